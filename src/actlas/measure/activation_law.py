"""How the activation ratio goes with training data: the two laws of Sparsing Law.

    fit_activation_law(points, kind="relu" | "silu") -> ActivationLaw (.predict(d), .limit, .error)

    ReLU  (falls)    A(D) = exp(-c D^a + b) + A0
    SiLU  (rises)    A(D) = A0 - c / D^a

D is the amount of training data in any unit (the paper: billions of tokens), A0 the limit ratio.

Source: Luo et al. 2024, "Sparsing Law" (arXiv 2411.02335), section 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actlas.core.errors import FailureError, InputError

Kind = Literal["relu", "silu"]


@dataclass(frozen=True)
class ActivationLaw:
    """A fitted law.

    Attributes:
        kind: which form.
        a, b, c, limit: its parameters; `b` is 0 for SiLU, `limit` is A0.
        error: root mean square of the residuals.
        r2: share of the variance explained; `nan` if the ratios do not vary.
    """

    kind: Kind
    a: float
    b: float
    c: float
    limit: float
    error: float
    r2: float

    def predict(self, data: ArrayLike) -> NDArray[np.float64]:
        """Return the activation ratio after so much data."""
        d = np.asarray(data, dtype=np.float64)
        if self.kind == "relu":
            return np.exp(-self.c * d**self.a + self.b) + self.limit
        return self.limit - self.c / d**self.a

    def describe(self) -> str:
        """Return the law with its numbers."""
        if self.kind == "relu":
            return f"A(D) = exp(-{self.c:.3g} D^{self.a:.3g} {self.b:+.3g}) + {self.limit:.3g}"
        return f"A(D) = {self.limit:.3g} - {self.c:.3g} / D^{self.a:.3g}"


def fit_activation_law(points: Sequence[tuple[float, float]], kind: Kind = "relu") -> ActivationLaw:
    """Fit a law by least squares from several starting exponents.

    Args:
        points: (data, activation ratio) pairs, more than the law has parameters (ReLU 4, SiLU 3).
        kind: `"relu"` or `"silu"`.

    Raises:
        InputError: too few points, data that is not positive, or an unknown kind.
        FailureError: no start converged.
    """
    from scipy.optimize import least_squares

    if kind not in ("relu", "silu"):
        raise InputError(f'kind must be "relu" or "silu", not {kind!r}')
    needed = 5 if kind == "relu" else 4
    if len(points) < needed:
        raise InputError(f"the {kind} law needs at least {needed} points, not {len(points)}")
    d, ratio = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
    if not (d > 0).all() or not np.isfinite(ratio).all():
        raise InputError("points must have positive data and finite ratios")
    scale = float(np.exp(np.log(d).mean()))  # fit in D / scale, then carry the scale over to c
    x = d / scale
    span = max(float(np.ptp(ratio)), 1e-6)

    def model(q: NDArray[np.float64]) -> NDArray[np.float64]:
        a, c = np.exp(q[0]), np.exp(q[1])
        return np.exp(-c * x**a + q[2]) + q[3] if kind == "relu" else q[2] - c / x**a

    best = None
    for exponent in (0.3, 0.7, 1.5):
        start = [np.log(exponent), 0.0, np.log(span) + 1, float(ratio.min())]
        if kind == "silu":
            start = [np.log(exponent), np.log(span / 2), float(ratio.max())]
        try:
            found = least_squares(lambda q: model(q) - ratio, start, max_nfev=5000, x_scale="jac")
        except ValueError:
            continue
        if np.isfinite(found.cost) and (best is None or found.cost < best.cost):
            best = found
    if best is None:
        raise FailureError(f"the {kind} law could not be fitted to {len(points)} points")
    q = best.x
    a = float(np.exp(q[0]))
    residual = model(q) - ratio
    variance = float(((ratio - ratio.mean()) ** 2).mean())
    mean_square = float((residual**2).mean())
    c = float(np.exp(q[1])) * (scale**-a if kind == "relu" else scale**a)
    b, limit = (float(q[2]), float(q[3])) if kind == "relu" else (0.0, float(q[2]))
    r2 = 1 - mean_square / variance if variance > 0 else float("nan")
    return ActivationLaw(kind, a, b, c, limit, mean_square**0.5, r2)
