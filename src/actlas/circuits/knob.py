"""A knob: one direction at one site whose value decides between two behaviours.

    dial = knob(model, pairs, site="blocks.20.resid_post")      # (text with intent A, text with intent B)
    with model.edit(dial.set("context")):                       # or "prior", or a number
        model.generate("The capital of France is the city of Rome. The capital of France is the city of")

    x' = x + (c - u . x) u          u a unit vector, c the value it is set to

u is the difference of the two sides' mean activations (`mean_diff`) or is learned (`das`: rank 1, on swaps
between the two texts of a pair, with cross-entropy to what the model says after the other text). u has no
sign of its own; it is turned so that the positive side has the larger mean. Both means stay with the edit,
because c is in units of that layer's activations: a value that means much in one layer means nothing, or
more than the model has ever seen, in another. It applies to the last prompt token and to every generated one.

Source: "Controllable Context Sensitivity and the Knob Behind It" (Minder et al. 2024), sections 5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from actlas.circuits.das import faithfulness_of, learn
from actlas.circuits.interchange import Interchange
from actlas.circuits.last_token import LastToken
from actlas.core.contrast import Contrast
from actlas.core.edit import ActivationEdit, Edit, Here, register_edit, replace_edit
from actlas.core.errors import InputError, did_you_mean
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.scope import Scope
from actlas.measure.samples import rate_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

Fitted = Literal["mean_diff", "das"]


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SetProjection(ActivationEdit):
    """Set an activation's projection on a direction to a value.

    Attributes:
        direction: `[d]`, of any length; the unit vector along it counts. Heads are one axis with their
            channels.
        means: mean projections of the positive and the negative side.
        names: what the two sides are called.
        to: the value that the projection is set to.
    """

    direction: Tensor
    means: tuple[float, float] = (0.0, 0.0)
    names: tuple[str, str] = ("context", "prior")
    to: float = 0.0
    feature_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def unit(self) -> Tensor:
        """The unit vector, `[d]`."""
        return self.direction / self.direction.norm()

    def set(self, to: str | float) -> SetProjection:
        """Return the knob at another value.

        Args:
            to: the name of a side (its mean), or a number in units of the site's activations.

        Raises:
            InputError: a name that this knob has not got, or a number that is not finite.
        """
        if isinstance(to, str):
            if to not in self.names:
                raise InputError(
                    f"this knob has no side {to!r}{did_you_mean(to, self.names)}; it has "
                    f"{self.names[0]!r} and {self.names[1]!r}"
                )
            value = self.means[self.names.index(to)]
        else:
            value = float(to)
            if value - value != 0:
                raise InputError(f"a knob is set to a finite number, not {value}")
        made = replace_edit(self, to=value).with_measurements(self.measurements)
        assert isinstance(made, SetProjection)
        return made

    def score(self, x: Tensor) -> Tensor:
        """Return the projections `[...]` of activations `[..., d]`."""
        along: Tensor = x @ self.unit.to(x)
        return along

    def check(self, site: Site) -> None:
        width = 1
        for size in site.features or (self.direction.numel(),):
            width *= size
        if self.direction.ndim != 1 or len(self.direction) != width:
            raise InputError(
                f"the knob has a direction {list(self.direction.shape)}; {site.name} has {width} channels"
            )
        if not float(self.direction.norm()) > 0:
            raise InputError("the knob's direction is zero; fit it at another site or position")

    def value(self, x: Tensor, here: Here) -> Tensor:
        axes = len(here.site.features or (1,))
        flat = x.flatten(-axes) if axes > 1 else x
        unit = self.unit.to(flat)
        moved = flat + (self.to - flat @ unit).unsqueeze(-1) * unit
        return moved.reshape(x.shape)

    def describe(self) -> str:
        near = [n for n, m in zip(self.names, self.means, strict=True) if m == self.to]
        return f"{super().describe()} set to {near[0] if near else format(self.to, '.4g')}"

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        pairs = {name: tuple(record[name]) for name in ("means", "names")}
        return super()._rebuild({**record, **pairs}, tensors)


@method(
    "knob",
    room="circuits",
    returns="Edit",
    data="pairs",
    summary="one direction whose value decides between two behaviours, e.g. context against memory",
    example="actlas fit knob smollm2 pairs.jsonl --site blocks.20.resid_post -o knob/",
    papers=("context-knob",),
)
def knob(
    model: Model,
    data: Any,
    *,
    site: str,
    method: Fitted = "mean_diff",
    names: Sequence[str] = ("context", "prior"),
    set: str | float | None = None,
    steps: int = 40,
    batch: int = 8,
    lr: float = 0.01,
    held_out: float = 0.25,
    check: bool = True,
    controls: int = 5,
    seed: int = 0,
) -> SetProjection:
    """Fit a knob on pairs of prompts that differ in what they ask the model to do.

    Args:
        model: a causal language model that does what both texts of a pair ask.
        data: pairs (`Contrast`, or anything that makes one): the positive side is `names[0]`.
        site: one site.
        method: `"mean_diff"` or `"das"`; see the module docstring.
        names: what the positive and the negative side are called.
        set: the value the returned knob has; `None`: the positive side.
        steps, batch, lr: of `"das"`.
        held_out: share of the pairs that effects are measured on.
        check: also run the illusion test on the held-out pairs.
        controls: random directions for the comparison.
        seed: of the split, learning, and controls.

    Returns:
        The edit, limited to the newest token, with measurements: how often it turns held-out prompts to
        the other side's answer, against swapping the whole activation and random directions.

    Raises:
        InputError: pairs after which the model says the same on both sides, or a zero direction.
    """
    first, second = _two(names)
    fit, test = Contrast.of(data).split(held_out, seed)
    swap = contrast_swaps(model, fit, site)
    dial = fit_dial(swap, method, names=(first, second), steps=steps, batch=batch, lr=lr, seed=seed)
    made = dial.set(first if set is None else set)
    held = contrast_swaps(model, test, site)
    found = knob_measures(made, held, controls=controls, seed=seed)
    if check:
        found += faithfulness_of(model, held, made.unit, controls=controls, seed=seed).measurements
    bound = made.with_measurements(found).bind(model.fingerprint)
    assert isinstance(bound, SetProjection)
    return bound


def fit_dial(
    swap: Interchange,
    method: Fitted = "mean_diff",
    *,
    names: tuple[str, str] = ("context", "prior"),
    steps: int = 40,
    batch: int = 8,
    lr: float = 0.01,
    seed: int = 0,
) -> SetProjection:
    """Return the knob that fits swaps both ways, set to its positive side; see `knob` for the options.

    Raises:
        InputError: an unknown method, or a zero direction.
    """
    if method not in ("mean_diff", "das"):
        raise InputError(f"method is {method!r}; it must be 'mean_diff' or 'das'")
    half = len(swap) // 2
    x = swap.base.detach().float()
    if method == "mean_diff":
        vector = (x[:half] - x[half:]).mean(0)
    else:
        vector = learn(swap, steps=steps, batch=batch, lr=lr, seed=seed, what="learning a knob")
    site = swap.runs.site.name
    if not float(vector.norm()) > 0:
        raise InputError(f"both sides have the same mean activation at {site}; fit the knob at another site")
    unit = vector / vector.norm()
    high, low = float((x[:half] @ unit).mean()), float((x[half:] @ unit).mean())
    if high < low:
        unit, high, low = -unit, -high, -low
    return SetProjection(site, unit.cpu(), (high, low), names, high, scope=Scope(positions="last"))


def contrast_swaps(model: Model, pairs: Contrast, site: str) -> Interchange:
    """Return the swaps between the two texts of each pair, both ways: positive rows, then negative ones.

    The answer of a row is what the model says after its text, the target what it says after the other.
    Pairs after which it says the same are left out.

    Raises:
        InputError: fewer than two pairs are left.
    """
    n = len(pairs)
    runs = LastToken(model, list(pairs.texts), site)
    said = runs.logits().argmax(1)
    kept = (said[:n] != said[n:]).nonzero()[:, 0].tolist()
    if len(kept) < 2:
        raise InputError(
            f"{model.name} says different things after the two texts of only {len(kept)} of {n} pairs; a "
            "knob needs a model that does what both sides ask"
        )
    if len(kept) < n:
        rows = torch.tensor([*kept, *(n + i for i in kept)], device=said.device)
        runs, said = runs.take(rows), said[rows]
    other = torch.arange(len(said), device=said.device).roll(len(kept))
    return Interchange(runs, runs.values.flatten(1)[other], said, said[other])


def knob_measures(
    dial: SetProjection, swap: Interchange, *, controls: int = 5, seed: int = 0
) -> list[Measurement]:
    """Return how often the knob, and its controls, turn a prompt to the other side's answer.

    Args:
        dial: the knob.
        swap: both ways (`contrast_swaps`): the positive rows are set to the negative mean and back.
        controls: random directions; each moves every activation as far as the knob does.
        seed: of these.
    """
    half = len(swap) // 2
    x = swap.base
    unit = dial.unit.to(x)
    goal = torch.tensor([dial.means[1]] * half + [dial.means[0]] * half).to(x)
    step = goal - x @ unit
    every = {
        "set": x + step.unsqueeze(1) * unit,
        "swap along the knob": x + ((swap.source - x) @ unit).unsqueeze(1) * unit,
        "swap of everything": swap.source,
    }
    found = []
    for name, values in every.items():
        hits = swap.run(values).hits
        assert hits is not None
        found.append(rate_measurement("turned", hits.cpu().numpy(), group={"by": name}))
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for _ in range(controls):
        drawn = torch.randn(len(unit), generator=generator).to(x)
        hits = swap.run(x + step.unsqueeze(1) * drawn / drawn.norm()).hits
        assert hits is not None
        turned.append(hits)
    if turned:
        every_hit = torch.cat(turned).cpu().numpy()
        found.append(rate_measurement("turned", every_hit, seed=seed, group={"by": "random directions"}))
    return found


def _two(names: Sequence[str]) -> tuple[str, str]:
    if isinstance(names, str) or len(names) != 2 or names[0] == names[1] or not all(names):
        raise InputError(f"names are {names!r}; a knob has two sides with different names")
    return str(names[0]), str(names[1])
