"""A gray-box detector on a model's outputs: memorised text, wrong answers, edited models.

    probe = fit_output_probe(model, [("a text", 1), ...])             # or (signature, labels), groups=...
    probe.score(output_signature(model, texts))                       # logits; label 1 above 0
    probe.save("los/")

The detector is judged out of fold: items of one group (a country, a document, the same text) are never on
both sides, and scores are ranked within each fold before folds are pooled, because detectors of different
folds have different scales. All hand-made scores, a logistic regression on summary features, the
transformer without sorted log-probabilities (ATP+R), the number of rows alone and the detector itself on
shuffled labels are judged on the same folds.

Source: "Learning on LLM Output Signatures for gray-box LLM Behavior Analysis" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from actlas.core.errors import ArtifactError, InputError, NonFiniteError, ShapeError
from actlas.core.lens import Lens, check_finite
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.probe_data import parse_items
from actlas.core.probe_quality import auc
from actlas.core.resampling import draws, percentiles
from actlas.measure.output_signature import SCORES, OutputSignature, output_signature
from actlas.security.output_detectors import (
    KINDS,
    NETWORKS,
    Array,
    Detector,
    Index,
    Training,
    build,
    fit_detector,
)

if TYPE_CHECKING:
    from actlas.core.model import Model

BASELINES = (*SCORES, "logistic", "atp-r")
_OVER = "bootstrap over held-out groups"


@dataclass(kw_only=True, eq=False)
class OutputProbe(Lens):
    """A detector on output signatures.

    Attributes:
        kind: which detector; see `actlas.security.output_detectors`.
        state, network: its numbers.
        top_k, rows, vocabulary: the signatures that it reads.
    """

    site: str = "logits"
    kind: str = "los-net"
    state: Tensor
    network: Mapping[str, Any] = field(default_factory=dict)
    top_k: int
    rows: int
    vocabulary: int

    def __post_init__(self) -> None:
        check_finite("OutputProbe", state=self.state)
        if self.kind not in KINDS:
            raise ArtifactError(f"an output probe of unknown kind {self.kind!r}; upgrade Actlas")
        if self.kind in NETWORKS:
            build(self.network, self.state)

    @property
    def channels(self) -> int:
        return self.top_k

    def score(self, x: OutputSignature | Tensor) -> Tensor:
        """Return one score for each text, `[n]`; higher speaks for label 1.

        Raises:
            InputError: activations instead of an `OutputSignature`, or one of another K or vocabulary.
        """
        if not isinstance(x, OutputSignature):
            raise InputError(
                f"an output probe reads an OutputSignature, not a {type(x).__name__}; "
                "make one with output_signature(model, texts)"
            )
        if x.vocabulary != self.vocabulary or (self.kind == "los-net" and x.top_k != self.top_k):
            raise ShapeError(
                f"this probe reads {self.top_k} of {self.vocabulary} log-probabilities a row, "
                f"not {x.top_k} of {x.vocabulary}"
            )
        return Detector(self.kind, self.state, self.network).score(x.cut(self.rows))

    def judge(self, model: Model, texts: Sequence[Any]) -> Tensor:
        """Return the score of each text (or (prompt, continuation)) as this model writes it, `[n]`."""
        return self.score(output_signature(model, texts, top_k=self.top_k, rows=self.rows))


@method(
    "output-probe",
    room="security",
    returns="Lens",
    data="labelled",
    summary="tell labelled texts apart by the model's output distributions alone, beside hand-made scores",
    example="actlas fit output-probe smollm2 members.jsonl -o los/",
    papers=("los-net",),
)
def fit_output_probe(
    model: Model | None,
    data: Any,
    *,
    kind: str = "los-net",
    groups: Sequence[Any] | None = None,
    top_k: int = 1000,
    rows: int = 100,
    folds: int = 5,
    baselines: bool = True,
    controls: int = 1,
    seed: int = 0,
    **training: Any,
) -> OutputProbe:
    """Fit a detector on output signatures and judge it out of fold.

    Args:
        model: whose outputs are read; may be `None` if `data` holds signatures.
        data: labelled texts or pairs of texts; items `((prompt, continuation), label)`; or a tuple
            `(OutputSignature, labels)`.
        kind: `"los-net"`, `"atp-r"`, `"logistic"`, or the name of a hand-made score.
        groups: for each item what must stay on one side of a split; default the text (or pair).
        top_k, rows: of the signatures.
        folds: of the cross-validation.
        baselines: judge the other detectors on the same folds.
        controls: runs of the whole procedure on shuffled labels.
        seed: of folds, networks, shuffles and bootstrap.
        **training: fields of `Training`, e.g. `epochs=100`.

    Returns:
        The detector fitted on all items. `measurements`: `output-probe AUC` and `output-probe TPR at 5%
        FPR`, the same for each baseline (group `detector`), and differences from the best hand-made score,
        from the number of rows and from shuffled labels.

    Raises:
        InputError: an unknown kind or option, one label only, fewer groups of a label than folds.
        NonFiniteError: NaN or infinity among labels or log-probabilities.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; it must be of {', '.join(KINDS)}")
    if folds < 2 or controls < 0:
        raise InputError(f"folds is {folds} and controls {controls}; give at least 2 and 0")
    try:
        how = Training(**training)
    except TypeError as error:
        raise InputError(f"{error}; options of the training are {', '.join(vars(Training()))}") from error
    los, y, own = _gather(model, data, top_k, rows)
    code = own if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)
    _check(los, y, code, folds)
    named = [kind, *(b for b in BASELINES if baselines and b != kind)]
    scores = {name: out_of_fold(name, los, y, code, folds, how, seed) for name in named}
    shuffled = []
    generator = np.random.default_rng(seed)
    for i in range(controls):
        blank = generator.permutation(y)
        shuffled.append((blank, out_of_fold(kind, los, blank, code, folds, how, seed + i)))
    made = fit_detector(kind, los, y, code, how, seed)
    return OutputProbe(
        fingerprint=None if model is None else model.fingerprint,
        measurements=tuple(_measurements(kind, scores, shuffled, y, code, seed)),
        kind=kind,
        state=made.state,
        network=dict(made.network),
        top_k=los.top_k,
        rows=los.mask.shape[1],
        vocabulary=los.vocabulary,
    )


