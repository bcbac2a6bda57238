"""A feature of a lens as a direction: the one of a dictionary whose codes tell the sides apart best.

    j* = argmax_j  |mean_p z_j - mean_n z_j| / sqrt((var_p z_j + var_n z_j)/2 + e_j)
    c  = (mean_p z_j* - mean_n z_j*) d_j*

z are the lens's codes and d its directions. e_j, a hundredth of the code's overall variance, keeps a
feature that fires on one text alone from winning. `feature` names one instead.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.steering.fits import as_float64, check_length, direction_fit


@direction_fit(
    "feature", data="pairs", summary="the feature of a given dictionary that tells the sides apart"
)
def feature_direction(
    positive: Tensor, negative: Tensor, *, lens: Lens | str | Path, feature: int | None = None
) -> Tensor:
    """Return the displacement along a feature's direction, `[d]`.

    Args:
        positive, negative: `[n, d]`.
        lens: a dictionary (or another lens with codes and directions) of the same site, or its folder.
        feature: its number; default the one that tells the sides apart best.

    Raises:
        InputError: a lens without codes or directions, a feature that it has not got, or one that does not
            differ between the sides.
    """
    if not isinstance(lens, Lens):
        lens = Lens.load(lens)
    p, n = _codes(lens, positive), _codes(lens, negative)
    gap = p.mean(0) - n.mean(0)
    j = best_feature(p, n) if feature is None else lens.check_feature(int(feature))
    if float(gap[j]) == 0:
        raise InputError(f"feature {j} has the same mean on both sides; leave feature out to find one")
    return check_length(gap[j] * lens.direction(j).detach().cpu().double())


def best_feature(positive: Tensor, negative: Tensor) -> int:
    """Return the code of largest standardised difference between the sides; codes are `[n, k]`."""
    gap = positive.mean(0) - negative.mean(0)
    within = (positive.var(0, correction=0) + negative.var(0, correction=0)) / 2
    floor = torch.cat([positive, negative]).var(0, correction=0) / 100
    effect = torch.where(
        gap == 0, torch.zeros_like(gap), gap.abs() / (within + floor).clamp_min(1e-30).sqrt()
    )
    return int(effect.argmax())


def _codes(lens: Lens, x: Tensor) -> Tensor:
    with torch.no_grad():
        codes = lens.encode(x.float())
    dense = codes.dense() if isinstance(codes, Codes) else codes
    return as_float64(dense)[0]
