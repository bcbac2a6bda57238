"""subspace-patching-illusion: a learned direction can work where the variable is not.

Makelov, Lange and Nanda 2023, "Is This the Subspace You Are Looking for? An Interpretability Illusion for
Subspace Activation Patching". On indirect-object identification, which of the two names comes first (Pos) is
in SmolLM2's residual stream at the last token around block 20, and MLP 19 does not write it. A direction
learned there by DAS lowers the logit difference all the same, and the illusion test says why; the same
learning in the residual stream finds where the variable is. The smallest network with the illusion is run
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actlas.circuits.illusion import EFFECT, GAP, PARTS, READABLE
from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model
    from actlas.data.task_items import TaskItem

MLP, RESIDUAL = "blocks.19.mlp.act", "blocks.20.resid_post"
_EXACT = 1e-12


def judge(m: Measured) -> list[Check]:
    """Holds if (1) in the network h = (x, 0, x), output h1 + 2 h2, the patch along (0, 1, 1) gives the
    published hidden vector and output exactly and is called an illusion, while the patch along (1, 0, 0) of
    the same effect is called faithful (central); on held-out IOI prompts with other names, (2) the direction
    learned in MLP 19 has an effect above that of random directions (central), (3) its readable and unreadable
    parts have less than 80% of its effect (central), (4) patching the whole MLP has less effect than patching
    the one direction (central), (5) the unreadable part alone has none, and (6) the direction learned in the
    residual stream at block 20 keeps more than 80% of its effect in its parts (central) and (7) most of it in
    the part that the strongest query heads read. Effects are fractional logit difference decreases with
    intervals over prompts; a check whose interval covers its boundary is undecided."""
    error = m.get("deviation of the distilled network")
    verdicts = {v.group["case"]: v.note.split(":")[0] for v in m.every(PARTS) if "case" in v.group}
    said = ", ".join(f"{case}: {v}" for case, v in verdicts.items())
    right = sorted(verdicts.values()) == ["faithful", "illusion"]
    exact = error is not None and error.value < _EXACT
    known = error is not None and len(verdicts) == 2
    checks = [
        Check(
            "the distilled network shows the illusion exactly, and only along (0, 1, 1)",
            (exact and right and "0, 1, 1" in next(c for c, v in verdicts.items() if v == "illusion"))
            if known and right
            else (False if known else None),
            f"deviation {error.value if error else float('nan'):.1e}; {said}",
            central=True,
        )
    ]
    own, chance = m.get(EFFECT, site=MLP, part="subspace"), m.get(EFFECT, site=MLP, part="random")
    bound = max(0.0, chance.high or chance.value) if chance is not None else 0.0
    checks.append(Check.above("a direction learned in MLP 19 works", own, bound, central=True))
    parts = m.get(PARTS, site=MLP)
    checks.append(Check.below("its parts alone work much less", parts, 0.8, central=True))
    gap = m.get(GAP, site=MLP)
    checks.append(Check.below("the whole MLP does less than one direction in it", gap, 0.0, central=True))
    unread = m.get(EFFECT, site=MLP, part="unreadable")
    silent = unread is not None and abs(unread.value) < 1e-3
    checks.append(
        Check("the part that nothing reads does nothing", silent if unread else None, str(unread or ""))
    )
    found = m.get(PARTS, site=RESIDUAL)
    checks.append(Check.above("in the residual stream the parts keep the effect", found, 0.8, central=True))
    read = m.get(READABLE, site=RESIDUAL)
    checks.append(Check.above("most of it is what the strongest query heads read", read, 0.5))
    return checks


@reproduction(
    "subspace-patching-illusion",
    claim="A direction learned in an MLP that does not carry the variable works through a normally silent "
    "pathway; the same learning in the residual stream finds the variable.",
    judge=judge,
    quick={"names": 16, "pairs": 32, "steps": 40, "sites": (MLP, RESIDUAL), "whole": ()},
    full={
        "names": 24,
        "pairs": 64,
        "steps": 90,
        "sites": (
            *(f"blocks.{i}.mlp.act" for i in range(18, 23)),
            *(f"blocks.{i}.resid_post" for i in range(18, 23)),
        ),
        "whole": (16, 18, 19, 20, 22, 24),
    },
)
def subspace_patching_illusion(
    *, seed: int, names: int, pairs: int, steps: int, sites: Sequence[str], whole: Sequence[int]
) -> Findings:
    """Run it.

    Args:
        seed: seed of prompts, learning, random directions and intervals.
        names: how many names the prompts use, half of them for learning.
        pairs: pairs for learning, and as many for the test.
        steps: steps of learning a direction.
        sites: where a direction is learned.
        whole: blocks whose whole residual stream is patched, for the course over depth.
    """
    from actlas.circuits.das import learn, subspace_faithfulness
    from actlas.circuits.interchange import Interchange
    from actlas.models import load
    from actlas.papers.reproductions.distilled_illusion import distilled

    toy = distilled(seed=seed)
    measured = [
        Measurement("deviation of the distilled network", toy.error, "absolute", 64),
        *toy.illusion.measurements,
        *toy.honest.measurements,
    ]
    model = load("smollm2")
    learned, test = position_pairs(model, names, pairs, seed)
    verdicts = []
    for site in sites:
        swap = Interchange.of(model, learned, site)
        directions = learn(swap, steps=steps, seed=seed, what=f"DAS at {site}")
        report = subspace_faithfulness(model, directions, test, site=site, seed=seed)
        measured += report.measurements
        verdicts.append(f"{site}: {report.verdict} (read by {', '.join(report.readers)})")
    measured += [_whole(model, test, block, seed) for block in whole]
    note = f"{NOTE} Verdicts: {'; '.join(verdicts)}."
    return Findings(measured, _headline(Measured(measured)), note, [_plot(measured)])


NOTE = (
    "Published: GPT-2 small, MLP 8 and the residual stream at layer 8, DAS for 30 epochs on prompts of "
    "four pattern pairs, names and templates disjoint. Ours: SmolLM2-135M-Instruct; the source prompt has "
    "the same two names in the other order (so its right answer is the same), names are disjoint between "
    "learning and test, templates are shared, only prompts that the model answers right are used. The "
    "gated MLP's site is the product that enters the down projection. The parts of a direction are "
    "patched along their own unit vectors, as in the paper's table. The residual stream as a whole is "
    "read in every direction, so its readers are the four query heads through which the patch works most, "
    "found by attribution on the test prompts; what they do not read others may read, and this is why "
    "both parts are added up for the verdict. The distilled network is a case in float64 whose formulas "
    "are published. Before the criterion was written, 20 steps on 24 pairs were tried at the same sites "
    "and seed, and after it with seed 5. That both parts are added up was decided after the first of "
    "these tries."
)


def position_pairs(model: Model, names: int, n: int, seed: int) -> tuple[PromptPairs, PromptPairs]:
    """Return pairs for learning and test, on disjoint names; the other prompt has its names exchanged."""
    from actlas.circuits.batch import PromptPairs
    from actlas.data import task

    items = task("ioi", model.tokenizer, n=16 * n, seed=seed, words=names)
    known = sorted({i.attributes["IO"] for i in items} | {i.attributes["S"] for i in items})
    first = set(known[::2])
    sides: tuple[list[TaskItem], list[TaskItem]] = [], []
    for item in items:
        receiver, giver = (item.attributes[who] in first for who in ("IO", "S"))
        if receiver == giver and "Pos" in item.variants and len(sides[giver]) < n + n // 2:
            sides[giver].append(item)
    made = [PromptPairs.from_task(model, s, n=n, variant="Pos", correct_only=True, seed=seed) for s in sides]
    return made[0], made[1]


def _whole(model: Model, pairs: PromptPairs, block: int, seed: int) -> Measurement:
    """Return the effect of patching the whole residual stream after a block."""
    from actlas.circuits.interchange import Interchange
    from actlas.core.intervals import bootstrap_ratio

    swap = Interchange.of(model, pairs, f"blocks.{block}.resid_post")
    clean = swap.run(swap.base).metric.cpu().numpy()
    change = clean - swap.run(swap.source).metric.cpu().numpy()
    low, high = bootstrap_ratio(change, clean, seed=seed)
    group = {"site": f"blocks.{block}.resid_post", "part": "whole, over depth"}
    value = float(change.mean() / clean.mean())
    return Measurement(
        EFFECT, value, "fraction", len(clean), low, high, "bootstrap over prompts", seed, group=group
    )


def _headline(m: Measured) -> str:
    said = []
    for site, name in ((MLP, "MLP 19"), (RESIDUAL, "residual stream at block 20")):
        own, parts = m.get(EFFECT, site=site, part="subspace"), m.get(PARTS, site=site)
        if own is not None and parts is not None:
            said.append(
                f"{name}: one direction lowers the logit difference by {own.value:.0%}, its parts alone by "
                f"{parts.value:.0%} of that"
            )
    whole = m.get(EFFECT, site=MLP, part="whole")
    if whole is not None:
        said[0] += f", the whole MLP by {whole.value:.0%}"
    return "; ".join(said)


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows = [
        {"site": m.group["site"], "effect (FLDD)": m.value, "patched": m.group["part"]}
        for m in measured
        if m.name == EFFECT and "site" in m.group
    ]
    return Plot("What patching each part does", rows, "patched", "effect (FLDD)", "site", "bar")