def out_of_fold(
    kind: str, los: OutputSignature, y: Index, groups: Index, folds: int, training: Training, seed: int
) -> Array:
    """Return each item's score by a detector without its group: its rank within the fold, 0 to 1."""
    from scipy.stats import rankdata
    from sklearn.model_selection import StratifiedGroupKFold

    out = np.zeros(len(y))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fit, test in splitter.split(y, y, groups):
        made = fit_detector(kind, los.at(torch.tensor(fit)), y[fit], groups[fit], training, seed)
        found = made.score(los.at(torch.tensor(test))).double().numpy()
        out[test] = (rankdata(found) - 0.5) / len(test)
    return out


def _measurements(
    kind: str,
    scores: Mapping[str, Array],
    shuffled: Sequence[tuple[Index, Array]],
    y: Index,
    groups: Index,
    seed: int,
) -> list[Measurement]:
    def made(name: str, unit: str, value: Array, resampled: Array, **more: Any) -> Measurement:
        low, high = percentiles([resampled], groups)
        return Measurement(name, float(value), unit, len(y), low, high, _OVER, seed, better="higher", **more)

    labels = y.astype(np.float64)
    counts = np.concatenate(list(draws(groups, seed)))
    one = np.ones((1, len(y)))
    areas = {name: (auc(labels, s, one)[0], auc(labels, s, counts)) for name, s in scores.items()}
    noise = [
        (auc(b.astype(np.float64), s, one)[0], auc(b.astype(np.float64), s, counts)) for b, s in shuffled
    ]
    out = []
    for name, (value, drawn) in areas.items():
        group = {"detector": name}
        out.append(made("output-probe AUC", "AUC", value, drawn, group=group))
        rates = [_tpr(labels, scores[name], w) for w in (one, counts[:300])]
        out.append(made("output-probe TPR at 5% FPR", "fraction", rates[0][0], rates[1], group=group))
    rivals: dict[str, tuple[Any, Array]] = {}
    hand = [n for n in SCORES if n in areas and n not in (kind, "length")]
    if hand:
        best = max(hand, key=lambda n: areas[n][0])
        rivals[f"the best hand-made score ({best})"] = areas[best]
    for name, said in (("length", "the number of rows"), ("logistic", "logistic"), ("atp-r", "ATP+R")):
        if name in areas and name != kind:
            rivals[said] = areas[name]
    if noise:
        blank = (np.mean([v for v, _ in noise]), np.mean([d for _, d in noise], axis=0))
        rivals["shuffled labels"] = blank
        out.append(made("output-probe AUC", "AUC", *blank, group={"detector": f"{kind}, shuffled labels"}))
    value, drawn = areas[kind]
    for said, (other, others) in rivals.items():
        name = "the best hand-made score" if said.startswith("the best") else said
        out.append(
            made(
                f"AUC above {name}", "AUC", value - other, drawn - others, group={"detector": kind}, note=said
            )
        )
    return out


