"""Attribution patching: estimate the effect of every patch from one gradient.

    m(patched) ~ m(run) + (a' - a) . dm/da          a: the activation in the run, a': what is written

One pass over the prompts that are patched, one over the others and one backward pass give an estimate for
every part of the model at once, where exact patching runs the model once for each. The estimate is linear:
it misses what saturates (attention patterns above all), and it says nothing about two patches together.
The integrated form replaces the gradient at the run by its mean over `steps` runs whose embeddings lie
between those of the two prompts; it costs two passes a step. `effects.agreement` compares with `patch`.

The shared prefix of the two prompts is run once; everything else, the gradient included, only runs from the
first token in which they differ.

Source: Nanda 2023 ("Attribution patching"); Syed et al. 2023 (arXiv 2310.10348); integrated gradients over
inputs: Hanna et al. 2024 (arXiv 2403.17806), section 3; Sundararajan et al. 2017 (arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.effects import Effects, Part, check_difference
from actlas.circuits.metrics import Metric, MetricFunction
from actlas.circuits.nodes import Node, Position
from actlas.circuits.patching import as_nodes, as_parts, say_inert, sites_of
from actlas.circuits.prefix import KeysValues, last_columns, only_columns, padded
from actlas.circuits.sources import Mode, Source, at, check_mode
from actlas.core.errors import InputError
from actlas.core.hooks import attach

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.dictionary import Dictionary
    from actlas.core.model import Model
    from actlas.core.sites import Site


def attribute(
    model: Model,
    pairs: PromptPairs,
    over: str | Sequence[Part] = "components",
    *,
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    steps: int = 0,
    layers: Sequence[int] | None = None,
    positions: Position | Sequence[Position] | None = None,
    lens: Dictionary | None = None,
    seed: int = 0,
) -> Effects:
    """Estimate the effects of patching parts of a model.

    Args:
        model, pairs, over, mode, metric, layers, positions, lens, seed: as for `patch`; the estimate for a
            tuple of nodes is the sum of theirs.
        steps: 0 for the gradient at the run that is patched, else the number of runs between the two
            prompts over which it is averaged (integrated gradients; 5 are usual).

    Raises:
        InputError: nothing to patch, a metric that does not tell clean from corrupted prompts, a metric
            without a gradient at the run, or steps in a mode that has no second prompt.
        SiteError: a place that this model has not got.
    """
    check_mode(mode)
    paired = mode in ("denoise", "noise")
    if steps < 0 or (steps and not paired):
        raise InputError(
            f"steps={steps}: integrated gradients lie between two prompts; use mode denoise or noise"
        )
    if metric == "kl" and mode != "denoise" and not steps:
        raise InputError(
            f"the divergence from the clean run has no gradient at the clean run, where mode {mode!r} starts;"
            " use steps=5, mode 'denoise' or another metric"
        )
    parts = as_parts(model, pairs, over, layers=layers, positions=positions, lens=lens)
    passes = _Passes(model, pairs, mode, list(sites_of(model, parts).values()), parts)
    other = passes.read(passes.second) if paired else None
    other_logits = other.logits if other is not None else pairs.last_logits(model, passes.second)
    if steps:
        assert other is not None
        run = passes.read(passes.patched)
        judge = Metric.of(metric, pairs, other_logits if mode == "denoise" else run.logits)
        m_run, base = judge.whole(run.logits), run.values
        grads: dict[str, Tensor] = {}
        for k in range(steps):
            between = run.embedding + (k + 0.5) / steps * (other.embedding - run.embedding)
            found, _, _ = passes.gradient(judge, between)
            grads = {name: grads.get(name, 0) + g / steps for name, g in found.items()}
    else:
        judge = Metric.of(metric, pairs, other_logits)
        grads, base, m_run = passes.gradient(judge)
    m_other = judge.whole(other_logits)
    clean, corrupt = (m_other, m_run) if mode == "denoise" else (m_run, m_other)
    check_difference(clean, corrupt, judge.name)
    source = Source(pairs, mode, base, other.values if other is not None else {}, seed=seed)
    estimates = _estimates(parts, source, pairs, grads, lens)
    inert = (estimates == 0).all(1)
    method = f"integrated gradients ({steps} steps)" if steps else "attribution"
    return Effects(
        tuple(parts), (m_run + estimates).double().cpu(), clean.double().cpu(), corrupt.double().cpu(), mode,
        judge.name, judge.unit, method, model.name, pairs.task, inert.cpu(), seed, say_inert(inert, pairs),
    )  # fmt: skip


@dataclass(frozen=True)
class _Read:
    """One run: activations `[n, pos, ...]` by site, the embedding of the columns run, the last logits."""

    values: dict[str, Tensor]
    embedding: Tensor
    logits: Tensor


class _Passes:
    """The passes of an estimate, each from the first column in which anything is written."""

    def __init__(
        self, model: Model, pairs: PromptPairs, mode: Mode, sites: list[Site], parts: Sequence[Part]
    ) -> None:
        self.model, self.pairs, self.sites = model, pairs, sites
        self.patched, self.second = ("corrupt", "clean") if mode == "denoise" else ("clean", "corrupt")
        mask = Source(pairs, mode, {}, {}).mask
        positions = {n.position for p in parts for n in as_nodes(p)}
        where = torch.stack([at(pairs, p) & mask for p in positions]).any(0).any(0)
        first = int(where.to(torch.int8).argmax()) if bool(where.any()) else pairs.width - 1
        self.kept = KeysValues.run(model, getattr(pairs, self.patched), first)
        # Gradients are needed from the first column that is written; reading starts where the prompts differ.
        self.start = first if self.kept is not None else 0
        self.shared = min(self.start, int(pairs.changed.min()))
        self.embed = model.resolve(
            f"{model.tower.name}.embed" if model.tower and model.tower.name else "embed"
        )[0]

    def read(self, side: str) -> _Read:
        """Run one side's prompts."""
        trace = self.model.trace(self._arguments(side, self.shared), [self.embed, *self.sites], stop=False)
        values = {s.name: padded(trace[s.name], self.pairs.width) for s in self.sites}
        return _Read(values, trace[self.embed.name], trace.logits[:, -1].float())

    def gradient(
        self, judge: Metric, embedding: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Run the patched side's prompts, from another embedding if one is given.

        Returns:
            Gradients of the metric and activations, `[n, pos, ...]` by site, and the metric `[n]`.
        """
        model, rows = self.model, torch.arange(len(self.pairs), device=self.pairs.answer_ids.device)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # the caller may have switched gradients off
            if embedding is not None:
                stack.callback(attach(model.module, self.embed, lambda x: embedding.to(x)).remove)
            narrow = stack.enter_context(only_columns(model, judge.columns))
            start = self.start if embedding is None else self.shared
            trace = model.trace(self._arguments(self.patched, start), self.sites, grad=True, stop=False)
            logits = trace.logits[:, -1].float()
            if judge.columns is not None and not narrow:
                logits = logits.gather(1, judge.columns)
            metric = judge.function(logits, rows)
            grads, width = trace.gradients(metric.sum()), self.pairs.width
        values = {s.name: padded(trace[s.name].detach(), width) for s in self.sites}
        return {name: padded(g, width) for name, g in grads.items()}, values, metric.detach()

    def _arguments(self, side: str, start: int) -> dict[str, Any]:
        encoded = getattr(self.pairs, side)
        if self.kept is None:
            return last_columns(self.model, encoded, None, start)
        return self.kept.arguments(self.model, encoded, None, start)


def _estimates(
    parts: Sequence[Part],
    source: Source,
    pairs: PromptPairs,
    grads: dict[str, Tensor],
    lens: Dictionary | None,
) -> Tensor:
    """Return the linear estimate of the metric's change under each patch, `[parts, n]`."""
    sums: dict[tuple[str, Position, str], Tensor] = {}

    def of(node: Node) -> Tensor:
        name = node.site.split("[")[0]
        what = "feature" if node.feature is not None else "whole" if node.index is None else "indexed"
        key = (name, node.position, what)
        if key not in sums:
            sums[key] = _site_sums(
                name, what, (at(pairs, node.position) & source.mask), source, grads[name], lens
            )
        index = node.feature if node.feature is not None else node.index
        return sums[key] if index is None else sums[key][:, index]

    return torch.stack([sum((of(n) for n in as_nodes(p)), torch.zeros(())) for p in parts])


def _site_sums(
    name: str, what: str, mask: Tensor, source: Source, grad: Tensor, lens: Dictionary | None
) -> Tensor:
    """Return `(a' - a) . dm/da` over the masked columns: `[n]`, or `[n, heads or channels or features]`."""
    if what == "feature":
        if lens is None:
            raise InputError(f"a node names a feature at {name}, but no dictionary was given (lens)")
        now, new = source.codes(lens, name)
        product = (new - now) * (lens.flat(grad) @ lens.atoms.to(grad).T)
    else:
        product = (source.values(name) - source.base[name]) * grad
    product = product * mask.reshape(*mask.shape, *([1] * (product.ndim - 2)))
    if what == "whole":
        return product.flatten(1).sum(1)
    return product.sum((1, 3)) if product.ndim == 4 else product.sum(1)
