"""The few heads and MLPs that carry each task, chosen on one half of the prompts, shown on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.report.content import DataUse, Figure, SectionResult, Table, plain
from actlas.report.plots import Row, dots
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.data.task_items import Task

_INTRO = (
    "For each task, the activation of a prompt that has another answer is written into one head (`L23H3`:"
    " block 23, head 3) or MLP at a time. The effect is the share of the difference in the answer's logits"
    " that goes with it: 100% is all of the behaviour, and a negative share belongs to a part that works"
    " against it. The parts were chosen by gradients on one half of the prompts; the numbers are exact"
    " patches on the other half."
)
_SHOWN = 6
_RANDOM = 5
_MOST = 48
_STEPS = 2


@dataclass(frozen=True)
class _Found:
    """What one task showed: its largest components, random ones beside them, and the prompts."""

    top: list[Measurement]
    control: Measurement
    pairs: PromptPairs


@section("circuits", title="Components behind each task", order=47, needs=("causal-lm",), cost=2.0)
def circuits(context: Context) -> SectionResult:
    """Patch the heads and MLPs that one gradient points to, task by task."""
    from actlas.data import task, tasks

    model = context.model
    if model.layout is None or model.tokenizer is None or not model.n_blocks:
        raise ModelError(f"{model.name} has no heads and MLPs or tokenizer to find circuits by")
    rows: list[tuple[str, ...]] = []
    measurements: list[Measurement] = []
    notes: list[str] = []
    used: list[DataUse] = []
    for name in tasks():
        try:
            made = _prompts(context, task(name, model.tokenizer, n=_MOST, seed=context.seed))
            notes += context.notes_on(made)
            found = _components(context, made)
        except ModelError:
            raise
        except InputError as error:
            rows.append((f"`{name}`", "-", plain(_reason(str(error))), "-"))
            continue
        measurements += [*found.top, found.control]
        said = ", ".join(f"{m.group['component']} {m.value:+.0%}" for m in found.top)
        rows.append((f"`{name}`", f"{found.pairs.accuracy:.0%}", said, f"{found.control.value:.1%}"))
        used.append(DataUse(name, len(made), "prompts", made.hash, "patched pairwise with counterfactuals"))
    table = Table(
        "Largest components by task",
        ("task", "right", "components and their effects", "random components"),
        tuple(rows),
        "right: clean prompts on which the answer beats the wrong one. random components: the median size"
        " of the effect of components drawn at random.",
    )
    if any(m.group["component"] == "MLP 0" and m.value > 0.9 for m in measurements):
        notes.append("100% at MLP 0 says only that later layers read the changed token through it.")
    notes.append(f"All parts, with heat maps: `actlas patch {plain(model.name)} --task ioi --html out.html`.")
    figures = _figures(measurements)
    return SectionResult(_INTRO, tuple(measurements), figures, (table,), notes, [], used)


def _prompts(context: Context, made: Task) -> Task:
    """Return as many prompts as the budget has tokens for, 8 to 16 on a quick card."""
    length = sum(len(context.model.tokenizer(i.prompt)["input_ids"]) for i in made) / len(made)
    most = min(_MOST, context.budget.task_prompts // 4)
    return made[: max(8, min(most, int(4 * context.budget.task_prompts / length)))]


def _components(context: Context, made: Task) -> _Found:
    import torch

    from actlas.circuits.attribution_patching import attribute
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.patching import patch

    model = context.model
    pairs = PromptPairs.from_task(model, made, n=len(made))
    half = len(pairs) // 2
    chosen = attribute(
        model, pairs.take(slice(0, half)), "components", mode="noise", steps=_STEPS, seed=context.seed
    )
    order = chosen.values.abs().argsort(descending=True, stable=True)[:_SHOWN].tolist()
    draw = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(context.seed))
    others = [i for i in draw.tolist() if i not in order][:_RANDOM]
    parts = [chosen.parts[i] for i in [*order, *others]]
    exact = patch(model, pairs.take(slice(half, None)), parts, mode="noise", seed=context.seed)
    group, name = {"task": pairs.task}, "component-effect"
    note = "share of the logit difference; chosen on other prompts"
    top = [
        Measurement(
            name, e.value, "fraction", len(pairs) - half, e.low, e.high, "bootstrap over prompts",
            context.seed, group={**group, "component": e.label}, note=note,
        )
        for e in sorted(exact.intervals(range(len(order))), key=lambda e: -abs(e.value))
    ]  # fmt: skip
    sizes = exact.values[len(order) :].abs()
    control = Measurement(
        name, float(sizes.median()), "fraction", len(sizes), float(sizes.min()), float(sizes.max()),
        "smallest to largest", context.seed, group={**group, "component": "random components"},
        note="control: median size of the effect of components drawn at random",
    )  # fmt: skip
    return _Found(top, control, pairs)


def _reason(error: str) -> str:
    """Return the part of an error that says why there is nothing to find."""
    said = error.split(";")[0]
    return "not patched: the task has no counterfactual prompts" if "no counterfactual" in said else said


def _figures(found: list[Measurement]) -> tuple[Figure, ...]:
    rows = [
        replace(Row.of(m, f"{m.group['task']}: {m.group['component']}"), n=m.n)
        for m in found
        if m.group["component"] != "random components"
    ]
    if not rows:
        return ()
    text = "For each task the effects of its largest heads and MLPs, with intervals over prompts."
    return (
        dots(
            "Effect of components by task",
            text,
            rows,
            axis="share of the logit difference",
            percent=True,
            wide=True,
        ),
    )
