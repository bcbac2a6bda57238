"""Linear discriminant analysis: the mean difference, whitened by the spread within the sides.

    w = S^-1 m,     S = (1 - g) C + g tr(C)/d I        c = w (w . m) / |w|^2

C is the covariance within the sides. With fewer texts than channels C has no inverse; the shrinkage g of
Ledoit and Wolf (2004) is the one with the least expected squared error, and needs no tuning. With g = 1
nothing is whitened and c is the mean difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.steering.fits import along, as_float64, direction_fit


@direction_fit("lda", data="pairs", summary="the mean difference, whitened by the spread within the sides")
def lda(positive: Tensor, negative: Tensor, *, shrinkage: float | None = None) -> Tensor:
    """Return the displacement along the discriminant, `[d]`.

    Args:
        positive, negative: `[n, d]`.
        shrinkage: g, between 0 and 1; default Ledoit and Wolf's.

    Raises:
        InputError: a shrinkage outside [0, 1], fewer than two rows a side, or 0 shrinkage where C has no
            inverse.
    """
    p, n = as_float64(positive, negative)
    if len(p) < 2 or len(n) < 2:
        raise InputError(f"lda needs at least two texts a side, not {len(p)} and {len(n)}")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage is {shrinkage}; it must lie between 0 and 1")
    within = torch.cat([p - p.mean(0), n - n.mean(0)])
    d = within.shape[1]
    c = within.T @ within / len(within)
    mean_variance = torch.trace(c) / d
    difference = p.mean(0) - n.mean(0)
    if float(mean_variance) == 0:
        return along(difference, difference)
    g = _ledoit_wolf(within) if shrinkage is None else float(shrinkage)
    s = (1 - g) * c + g * mean_variance * torch.eye(d, dtype=c.dtype)
    if g == 0 and int(torch.linalg.matrix_rank(s, hermitian=True)) < d:
        raise InputError(
            f"{len(within)} texts do not span {d} channels, so that shrinkage 0 has no solution; "
            "leave shrinkage out"
        )
    weight = torch.linalg.solve(s, difference)
    return along(weight, difference)


def _ledoit_wolf(rows: Tensor) -> float:
    from sklearn.covariance import ledoit_wolf_shrinkage

    return float(ledoit_wolf_shrinkage(rows.numpy(), assume_centered=True))
