"""What the reproductions of weight quantization share: texts, a third of the blocks, how results are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.quant_price import losses_of
from actlas.measure.statistics import paired_difference
from actlas.papers.reproduction import Check, Measured

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.measure.likelihood import Losses

CALIBRATION_TEXTS = 60


def texts(seed: int) -> tuple[list[Any], list[Any]]:
    """Return documents to calibrate on, and others to evaluate on."""
    from actlas.data import corpus

    found = list(corpus("prose", seed=seed))
    return found[:CALIBRATION_TEXTS], found[CALIBRATION_TEXTS:]


def reading(tokens: int, context: int) -> dict[str, Any]:
    """Return the options of evaluation: the first window of as many documents as are needed."""
    return {"tokens": tokens, "context": context, "per_document": context}


def outside(model: Model, step: int) -> tuple[str, ...]:
    """Return the paths of the linear layers of all blocks but every `step`-th, which stay as they are."""
    from actlas.measure.linear_layers import linear_layers

    return tuple(layer.path for layer in linear_layers(model) if layer.block % step)


def measured(m: Measured, name: str, **group: str) -> Measurement:
    """Return a measurement that must be there.

    Raises:
        InputError: it is not.
    """
    found = m.get(name, **group)
    if found is None:
        raise InputError(f"the run has no {name!r} for {group}")
    return found


def less(m: Measured, question: str, name: str, over: str, *, central: bool = False, **group: str) -> Check:
    """Ask whether a variant diverges less from the base than another one, beyond the interval."""
    found = m.get("extra-kl", variant=name, over=over, **group)
    return Check.below(question, found, 0.0, central=central)


def part_less(losses: Losses, over: Losses, share: float, *, seed: int, group: dict[str, str]) -> Measurement:
    """Return KL of one variant minus `share` times that of another: below 0 where it is so much lower."""
    assert losses.divergence is not None and over.divergence is not None
    drawn = paired_difference(
        share * over.divergence / over.tokens, losses.divergence / losses.tokens, losses.tokens, seed=seed
    )
    return Measurement(
        f"kl minus {share:g} of it",
        drawn.value,
        "nats/token",
        drawn.n,
        drawn.low,
        drawn.high,
        "paired bootstrap over documents",
        seed,
        group=group,
        better="lower",
    )


def kl(found: Iterable[Measurement], variant: str, **group: str) -> float:
    """Return the divergence of a variant."""
    return next(
        m.value
        for m in found
        if m.name == "kl-to-base"
        and m.group.get("variant") == variant
        and all(m.group.get(k) == v for k, v in group.items())
    )


def rows(found: Iterable[Measurement]) -> list[dict[str, Any]]:
    """Return records for a plot: bits a weight, divergence, variant."""
    found = list(found)
    bits = {m.group["variant"]: m.value for m in found if m.name == "bits-per-weight"}
    return [
        {
            "bits a weight": bits[m.group["variant"]],
            "KL to the full model": m.value,
            "variant": m.group["variant"],
        }
        for m in found
        if m.name == "kl-to-base" and m.group["variant"] in bits
    ]


def with_step(found: Iterable[Measurement], **group: str) -> list[Measurement]:
    """Return measurements with further labels."""
    return [replace(m, group={**m.group, **group}) for m in found]


def divergences(
    model: Model, held_out: list[Any], variants: dict[str, Edit], *, tokens: int, context: int
) -> dict[str, Losses]:
    """Return the losses of each variant with their divergence from the model as it is."""
    return losses_of(model, held_out, variants, **reading(tokens, context))[1]
