"""The smallest network with the subspace illusion, and the same network patched where the variable is.

    hidden h = (x, 0, x), output h1 + 2 h2          (Makelov et al. 2023, section 3)

Patching along (0, 1, 1) / sqrt(2) from x' gives h = (x, (x' - x) / 2, (x + x') / 2), and the output is
exactly x': the full effect, though h2 never varies and h3 is read by nothing. Patching along (1, 0, 0) gives
the same output because h1 is where x is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actlas.circuits.illusion import IllusionReport, Outcome, illusion_test
from actlas.circuits.readers import Readers
from actlas.circuits.subspace import interchange

MUST = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64) / 2**0.5
MUST_NOT = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
READERS = Readers(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64), ("h1", "2 h2"))


@dataclass(frozen=True)
class Distilled:
    """What came out of the distilled network.

    Attributes:
        error: greatest deviation of the patched hidden vector and output from the paper's formulas.
        illusion, honest: the tests of both directions.
    """

    error: float
    illusion: IllusionReport
    honest: IllusionReport


def distilled(n: int = 64, seed: int = 0) -> Distilled:
    """Run it on `n` random pairs of inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, step = torch.randn(2, n, generator=generator, dtype=torch.float64)
    other = x + step.abs() + 0.1  # every pair differs, in one direction
    base, source = hidden(x), hidden(other)
    patched = interchange(base, source, MUST)
    wanted = torch.stack([x, (other - x) / 2, (x + other) / 2], 1)
    error = max(float((patched - wanted).abs().max()), float((output(patched) - other).abs().max()))
    tests = [
        illusion_test(
            lambda h: Outcome(output(h)), base, source, v, READERS, scale=x - other, seed=seed,
            group={"case": case},
        )
        for v, case in ((MUST, "distilled, v = (0, 1, 1)"), (MUST_NOT, "distilled, v = (1, 0, 0)"))
    ]  # fmt: skip
    return Distilled(error, *tests)


def hidden(x: Tensor) -> Tensor:
    """Return h = (x, 0, x), `[n, 3]`."""
    return torch.stack([x, torch.zeros_like(x), x], 1)


def output(h: Tensor) -> Tensor:
    """Return h1 + 2 h2, `[n]`."""
    return h[:, 0] + 2 * h[:, 1]
