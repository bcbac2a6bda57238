"""A race of mixes against the original, as many at a time as memory is meant for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from actlas.core.progress import progress
from actlas.models.fast_generate import lean_weights
from actlas.report.shrink.rows import ORIGINAL, Mix
from actlas.report.shrink.speed import Speed, in_lean_loop, in_transformers, interleave, prompts

if TYPE_CHECKING:
    from actlas.core.model import Model

MEMORY = 3 * 2**30
"""Bytes that the loops of one race hold beside the model; more mixes than fit run in races of their own."""


def race(
    model: Model, mixes: Sequence[Mix], documents: Sequence[Any], *, written: int, repeats: int, what: str
) -> dict[str, Speed]:
    """Return the speed of every mix, and of the original under `ORIGINAL`.

    Args:
        model: the model without edits.
        mixes: what runs on the lean loop where it can, else in transformers.
        documents: their first tokens are the prompts.
        written: tokens that are generated in a turn.
        repeats: turns that count.
        what: a few words for the progress line.
    """
    texts = prompts(model, documents, repeats, 8 if model.kind == "causal-lm" else 128)
    written = max(1, min(written, (model.context_length or 2048) - len(texts[0])))
    found: dict[str, Speed] = {}
    batches = list(_batches(mixes))
    with progress(what, total=(repeats + 1) * (len(mixes) + len(batches)), unit="runs") as advance:
        for batch in batches:
            steps = {ORIGINAL: in_transformers(model, (), written)}
            for mix in batch:
                if mix.lean:
                    loop = lean_weights(model, mix.edits).decoder(model, len(texts[0]) + written)
                    steps[mix.name] = in_lean_loop(loop, written)
                else:
                    steps[mix.name] = in_transformers(model, mix.edits, written)
            found = {**interleave(steps, texts, repeats, advance), **found}
    return found


def _batches(mixes: Sequence[Mix]) -> Iterator[list[Mix]]:
    """Cut mixes into groups whose loops hold at most `MEMORY` bytes beside the model together."""
    batch: list[Mix] = []
    held = 0
    for mix in mixes:
        own = mix.bytes if mix.lean and (mix.weights != "f32" or mix.skipped) else 0
        if batch and held + own > MEMORY:
            yield batch
            batch, held = [], 0
        batch.append(mix)
        held += own
    if batch:
        yield batch
