"""What every feature of a dictionary means, as far as a program can tell: one pass over text.

    atlas = feature_atlas(model, sae, corpus("prose"))
    atlas.feature(417)               # contexts, logits, neighbours, label
    atlas.save_html("features.html") # a browser of all of them, offline

For each feature: how often it fires and how strongly (a histogram), the contexts in which it fires most,
the tokens that its atom raises and lowers directly at the output, the features that fire together with it
(Jaccard index of the sets of tokens), and a label by the rule of `labels.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.artifact import atomic_write
from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.measurement import format_number
from actlas.dictionaries.feature_codes import CorpusCodes, read_codes
from actlas.dictionaries.labels import Label, label_features

if TYPE_CHECKING:
    from actlas.core.model import Model

BINS = 20
#: Sites whose atoms live in the residual stream, so that the output head can read them.
_WRITES_RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out")


@dataclass(frozen=True)
class FeatureContext:
    """A place where a feature fires.

    Attributes:
        tokens: texts of the tokens around it. values: the feature's value at each.
        centre: which of them it is about. document: where it is from.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    centre: int
    document: str

    def __str__(self) -> str:
        marked = [f"«{t}»" if i == self.centre else t for i, t in enumerate(self.tokens)]
        return "".join(marked).replace("\n", "⏎")


@dataclass(frozen=True)
class Feature:
    """Everything about one feature.

    Attributes:
        number: which it is.
        firings: tokens at which it is active; density: their share.
        mean, largest: of its values where it is active.
        histogram: counts of its values in twenty equal steps from 0 to the largest.
        contexts: where it is largest, from different windows of text.
        raised, lowered: (token, effect) that its atom raises and lowers most; empty without a meaning.
        neighbours: (feature, Jaccard index) of those that fire with it.
        label: what goes along with it, or `None`.
    """

    number: int
    firings: int
    density: float
    mean: float
    largest: float
    histogram: tuple[int, ...]
    contexts: tuple[FeatureContext, ...]
    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]
    neighbours: tuple[tuple[int, float], ...]
    label: Label | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "feature": self.number,
            "firings": self.firings,
            "density": self.density,
            "mean": self.mean,
            "largest": self.largest,
            "histogram": list(self.histogram),
            "contexts": [
                {"tokens": c.tokens, "values": c.values, "centre": c.centre, "document": c.document}
                for c in self.contexts
            ],
            "raised": [list(p) for p in self.raised],
            "lowered": [list(p) for p in self.lowered],
            "neighbours": [list(p) for p in self.neighbours],
            "label": None if self.label is None else self.label.to_json(),
        }

    def __str__(self) -> str:
        named = "unnamed" if self.label is None else str(self.label)
        lines = [
            f"feature {self.number}: {named}",
            f"  fires at {self.density:.3%} of tokens, largest value {format_number(self.largest)}",
        ]
        if self.label is not None:
            lines[0] += f" (precision {self.label.precision:.2f}, recall {self.label.recall:.2f})"
        if self.raised:
            lines.append("  raises " + " ".join(repr(t) for t, _ in self.raised[:6]))
            lines.append("  lowers " + " ".join(repr(t) for t, _ in self.lowered[:6]))
        return "\n".join([*lines, *(f"  {format_number(c.values[c.centre]):>8}  {c}" for c in self.contexts)])


