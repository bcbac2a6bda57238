"""Layer voids: which layers a token hardly used, and what becomes of the model without them.

    void_trace(model, data, *, alpha=0.8, signal="norm", tokens=2048, max_new_tokens=0, ...) -> VoidTrace
    layer_usage(model, corpus, *, alpha=0.8, tokens=2048, ...) -> list[Measurement]
    profile_distance(trace, *, seed=0) -> Measurement            prompt against response

The rule and its edits are in `void_edits`, with the source. This is the descriptive half: profiles of layer
usage, and whether they differ between prompt and response. The causal half, what becomes of a model whose
void layers are skipped, is `void_quality`. Tokens with massive activations grow so much in one early layer
that everything after it counts as void; they are reported apart and left out of every average.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.measure.reading import read, token_rows
from actlas.measure.registry import measure
from actlas.measure.samples import mean_measurement
from actlas.measure.void_edits import (
    LAC,
    STATES,
    RandomSkip,
    Signal,
    VoidRule,
    increment,
    lac,
    random_skip,
    static_layer_skip,
)

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.trace import Trace

__all__ = [
    "LAC",
    "RandomSkip",
    "VoidRule",
    "VoidTrace",
    "lac",
    "layer_usage",
    "profile_distance",
    "random_skip",
    "static_layer_skip",
    "void_trace",
]

TokenPhase = Literal["prompt", "response"]


@dataclass
class VoidTrace:
    """Increments and activity of every layer for every token.

    Attributes:
        rule: what called a layer active.
        increments: `[tokens, layers]`, float32.
        active: `[tokens, layers]`.
        massive: whether the token is a massive activation somewhere, `[tokens]`.
        response: whether the token was generated, `[tokens]`.
        documents: which document or prompt each token is from, `[tokens]`; `names` has their ids.
    """

    rule: VoidRule
    increments: NDArray[np.float32]
    active: NDArray[np.bool_]
    massive: NDArray[np.bool_]
    response: NDArray[np.bool_]
    documents: NDArray[np.int64]
    names: list[str] = field(default_factory=list)

    def profile(self, phase: TokenPhase | None = None) -> NDArray[np.float64]:
        """Return the share of (not massive) tokens for which each layer is active, `[layers]`."""
        rows = self.active[self.select(phase)]
        return rows.mean(0) if len(rows) else np.full(self.active.shape[1], np.nan)

    def select(self, phase: TokenPhase | None = None, massive: bool = False) -> NDArray[np.bool_]:
        """Return which tokens belong to a phase, massive ones or the others."""
        chosen = self.massive == massive
        return chosen if phase is None else chosen & (self.response == (phase == "response"))

    @property
    def last_active(self) -> NDArray[np.int64]:
        """The last active layer of each token, counted from 1; 0 if there is none."""
        layers = self.active.shape[1]
        return np.where(self.active.any(1), layers - self.active[:, ::-1].argmax(1), 0)

    def usage(
        self, phase: TokenPhase | None = None, massive: bool = False, seed: int = 0
    ) -> list[Measurement]:
        """Return the share of active layers, over all layers and for each, with intervals over documents."""
        chosen = self.select(phase, massive)
        labels = {"phase": phase or "all"} | ({"tokens": "massive"} if massive else {})
        note = f"alpha {self.rule.alpha:g}, signal {self.rule.signal}, {int(chosen.sum()):,} tokens"
        note += "" if massive else f"; {int(self.massive.sum()):,} massive tokens apart"
        active, documents = self.active[chosen], self.documents[chosen]
        weights = np.bincount(documents, minlength=len(self.names)).astype(float)
        held = weights > 0
        out = []
        columns = [("all", active.mean(1) if len(active) else np.zeros(0))]
        columns += [(str(i), active[:, i]) for i in range(active.shape[1])]
        for layer, values in columns:
            sums = np.bincount(documents, weights=values, minlength=len(self.names))
            out.append(
                mean_measurement(
                    "layer-usage",
                    "fraction",
                    sums[held] / weights[held],
                    weights[held],
                    seed=seed,
                    group={**labels, "layer": layer},
                    note=note,
                )
            )
        return out


def void_trace(
    model: Model,
    data: Iterable[Any],
    *,
    alpha: float = 0.8,
    signal: Signal = "norm",
    tokens: int | None = 2048,
    context: int = 256,
    per_document: int | None = 128,
    max_new_tokens: int = 0,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 0,
) -> VoidTrace:
    """Judge every layer for every token of a corpus, or of prompts and the answers to them.

    Args:
        model: a model with residual sites; installed edits apply.
        data: documents or strings; prompts, if `max_new_tokens` is given.
        alpha, signal: the rule.
        tokens, context, per_document: how much of a corpus is read (ignored for prompts).
        max_new_tokens: generate so many tokens after each prompt; they are the response phase.
        temperature, top_p, seed: of the generation; the paper's values.

    Raises:
        InputError: no tokens.
        NonFiniteError: NaN or infinity in the residual stream.
    """
    rule = VoidRule(alpha, signal)
    traces: Iterator[tuple[Trace, Tensor | None]]
    if max_new_tokens:
        prompts = [d if isinstance(d, str) else getattr(d, "prompt", None) or d.text for d in data]
        traces = _answered(model, prompts, max_new_tokens, temperature, top_p, seed)
    else:
        found = read(model, data, STATES, tokens=tokens, context=context, per_document=per_document)
        traces = ((trace, None) for trace in found)
    names: dict[str, int] = {}
    increments, massive, response, documents = [], [], [], []
    for trace, generated in traces:
        here, index = token_rows(trace)
        ids = [names.setdefault(name, len(names)) for name in here]
        documents.append(np.array(ids)[index])
        response.append(
            np.zeros(len(index), bool) if generated is None else generated[trace.mask].cpu().numpy()
        )
        d, m = _increments(model, trace, signal)
        increments.append(d.float().cpu())
        massive.append(m.cpu().numpy())
    if not increments:
        raise InputError("no tokens to judge: give at least one document")
    table = torch.cat(increments)
    if not bool(torch.isfinite(table).all()):
        layer = int((~torch.isfinite(table)).any(0).nonzero()[0])
        raise NonFiniteError(
            f"block {layer} of {model.name} writes NaN or infinity; check the weights, or load it in float32"
        )
    return VoidTrace(
        rule,
        table.numpy(),
        rule.active(table).numpy(),
        np.concatenate(massive),
        np.concatenate(response),
        np.concatenate(documents),
        list(names),
    )


def _increments(model: Model, trace: Trace, signal: Signal) -> tuple[Tensor, Tensor]:
    columns, massive = [], None
    prefix = _prefix(model)
    for i in range(model.n_blocks or 0):
        before = trace.rows(f"{prefix}blocks.{i}.resid_pre")
        after = trace.rows(f"{prefix}blocks.{i}.resid_post")
        columns.append(increment(before, after, signal))
        found = massive_rows(after)
        massive = found if massive is None else massive | found
    if massive is None:
        raise ModelError(f"{model.name} has no residual sites to judge layers by")
    return torch.stack(columns, -1), massive


def _prefix(model: Model) -> str:
    return f"{model.tower.name}." if model.tower is not None and model.tower.name else ""


def _answered(
    model: Model, prompts: Sequence[str], new: int, temperature: float, top_p: float, seed: int
) -> Iterator[tuple[Trace, Tensor | None]]:
    """Yield, eight prompts at a time, a trace of prompts and answers, and which tokens were generated."""
    for start in range(0, len(prompts), 8):
        batch = list(prompts[start : start + 8])
        encoded = model.encode(batch, padding_side="left")
        made = model.generate(
            batch, max_new_tokens=new, temperature=temperature, top_p=top_p, seed=seed + start
        )
        columns = encoded["input_ids"].shape[1]
        generated = torch.zeros_like(made.sequences, dtype=torch.bool)
        for i, ids in enumerate(made.tokens):
            generated[i, columns : columns + len(ids)] = True
        mask = generated.clone()
        mask[:, :columns] = encoded["attention_mask"].bool()
        whole = model.encode(
            {"input_ids": made.sequences, "attention_mask": mask.long()}, padding_side="left"
        )
        trace = model.trace(whole, STATES)
        trace.documents = [str(start + i) for i in range(len(batch))]
        yield trace, generated


@measure(
    "layer-usage",
    summary="share of layers that are active for a token (L2 adaptive computation)",
    unit="fraction",
    needs=("causal-lm", "encoder"),
    quick={"tokens": 1024},
    source="Shemiranifar 2025, Void in Language Models, section 3",
)
def layer_usage(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    alpha: float = 0.8,
    signal: Signal = "norm",
    tokens: int = 4096,
    context: int = 256,
    per_document: int | None = 128,
) -> list[Measurement]:
    """Measure layer usage on text: the mean, each layer, and massive tokens apart.

    Args:
        model, corpus, alpha, signal, tokens, context, per_document: as in `void_trace`.
        seed: of the bootstrap.
    """
    trace = void_trace(
        model, corpus, alpha=alpha, signal=signal, tokens=tokens, context=context, per_document=per_document
    )
    out = trace.usage(seed=seed)
    if trace.massive.any():
        out.append(trace.usage(massive=True, seed=seed)[0])
    return out


def profile_distance(trace: VoidTrace, *, seed: int = 0, resamples: int = 200) -> Measurement:
    """Return how far the usage profiles of prompt and response lie apart, beside two halves of the prompts.

    The distance is the mean absolute difference of the two profiles over layers. The baseline is the same
    distance between prompt profiles of two random halves of the prompts; the interval is a bootstrap over
    prompts.

    Raises:
        InputError: a phase without tokens, or fewer than two prompts.
    """
    sums = {}
    for phase in ("prompt", "response"):
        chosen = trace.select(phase)
        if not chosen.any():
            raise InputError(f"the trace has no {phase} tokens; make it with max_new_tokens")
        table = np.zeros((len(trace.names), trace.active.shape[1]))
        np.add.at(table, trace.documents[chosen], trace.active[chosen])
        sums[phase] = (table, np.bincount(trace.documents[chosen], minlength=len(trace.names)).astype(float))
    n = len(trace.names)
    if n < 2:
        raise InputError("two halves need at least two prompts")
    generator = np.random.default_rng(seed)

    def profile(phase: str, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        table, counts = sums[phase]
        return (weights @ table) / max(float(weights @ counts), 1e-12)

    def distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.abs(a - b).mean())

    ones = np.ones(n)
    value = distance(profile("prompt", ones), profile("response", ones))
    draws, halves = [], []
    for _ in range(resamples):
        w = generator.multinomial(n, ones / n).astype(float)
        draws.append(distance(profile("prompt", w), profile("response", w)))
        half = np.zeros(n)
        half[generator.permutation(n)[: n // 2]] = 1
        halves.append(distance(profile("prompt", half), profile("prompt", 1 - half)))
    low, high = np.quantile(halves, [0.025, 0.975])
    base = Measurement(
        "profile-distance", float(np.mean(halves)), "fraction of tokens", n, float(low), float(high),
        "random halves of the prompts", seed, note="two halves of the prompts",
    )  # fmt: skip
    low, high = np.quantile(draws, [0.025, 0.975])
    return Measurement(
        "profile-distance", value, "fraction of tokens", n, float(low), float(high),
        "bootstrap over prompts", seed, baseline=base,
        details={
            "prompt": profile("prompt", ones).tolist(),
            "response": profile("response", ones).tolist(),
            "share_of_halves_below": float(np.mean(np.array(halves) < value)),
        },
    )  # fmt: skip
