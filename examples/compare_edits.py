"""What does a model lose without one MLP? The same texts with and without it, as paired differences.

python examples/compare_edits.py [MODEL] [BLOCK] [TOKENS]
"""

from __future__ import annotations

import sys

import actlas
from actlas.data import corpus


def main(name: str = "smollm2", block: str = "4", tokens: str = "2000") -> None:
    model = actlas.load(name)
    site = f"blocks.{block}.mlp.out"
    text = corpus("mixed")
    mean = actlas.calibrate(model, text, site, ("moments",), max_tokens=int(tokens))[site].mean
    variants = {
        "base": [],
        "zero": [actlas.Zero(site)],
        "mean": [actlas.MeanAblate(site, mean)],
    }
    comparison = actlas.compare(model, variants, ["perplexity"], text, tokens=int(tokens))
    for row in comparison["perplexity"]:
        if row.measurement.group:  # rows for each kind of text are there too
            continue
        print(f"{row.variant:6} {row.measurement}")
        if row.difference is not None:
            print(f"       {row.difference}")


if __name__ == "__main__":
    main(*sys.argv[1:])
