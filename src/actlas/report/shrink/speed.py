"""How fast mixes generate here: interleaved, so that a busy moment of the machine falls on all alike.

Every variant writes the same number of greedy tokens after the same prompts, one sequence at a time. A repeat
is one turn of each; the ratio to the original is taken within a repeat, and its median is what counts.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.edit import Edit
from actlas.core.progress import Advance
from actlas.report.shrink.rows import ORIGINAL

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.models.decoder import FastDecoder

Run = Callable[[list[int]], int]
PROMPT = 8


@dataclass(frozen=True)
class Step:
    """One variant of a race.

    Attributes:
        run: generates after the ids of a prompt and returns how many tokens it has made.
        edits: installed on `model` around the run; putting them in is not timed.
    """

    run: Run
    model: Model | None = None
    edits: tuple[Edit, ...] = ()

    def installed(self) -> contextlib.AbstractContextManager[object]:
        """Return the block in which the step may run."""
        if self.model is None or not self.edits:
            return contextlib.nullcontext()
        return self.model.edit(*self.edits)


@dataclass(frozen=True)
class Speed:
    """Speed of one variant; see `rows.Row`."""

    rate: float
    ratio: float
    low: float
    high: float


def in_transformers(model: Model, edits: Sequence[Edit], tokens: int) -> Step:
    """Return a step of transformers' greedy decoding; for encoders, of one forward pass over the prompt."""
    module: Any = model.module
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    options["pad_token_id"] = getattr(model.tokenizer, "pad_token_id", None) or 0

    def run(ids: list[int]) -> int:
        encoded = {"input_ids": torch.tensor([ids], device=model.device)}
        encoded["attention_mask"] = torch.ones_like(encoded["input_ids"])
        with torch.no_grad():
            if model.kind != "causal-lm":
                module(**encoded)
                return len(ids)
            module.generate(**encoded, **options)
        return tokens

    return Step(run, model, tuple(edits))


def in_lean_loop(decoder: FastDecoder, tokens: int) -> Step:
    """Return a step of the lean loop."""
    return Step(lambda ids: sum(1 for _ in decoder.greedy(ids, tokens)))


def prompts(model: Model, documents: Sequence[Any], count: int, length: int = PROMPT) -> list[list[int]]:
    """Return the first tokens of some documents."""
    found = []
    for document in documents:
        text = document if isinstance(document, str) else document.text
        ids = model.encode(text[: 40 * length], truncate=True)["input_ids"][0].tolist()[:length]
        if len(ids) == min(length, (model.context_length or length) // 2):
            found.append(ids)
        if len(found) == count:
            break
    return found or [model.encode("The")["input_ids"][0].tolist()]


def interleave(
    steps: Mapping[str, Step], prompts: Sequence[list[int]], repeats: int, advance: Advance | None = None
) -> dict[str, Speed]:
    """Measure all steps in turn.

    Args:
        steps: by name; `ORIGINAL` is what the others are compared with.
        prompts: one for each repeat, in a circle.
        repeats: turns of each; one more, which is not counted, warms up.
        advance: called after each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, repeats):
        ids = prompts[turn % len(prompts)]
        for name, step in steps.items():
            with step.installed():
                start = time.perf_counter()
                made = step.run(ids)
                spent = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(spent / made)
            if advance is not None:
                advance()
    found = {}
    for name, own in seconds.items():
        ratios = [base / mine for base, mine in zip(seconds[ORIGINAL], own, strict=True)]
        found[name] = Speed(1 / statistics.median(own), statistics.median(ratios), min(ratios), max(ratios))
    return found
