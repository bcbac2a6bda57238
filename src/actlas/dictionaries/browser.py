"""The feature browser: one HTML page that works offline, with search, histograms and highlighted tokens.

Texts of tokens are written once and referred to by number, and values are whole hundredths of a
feature's largest value, so the page of a dictionary with 4,608 features is a few megabytes.
"""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actlas.dictionaries.feature_atlas import Feature, FeatureAtlas


def page(atlas: FeatureAtlas) -> str:
    """Return the page; features that never fired are counted, not shown."""
    words = _Numbers()
    documents = _Numbers()
    shown = [_record(f, words, documents) for f in atlas.features if f.firings]
    data = {"about": atlas.about, "words": words.values, "documents": documents.values, "features": shown}
    # Inside a script element only "<" could end the data; escaped it is the same JSON.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    template = files("actlas.dictionaries").joinpath("templates/features.html").read_text(encoding="utf-8")
    about = atlas.about
    corpus = f" of {about['corpus']}" if about["corpus"] else ""
    summary = (
        f"{about['dictionary']} with {about['features']:,} features at {about['site']}, read over "
        f"{about['tokens']:,} tokens{corpus}. {about['dead']:,} features never fired there; "
        f"{about['named']:,} have a label that held on text it was not chosen on."
    )
    fields = {"MODEL": html.escape(str(about["model"])), "SUMMARY": html.escape(summary), "DATA": text}
    return re.sub(r"@@([A-Z]+)@@", lambda found: fields[found[1]], template)


class _Numbers:
    """Texts by number, each once."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self.values)
            self.values.append(text)
        return self._known[text]


def _record(feature: Feature, words: _Numbers, documents: _Numbers) -> dict[str, Any]:
    top = feature.largest or 1.0
    record: dict[str, Any] = {
        "n": feature.number,
        "c": feature.firings,
        "d": _short(feature.density),
        "m": _short(feature.mean),
        "x": _short(feature.largest),
        "h": list(feature.histogram),
        "e": [
            [
                [words(t) for t in c.tokens],
                [round(100 * v / top) for v in c.values],
                c.centre,
                documents(c.document),
            ]
            for c in feature.contexts
        ],
        "u": [[words(t), _short(v)] for t, v in feature.raised],
        "w": [[words(t), _short(v)] for t, v in feature.lowered],
        "j": [[n, round(v, 3)] for n, v in feature.neighbours],
    }
    if feature.label is not None:
        label = feature.label
        record["l"] = [label.attribute, list(label.values), round(label.precision, 3), round(label.recall, 3)]
    return record


def _short(value: float) -> float:
    return float(f"{value:.4g}")
