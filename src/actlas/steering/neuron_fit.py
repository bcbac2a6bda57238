"""`actlas fit neuron-adjust` and `actlas fit prune-neurons`: fitted on some texts, measured on others.

What is measured is the rise of the loss (nats per token) on held-out texts of either label, beside the same
with as many random neurons. Unlearning is a rise on the skill's texts that the others are spared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.measure.likelihood import nll
from actlas.measure.samples import mean_measurement
from actlas.steering.gate_rows import GateTexts
from actlas.steering.neuron_adjust import SITES, NeuronMoments

if TYPE_CHECKING:
    from actlas.core.model import Model

Make = Callable[[Mapping[str, Tensor]], Edit]


@method(
    "neuron-adjust",
    room="steering",
    returns="Edit",
    data="labelled",
    summary="unlearn a skill (label 1): its neurons take the values they have on other text (label 0)",
    example="actlas fit neuron-adjust smollm2 texts.jsonl --top 0.03 -o no-maths/",
    papers=("skill-unlearning",),
)
def fit_neuron_adjust(
    model: Model,
    data: Any,
    site: str | Sequence[str] = SITES,
    *,
    top: float = 0.005,
    held_out: float = 0.25,
    seed: int = 0,
) -> Edit:
    """Fit the adjustment of the neurons that rise most on texts with label 1.

    Args:
        model: a causal language model.
        data: labelled texts: 1 to forget, 0 to retain.
        site: where; the published text adjusts `mlp.gate`, the released code the default, `mlp.act`.
        top: share of neurons; the paper takes 0.005 for languages and 0.03 for mathematics and code.
        held_out: share of the texts that the edit is measured on.
        seed: of the random decisions, the split and the random neurons.

    Returns:
        The edit; its `measurements` are the rise of the loss on held-out texts of either label, and the
        same for as many random neurons.

    Raises:
        InputError: one class only, too few texts to hold some out, or a share outside (0, 1].
    """
    return _fit(
        model, data, site, top, held_out, seed, "neuron-adjust", lambda found: lambda n: found.adjust(n, seed)
    )


@method(
    "prune-neurons",
    room="steering",
    returns="Edit",
    data="labelled",
    summary="set to 0 the neurons that rise most on a skill's texts (label 1): a baseline",
    example="actlas fit prune-neurons smollm2 texts.jsonl --top 0.03 -o pruned/",
    papers=("skill-unlearning",),
)
def fit_prune_neurons(
    model: Model,
    data: Any,
    site: str | Sequence[str] = SITES,
    *,
    top: float = 0.005,
    held_out: float = 0.25,
    seed: int = 0,
) -> Edit:
    """Fit the baseline: the neurons that `fit_neuron_adjust` adjusts are set to 0 instead."""
    return _fit(model, data, site, top, held_out, seed, "prune-neurons", lambda found: found.prune)


def _fit(
    model: Model,
    data: Any,
    site: str | Sequence[str],
    top: float,
    held_out: float,
    seed: int,
    what: str,
    maker: Callable[[NeuronMoments], Make],
) -> Edit:
    texts = GateTexts.of(data, what)
    fit, test = texts.split((held_out,), seed)

    def of(label: float, chosen: Any) -> list[str]:
        return [texts.texts[i] for i in chosen if float(texts.y[i]) == label]

    moments = NeuronMoments.of(model, of(1.0, fit), of(0.0, fit), site)
    make = maker(moments)
    edit, control = make(moments.top(top)), make(moments.random(top, seed))
    measured: list[Measurement] = []
    for label, kind in ((1.0, "texts to forget"), (0.0, "texts to retain")):
        held = of(label, test)
        base = nll(model, held)
        for name, each in (("chosen neurons", edit), ("random neurons", control)):
            with model.edit(each):
                found = nll(model, held)
            rise = (found.nll - base.nll) / base.tokens
            measured.append(
                mean_measurement(
                    "rise of the loss", "nats/token", rise, base.tokens, seed=seed, over="texts",
                    group={"of": name, "on": kind}, note=base.note,
                )
            )  # fmt: skip
    return edit.bind(model.fingerprint).with_measurements(measured)
