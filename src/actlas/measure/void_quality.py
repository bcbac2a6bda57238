"""What becomes of a model whose void layers are read around, truly skipped, or skipped at random.

    void_perplexity(model, corpus, *, alphas=(0.1, 0.5, 0.8), modes=MODES, tokens=4096) -> list[Measurement]
    count_usage(model, rule=None) -> counts of active layers, while a block runs

"Void layers are not needed" is a causal claim, so it gets its control: true skipping beside as many layers
skipped at random. The released variant only moves the readout; its low layer usage is no saving, and both
are shown (see `void_edits` for the rule, the modes and the source).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.installation import EditHadNoEffect, PassWatcher
from actlas.core.measurement import Measurement
from actlas.measure.likelihood import nll
from actlas.measure.paired import perplexity_ratio
from actlas.measure.registry import measure
from actlas.measure.void_edits import STATES, Signal, VoidRule, increment, lac, random_skip

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

MODES = ("readout", "skip", "random")


@dataclass
class _Usage:
    """Counts of tokens, active layers and last active layers, kept while passes run."""

    tokens: int = 0
    active: float = 0.0
    last: float = 0.0


@contextmanager
def count_usage(model: Model, rule: VoidRule | None = None) -> Iterator[_Usage]:
    """Count layer usage of the passes in the block, real tokens only.

    Args:
        model: the model; enter after `model.edit(...)`.
        rule: count what it calls active on the running chain; `None` counts layers whose output differs
            from their input (what an edit skipped does not).
    """
    found, watcher, handles = _Usage(), PassWatcher(model), []
    held: dict[str, Any] = {}
    last = (model.n_blocks or 1) - 1

    def reader(site: Site) -> Any:
        def observe(x: Tensor) -> Tensor:
            if site.kind == "resid_pre":
                held["before"] = x
                if site.block == 0:
                    held.update(seen=None, used=0.0, last=0.0)
                return x
            before, block = held["before"], site.block or 0
            if rule is None:
                active = (x != before).any(-1)
            else:
                active, held["seen"] = rule.judge(increment(before, x, rule.signal), held["seen"])
            held["used"] = held["used"] + active.double()
            held["last"] = torch.where(active, float(block + 1), held["last"])
            if block == last:
                run = watcher.of(site)
                real = run.real(x.device)
                found.tokens += int(real.sum())
                found.active += float(held["used"][real].sum())
                found.last += float(held["last"][real].sum())
                held.clear()
            return x

        return observe

    watcher.start()
    try:
        for site in model.resolve(STATES):
            handles.append(attach(model.module, site, reader(site)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
        watcher.stop()


@measure(
    "void-perplexity",
    summary="perplexity when void layers are read around, truly skipped, or as many skipped at random",
    unit="ratio",
    needs=("causal-lm",),
    quick={"tokens": 512, "alphas": (0.8,)},
    source="Shemiranifar 2025, Void in Language Models",
)
def void_perplexity(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    alphas: Sequence[float] = (0.1, 0.5, 0.8),
    modes: Sequence[str] = MODES,
    signal: Signal = "norm",
    tokens: int = 4096,
    context: int = 512,
    per_document: int | None = None,
    skip_first: int = 0,
) -> list[Measurement]:
    """Measure the perplexity ratio of layer-adaptive computation in several modes, to the dense model.

    Args:
        model: a causal language model.
        corpus: documents or strings.
        seed: of the random skips and the bootstrap.
        alphas, signal: the rule.
        modes: of `"readout"` (as released), `"skip"` (true skipping) and `"random"` (as many layers as
            true skipping left, chosen at random; its usage is measured, not assumed).
        tokens, context, per_document: see `likelihood.nll`.
        skip_first: first tokens of each window that are left alone in every mode. The first token is the
            attention sink of many models, and skipping its layers takes the sink away from all others.

    Returns:
        `void-perplexity` for each alpha and mode, with `usage` (share of layers that were active) and
        `last_active` (mean last active layer) in `details`. Readout's usage is what the rule called
        active; no layer was skipped.

    Raises:
        InputError: an unknown mode.
    """
    unknown = [m for m in modes if m not in MODES]
    if unknown:
        raise InputError(f"unknown mode {unknown[0]!r}: one of {', '.join(MODES)}")
    corpus, layers = list(corpus), model.n_blocks or 1
    options: dict[str, Any] = {"tokens": tokens, "context": context, "per_document": per_document}
    base = nll(model, corpus, **options)
    out = []
    for alpha in alphas:
        rule, kept = VoidRule(alpha, signal), float("nan")
        for mode in [m for m in MODES if m in modes or (m == "skip" and "random" in modes)]:
            edit = _edit(mode, alpha, signal, kept, seed)
            edit = edit.at(positions=range(skip_first, context)) if skip_first else edit
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EditHadNoEffect)
                with model.edit(edit), count_usage(model, rule if mode == "readout" else None) as usage:
                    losses = nll(model, corpus, **options)
            if mode == "skip":
                kept = usage.active / usage.tokens
            if mode in modes:
                out.append(
                    perplexity_ratio(
                        base,
                        losses,
                        name="void-perplexity",
                        seed=seed,
                        group={"alpha": f"{alpha:g}", "mode": mode},
                        note=_note(mode, skip_first),
                        details={
                            "usage": usage.active / usage.tokens / layers,
                            "last_active": usage.last / usage.tokens,
                            "layers": layers,
                            "signal": signal,
                        },
                    )
                )
    return out


def _note(mode: str, skip_first: int) -> str:
    said = ["no layer is skipped"] if mode == "readout" else []
    return ", ".join([*said, f"first {skip_first} tokens left alone"] if skip_first else said)


def _edit(mode: str, alpha: float, signal: Signal, kept: float, seed: int) -> Edit:
    if mode == "random":
        return random_skip(kept, seed=seed)
    return lac(alpha, "readout" if mode == "readout" else "skip", signal=signal)
