"""What the reproductions of post-training sparsity share: text, one protocol, how results are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Measured

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.measure.likelihood import Losses

CONTEXT = 192
CALIBRATION_TEXTS = 40


def texts(seed: int) -> tuple[list[Any], list[Any]]:
    """Return documents to calibrate on, and others to evaluate on."""
    from actlas.data import corpus

    found = list(corpus("prose", seed=seed))
    return found[:CALIBRATION_TEXTS], found[CALIBRATION_TEXTS:]


def reading(tokens: int) -> dict[str, Any]:
    """Return the options of evaluation: the first 192 tokens of as many documents as are needed."""
    return {"tokens": tokens, "context": CONTEXT, "per_document": CONTEXT}


def compared(
    model: Model,
    held_out: list[Any],
    rules: Mapping[str, Edit],
    *,
    base: Losses,
    asked: str,
    tokens: int,
    seed: int,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> list[Measurement]:
    """Return `compare_rules`' measurements, grouped by what was asked for as well."""
    from actlas.measure.sparsity_price import compare_rules

    found = compare_rules(model, held_out, rules, base=base, pairs=pairs, seed=seed, **reading(tokens))
    kept = [m for m in found if not math.isnan(m.value)]
    return [replace(m, group={**m.group, "asked": asked}) for m in kept]


def less(m: Measured, question: str, rule: str, over: str, asked: str, *, central: bool = False) -> Check:
    """Ask whether a rule loses less than another one at equal weights touched, beyond the interval."""
    found = m.get("extra-loss", rule=rule, over=over, asked=asked)
    check = Check.below(question, found, 0.0, central=central)
    return replace(check, said=f"{check.said}; {found.note}") if found is not None else check


def rows(found: list[Measurement]) -> list[dict[str, Any]]:
    """Return records for a plot: weights touched, perplexity ratio, rule."""
    touched = {(m.group["rule"], m.group["asked"]): m.value for m in found if m.name == "weights-touched"}
    return [
        {
            "weights touched": touched[m.group["rule"], m.group["asked"]],
            "perplexity ratio": m.value,
            "rule": m.group["rule"],
        }
        for m in found
        if m.name == "perplexity-ratio"
    ]


def ratio(found: list[Measurement], rule: str, asked: str) -> float:
    """Return the perplexity ratio of a rule."""
    return next(
        m.value
        for m in found
        if m.name == "perplexity-ratio" and (m.group["rule"], m.group["asked"]) == (rule, asked)
    )


def random_inputs(model: Model, sparsity: float, seed: int) -> Edit:
    """Skip a random set of every layer's inputs: the control of equal size."""
    from actlas.core.skip_inputs import SkipInputs
    from actlas.measure.linear_layers import linear_layers
    from actlas.sparsity.input_sparsity import finish

    generator = torch.Generator().manual_seed(seed)
    made = []
    for layer in linear_layers(model):
        kept = torch.rand(layer.columns, generator=generator).argsort() >= round(sparsity * layer.columns)
        made.append(SkipInputs(layer.input_site, frozen=kept))
    return finish(model, made, "all")
