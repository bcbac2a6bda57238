"""los-net: are wrong answers and memorised text seen in a model's output distributions?

Two gray-box tasks. Hallucination: SmolLM2 answers where countries lie, what their capitals and currencies
are, 8 greedy tokens each; is the answer right? All facts of a country stay on one side of a split.
Membership: a byte-level model learns half of some windows of Moby-Dick; which did it learn? LOS-Net is
compared with hand-made scores, a logistic regression on summaries, the transformer without the sorted
log-probabilities, the number of rows, and itself on shuffled labels, all on the same folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.los_net_facts import facts
from actlas.papers.reproductions.prompt_only import without

if TYPE_CHECKING:
    from actlas.measure.output_signature import OutputSignature

TASKS = ("hallucination", "membership")
BEST = "AUC above the best hand-made score"


def judge(m: Measured) -> list[Check]:
    """Holds if LOS-Net's out-of-fold AUC is above that of the best hand-made score (mean and minimum
    log-probability, entropy, Min-K%, Min-K%++, rank; the best is chosen on the same items, in their favour)
    on both tasks, wrong answers and membership, by intervals above 0 (central; one interval below 0 refutes
    the claim for that task). Also: on each task its AUC is above 0.5, above that of the number of rows and
    above that of shuffled labels; trained on two relations it tells right from wrong on the third (mean AUC
    within the relation left out above 0.5).
    """
    checks = []
    for task in TASKS:
        checks.append(
            Check.above(f"{task}: above the best hand-made score", m.get(BEST, task=task), 0.0, central=True)
        )
    for task in TASKS:
        own = m.get("output-probe AUC", task=task, detector="los-net")
        checks += [
            Check.above(f"{task}: better than chance", own, 0.5),
            Check.above(
                f"{task}: above the number of rows", m.get("AUC above the number of rows", task=task), 0.0
            ),
            Check.above(f"{task}: above shuffled labels", m.get("AUC above shuffled labels", task=task), 0.0),
        ]
    checks.append(Check.above("transfers to an unseen relation", m.get("transfer AUC"), 0.5))
    return checks


@reproduction(
    "los-net",
    claim="A network on the sequence of output distributions detects wrong answers and memorised text better "
    "than hand-made gray-box scores, and transfers.",
    judge=judge,
    quick={"countries": 80, "members": 64, "steps": 60, "rows": 24, "epochs": 60, "folds": 4, "controls": 1},
    full={
        "countries": 95,
        "members": 256,
        "steps": 300,
        "rows": 64,
        "epochs": 200,
        "folds": 5,
        "controls": 3,
    },
)
def los_net(
    *,
    seed: int,
    countries: int,
    members: int,
    steps: int,
    rows: int,
    epochs: int,
    folds: int,
    controls: int,
) -> Findings:
    """Run it.

    Args:
        seed: of models, folds and intervals.
        countries: whose facts are asked.
        members: windows that the byte model learns, and as many that it does not.
        steps: of the byte model's training.
        rows: bytes of a window that are looked at.
        epochs, folds, controls: of LOS-Net's training and of the cross-validation.
    """
    from actlas.security.output_probe import fit_output_probe

    out: list[Measurement] = []
    options: dict[str, Any] = {"folds": folds, "epochs": epochs, "controls": controls, "seed": seed}
    answers, right, country, relation, share = _answers(countries)
    probe = fit_output_probe(None, (answers, right), groups=country, **options)
    out += [m.with_group(task="hallucination") for m in probe.measurements]
    out += share
    out.append(_transfer(answers, right, country, relation, epochs, seed))
    text, member, place = _membership(members, steps, rows, seed)
    probe = fit_output_probe(None, (text, member), groups=place, rows=rows, **options)
    out += [m.with_group(task="membership") for m in probe.measurements]
    return Findings(out, _headline(Measured(out)), f"{NOTE} {without('los-net')}", [_plot(out)])


NOTE = (
    "Published: models of 7 to 8 billion parameters, HotpotQA, IMDB and Movies for hallucination, WikiMIA "
    "and BookMIA for membership, 300 to 500 epochs, three seeds. Official code: no attention mask, so padded "
    "rows count as zeros, and padded ranks as the last of the vocabulary; here rows are masked. Ours: "
    "answers are greedy, so the rank of every token is 0 and all are 8 tokens long: rank and length cannot "
    "help there, by design. Relations differ in how often the answer is right, which every detector may "
    "use; 'right answers' gives the shares and 'transfer AUC' is taken within a relation that was left out. "
    "Tried before this run on the same model, with another wording for currencies and two other seeds: "
    "widths 32 and 64, dropout 0.1 and 0.3, learning rates 3e-4 to 3e-3; the AUC of LOS-Net on wrong answers "
    "was 0.73 to 0.75 (0.70 once, at 3e-3), the level of the mean log-probability, and the dropout of the "
    "paper, 0.3, was kept; one small run of everything with 10 epochs, too few to learn (AUC 0.33). A run of "
    "these very settings was stored before with another note; only the note has changed. The byte model of "
    "the quick mode has seen its windows some 15 times and hardly remembers them: no detector does well "
    "there."
)


def _answers(
    countries: int,
) -> tuple[OutputSignature, NDArray[np.int64], list[str], list[str], list[Measurement]]:
    """Return signatures of the model's answers, which are right, and their countries and relations."""
    from actlas.measure.output_signature import output_signature
    from actlas.measure.samples import rate_measurement
    from actlas.models import load

    model = load("smollm2")
    known = list(dict.fromkeys(f.country for f in facts()))
    # every k-th country, so that all continents are there
    kept = {known[i] for i in np.linspace(0, len(known) - 1, min(countries, len(known))).round().astype(int)}
    asked = [f for f in facts() if f.country in kept]
    texts: list[tuple[Any, Any]] = []
    right: list[bool] = []
    for start in range(0, len(asked), 64):
        some = asked[start : start + 64]
        made = model.generate([f.prompt for f in some], max_new_tokens=8)
        prompts = model.tokenizer([f.prompt for f in some])["input_ids"]
        texts += [(tuple(p), tuple(t.tolist())) for p, t in zip(prompts, made.tokens, strict=True)]
        right += [f.right(t) for f, t in zip(some, made.texts, strict=True)]
    hits = np.array(right)
    relation = [f.relation for f in asked]
    share = [
        rate_measurement("right answers", hits[[r == name for r in relation]], group={"relation": name})
        for name in dict.fromkeys(relation)
    ]
    return output_signature(model, texts), hits.astype(np.int64), [f.country for f in asked], relation, share


