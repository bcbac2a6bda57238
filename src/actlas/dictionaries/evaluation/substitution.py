"""What the model loses when the reconstruction takes the activation's place: SAEBench's ce_loss_score.

With H the mean next-token cross-entropy, over the same tokens:

    ce_loss_score = (H_ablated - H_sae) / (H_ablated - H_original)       "loss recovered"
    kl_div_score  = (KL_ablated - KL_sae) / KL_ablated,   KL = mean KL(original || edited)

1 is a perfect substitution, 0 no better than the ablation, and the score depends on which ablation it
was. SAEBench sets the activation of every token to zero (`ablation=zero`), the massive first token too,
which no model survives: scores come out near 1. `ablation=mean` puts the mean of the data in the place
of those tokens that the dictionary replaces, which is harder to beat. Both are given.

The prefix of the model runs once for all variants; each variant re-runs only what follows the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.core.splitting import split_at
from actlas.measure.likelihood import _batches, _pad, _times, select
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.measure.likelihood import Window

Array = NDArray[np.float64]
ORIGINAL = "original"
_CHUNK = 40  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class VariantLosses:
    """Sums over each document, by variant; arrays `[documents]`.

    Attributes:
        tokens: scored tokens.
        nll: negative log-likelihood in nats, with `"original"` among the variants.
        divergence: KL(original || variant) in nats.
    """

    tokens: Array
    nll: Mapping[str, Array]
    divergence: Mapping[str, Array]

    def loss(self, variant: str) -> float:
        """Return the mean cross-entropy of a variant, nats a token."""
        return float(self.nll[variant].sum() / self.tokens.sum())


def variant_losses(
    model: Model,
    corpus: Iterable[Any],
    site: str,
    variants: Mapping[str, Edit],
    *,
    tokens: int,
    context: int = 256,
    per_document: int | None = None,
) -> VariantLosses:
    """Score text under several edits of one site, running the model up to the site only once.

    Args:
        model: a causal language model.
        corpus: documents or strings.
        site: what all edits are at.
        variants: name to edit.
        tokens, context, per_document: as of `actlas.measure.likelihood.nll`.

    Raises:
        InputError, ModelError: see `likelihood.select`; a variant called "original".
        NonFiniteError: NaN or infinity in the logits.
    """
    if ORIGINAL in variants:
        raise InputError(f"a variant is called {ORIGINAL!r}, which is the unedited model; rename it")
    chosen = select(model, corpus, tokens=tokens, context=context, per_document=per_document)
    n = len(chosen.ids)
    nll = {name: np.zeros(n) for name in (ORIGINAL, *variants)}
    divergence = {name: np.zeros(n) for name in variants}
    count = np.zeros(n)
    head, tail = split_at(model, site)
    planned = sum(len(w.ids) for w in chosen.windows) * (1 + len(variants))
    with progress("substitution", total=planned, unit="tokens") as advance, torch.no_grad():
        for batch in _batches(model, chosen.windows):
            windows = [chosen.windows[i] for i in batch]
            size = sum(len(w.ids) for w in windows)
            state = head(_pad(model, windows))
            base = _logits(model, tail(state))
            for window, loss in zip(windows, _losses(base, windows, model, ORIGINAL), strict=True):
                nll[ORIGINAL][window.document] += loss
                count[window.document] += window.stop - window.scored
            advance(size)
            for name, edit in variants.items():
                with model.edit(edit):
                    logits = _logits(model, tail(state))
                losses = _losses(logits, windows, model, name)
                for row, (window, loss) in enumerate(zip(windows, losses, strict=True)):
                    nll[name][window.document] += loss
                    divergence[name][window.document] += _divergence(base[row], logits[row], window)
                advance(size)
    return VariantLosses(count, nll, divergence)


def substitution_measurements(
    losses: VariantLosses,
    variant: str,
    ablations: Sequence[str] = ("zero", "mean"),
    *,
    seed: int = 0,
    group: Mapping[str, str] | None = None,
) -> list[Measurement]:
    """Return SAEBench's model-behaviour metrics of one variant.

    Args:
        losses: with the variant and the ablations among its variants (`"zero ablation"`, ...).
        variant: the substitution.
        ablations: which to compare with.
        seed: of the bootstrap.
        group: labels.
    """
    group = dict(group or {})
    w = losses.tokens
    nats = "nats/token"

    def mean(name: str, sums: Array, **more: str) -> Measurement:
        return mean_measurement(name, nats, sums / w, w, seed=seed, better="lower", group=group | more)

    out = [
        mean("ce_loss_without_sae", losses.nll[ORIGINAL]),
        mean("ce_loss_with_sae", losses.nll[variant]),
        mean("kl_div_with_sae", losses.divergence[variant]),
    ]
    for ablation in ablations:
        name = f"{ablation} ablation"
        out += [
            mean("ce_loss_with_ablation", losses.nll[name], ablation=ablation),
            mean("kl_div_with_ablation", losses.divergence[name], ablation=ablation),
            score(
                "ce_loss_score",
                losses.nll[name] - losses.nll[variant],
                losses.nll[name] - losses.nll[ORIGINAL],
                seed,
                group | {"ablation": ablation},
            ),
            score(
                "kl_div_score",
                losses.divergence[name] - losses.divergence[variant],
                losses.divergence[name],
                seed,
                group | {"ablation": ablation},
            ),
        ]
    return out


def score(name: str, top: Array, bottom: Array, seed: int, group: Mapping[str, str]) -> Measurement:
    """Return the ratio of two sums over documents; missing where there is nothing to recover."""
    if bottom.sum() <= 1e-9 * max(1.0, float(np.abs(top).sum())):
        return missing(
            name, "fraction", "the ablation does not raise the loss: nothing to recover", group=group
        )
    values = np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)
    return mean_measurement(name, "fraction", values, bottom, seed=seed, better="higher", group=group)


def _logits(model: Model, output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ModelError(f"{model.name} gives no logits of shape [batch, pos, vocab]")
    return logits


def _span(window: Window) -> tuple[int, int]:
    """Return the first and the end of the places in the window that predict a scored token."""
    stop = len(window.ids) - 1
    return stop - (window.stop - window.scored), stop


def _losses(logits: Tensor, windows: Sequence[Window], model: Model, variant: str) -> list[float]:
    out = []
    for row, window in enumerate(windows):
        start, stop = _span(window)
        target = torch.tensor(window.ids[start + 1 : stop + 1], device=logits.device)
        total = 0.0
        for i in range(start, stop, _CHUNK):
            z = logits[row, i : min(i + _CHUNK, stop)].float()
            x = target[i - start : i - start + len(z)]
            total += float((z.logsumexp(-1) - z.gather(-1, x[:, None])[:, 0]).double().sum())
        if not np.isfinite(total):
            raise NonFiniteError(f"the logits of {model.name} hold NaN or infinity under {variant!r}")
        out.append(total)
    return out


def _divergence(base: Tensor, edited: Tensor, window: Window) -> float:
    start, stop = _span(window)
    total = 0.0
    for i in range(start, stop, _CHUNK):
        at = slice(i, min(i + _CHUNK, stop))
        log_b, log_p = base[at].float().log_softmax(-1), edited[at].float().log_softmax(-1)
        total += float(_times(log_b.exp(), log_b - log_p).sum())
    return total
