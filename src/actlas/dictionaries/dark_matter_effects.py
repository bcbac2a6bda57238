"""How a dictionary's two kinds of error go with its width, and what they are worth to the model.

    same_tokens(a, b)                  do two dictionaries fail on the same tokens?
    error_scaling(widths, fvu, ...)    FVU(W) = c + a W^-m, beside the flat nonlinear level
    downstream_recovery(...)           recovered = (CE_sae - CE_sae+part) / (CE_sae - CE_original)

The parts are those of `dark_matter`. Published (Engels et al. 2024): larger autoencoders fail on the same
tokens; the nonlinear level stays the same over widths, so that absent features (a W^-m) and the linear
error (c minus that level) are what width removes; either part of the error matters to the model about in
proportion to its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.dictionaries.dark_matter import (
    ErrorDecomposition,
    least_squares_map,
    r2_measurement,
    share_measurement,
    with_constant,
)
from actlas.dictionaries.evaluation.substitution import ORIGINAL, score, variant_losses
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

Part = Literal["linear", "nonlinear"]


def same_tokens(a: ErrorDecomposition, b: ErrorDecomposition, *, seed: int = 0) -> list[Measurement]:
    """Ask whether two dictionaries fail on the same tokens.

    R2 of a line that predicts b's error norm from a's, and the share of what remains that a's nonlinear
    error norm explains besides (the paper's: small, so the nonlinear norm says nothing more).

    Raises:
        InputError: they were measured on different rows.
    """
    if len(a.held) != len(b.held) or not torch.equal(a.held.x, b.held.x):
        raise InputError(
            "the two dictionaries were measured on different rows; give both the same sample and seed"
        )
    y, first, second = b.error.sqrt(), a.error.sqrt(), a.nonlinear.sqrt()
    rests = []
    for columns in (first[:, None], torch.stack([first, second], 1)):
        rests.append(y - (with_constant(columns, True) @ least_squares_map(columns, y[:, None], True))[:, 0])
    r2 = r2_measurement("error_norm_r2_across", a.held, y[:, None], rests[0][:, None], group={}, seed=seed)
    more = share_measurement(
        "remaining_variance_removed_by_nonlinear_norm",
        a.held, rests[0].square() - rests[1].square(), rests[0].square(), group={}, seed=seed,
    )  # fmt: skip
    return [r2, more]


@dataclass(frozen=True)
class ErrorScaling:
    """`FVU(W) = floor + factor W^-power`, and the flat level of the nonlinear part.

    At any width: absent features `factor W^-power`, linear error `floor - nonlinear`, nonlinear error
    `nonlinear`.
    """

    floor: float
    factor: float
    power: float
    nonlinear: float
    error: float

    def predict(self, width: float) -> float:
        """Return the FVU at a width."""
        return self.floor + self.factor * width**-self.power


def error_scaling(widths: Sequence[float], fvu: Sequence[float], nonlinear: Sequence[float]) -> ErrorScaling:
    """Fit how the error goes with width, by least squares with floor, factor and power at least 0.

    Args:
        widths: three or more different numbers of features.
        fvu: of each dictionary. nonlinear: its nonlinear FVU.

    Raises:
        InputError: fewer than three widths, or lists of different lengths.
    """
    from scipy.optimize import least_squares

    w, y = np.asarray(widths, dtype=np.float64), np.asarray(fvu, dtype=np.float64)
    if len(set(w.tolist())) < 3 or len(w) != len(y) or len(nonlinear) != len(y) or (w <= 0).any():
        raise InputError(f"a law of width needs FVUs at 3 or more different widths, not {list(widths)}")
    scale = float(np.exp(np.log(w).mean()))
    best = None
    for power in (0.2, 0.5, 1.0, 2.0):
        start = [max(float(y.min()) * 0.5, 1e-6), max(float(y.mean()) * 0.5, 1e-6), power]
        found = least_squares(
            lambda q: q[0] + q[1] * (w / scale) ** -q[2] - y, start, bounds=([0, 0, 0], [np.inf, np.inf, 10])
        )
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    floor, factor, power = (float(v) for v in best.x)
    rms = math.sqrt(2 * best.cost / len(y))
    return ErrorScaling(floor, factor * scale**power, power, float(np.mean(nonlinear)), rms)


def downstream_recovery(
    model: Model,
    corpus: Iterable[Any],
    decomposition: ErrorDecomposition,
    *,
    tokens: int = 3072,
    context: int = 256,
    per_document: int | None = None,
    skip_positions: int = 0,
    group: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Measure what each part of the error is worth to the model.

    recovered = (CE_sae - CE_sae+part) / (CE_sae - CE_original), beside the part's share of the squared
    error. A part that matters as much as its size says has equal numbers.

    Args:
        model: the model. corpus: held-out text. decomposition: with its B.
        tokens, context, per_document: of the text that is scored.
        skip_positions: leave each window's first so many tokens as they are (the paper: 200 of 1,024).
        group: labels. seed: of the bootstrap.
    """
    lens = decomposition.lens
    variants: dict[str, Edit] = {"sae": lens.substitute()}
    parts: tuple[Part, ...] = get_args(Part)
    for part in parts:
        variants[part] = decomposition.substitute(part)
    if skip_positions:
        variants = {k: v.at(positions=range(skip_positions, context)) for k, v in variants.items()}
    losses = variant_losses(
        model, corpus, lens.site, variants, tokens=tokens, context=context, per_document=per_document
    )
    group = dict(group or {})
    w = losses.tokens
    out = [
        mean_measurement(
            "cross_entropy", "nats/token", losses.nll[name] / w, w, seed=seed, better="lower",
            group=group | {"spliced": spliced},
        )
        for name, spliced in (
            (ORIGINAL, "nothing"), ("sae", "sae"), ("linear", "sae+linear"), ("nonlinear", "sae+nonlinear"),
        )
    ]  # fmt: skip
    lost: NDArray[np.float64] = losses.nll["sae"] - losses.nll[ORIGINAL]
    for part in parts:
        gained = losses.nll["sae"] - losses.nll[part]
        out.append(score("recovered_cross_entropy", gained, lost, seed, group | {"part": part}))
    share = decomposition["linear_share_of_fvu"]
    for part, value in zip(parts, (share.value, 1 - share.value), strict=True):
        out.append(
            Measurement(
                "share_of_squared_error",
                value,
                "fraction",
                share.n,
                interval="none: see linear_share_of_fvu",
                seed=seed,
                group=group | {"part": part},
            )
        )
    return out