@dataclass(frozen=True, eq=False)
class FeatureAtlas:
    """All features of a dictionary, over one corpus.

    Attributes:
        features: one for each feature; those that never fired have no contexts.
        about: model, site, kind of dictionary, corpus, tokens and settings.
    """

    features: tuple[Feature, ...]
    about: dict[str, Any]

    def feature(self, number: int) -> Feature:
        """Return one feature.

        Raises:
            InputError: there is none of that number.
        """
        if not 0 <= number < len(self.features):
            raise InputError(f"there is no feature {number}; there are 0 to {len(self.features) - 1}")
        return self.features[number]

    @property
    def named(self) -> list[Feature]:
        """Features with a label, the surest first (F1 on tokens that did not choose the label)."""
        found = [f for f in self.features if f.label is not None]
        return sorted(found, key=lambda f: (-f.label.f1, f.number) if f.label is not None else (0.0, 0))

    def search(self, text: str) -> list[Feature]:
        """Return the features whose label, raised tokens or contexts' centres contain a text."""
        wanted = text.lower()
        hits = []
        for f in self.features:
            words = [c.tokens[c.centre] for c in f.contexts] + [t for t, _ in f.raised]
            if wanted in str(f.label or "").lower() or any(wanted in w.lower() for w in words):
                hits.append(f)
        return sorted(hits, key=lambda f: -f.firings)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary of everything."""
        return {"about": self.about, "features": [f.to_json() for f in self.features if f.firings]}

    def save_html(self, path: str | Path) -> Path:
        """Write the feature browser: one page that works offline."""
        from actlas.dictionaries.browser import page

        return atomic_write(path, page(self))


def feature_atlas(
    model: Model,
    lens: Dictionary,
    corpus: Iterable[Any],
    *,
    max_tokens: int = 60_000,
    contexts: int = 8,
    before: int = 14,
    after: int = 6,
    logits: int = 8,
    neighbours: int = 6,
    context: int = 128,
    name: str = "",
) -> FeatureAtlas:
    """Describe every feature of a dictionary over a corpus.

    Args:
        model: whose activations are read.
        lens: the dictionary.
        corpus: strings or documents.
        max_tokens: tokens that are read.
        contexts: how many places are kept for a feature; before, after: tokens around each.
        logits: how many raised and lowered tokens are kept.
        neighbours: how many features that fire together are kept.
        context: tokens in a window that the model reads.
        name: the corpus's name, for the record.

    Raises:
        InputError: the corpus is empty. FingerprintError: the dictionary is of another model.
    """
    read = read_codes(model, lens, corpus, max_tokens=max_tokens, context=context)
    strings = {int(i): _text(model, int(i)) for i in np.unique(read.tokens.numpy())}
    features, rows, values = read.active()
    bounds = np.searchsorted(features, np.arange(lens.features + 1))
    labels = label_features(read, strings)
    raised, lowered = _direct(model, lens, logits)
    together = _neighbours(read.codes, neighbours)
    found = []
    for j in range(lens.features):
        mine = slice(bounds[j], bounds[j + 1])
        v, r = values[mine], rows[mine]
        largest = float(v[0]) if len(v) else 0.0
        histogram = np.histogram(v, bins=BINS, range=(0, largest or 1.0))[0]
        places = _places(read, strings, j, r, contexts, before, after)
        found.append(
            Feature(
                j,
                len(v),
                len(v) / len(read),
                float(v.mean()) if len(v) else 0.0,
                largest,
                tuple(histogram.tolist()),
                places,
                raised[j],
                lowered[j],
                together[j],
                labels[j],
            )
        )
    about = {
        "model": model.name, "site": lens.site, "dictionary": type(lens).__name__,
        "features": lens.features, "tokens": len(read), "windows": len(read.documents), "corpus": name,
        "massive": read.massive, "dead": int((np.diff(bounds) == 0).sum()),
        "named": sum(label is not None for label in labels),
    }  # fmt: skip
    return FeatureAtlas(tuple(found), about)


def _text(model: Model, token: int) -> str:
    assert model.tokenizer is not None
    return str(model.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _places(
    read: CorpusCodes,
    strings: dict[int, str],
    feature: int,
    rows: np.ndarray,
    n: int,
    before: int,
    after: int,
) -> tuple[FeatureContext, ...]:
    """Return the first n rows from different windows, with the feature's value at every token around."""
    window, tokens = read.window.numpy(), read.tokens.numpy()
    seen: set[int] = set()
    found = []
    for row in rows.tolist():
        if int(window[row]) in seen:
            continue
        seen.add(int(window[row]))
        low, high = max(0, row - before), min(len(read), row + after + 1)
        while window[low] != window[row]:
            low += 1
        while window[high - 1] != window[row]:
            high -= 1
        value = read.codes[low:high].of(feature)
        found.append(
            FeatureContext(
                tuple(strings[int(t)] for t in tokens[low:high]),
                tuple(round(float(x), 4) for x in value),
                row - low,
                read.documents[int(window[row])],
            )
        )
        if len(found) == n:
            break
    return tuple(found)


Effects = list[tuple[tuple[str, float], ...]]


def _direct(model: Model, lens: Dictionary, k: int) -> tuple[Effects, Effects]:
    from actlas.core.direct_logits import top_logits

    kind = lens.site.split(".", 2)[-1] if lens.site.startswith("blocks.") else lens.site
    if kind not in _WRITES_RESIDUAL or model.unembed_module is None or lens.atoms.shape[1] != model.d_model:
        empty: Effects = [()] * lens.features
        return empty, empty
    ids, effects = top_logits(model, lens.atoms, k)
    texts = {i: _text(model, i) for i in ids.unique().tolist()}
    both = [
        [
            tuple(
                (texts[i], round(e, 4))
                for i, e in zip(row[side].tolist(), effect[side].tolist(), strict=True)
            )
            for row, effect in zip(ids, effects, strict=True)
        ]
        for side in (0, 1)
    ]
    return both[0], both[1]


def _neighbours(codes: Codes, k: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the features with the largest Jaccard index of their sets of tokens."""
    from scipy.sparse import csr_matrix

    flat = codes.flatten()
    active = flat.active.numpy()
    starts = np.r_[0, active.sum(1).cumsum()]
    hits = csr_matrix(
        (np.ones(int(starts[-1]), dtype=np.float32), flat.indices.numpy()[active], starts),
        shape=(len(flat), codes.features),
    )
    both = (hits.T @ hits).tocsr()
    count = np.asarray(hits.sum(0)).ravel()
    found = []
    for j in range(codes.features):
        part = slice(both.indptr[j], both.indptr[j + 1])
        others, joint = both.indices[part], both.data[part]
        kept = others != j
        others, joint = others[kept], joint[kept]
        jaccard = joint / (count[j] + count[others] - joint)
        best = np.lexsort((others, -jaccard))[:k]
        found.append(tuple((int(others[b]), round(float(jaccard[b]), 4)) for b in best if joint[b] > 1))
    return found
