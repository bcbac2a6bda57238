"""How well a language model predicts different kinds of text, per byte and per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.measurement import Better, Measurement
from actlas.report.content import DataUse, SectionResult, Tile
from actlas.report.evaluation import Evaluation, changes, evaluate
from actlas.report.plots import Row, dots
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from actlas.data import Corpus
    from actlas.measure.likelihood import Losses

PIECE = 64
"""Tokens read of one document in the quick card: many documents give an interval, few do not."""
ABOUT = {
    "prose": "English prose",
    "code": "Python source code",
    "docs": "technical documentation",
}


@dataclass(frozen=True)
class Read:
    """One pass over the corpus, as evaluations of three quantities."""

    loss: Evaluation
    perplexity: list[Measurement]
    accuracy: Evaluation


@section("text", title="Results by kind of text", order=35, needs=("causal-lm",), cost=2.3)
def text(context: Context) -> SectionResult:
    """Read documents of each kind once; loss per byte compares models with different tokenizers."""
    from actlas.data import corpus

    budget = context.budget
    piece = PIECE if budget.quick else 512
    used = corpus("mixed", seed=context.seed).take(max(6, budget.text_tokens // piece))
    notes = context.notes_on(used)
    after = _read(context, used, piece)
    kinds = sorted({m.group["domain"] for m in after.loss.cells})
    measurements = [
        *after.loss.measurements,
        *after.perplexity,
        after.accuracy.overall,
        *after.accuracy.cells,
    ]
    rows = [Row.of(m, ABOUT.get(m.group["domain"], m.group["domain"])) for m in after.loss.cells]
    rows.append(Row.of(after.loss.overall, "all"))
    unit = after.loss.overall.unit
    named = " and ".join(sorted(ABOUT.get(k, k) for k in kinds))
    figures = [
        dots(
            "Loss by kind of text",
            f"How many {unit.replace('/', ' a ')} the model needs, with 95% intervals over documents; "
            "less is better.",
            rows,
            axis=unit,
        ),
        dots(
            "First guesses by kind of text",
            "Share of tokens that were the model's first guess, with 95% intervals over documents.",
            [Row.of(m, ABOUT.get(m.group["domain"], m.group["domain"])) for m in after.accuracy.cells]
            + [Row.of(after.accuracy.overall, "all")],
            axis="next-token accuracy",
            percent=True,
        ),
    ]
    intro = (
        f"The model reads {len(used)} documents ({named}), at most {piece} tokens from the start of "
        "each, so it has "
        "little context; perplexities from longer contexts are lower. " + after.loss.gap_line()
    )
    if context.edits:
        with context.model.without_edits():
            before = _read(context, used, piece)
        changed = changes(before.loss, after.loss, seed=context.seed)
        measurements += changed
        figures.append(
            dots(
                "What the edits change",
                "Loss with the edits minus loss without, on the same documents, with paired 95% intervals.",
                [Row.of(m, m.group.get("domain", "all"), reference=0.0) for m in changed],
                axis=f"change, {unit}",
                reference="no change",
            )
        )
    overall = after.loss.overall
    tile = Tile("Loss per byte" if "byte" in unit else "Loss per token", overall, rank=20)
    data = DataUse(used.name, len(used), "documents", used.hash, used.source)
    return SectionResult(intro, measurements, figures, (), notes, [tile], [data])


def _read(context: Context, used: Corpus, piece: int) -> Read:
    from actlas.measure.likelihood import nll

    losses = nll(context.model, used, tokens=None, context=512, per_document=piece)
    under = tuple(e.describe() for e in context.model.installed)
    loss, unit, weights = _per_byte(losses)
    documents = [_Item(dict(g)) for g in losses.groups]

    def by_domain(values: Any, weights: Any, name: str, unit: str, better: Better) -> Evaluation:
        return evaluate(
            values,
            documents,
            "mean",
            ["domain"],
            1,
            weights=list(weights),
            name=name,
            unit=unit,
            better=better,
            seed=context.seed,
            minimum=1,
        )

    tokens = losses.tokens
    what = "loss-per-byte" if "byte" in unit else "loss-per-token"
    by_loss = by_domain(loss, weights, what, unit, "lower")
    hits = by_domain(losses.hits / tokens, tokens, "next-token-accuracy", "fraction", "higher")
    nats = by_domain(losses.nll / tokens, tokens, "loss-per-token", "nats/token", "lower")
    perplexities = [_perplexity(m, losses.context) for m in (nats.overall, *nats.cells)]
    return Read(_under(by_loss, under), [replace(p, under=under) for p in perplexities], _under(hits, under))


@dataclass(frozen=True)
class _Item:
    group: dict[str, str]


def _per_byte(losses: Losses) -> tuple[Any, str, Any]:
    """Bits a byte; nats a token where the tokenizer does not say which characters a token stands for."""
    if not np.isfinite(losses.bytes).all() or (losses.bytes <= 0).any():
        return losses.nll / losses.tokens, "nats/token", losses.tokens
    return losses.nll / np.log(2) / losses.bytes, "bits/byte", losses.bytes


def _perplexity(m: Measurement, context: int) -> Measurement:
    """The exponential of a mean loss and of its interval."""
    return replace(
        m,
        name="perplexity",
        value=float(np.exp(m.value)),
        low=None if m.low is None else float(np.exp(m.low)),
        high=None if m.high is None else float(np.exp(m.high)),
        unit="perplexity",
        details={"context": context, "transform": "exp"},
    )


def _under(result: Evaluation, under: tuple[str, ...]) -> Evaluation:
    def mark(m: Measurement) -> Measurement:
        return replace(m, under=under)

    return replace(
        result,
        overall=mark(result.overall),
        cells=tuple(map(mark, result.cells)),
        gaps=tuple(map(mark, result.gaps)),
    )