def _transfer(
    los: OutputSignature,
    right: NDArray[np.int64],
    country: Sequence[str],
    relation: Sequence[str],
    epochs: int,
    seed: int,
) -> Measurement:
    """Return the mean AUC on each relation by a network that was fitted on the other two."""
    from actlas.core.probe_quality import auc
    from actlas.core.resampling import draws, percentiles
    from actlas.security.output_detectors import Training, fit_detector

    groups = np.unique(country, return_inverse=True)[1].astype(np.int64)
    names = np.array(relation)
    scores = np.zeros(len(right))
    for name in np.unique(names):
        fit, test = np.flatnonzero(names != name), np.flatnonzero(names == name)
        made = fit_detector(
            "los-net", los.at(torch.tensor(fit)), right[fit], groups[fit], Training(epochs=epochs), seed
        )
        scores[test] = made.score(los.at(torch.tensor(test))).double().numpy()

    def mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        areas = [
            auc(right[i].astype(float), scores[i], weights[:, i]) for i in (names == n for n in set(names))
        ]
        return np.asarray(np.mean(areas, axis=0))

    value = float(mean(np.ones((1, len(right))))[0])
    low, high = percentiles((mean(w) for w in draws(groups, seed)), groups)
    return Measurement(
        "transfer AUC", value, "AUC", len(right), low, high, "bootstrap over countries", seed, better="higher"
    )


def _membership(
    members: int, steps: int, rows: int, seed: int
) -> tuple[OutputSignature, NDArray[np.int64], list[int]]:
    """Return signatures of windows of Moby-Dick, which of them a byte model learned, and their places."""
    from actlas.data import corpus
    from actlas.measure.output_signature import output_signature
    from actlas.papers.reproductions.byte_models import CONTEXT, train_checkpoints

    prose = " ".join(d.text for d in corpus("prose", seed=seed)).encode("ascii", "ignore").decode()
    windows = [prose[i : i + CONTEXT] for i in range(0, CONTEXT * 2 * members, CONTEXT)]
    drawn = np.random.default_rng(seed).permutation(len(windows))
    learned = np.zeros(len(windows), dtype=np.int64)
    learned[drawn[:members]] = 1
    text = "\n".join(windows[i] for i in np.flatnonzero(learned))
    _, model = next(train_checkpoints(text, activation="silu", checkpoints=(steps,), seed=seed))
    los = output_signature(model, windows, top_k=256, rows=rows)
    return los, learned, list(range(len(windows)))


def _headline(m: Measured) -> str:
    said = []
    for task in TASKS:
        own = m.get("output-probe AUC", task=task, detector="los-net")
        gap = m.get(BEST, task=task)
        if own is not None and gap is not None and gap.low is not None and gap.high is not None:
            best = gap.note.partition("(")[2].rstrip(")")
            more = f"{gap.value:+.3f} [{gap.low:.3f}, {gap.high:.3f}]"
            said.append(f"{task}: AUC {own.value:.2f}, {more} against {best}")
    return "; ".join(said)


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows = [
        {"detector": m.group["detector"], "AUC": m.value, "task": m.group["task"]}
        for m in measured
        if m.name == "output-probe AUC"
    ]
    return Plot("Out-of-fold AUC of each detector", rows, "detector", "AUC", "task", "point")