def _tpr(y: Array, scores: Array, weights: Array, fpr: float = 0.05) -> Array:
    """Return the share of positives above the threshold that at most `fpr` of the negatives exceed."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))  # ends of ties
    w = weights[:, order]
    positive, negative = (np.cumsum(w * side, 1) for side in (y[order] > 0.5, y[order] <= 0.5))
    with np.errstate(invalid="ignore", divide="ignore"):
        allowed = negative[:, last] / negative[:, -1:] <= fpr
        found: Array = np.where(allowed, positive[:, last], 0.0).max(1) / positive[:, -1]
    return found


def _gather(model: Model | None, data: Any, top_k: int, rows: int) -> tuple[OutputSignature, Index, Index]:
    """Return signatures, labels 0 and 1, and the group of each item."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], OutputSignature):
        los, labels = data[0].cut(rows), np.asarray(data[1], dtype=np.float64)
        if labels.shape != (len(los),):
            raise ShapeError(f"{len(los)} signatures need as many labels, not {list(labels.shape)}")
        return los, _labels(labels), np.arange(len(labels))
    if model is None:
        raise InputError("texts need a model to read their signatures with; or give (signature, labels)")
    items = list(data)
    if items and all(isinstance(i, tuple) and len(i) == 2 and isinstance(i[0], tuple) for i in items):
        texts: list[Any] = [i[0] for i in items]
        labels = np.array([float(i[1]) for i in items])
        known: dict[Any, int] = {}
        own = np.array([known.setdefault(tuple(map(str, t)), len(known)) for t in texts])
    else:
        texts, given, numbers, _ = parse_items(items)
        labels, own = np.array(given), np.array(numbers, dtype=np.int64)
    return output_signature(model, texts, top_k=top_k, rows=rows), _labels(labels), own


def _labels(labels: ArrayLike) -> Index:
    y = np.asarray(labels, dtype=np.float64)
    if not np.isfinite(y).all():
        raise NonFiniteError("the labels hold NaN or infinity; they must be 0 or 1")
    if not np.isin(y, (0.0, 1.0)).all():
        raise InputError(f"the labels must be 0 or 1, not {y[~np.isin(y, (0.0, 1.0))][0]:g}")
    return y.astype(np.int64)


def _check(los: OutputSignature, y: Index, groups: Index, folds: int) -> None:
    if len(groups) != len(y):
        raise InputError(f"there are {len(y)} items but {len(groups)} groups")
    if len(np.unique(y)) < 2:
        raise InputError(f"every label is {y[0]}; a detector needs texts of both kinds")
    fewest = min(len(np.unique(groups[y == c])) for c in (0, 1))
    if fewest < folds:
        raise InputError(f"one label comes from only {fewest} groups; {folds} folds need at least {folds}")
