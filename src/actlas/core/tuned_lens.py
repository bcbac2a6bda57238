"""The tuned lens: one affine translator a layer, so that the logit lens reads early layers better.

    t_l(x) = x + A_l x + b_l            A_l, b_l = 0 at the start: the plain logit lens
    loss   = KL(final logits || unembed(final_norm(t_l(x)))), summed over layers

After Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens". The
translators are trained with Adam (the paper: SGD with Nesterov momentum) on a sample of positions of
each batch, all layers from one forward pass of the model. The KL on held-out text is reported beside
that of the plain logit lens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.calibration import massive_rows
from actlas.core.errors import FailureError, InputError, ShapeError, did_you_mean
from actlas.core.lens import Lens, check_finite
from actlas.core.logit_lens import LogitLens
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.progress import progress
from actlas.core.resampling import mean_interval

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace


@dataclass(kw_only=True, eq=False)
class TunedLens(Lens):
    """Affine translators for the logit lens.

    Attributes:
        sites: the sites, one for each translator.
        weight: float32 `[len(sites), d, d]`, the A of each.
        bias: float32 `[len(sites), d]`.
    """

    sites: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        n, d = len(self.sites), self.bias.shape[-1] if self.bias.ndim else 0
        if self.weight.shape != (n, d, d) or self.bias.shape != (n, d):
            raise ShapeError(
                f"a tuned lens of {n} sites needs weight [{n}, d, d] and bias [{n}, d], "
                f"not {list(self.weight.shape)} and {list(self.bias.shape)}"
            )
        check_finite("TunedLens", weight=self.weight, bias=self.bias)

    @property
    def channels(self) -> int:
        return self.bias.shape[1]

    def translate(self, x: Tensor, site: str) -> Tensor:
        """Return the activation as the last layer would hold it, `[..., d]`, of the dtype of `x`.

        Raises:
            InputError: the lens was not fitted for this site.
        """
        if site not in self.sites:
            raise InputError(f"the tuned lens has no translator for {site}{did_you_mean(site, self.sites)}")
        i = self.sites.index(site)
        wide = self.flat(x).to(self.weight.dtype)
        moved = wide + wide @ self.weight[i].to(x.device).T + self.bias[i].to(x.device)
        return moved.to(x.dtype)

    def on(self, model: Model) -> LogitLens:
        """Return the logit lens of a model with these translators.

        Raises:
            FingerprintError: the lens was fitted on another model.
        """
        if self.fingerprint is not None:
            self.fingerprint.check(model.fingerprint, "this tuned lens")
        return LogitLens(model=model, tuned=self)


@method(
    "tuned-lens",
    room="core",
    returns="Lens",
    data="corpus",
    summary="affine translators that let the logit lens read early layers, trained on a corpus",
    example="actlas fit tuned-lens smollm2 prose --site blocks.20.resid_post -o tuned/",
)
def fit_tuned_lens(
    model: Model,
    data: Iterable[Any],
    site: str | Sequence[str] = "blocks.*.resid_post",
    *,
    steps: int = 250,
    learning_rate: float = 1e-3,
    batch_tokens: int = 512,
    sample: int = 64,
    held_out: int = 8,
    seed: int = 0,
) -> TunedLens:
    """Train a tuned lens.

    Args:
        model: a language model; its weights do not change.
        data: a corpus that can be read more than once, or is long enough for all steps.
        site: residual-stream sites; the last block's `resid_post` needs no translator and is left out.
        steps: optimiser steps, one batch each.
        learning_rate: of Adam, decayed linearly to 0.
        batch_tokens: tokens of a forward pass.
        sample: positions of a batch on which the loss is computed. Most of the cost is the output head,
            `6 d_model vocabulary` operations for each position, site and step: about half a second a
            site and step for `smollm2` on two cores, so name the sites you need.
        held_out: first batches of the corpus that are kept for measuring.
        seed: of the sampled positions.

    Returns:
        The lens; `measurements` holds for each site the held-out KL, with the plain lens's as baseline.

    Raises:
        InputError: too little text, or a site that is not the residual stream.
        FailureError: the loss became NaN.
    """
    if steps < 1 or sample < 1 or held_out < 1:
        raise InputError(f"steps, sample and held_out must be at least 1, not {steps}, {sample}, {held_out}")
    plain = LogitLens(model=model)
    last = plain._last()
    resolved = [s for s in plain._sites(site) if s.name != last.name]
    if not resolved:
        raise InputError(f"{site!r} names only the last block, whose logit lens is exact; name earlier ones")
    names = [s.name for s in resolved]
    d = plain.channels
    weight = torch.zeros(len(names), d, d, device=model.device, requires_grad=True)
    bias = torch.zeros(len(names), d, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    read = [*resolved, last]
    stream = model.stream(data, read, batch_tokens=batch_tokens)
    test = [_sampled(t, read, sample, generator) for t in itertools.islice(stream, held_out)]
    scale = _scales(test, names)
    batches = itertools.islice(_endless(model, data, read, batch_tokens, held_out, stream), steps)
    frozen = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with progress("tuned lens", steps, "steps") as advance:
            for step, trace in enumerate(batches):
                rows = _sampled(trace, read, sample, generator).rows
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * (1 - step / steps)
                optimiser.zero_grad()
                total = 0.0
                target = _log_probabilities(model, rows[last.name])
                for i, name in enumerate(names):
                    x = rows[name].to(torch.float32)
                    moved = x + x @ weight[i].T + bias[i] * scale[i]
                    loss = _kl(target, _log_probabilities(model, moved)).mean()
                    torch.autograd.backward(loss)
                    total += float(loss.detach())
                if total != total:
                    raise FailureError(f"the tuned lens diverged at step {step}; use a lower learning_rate")
                optimiser.step()
                advance(note=f"KL {total / len(names):.3f} nats")
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    lens = TunedLens(
        site=last.name.replace(f"blocks.{(model.n_blocks or 1) - 1}.", "blocks.*."),
        fingerprint=model.fingerprint,
        sites=tuple(names),
        weight=weight.detach().cpu(),
        bias=(bias.detach() * scale).cpu(),
    )
    lens.measurements = tuple(_measure(model, lens, test, last.name, seed))
    return lens


def _endless(
    model: Model,
    data: Iterable[Any],
    sites: Sequence[Site],
    batch_tokens: int,
    skip: int,
    stream: Iterator[Trace],
) -> Iterator[Trace]:
    """Yield the rest of a stream, then the corpus again and again without its first `skip` batches."""
    while True:
        empty = True
        for trace in stream:
            empty = False
            yield trace
        if empty:
            raise InputError(
                f"the corpus has no text beyond the {skip} held-out batches of {batch_tokens} tokens; "
                "give more text, or a smaller held_out or batch_tokens"
            )
        stream = itertools.islice(model.stream(data, sites, batch_tokens=batch_tokens), skip, None)


@dataclass(frozen=True)
class _Sample:
    """Activations at some positions: `[n, d]` by site, and each position's document."""

    rows: dict[str, Tensor]
    documents: list[str]


