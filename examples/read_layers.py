"""What would the model say if it had to answer from an earlier layer? The logit lens in ten lines.

python examples/read_layers.py [MODEL] [PROMPT]
"""

from __future__ import annotations

import sys

import actlas


def main(name: str = "smollm2", prompt: str = "The capital of France is") -> None:
    model = actlas.load(name)
    table = actlas.LogitLens(model=model).top(prompt, k=1)
    last = len(table.tokens) - 1
    for layer, names in zip(table.layers, table.strings, strict=True):
        probability = float(layer.probabilities[last, 0])
        print(f"{layer.site:24} {names[last][0]!r:16} {probability:6.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
