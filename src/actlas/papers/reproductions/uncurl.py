"""uncurl: shrinking a mixture for one task, is merging experts that are routed alike better than deleting
them?

A byte-level Mixtral with 16 experts a block learns prose, Python source and columns of sums. For each kind of
text its experts become 8 (and 4): pruned by usage or by REAP's score, merged at random, merged by UNCURL with
and without alignment. Arms are judged on held-out text of that kind, before and after a short fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from actlas.core.edit import Edit
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure.likelihood import Losses, nll
from actlas.measure.samples import mean_measurement
from actlas.merge.experts import merge_experts
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import byte_mixtral as tiny
from actlas.papers.reproductions.byte_models import CONTEXT
from actlas.sparsity.expert_pruning import prune_experts

EXPERTS = 16
UNCURL, UNALIGNED, RANDOM = "UNCURL", "UNCURL, not aligned", "random merge"
USAGE, REAP, SCRATCH = "pruned by usage", "pruned by REAP's score", "from scratch"
ARMS = (UNCURL, UNALIGNED, RANDOM, USAGE, REAP)


def judge(m: Measured) -> list[Check]:
    """Holds if with half of the experts and after fine-tuning UNCURL's loss on held-out text of the task is
    below that of merging at random and below that of pruning by usage (both central, paired by document over
    all kinds of text). Beside it: alignment lowers the loss before fine-tuning; four times fewer experts
    lose more than two times fewer; UNCURL after fine-tuning loses no more than a mixture of 8 experts trained
    from scratch on as much text and fine-tuned as long. Falsified if UNCURL is worse than random merging.
    """
    after = {"experts": "8", "tuned": "yes"}
    return [
        Check.below(
            "UNCURL loses less than random merging",
            m.get("loss over", arm=RANDOM, **after),
            0.0,
            central=True,
        ),
        Check.below(
            "UNCURL loses less than pruning by usage",
            m.get("loss over", arm=USAGE, **after),
            0.0,
            central=True,
        ),
        Check.below("alignment helps", m.get("loss over", arm=UNALIGNED, experts="8", tuned="no"), 0.0),
        Check.above("four times fewer experts lose more", m["loss of 4 over 8 experts"], 0.0),
        Check.below(
            "UNCURL loses no more than training from scratch", m.get("loss over", arm=SCRATCH, **after), 0.0
        ),
    ]


@reproduction(
    "uncurl",
    claim="For one task, merging the experts that its routing uses alike (aligned) loses less than deleting "
    "seldom used ones or merging at random, at half of the experts.",
    judge=judge,
    quick={"steps": 220, "tune": 25, "layers": 3, "eval_tokens": 6144, "calibration": 2048},
    full={"steps": 1500, "tune": 50, "layers": 4, "eval_tokens": 32768, "calibration": 8192},
)
def uncurl(*, seed: int, steps: int, tune: int, layers: int, eval_tokens: int, calibration: int) -> Findings:
    """Run it.

    Args:
        seed: of texts, weights, windows and clusters.
        steps: training steps of 2,048 bytes, of either mixture.
        tune: steps of fine-tuning on the task, after the experts were reduced.
        layers: blocks.
        eval_tokens: bytes of each kind of text for the loss.
        calibration: bytes of each kind of text from which usage and router logits come.
    """
    texts = tiny.domains(seed)
    learn = tiny.mixed(texts)
    wide = tiny.train(tiny.byte_mixtral(EXPERTS, seed, layers=layers), learn, steps, seed)
    narrow = tiny.train(tiny.byte_mixtral(EXPERTS // 2, seed, layers=layers), learn, steps, seed)
    wide, narrow = tiny.without_balance(wide), tiny.without_balance(narrow)

    runs: dict[tuple[str, int, bool], list[Losses]] = {}
    options: dict[str, Any] = {"tokens": calibration, "context": CONTEXT}
    for train_on, fit_on, judged in texts.values():

        def loss(model: Model, judged: Any = judged) -> Losses:
            return nll(model, judged, tokens=eval_tokens, context=CONTEXT)

        task = "\n\n".join(train_on)
        runs.setdefault(("all experts", EXPERTS, False), []).append(loss(wide))
        for count in (EXPERTS // 2, EXPERTS // 4):
            for arm, edit in _edits(wide, fit_on, EXPERTS // count, options, seed).items():
                small = tiny.without_balance(wide)
                edit.bake(small)
                runs.setdefault((arm, count, False), []).append(loss(small))
                if count == EXPERTS // 2:
                    runs.setdefault((arm, count, True), []).append(loss(tiny.train(small, task, tune, seed)))
        scratch = tiny.without_balance(narrow)
        runs.setdefault((SCRATCH, EXPERTS // 2, False), []).append(loss(scratch))
        tuned = loss(tiny.train(scratch, task, tune, seed))
        runs.setdefault((SCRATCH, EXPERTS // 2, True), []).append(tuned)
    return _report(runs, list(texts), seed)


def _edits(model: Model, data: Any, factor: int, options: dict[str, Any], seed: int) -> dict[str, Edit]:
    def merged(**more: Any) -> Edit:
        return merge_experts(model, data, factor=factor, seed=seed, **more, **options)

    makers: dict[str, Callable[[], Edit]] = {
        UNCURL: merged,
        UNALIGNED: lambda: merged(align=False),
        RANDOM: lambda: merged(cluster="random"),
        USAGE: lambda: prune_experts(model, data, keep=EXPERTS // factor, score="usage", **options),
        REAP: lambda: prune_experts(
            model, data, keep=EXPERTS // factor, score="router_weighted_norm", **options
        ),
    }
    return {arm: makers[arm]() for arm in ARMS}


def _report(runs: dict[tuple[str, int, bool], list[Losses]], names: list[str], seed: int) -> Findings:
    out: list[Measurement] = []
    rows = []
    for (arm, count, tuned), losses in runs.items():
        group = {"arm": arm, "experts": str(count), "tuned": "yes" if tuned else "no"}
        out.append(_mean("loss", losses, None, group, seed))
        rows.append(
            {"arm": arm, "setting": f"{count} experts{', tuned' if tuned else ''}", "loss": out[-1].value}
        )
        for name, one in zip(names, losses, strict=True):
            out.append(_mean("loss by text", [one], None, {**group, "text": name}, seed))
        if arm != UNCURL and (UNCURL, count, tuned) in runs:
            out.append(_mean("loss over", runs[UNCURL, count, tuned], losses, group, seed))
    half, quarter = EXPERTS // 2, EXPERTS // 4
    out.append(
        _mean("loss of 4 over 8 experts", runs[UNCURL, quarter, False], runs[UNCURL, half, False], {}, seed)
    )
    found = {
        (m.group.get("arm"), m.group.get("experts"), m.group.get("tuned")): m for m in out if m.name == "loss"
    }
    tuned_at = {arm: found[arm, str(half), "yes"].value for arm in (UNCURL, RANDOM, USAGE, REAP)}
    headline = (
        f"8 of 16 experts, tuned: UNCURL {tuned_at[UNCURL]:.3f}, random merge {tuned_at[RANDOM]:.3f}, pruned "
        f"by usage {tuned_at[USAGE]:.3f}, by REAP's score {tuned_at[REAP]:.3f} nats/byte; all experts, not "
        f"tuned {found['all experts', str(EXPERTS), 'no'].value:.3f}"
    )
    plot = Plot("Loss on the task's held-out text", rows, x="setting", y="loss", color="arm", mark="point")
    return Findings(out, headline, NOTE, [plot])


def _mean(
    name: str, losses: list[Losses], base: list[Losses] | None, group: dict[str, str], seed: int
) -> Measurement:
    """Return the loss per byte, or its paired difference to another run, over all documents."""
    tokens = np.concatenate([x.tokens for x in losses])
    total = np.concatenate([x.nll for x in losses])
    if base is not None:
        total = total - np.concatenate([x.nll for x in base])
    return mean_measurement(name, "nats/byte", total / tokens, tokens, seed=seed, group=group, better="lower")


NOTE = (
    "Published: mixtures of 1 to 13 billion parameters with 8 to 128 experts on SuperGLUE; pruning by usage "
    "hurts on every task, UNCURL at a factor of 2 matches or beats a smaller mixture trained from scratch. "
    "Ours: a byte-level Mixtral of 16 experts, three kinds of text as tasks. The published summary gives "
    "clustering by router logits, alignment and activation-weighted means; affinity, reference, matching "
    "score and the merge of the router are our completion. 'Loss over' is UNCURL's loss minus the arm's. "
    "Later work (REAP) reports that pruning beats merging for generation; a pruning arm that wins here "
    "points the same way. Intervals are over documents of one trained model. Losses before fine-tuning are "
    "stored beside those after."
)
