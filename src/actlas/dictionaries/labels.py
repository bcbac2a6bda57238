"""Names for features, by a stated rule: what do the tokens have in common at which it fires strongly?

Every token has attributes whose truth is known: the token itself, the one before and the one after it, its
kind (capitalised, digits, punctuation, ...), the domain of its text. A feature's label is the attribute
value, or the union of up to five values of one attribute, that best tells where it fires:

    fires(j)  = z_j above a quarter of its largest value
    label(j)  = argmax over (attribute, values) of F1 on the even windows of text
    precision = P(value | fires)        recall = P(fires | value)        both on the odd windows

This is the concept dictionary of RecSAE (Wang et al. 2024) with attributes in place of a language model's
guess: named on one half, verified on the other. A feature keeps its label only with F1 of at least 0.3 and
at least five firings on the verifying half; all others are unnamed, which is most of them in small
dictionaries. A label says what goes along with a feature, not what the feature does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.intervals import wilson

if TYPE_CHECKING:
    from actlas.dictionaries.feature_codes import CorpusCodes

STRONG = 0.25
LEAST_F1 = 0.3
LEAST_FIRINGS = 5
MOST_VALUES = 5
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Label:
    """What a feature goes along with.

    Attributes:
        attribute: `"token"`, `"previous token"`, `"next token"`, `"kind"` or `"domain"`.
        values: the values, best first.
        precision, recall, f1: on tokens that were not used to choose the label.
        low, high: 95% interval of the precision (Wilson).
        firings: strong firings on those tokens.
    """

    attribute: str
    values: tuple[str, ...]
    precision: float
    recall: float
    f1: float
    low: float
    high: float
    firings: int

    def __str__(self) -> str:
        shown = ", ".join(repr(v) if "token" in self.attribute else v for v in self.values)
        return f"{self.attribute} {shown}"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "text": str(self)}


def label_features(read: CorpusCodes, strings: dict[int, str]) -> list[Label | None]:
    """Return each feature's label, or `None` for an unnamed one.

    Args:
        read: the codes of a corpus.
        strings: the text of every token id in it.
    """
    features, rows, values = read.active()
    first = np.r_[True, features[1:] != features[:-1]] if len(features) else np.zeros(0, bool)
    largest = np.maximum.accumulate(np.where(first, np.arange(len(features)), 0))
    strong = values > STRONG * values[largest] if len(features) else first
    features, rows = features[strong], rows[strong]
    naming = (read.window.numpy() % 2) == 0
    best: list[tuple[float, str, list[int]]] = [(0.0, "", [])] * read.codes.features
    columns = attributes(read, strings)
    for name, (column, _) in columns.items():
        found = _best_unions(features, rows, column, naming, read.codes.features)
        best = [(f, name, v) if f > b[0] else b for b, (f, v) in zip(best, found, strict=True)]
    bounds = np.searchsorted(features, np.arange(read.codes.features + 1))
    labels: list[Label | None] = []
    for feature, (f1, name, chosen) in enumerate(best):
        mine = rows[bounds[feature] : bounds[feature + 1]]
        labels.append(
            _verified(mine[~naming[mine]], name, chosen, columns, ~naming) if f1 >= LEAST_F1 else None
        )
    return labels


def attributes(read: CorpusCodes, strings: dict[int, str]) -> dict[str, tuple[Ints, list[str]]]:
    """Return, for each attribute, its value's number at every token (-1: none) and the values' texts."""
    ids, window = read.tokens.numpy(), read.window.numpy()
    unique, numbers = np.unique(ids, return_inverse=True)
    texts = [strings.get(int(i), str(i)) for i in unique]
    before = np.r_[-1, np.where(window[1:] == window[:-1], numbers[:-1], -1)]
    after = np.r_[np.where(window[1:] == window[:-1], numbers[1:], -1), -1]
    kinds = sorted({_kind(t) for t in texts})
    kind = np.array([kinds.index(_kind(t)) for t in texts], dtype=np.int64)[numbers]
    found = {
        "token": (numbers.astype(np.int64), texts),
        "previous token": (before.astype(np.int64), texts),
        "next token": (after.astype(np.int64), texts),
        "kind": (kind, kinds),
    }
    domains = sorted(set(read.groups))
    if len(domains) > 1:
        of_window = np.array([domains.index(g) for g in read.groups], dtype=np.int64)
        found["domain"] = (of_window[window], domains)
    return found


def _kind(text: str) -> str:
    bare = text.strip()
    if not bare:
        return "line break" if "\n" in text else "space"
    if bare.isdigit():
        return "digits"
    if not any(c.isalnum() for c in bare):
        return "punctuation"
    if bare[0].isupper():
        return "capitalised" if text[0].isspace() or len(bare) > 1 else "capital letter"
    return "start of a word" if text[0].isspace() else "inside a word"


def _best_unions(
    features: Ints, rows: Ints, column: Ints, naming: NDArray[np.bool_], count: int
) -> list[tuple[float, list[int]]]:
    """Return for each feature the best F1 of a union of values, on the naming half, and the values."""
    known = naming[rows] & (column[rows] >= 0)
    fired = np.bincount(features[naming[rows]], minlength=count)
    size = int(column.max()) + 1 if len(column) else 0
    support = np.bincount(column[naming & (column >= 0)], minlength=size)
    pairs, joint = np.unique(features[known] * max(size, 1) + column[rows][known], return_counts=True)
    owner, value = pairs // max(size, 1), pairs % max(size, 1)
    single = 2 * joint / (fired[owner] + support[value])
    order = np.lexsort((value, -single, owner))
    owner, value, joint = owner[order], value[order], joint[order]
    bounds = np.searchsorted(owner, np.arange(count + 1))
    found: list[tuple[float, list[int]]] = []
    for feature in range(count):
        mine = slice(bounds[feature], min(bounds[feature + 1], bounds[feature] + MOST_VALUES))
        hits, wide = joint[mine].cumsum(), support[value[mine]].cumsum()
        if not len(hits):
            found.append((0.0, []))
            continue
        f1 = 2 * hits / (fired[feature] + wide)
        most = int(f1.argmax())
        found.append((float(f1[most]), value[mine][: most + 1].tolist()))
    return found


def _verified(
    rows: Ints,
    name: str,
    chosen: list[int],
    columns: dict[str, tuple[Ints, list[str]]],
    half: NDArray[np.bool_],
) -> Label | None:
    column, texts = columns[name]
    hits = int(np.isin(column[rows], chosen).sum())
    wide = int(np.isin(column[half], chosen).sum())
    if len(rows) < LEAST_FIRINGS or not hits:
        return None
    precision, recall = hits / len(rows), hits / wide
    f1 = 2 * precision * recall / (precision + recall)
    if f1 < LEAST_F1:
        return None
    low, high = wilson(hits, len(rows))
    return Label(name, tuple(texts[v] for v in chosen), precision, recall, f1, low, high, len(rows))
