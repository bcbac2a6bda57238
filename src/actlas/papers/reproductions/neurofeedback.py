"""neurofeedback: can SmolLM2 report and move its own activation along a direction, in context?

Short reviews are labelled by the sign of the model's own activation after block 15 along an axis: the
difference of means of praise and blame, principal components, and the difference of means for shuffled
labels. The model sees labelled reviews as its own turns and is asked for the next label (report), or for a
sentence with a label (control). A reader of the text alone gets the same examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.prompt_only import without

SITE = "blocks.15.resid_post"
AXIS = "means"
THINGS = ("film", "book", "hotel", "soup", "music", "story")


def judge(m: Measured) -> list[Check]:
    """Holds if, for the axis of praise against blame and in the later half of the sequence, the logit
    difference of the two labels tells the label of the model's own activation (area under the ROC curve
    above 0.5, and above that of an axis of shuffled labels; both central), and if asking for a sentence of
    high rather than low activation moves the activation of what the model writes, more than it moves
    principal components (explicit control: Cohen's d minus the mean size of d along components above 0;
    central). The area is judged, and not the accuracy, because a preference for one digit keeps a small
    model's accuracy near 0.5; the accuracy must be above 0.5 too, but not centrally. Also: a late component
    is reported less well than the semantic axis, and a fixed sentence's activation moves (implicit control,
    d above 0). Whether the report beats a reader of the text is shown and not judged: the claim is that the
    model reports, not from where.
    """
    late = {"axis": AXIS, "examples": "late"}
    checks = [
        Check.above("the semantic axis is reported", m.get("report AUC", **late), 0.5, central=True),
        Check.above(
            "better than an axis of shuffled labels",
            m.get("report AUC above the shuffled axis", axis=AXIS),
            0.0,
            central=True,
        ),
        Check.above(
            "explicit control", m.get("explicit control above components", axis=AXIS), 0.0, central=True
        ),
        Check.above("its labels are predicted", m.get("report accuracy", **late), 0.5),
    ]
    for gap in m.every("report AUC below the semantic axis"):
        checks.append(Check.above(f"better than {gap.group['axis']}", gap, 0.0))
    checks.append(Check.above("implicit control", m.get("implicit control", axis=AXIS), 0.0))
    return checks


@reproduction(
    "neurofeedback",
    claim="In context a chat model reports and moves its own activation along a semantic direction, and not "
    "along directions without meaning.",
    judge=judge,
    quick={
        "axes": (AXIS, "pc32", "shuffled"),
        "examples": (0, 8, 16),
        "repetitions": 10,
        "shown": 6,
        "control": 6,
        "controlled": (AXIS,),
        "pairs": 48,
    },
    full={
        "axes": (AXIS, "logistic", "pc1", "pc2", "pc8", "pc32", "shuffled", "random"),
        "examples": (0, 8, 24),
        "repetitions": 60,
        "shown": 16,
        "control": 40,
        "controlled": (AXIS, "pc1", "pc2", "pc8", "pc32", "shuffled"),
        "pairs": 72,
    },
)
def neurofeedback(
    *,
    seed: int,
    axes: Sequence[str],
    examples: Sequence[int],
    repetitions: int,
    shown: int,
    control: int,
    controlled: Sequence[str],
    pairs: int,
) -> Findings:
    """Run it.

    Args:
        seed: of sentences, sequences, sampling and intervals.
        axes: of the report task.
        examples: numbers of labelled sentences.
        repetitions: dialogues an axis in the report task.
        shown: labelled sentences before a request in the control tasks.
        control: repetitions of the control tasks, four dialogues each.
        controlled: axes of the control tasks.
        pairs: of sentences; half of them fit the axes.
    """
    from actlas.measure.neurofeedback import neurofeedback as measure
    from actlas.models import load

    model, reader = load("smollm2"), load("minilm")
    given: dict[str, Any] = {"site": SITE, "seed": seed}
    out = measure(
        model,
        sentences(pairs),
        axes=axes,
        tasks=("report",),
        examples=examples,
        repetitions=repetitions,
        reader=reader,
        **given,
    )
    out += _above_components(out, seed)
    out += measure(
        model,
        sentences(pairs),
        axes=controlled,
        tasks=("implicit", "explicit"),
        examples=(shown,),
        repetitions=control,
        tokens=12,
        **given,
    )
    return Findings(out, _headline(Measured(out)), f"{NOTE} {without('neurofeedback')}", [_plot(out)])


NOTE = (
    "Published: Llama 3 and Qwen 2.5 of 1 to 70 billion parameters, ETHICS commonsense sentences, five "
    "depths, up to 256 examples, 100 repetitions; the label is the sign of the standardised score, report "
    "is judged by accuracy. Ours: generated reviews, half of which fit the axes, labels split at the median "
    "and balanced in every prompt, half of the repetitions with flipped labels, so that a preference for one "
    "digit gives an accuracy of 0.5. The text-only reader is a logistic regression on MiniLM embeddings of "
    "the same examples; along the semantic axis the label is nearly the review's sentiment, so a report "
    "below it is no sign of a look inside. 'late' pools the later half of the positions. The wording of "
    "system text and requests is ours. Tried before this run: five wordings with another seed (6 repetitions "
    "each), all with areas of 0.82 to 0.96 and accuracies of 0.60 to 0.67, because SmolLM2 nearly always "
    "prefers the digit 1; before that two runs of 3 and 4 repetitions, to see that it runs. The criterion "
    "was then written on the area, and the first wording was kept. A run of these very settings was stored "
    "before with another note; only the note has changed."
)


def sentences(pairs: int) -> list[tuple[str, str]]:
    """Return up to 72 pairs of praise and blame."""
    from actlas.data.words import BLAME, PRAISE

    frames = ("I thought the {} was {}.", "The {} was {}.")
    words = list(zip(PRAISE[:6], BLAME[:6], strict=True))
    found = [
        (frame.format(thing, good), frame.format(thing, bad))
        for (good, bad), thing, frame in product(words, THINGS, frames)
    ]
    return found[:pairs]


def _above_components(found: Sequence[Measurement], seed: int) -> list[Measurement]:
    """Return how much better the semantic axis is reported than each component."""
    from actlas.measure.neurofeedback import auc_above

    areas = {m.group["axis"]: m for m in found if m.name == "report AUC"}
    name = "report AUC below the semantic axis"
    return [
        auc_above(areas[AXIS], other, name, seed).with_group(axis=axis)
        for axis, other in areas.items()
        if axis.startswith("pc")
    ]


def _headline(m: Measured) -> str:
    late = {"axis": AXIS, "examples": "late"}
    report, accuracy = m.get("report AUC", **late), m.get("report accuracy", **late)
    text = m.get("text-only accuracy", **late)
    explicit, implicit = m.get("explicit control", axis=AXIS), m.get("implicit control", axis=AXIS)
    said = []
    for name, value in (
        ("report AUC of the semantic axis", report),
        ("accuracy", accuracy),
        ("a text-only reader's", text),
        ("explicit control d", explicit),
        ("implicit d", implicit),
    ):
        if value is not None and value.low is not None and value.high is not None:
            said.append(f"{name} {value.value:.2f} [{value.low:.2f}, {value.high:.2f}]")
    return ", ".join(said)


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows = [
        {"examples": int(m.group["examples"]), "accuracy": m.value, "who": f"{m.group['axis']}, {who}"}
        for m in measured
        for name, who in (("report accuracy", "report"), ("text-only accuracy", "text only"))
        if m.name == name and m.group["examples"] != "late"
    ]
    return Plot("Report of the model's own label, by examples shown", rows, "examples", "accuracy", "who")
