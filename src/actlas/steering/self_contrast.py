"""Pairs that a model makes itself: its best and its worst *right* answers to the same prompt.

    contrast = self_contrast(model, prompts, verify, samples=8, rank="length")

Several answers are sampled for every prompt, the wrong and the unfinished ones are thrown away, and the
first and the last of the rest by a ranking become a pair (Exploring and Exploiting the Inherent Efficiency
within Large Reasoning Models: shortest against longest). No other model is needed, and both sides are
right, so that their difference is the property ranked by and not correctness. Pairing within a prompt
keeps the prompt's difficulty out of it.

The direction is the mean over the tokens of all good answers minus that over the bad ones:

    v = mean_{t in efficient} h(t) - mean_{t in verbose} h(t)                   (`answer_readings`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from actlas.core.calibration.massive import massive_rows
from actlas.core.contrast import Contrast, Readings
from actlas.core.errors import InputError
from actlas.measure.answer_length import write_answers

if TYPE_CHECKING:
    from actlas.core.model import Model

Verify = Callable[[str, str], bool]
Rank = Literal["length"] | Callable[[str, int], float]


@dataclass(frozen=True)
class Sampled:
    """One sampled answer.

    Attributes:
        prompt: number of its prompt.
        rendered: the prompt as the model read it.
        text: the answer.
        tokens: its length, end-of-turn token included.
        ended: whether it ended by itself.
        right: what the verifier said.
    """

    prompt: int
    rendered: str
    text: str
    tokens: int
    ended: bool
    right: bool


def self_contrast(
    model: Model,
    prompts: Sequence[str],
    verify: Verify,
    samples: int = 8,
    rank: Rank = "length",
    *,
    least_gap: float = 0.3,
    temperature: float = 0.8,
    max_new_tokens: int = 64,
    chat: bool | None = None,
    seed: int = 0,
) -> Contrast:
    """Return pairs of a model's own answers: first by rank (positive) against last (negative).

    Args:
        model: a language model that generates.
        prompts: questions.
        verify: (prompt, answer) -> whether the answer is right.
        samples: answers a prompt.
        rank: `"length"` (fewer tokens first) or a function (answer, tokens) -> number, small first.
        least_gap: keep a pair only if the ranks differ by more than this share of the larger one.
        temperature, max_new_tokens, chat, seed: of the sampling; unfinished answers are not used.

    Raises:
        InputError: fewer than two samples, or no prompt with two right answers that differ enough.
    """
    made = sample_answers(
        model, prompts, verify, samples,
        temperature=temperature, max_new_tokens=max_new_tokens, chat=chat, seed=seed,
    )  # fmt: skip
    return pair_answers(made, rank, least_gap=least_gap)


def sample_answers(
    model: Model,
    prompts: Sequence[str],
    verify: Verify,
    samples: int = 8,
    *,
    temperature: float = 0.8,
    max_new_tokens: int = 64,
    chat: bool | None = None,
    seed: int = 0,
) -> list[Sampled]:
    """Return the sampled answers of every prompt, prompt after prompt; see `self_contrast`.

    Raises:
        InputError: fewer than two samples, or a temperature of 0, at which all samples are one.
    """
    if samples < 2:
        raise InputError(f"samples is {samples}; a pair needs at least 2 answers to a prompt")
    if temperature <= 0:
        raise InputError(f"temperature is {temperature}; all samples are the same at 0, use e.g. 0.8")
    repeated = [p for p in prompts for _ in range(samples)]
    written = write_answers(
        model, repeated, max_new_tokens=max_new_tokens, chat=chat, temperature=temperature, seed=seed
    )
    return [
        Sampled(
            i // samples, written.prompts[i], written.texts[i], int(written.tokens[i]),
            bool(written.ended[i]), bool(verify(prompt, written.texts[i])),
        )
        for i, prompt in enumerate(repeated)
    ]  # fmt: skip


def pair_answers(sampled: Sequence[Sampled], rank: Rank = "length", *, least_gap: float = 0.3) -> Contrast:
    """Return the contrast of the first and the last right and finished answer of each prompt.

    Raises:
        InputError: no prompt has two right answers that differ enough.
    """
    key = (lambda s: float(s.tokens)) if rank == "length" else (lambda s: float(rank(s.text, s.tokens)))
    by_prompt: dict[int, list[Sampled]] = {}
    for s in sampled:
        if s.right and s.ended and s.text.strip():
            by_prompt.setdefault(s.prompt, []).append(s)
    pairs: list[tuple[Sampled, Sampled, float]] = []
    for members in by_prompt.values():
        first, last = min(members, key=key), max(members, key=key)
        low, high = key(first), key(last)
        if first.text != last.text and high - low > least_gap * max(abs(low), abs(high)):
            pairs.append((first, last, high - low))
    if not pairs:
        raise InputError(
            f"none of {len({s.prompt for s in sampled})} prompts has two right, finished answers that differ "
            f"by more than {least_gap:.0%}; sample more, or take easier prompts"
        )
    return Contrast(
        tuple(a.rendered + a.text for a, _, _ in pairs),
        tuple(b.rendered + b.text for _, b, _ in pairs),
        tuple(gap for *_, gap in pairs),
        tuple(a.rendered for a, _, _ in pairs),
    )


def answer_readings(model: Model, contrast: Contrast, site: str) -> Readings:
    """Return each side's mean activation over the tokens after the prompt, massive rows left out.

    Raises:
        InputError: the contrast does not know its prompts, or an answer has no token of its own.
    """
    if contrast.prompt is None:
        raise InputError("this contrast does not know its prompts; give pairs with a 'prompt'")
    name = model.resolve(site)[0].name
    sides: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    for texts in (contrast.positive, contrast.negative):
        rows = []
        for text, prompt in zip(texts, contrast.prompt, strict=True):
            start = len(model.tokenizer(prompt)["input_ids"])
            own = model.trace(text, [name])[name][0].flatten(1).float().cpu()
            if len(own) <= start:
                raise InputError(f"an answer has no token of its own after its prompt: {text[-60:]!r}")
            kept = own[start:][~massive_rows(own)[start:]]
            rows.append((kept if len(kept) else own[start:]).mean(0))
            norms.append(own[start:].norm(dim=-1))
        sides.append(torch.stack(rows))
    return Readings(name, sides[0], sides[1], float(torch.cat(norms).median()))