def _sampled(trace: Trace, sites: Sequence[Site], sample: int, generator: torch.Generator) -> _Sample:
    """Return the activations at some positions, those left out at which any site is massive.

    A massive row is thousands of times larger than the others and would decide the gradients alone.
    """
    rows = {site.name: trace.rows(site.name) for site in sites}
    massive = torch.stack([massive_rows(x) for x in rows.values()]).any(0)
    ordinary = (~massive).nonzero().squeeze(1).cpu()
    chosen = ordinary[torch.randperm(len(ordinary), generator=generator)[:sample]]
    assert trace.mask is not None
    lengths = trace.mask.sum(1).tolist()
    documents = [d for d, n in zip(trace.documents, lengths, strict=True) for _ in range(n)]
    kept = {name: x[chosen.to(x.device)].detach().clone() for name, x in rows.items()}
    return _Sample(kept, [documents[i] for i in chosen.tolist()])


def _scales(test: Sequence[_Sample], names: Sequence[str]) -> Tensor:
    """Return the root mean square of each site's activations, `[sites, 1]`: the unit of its bias."""
    squares = [
        torch.cat([sample.rows[name] for sample in test]).to(torch.float32).square().mean() for name in names
    ]
    return torch.stack(squares).sqrt().clamp(min=1e-6).unsqueeze(1)


def _log_probabilities(model: Model, x: Tensor) -> Tensor:
    return model.unembed(x.to(model.dtype)).to(torch.float32).log_softmax(-1)


def _kl(target: Tensor, said: Tensor) -> Tensor:
    return (target.exp() * (target - said)).sum(-1)


@torch.no_grad()
def _measure(
    model: Model, lens: TunedLens, test: Sequence[_Sample], last: str, seed: int
) -> Iterator[Measurement]:
    """Yield for each site the held-out KL of the tuned lens, with the plain lens's as its baseline."""
    targets = [_log_probabilities(model, sample.rows[last]) for sample in test]
    documents = [d for sample in test for d in sample.documents]

    def report(what: str, site: str, found: list[Tensor], baseline: Measurement | None) -> Measurement:
        values = torch.cat(found).double().cpu().numpy()
        low, high = mean_interval(values, documents, seed)
        return Measurement(
            name=what,
            value=float(values.mean()),
            unit="nats/token",
            n=len(set(documents)),
            low=low,
            high=high,
            interval="bootstrap over documents",
            seed=seed,
            group={"site": site},
            better="lower",
            baseline=baseline,
            details={"positions": len(values)},
        )

    for name in lens.sites:
        plain, tuned = [], []
        for sample, target in zip(test, targets, strict=True):
            x = sample.rows[name]
            plain.append(_kl(target, _log_probabilities(model, x)))
            tuned.append(_kl(target, _log_probabilities(model, lens.translate(x, name))))
        baseline = report("logit lens KL", name, plain, None)
        yield report("tuned lens KL", name, tuned, baseline)
