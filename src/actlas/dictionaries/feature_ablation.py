"""What a feature does: switch it off and see what changes, beside features that are as active.

    x' = x - z_j d_j                the feature's contribution goes, the reconstruction error stays
    fall = readout(x) - readout(x')

What a feature goes along with is not what it does, and switching anything off changes something. The
controls are other features that fire on the same rows, the nearest in mean activation there: a feature
that is off on these rows could not do anything, and would be an easy control.

Source: ablation as in Wang et al. 2024, "Interpret the Internal States of Recommendation Model with Sparse
Autoencoder" (RecSAE); matched controls are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.intervals import bootstrap_mean
from actlas.core.measurement import Measurement


@dataclass(frozen=True)
class Ablation:
    """What switching a feature off does to a number that is read from the rows.

    Attributes:
        effect: mean fall of the number when the feature is switched off.
        control: the same for features that are as active on these rows, averaged.
        difference: effect minus control, paired by row.
        controls: those features.
    """

    effect: Measurement
    control: Measurement
    difference: Measurement
    controls: tuple[int, ...]


def ablation_effect(
    lens: Dictionary,
    x: Tensor,
    feature: int,
    readout: Callable[[Tensor], Tensor],
    *,
    controls: int = 5,
    exclude: Sequence[int] = (),
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    name: str = "fall when switched off",
    unit: str = "",
) -> Ablation:
    """Switch a feature off (x - z_j d_j: the error stays) and measure what that changes.

    Args:
        lens: the dictionary.
        x: activations `[n, d]`, e.g. of the rows at which the concept holds.
        feature: which.
        readout: maps activations `[n, d]` to one number a row, `[n]`.
        controls: how many control features.
        exclude: features that are no controls, e.g. others of the same concept.
        groups: rows that belong together, for the interval.
        seed: of the bootstrap.
        name, unit: of the measurements.

    Raises:
        InputError: no such feature, a readout of another shape, or no feature that could be a control.
    """
    codes = lens.encode(x)
    lens.check_feature(feature)
    mean = torch.zeros(lens.features, dtype=torch.float64)
    mean.index_add_(0, codes.indices.reshape(-1).cpu(), codes.values.reshape(-1).double().cpu())
    mean /= max(1, len(x))
    barred = {feature, *exclude}
    possible = [int(i) for i in mean.nonzero().squeeze(1) if int(i) not in barred]
    if not possible:
        raise InputError(
            f"no other feature fires on these {len(x)} rows, so feature {feature} has no control"
        )
    possible.sort(key=lambda i: abs(float(mean[i] - mean[feature])))
    chosen = tuple(possible[:controls])
    base = _read(readout, x)

    def fall(j: int) -> Any:
        without = x - (codes.of(j).unsqueeze(-1) * lens.direction(j)).to(x)
        return base - _read(readout, without)

    effect, control = fall(feature), np.mean([fall(j) for j in chosen], axis=0)
    details = {
        "feature": feature,
        "mean activation": float(mean[feature]),
        "mean activation of controls": [float(mean[j]) for j in chosen],
    }

    def measured(what: str, values: Any, **more: Any) -> Measurement:
        low, high = bootstrap_mean(values, clusters=groups, seed=seed)
        interval = "bootstrap over groups" if groups is not None else "bootstrap over rows"
        return Measurement(
            what,
            float(np.mean(values)),
            unit,
            len(values),
            None if np.isnan(low) else low,
            None if np.isnan(high) else high,
            interval,
            seed,
            **more,
        )

    against = measured(f"{name}, features as active", control)
    return Ablation(
        measured(name, effect, baseline=against, details=details),
        against,
        measured(f"{name}, minus control", effect - control),
        chosen,
    )


def _read(readout: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with torch.no_grad():
        found = readout(x)
    if found.shape != (len(x),):
        raise InputError(
            f"the readout gave {list(found.shape)} for {len(x)} rows; it must give one number a row"
        )
    return found.double().cpu().numpy()
