"""Fit a probe for sentiment, look at how good it is beside shuffled labels, and steer along it.

python examples/probe_and_steer.py [MODEL] [BLOCK]
"""

from __future__ import annotations

import sys

import actlas
from actlas.core.probe import fit_probe
from actlas.data import pairs


def main(name: str = "smollm2", block: str = "15") -> None:
    model = actlas.load(name)
    examples = pairs(actlas.task("sentiment", model.tokenizer, n=64))
    probe = fit_probe(model, examples, f"blocks.{block}.resid_post", method="means")
    for measurement in probe.measurements:
        print(measurement)

    # Strength 1 goes from the mean of the negative texts to the mean of the positive ones.
    for strength in (-2, 0, 2):
        with model.edit(probe.edit(strength=strength)):
            text = model.generate("I watched the film and", max_new_tokens=12).texts[0]
        print(f"{strength:+d}: I watched the film and{text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
