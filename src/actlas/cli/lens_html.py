"""The logit lens as one HTML page that works offline: tokens across, layers down, details on demand."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING

from actlas.cli.lens_grid import label_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actlas.core.logit_lens import LogitLensTable

_MOST_TOKENS = 400  # columns that a browser lays out quickly with all layers


def page(table: LogitLensTable, model: str, prompt: str, edits: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        table: what the logit lens found; of more than 400 tokens the last 400 are shown.
        model: the model's name.
        prompt: the prompt.
        edits: descriptions of the edits that were installed.
    """
    first = max(len(table.tokens) - _MOST_TOKENS, 0)
    data = {
        "tokens": table.tokens[first:],
        "first": first,
        "layers": [label_of(site) for site in table.sites],
        "sites": table.sites,
        "names": [names[first:] for names in table.strings],
        "p": [
            [[round(p, 5) for p in row] for row in layer.probabilities[first:].tolist()]
            for layer in table.layers
        ],
        "entropy": [[round(v, 3) for v in layer.entropy[first:].tolist()] for layer in table.layers],
        "kl": [[round(v, 3) for v in layer.kl[first:].tolist()] for layer in table.layers],
    }
    # Inside a script element only "<" could end the data; escaped it is the same JSON.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    template = files("actlas.cli").joinpath("templates/lens.html").read_text(encoding="utf-8")
    fields = {
        "MODEL": html.escape(model),
        "PROMPT": html.escape(prompt if len(prompt) <= 400 else prompt[:200] + " … " + prompt[-199:]),
        "EDITS": html.escape("; ".join(edits) or "none"),
        "NOTE": f"The last {_MOST_TOKENS} of {len(table.tokens)} tokens." if first else "",
        "DATA": text,
    }
    return re.sub(r"@@([A-Z]+)@@", lambda found: fields[found[1]], template)
