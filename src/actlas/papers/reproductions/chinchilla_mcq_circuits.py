"""chinchilla-mcq-circuits: which parts name the letter of the right option, and in how few dimensions.

Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?" (arXiv 2307.09458). SmolLM2 cannot
choose letters, so a copy is taught label lookup in fifty steps. Its output nodes are found, the head that
looks at the right option is compressed to a few dimensions, and the same dimensions are tried on other
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

RANKS = (1, 2, 3, 4, 8, 64)


def judge(m: Measured) -> list[Check]:
    """Holds if, on words that the copy was not taught, (1) it answers more than 80% of prompts with labels A
    B C D; (2) fewer than 10% of its heads and MLPs carry 80% of all positive direct effects on the right
    letter (central); for the correct-label head with the greatest direct effect, chosen on other prompts,
    compressed in queries, keys and values: (3) rank 3 keeps more than 80% of its direct effect (central), (4)
    its letter, read off this head alone, is right less than 10 points less often than uncompressed (central),
    (5) rank 1 keeps less of the effect than rank 3, (6) random subspaces of rank 3 keep less than 20%; (7) on
    labels X K Q T the same subspace keeps less of the effect than on A B C D, by more than 20 points
    (central: the paper's partial generalisation). It fails if rank 3 fails on A B C D or carries over to X K
    Q T in full. Intervals are over prompts; a check whose interval covers its boundary is undecided."""
    return [
        Check.above("the copy chooses letters", m.get("accuracy", labels="A B C D"), 0.8),
        Check.below("few nodes carry the effect", m.get("nodes that carry the effect"), 0.1, central=True),
        Check.above("three dimensions keep the effect", _kept(m, "3"), 0.8, central=True),
        Check.below("and the letter", m.get("accuracy of the head alone, lost", rank="3"), 0.1, central=True),
        Check.below("one dimension keeps less", m.get("effect kept at rank 1 minus rank 3"), 0.0),
        Check.below("random dimensions keep little", _kept(m, "3", subspace="random"), 0.2),
        Check.below(
            "other labels are not read in full",
            m.get("effect kept on X K Q T minus A B C D", rank="3", parts="qkv"),
            -0.2,
            central=True,
        ),
    ]


def _kept(m: Measured, rank: str, subspace: str = "fitted", labels: str = "A B C D") -> Measurement | None:
    return m.get("effect kept", rank=rank, subspace=subspace, labels=labels, parts="qkv")


@reproduction(
    "chinchilla-mcq-circuits",
    claim="A few nodes name the letter of the right option, the head that looks at it works in about three "
    "dimensions, and these carry over to other labels only in part.",
    judge=judge,
    quick={"taught": 240, "steps": 50, "fit": 32, "test": 40, "total": 10},
    full={"taught": 480, "steps": 50, "fit": 128, "test": 256, "total": 40},
)
def chinchilla_mcq_circuits(
    *, seed: int, taught: int, steps: int, fit: int, test: int, total: int
) -> Findings:
    """Run it.

    Args:
        seed: seed of words, prompts, teaching and intervals.
        taught: prompts to teach the copy with.
        steps: steps of teaching, ten prompts each.
        fit: prompts that choose the head and fit subspaces.
        test: prompts of each set of labels to measure on.
        total: nodes whose total effects are measured, largest direct effects first.
    """
    from actlas.circuits.classify_heads import classify_heads
    from actlas.circuits.node_effects import node_effects
    from actlas.models import load
    from actlas.papers.reproductions.lettered_items import LABELS, lettered_items, word_halves
    from actlas.papers.reproductions.lettered_runs import compression, in_place, lettered, with_total
    from actlas.training.skill_tuning import tune_skill

    base = load("smollm2")
    words, held = word_halves(base, seed)
    items = lettered_items(words, taught, seed=seed)
    model = tune_skill(base, items, steps=steps, batch=10, lr=1e-4, seed=seed)
    chosen = lettered(model, held, fit, LABELS["A B C D"], seed + 11)
    tests = {name: lettered(model, held, test, labels, seed + 12) for name, labels in LABELS.items()}
    measured = [case.accuracy(name, seed) for name, case in tests.items()]

    on_test = node_effects(model, tests["A B C D"].pairs, labels=tests["A B C D"].ids, seed=seed)
    measured += [on_test.carrying_measured(), *on_test.top(8)]
    direct = node_effects(model, chosen.pairs, labels=chosen.ids, seed=seed)
    families = classify_heads(model, chosen.pairs, chosen.columns, chosen.right)
    measured += with_total(model, tests["A B C D"], [direct.nodes[i] for i in direct.order()[:total]], seed)
    readers = [f.head for f in families if f.family in ("correct label", "single label")]
    if not readers:
        note = f"{NOTE} No head looks at the right option more than at others, so there is none to compress."
        return Findings(measured, "no correct-label head was found", note)
    readers.sort(key=lambda node: -float(direct.of(node).mean()))
    found = compression(model, readers[0], chosen, tests, RANKS, seed)
    measured += found
    same = [node for node in readers if node.block == readers[0].block]
    measured += in_place(model, same, chosen, tests["A B C D"], seed)
    counts: dict[str, int] = {}
    for f in families:
        counts[f.family] = counts.get(f.family, 0) + 1
    said = ", ".join(f"{n} {family}" for family, n in sorted(counts.items(), key=lambda c: -c[1]))
    note = (
        f"{NOTE} Heads by family: {said}. The compressed head is {readers[0].label}; correct-label heads: "
        f"{', '.join(node.label for node in readers)}."
    )
    return Findings(measured, _headline(Measured(measured), readers[0].label), note, [_plot(measured)])


NOTE = (
    "Published: Chinchilla 70B on MMLU, five-shot. Ours: SmolLM2-135M-Instruct, a copy taught 'Which "
    "option says WORD?' with four one-token words (AdamW, all weights but the embedding), tested on other "
    "words. Scores are centred over the four labels, the final norm's scale is held. The head may look at "
    "an option's label or at its word, so both columns of each option count, for attention (weighted by "
    "values) and for compression; keys and values are centred over the four options and each has its own "
    "subspace, as have queries, before rotation; the complement is set to the mean over the fitting "
    "prompts. The head alone is recomputed, so that heads that share its keys are left as they are. "
    "Accuracy of the head alone is how often its own contribution is largest on the right letter. "
    "Published ranks are for several heads and many prompts. Tried before: this copy, with the heads of "
    "block 23 (the three with the largest leads), on 24 prompts of its taught words; and a run with 8 "
    "other prompts each. The stored run takes the taught copy from the cache, so its seconds leave "
    "teaching out."
)


def _headline(m: Measured, label: str) -> str:
    nodes, three, other = (
        m.get("nodes that carry the effect"),
        _kept(m, "3"),
        _kept(m, "3", labels="X K Q T"),
    )
    assert nodes is not None and three is not None and other is not None
    return (
        f"{nodes.value:.1%} of nodes carry 80% of the direct effect; in 3 dimensions {label} keeps "
        f"{three.value:.0%} of its effect on A B C D and {other.value:.0%} on X K Q T"
    )


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows: list[dict[str, Any]] = []
    for m in measured:
        if m.name == "effect kept" and m.group["parts"] == "qkv":
            series = m.group["labels"] if m.group["subspace"] == "fitted" else f"random, {m.group['labels']}"
            rows.append({"rank": int(m.group["rank"]), "share of the effect kept": m.value, "labels": series})
    return Plot(
        "A head that names the letter, compressed",
        rows,
        "rank",
        "share of the effect kept",
        "labels",
        log="x",
    )
