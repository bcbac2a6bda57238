"""Is an attribution right? Erase the tokens that it names, and see what that does to the answer.

    drop(S) = F(x) - F(x without S)         F = log p(y+ | x) - log p(y- | x)

An attribution that says what the answer rests on makes `drop` of its top k tokens larger than that of k
random ones (the control); the lowest k should drop it less than random ones do. Beside it stands by how
much the attributions miss adding up, and how often one token comes first.

Source: the deletion metric of Petsiuk, Das and Saenko 2018, "RISE", section 3.3, at one k; completeness
of Sundararajan, Taly and Yan 2017.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from actlas.core.answer_function import BaselineKind, answer_start, attribute_pair, erased, token_ids
from actlas.core.attributions import Rule
from actlas.core.contrast import Contrast
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.progress import progress
from actlas.measure.statistics import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "integrated-gradients",
    room="explain",
    returns="Measurement",
    data="pairs",
    summary="token attributions of answers: do they add up, and does erasing their tokens matter",
    example="actlas fit integrated-gradients smollm2 capitals --pairs 16",
    papers=("grains",),
)
def deletion(
    model: Model,
    data: Any,
    *,
    k: int = 1,
    pairs: int = 16,
    steps: int = 64,
    baseline: BaselineKind = "mean",
    rule: Rule = "gauss",
    controls: int = 4,
    seed: int = 0,
) -> list[Measurement]:
    """Measure integrated gradients of answers on pairs.

    Args:
        model: a causal language model.
        data: pairs (anything `Contrast.of` takes); answers are what follows the shared beginning.
        k: tokens of the prompt to erase.
        pairs: how many pairs to take, from the first.
        steps, rule, baseline: see `attribute_pair`.
        controls: random draws of k tokens for each pair.
        seed: of the draws and intervals.

    Returns:
        The completeness error of F, the drops of F for the top, the lowest and random tokens, and the top
        and lowest minus random, in nats.

    Raises:
        InputError: a prompt of at most k tokens, or no random draws.
    """
    if controls < 1 or pairs < 2:
        raise InputError(f"controls is {controls} and pairs {pairs}; there must be at least 1 and 2")
    contrast = Contrast.of(data)
    contrast = contrast.at(range(min(pairs, len(contrast))))
    generator = random.Random(seed)
    errors: list[float] = []
    drops: dict[str, list[float]] = {"top": [], "lowest": [], "random": []}
    with progress("attributions", len(contrast), "pairs") as advance:
        for texts in zip(contrast.positive, contrast.negative, strict=True):
            one, other = (token_ids(model, text) for text in texts)
            start = answer_start(one, other)
            if not 1 <= k < start:
                raise InputError(
                    f"k is {k}; the prompt {texts[0][:40]!r} has {start} tokens, so 1 to {start - 1}"
                )
            found, scores = attribute_pair(model, one, other, steps=steps, baseline=baseline, rule=rule)
            change = sum(s * (f.value - f.baseline_value) for s, f in zip((1, -1), found, strict=True))
            gap = found[0].gap - found[1].gap
            errors.append(abs(gap) / max(abs(change), 1e-9))
            order = (scores[0] - scores[1])[:start].argsort(descending=True).tolist()
            sets = [order[:k], order[-k:], *(generator.sample(range(start), k) for _ in range(controls))]
            plain = margin(model, one, other, start)
            dropped = [plain - margin(model, one, other, start, places) for places in sets]
            drops["top"].append(dropped[0])
            drops["lowest"].append(dropped[1])
            drops["random"].append(float(np.mean(dropped[2:])))
            advance()
    said = f"{steps} steps, baseline {baseline}"
    measured = [
        Measurement(
            "completeness error",
            float(np.median(errors)),
            "fraction",
            len(errors),
            note=f"median over pairs; {said}",
            better="lower",
            details={"largest": max(errors), "within 2%": float(np.mean(np.array(errors) < 0.02))},
        )
    ]
    for name, values in drops.items():
        measured.append(
            mean_measurement(
                "drop of F", "nats", values, seed=seed, over="pairs", group={"tokens": name, "k": str(k)}
            )
        )
    for name in ("top", "lowest"):
        difference = np.array(drops[name]) - np.array(drops["random"])
        group = {"tokens": f"{name} minus random", "k": str(k)}
        measured.append(
            mean_measurement("drop of F", "nats", difference, seed=seed, over="pairs", group=group)
        )
    return measured


def margin(model: Model, one: Tensor, other: Tensor, start: int, places: Sequence[int] = ()) -> float:
    """Return log p(answer of one) - log p(answer of other), with some tokens erased, in nats."""
    found = []
    for ids in (one, other):
        logits = model.logits(erased(model, ids, places))[0].float()
        log_p = logits[start - 1 : len(ids) - 1].log_softmax(-1)
        answer = ids[start:].to(log_p.device)
        found.append(float(log_p.gather(-1, answer.unsqueeze(-1)).double().sum()))
    return found[0] - found[1]


__all__ = ["deletion", "margin"]
