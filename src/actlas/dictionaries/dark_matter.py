"""The dark matter of a dictionary: which part of its error is a linear function of the activation.

    e = x - x_hat                         error; one sign everywhere
    B = argmin sum |x B - e|^2            by least squares, no constant, on tokens of their own
    linear error     x B
    nonlinear error  e - x B

On held-out documents:

    vector R2   mean over channels of the R2 of x B for e         (not 1 - FVU ratio: both are given)
    norm R2     R2 of a linear prediction of |e|^2 from x, beside the token's mean, |x| and L0
    FVU         sum |e|^2 / sum |x - m|^2           FVU nonlinear: the same with e - x B

What is linear could have been added back without a single new feature. How the parts go with width, and
what they are worth to the model, is in `dark_matter_effects`.

Controls: an error of isotropic noise with the same norms (vector R2 near 0), an error that is a
projection of x (vector R2 = 1).

Source: Engels et al. 2024, "Decomposing The Dark Matter of Sparse Autoencoders", and its code, which
stores x_hat - x as the error, splits tokens instead of documents, and calls |e|^2 the norm. Massive rows
make every R2 look like 1 and are left out; a fit on the dictionary's training tokens misleads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.core.intervals import Array, bootstrap_statistic
from actlas.core.measurement import Measurement
from actlas.dictionaries.evaluation.rows import Sample
from actlas.dictionaries.solvers import pursue
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.edit import Edit

Encoding = Literal["own", "pursuit"]
FEWEST, ENOUGH = 2, 10  # fitting tokens per channel: below the first B is refused, below the second noted
_RCOND = 1e-9
_OVER = "bootstrap over documents"


@dataclass(frozen=True, eq=False)
class ErrorDecomposition:
    """A dictionary's error on held-out rows, in two parts.

    Attributes:
        lens: the dictionary. error_map: B, float32 `[d, d]`.
        measurements: R2s, FVUs, baselines and controls.
        fitted: rows that B was fitted on.
        held: the held-out rows.
        error: `|e|^2` of each, float64 `[n]`. nonlinear: `|e - x B|^2`.
    """

    lens: Dictionary
    error_map: Tensor
    measurements: tuple[Measurement, ...]
    fitted: int
    held: Sample
    error: Tensor
    nonlinear: Tensor

    def substitute(self, part: Literal["linear", "nonlinear"]) -> Edit:
        """Return the edit that puts reconstruction plus one part of the error in the activation's place."""
        return self.lens.substitute(error=part, error_map=self.error_map)

    def __getitem__(self, name: str) -> Measurement:
        found = [m for m in self.measurements if m.name == name]
        if not found:
            raise InputError(
                f"there is no {name!r}; there are {', '.join(m.name for m in self.measurements)}"
            )
        return found[0]


@torch.no_grad()
def error_decomposition(
    lens: Dictionary,
    sample: Sample,
    *,
    fit: float = 2 / 3,
    bias: bool = False,
    encoding: Encoding = "own",
    controls: bool = True,
    group: Mapping[str, str] | None = None,
    seed: int = 0,
) -> ErrorDecomposition:
    """Split a dictionary's error into its linear and its nonlinear part.

    Args:
        lens: any dictionary that reconstructs its own site.
        sample: rows that the dictionary was not trained on (`evaluation.read_sample`), massive ones out.
        fit: share of the documents that B is fitted on; the others are measured.
        bias: add a constant to both regressions (the paper's code has none).
        encoding: the dictionary's own codes, or `"pursuit"`: gradient pursuit at the same L0 per token.
        controls: also the two constructed errors.
        group: labels of the measurements.
        seed: of the split, the controls and the bootstrap.

    Raises:
        InputError: fewer than two fitting rows per channel, a share not between 0 and 1, an unknown
            encoding.
        ShapeError: the dictionary writes to another site than it reads.
    """
    if encoding not in ("own", "pursuit"):
        raise InputError(f"encoding is {encoding!r}; it must be 'own' or 'pursuit'")
    train, held = _split(sample, fit, seed)
    d = lens.channels
    if len(train) < FEWEST * d:
        raise InputError(
            f"{len(train):,} rows cannot fix a map of {d} x {d}; give at least {FEWEST * d:,} to fit on "
            f"(better {ENOUGH * d:,})"
        )
    note = (
        ""
        if len(train) >= ENOUGH * d
        else f"only {len(train) / d:.1f} fitting rows a channel; 10 are advised"
    )
    fields: dict[str, Any] = {"group": {**(group or {}), "encoding": encoding}, "seed": seed, "note": note}
    error, l0 = zip(*(_error(lens, part.x, encoding) for part in (train, held)), strict=True)
    x = train.x.double(), held.x.double()
    solved = least_squares_map(x[0], torch.cat([error[0], error[0].square().sum(1, keepdim=True)], 1), bias)
    predicted = with_constant(x[1], bias) @ solved
    rest = error[1] - predicted[:, :d]
    squared, nonlinear = error[1].square().sum(1), rest.square().sum(1)
    spread = (x[1] - x[1].mean(0)).square().sum(1)
    measured = [
        r2_measurement("vector_r2", held, error[1], rest, **fields),
        r2_measurement("norm_r2", held, squared[:, None], (squared - predicted[:, d])[:, None], **fields),
        share_measurement("fvu", held, squared, spread, **fields),
        share_measurement("fvu_nonlinear", held, nonlinear, spread, **fields),
        share_measurement("linear_share_of_fvu", held, squared - nonlinear, squared, **fields),
        *_norm_baselines((train, held), error, (l0[0], l0[1]), squared, predicted[:, d], **fields),
    ]
    if controls:
        measured += _controls(x, error, held, bias, **fields)
    return ErrorDecomposition(
        lens, solved[:d, :d].float(), tuple(measured), len(train), held, squared, nonlinear
    )


def _split(sample: Sample, fit: float, seed: int) -> tuple[Sample, Sample]:
    """Return rows for fitting and for measuring; documents stay whole, a lone one is cut in two."""
    if not 0 < fit < 1:
        raise InputError(f"fit is {fit}; it is a share of the documents, between 0 and 1")
    n = sample.documents
    if n < 2:
        return sample.split(round(fit * len(sample)))
    order = np.random.default_rng(seed).permutation(n)
    first = np.isin(sample.document, order[: min(max(round(fit * n), 1), n - 1)])
    return sample.take(torch.from_numpy(first)), sample.take(torch.from_numpy(~first))


def _error(lens: Dictionary, x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Return `x - x_hat`, float64 `[n, d]`, and L0, `[n]`."""
    codes = lens.encode(x) if encoding == "own" else pursue(lens, x)
    made = lens.decode(codes)
    if made.shape != x.shape:
        raise ShapeError(
            f"{type(lens).__name__} reads {x.shape[1]} channels and writes {made.shape[1]}; its error is no "
            "part of the activation"
        )
    return x.double() - made.double().to(x.device), codes.l0.double()


def with_constant(x: Tensor, bias: bool) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1) if bias else x


def least_squares_map(x: Tensor, y: Tensor, bias: bool) -> Tensor:
    return torch.linalg.lstsq(with_constant(x, bias), y, rcond=_RCOND).solution


def r2_measurement(name: str, held: Sample, target: Tensor, rest: Tensor, **fields: Any) -> Measurement:
    """Mean over columns of 1 - SS(rest) / SS(target around its mean), bootstrapped over documents."""
    top = held.sums(rest.square())
    bottom = held.sums((target - target.mean(0)).square())

    def statistic(draws: Array) -> Array:
        out: Array = (1 - (draws @ top) / np.maximum(draws @ bottom, 1e-300)).mean(-1)
        return out

    low, high = bootstrap_statistic(statistic, held.documents, seed=fields["seed"])
    value = float(statistic(np.ones((1, held.documents)))[0])
    return Measurement(name, value, "R2", held.documents, *_bounds(low, high), _OVER, **fields)


def share_measurement(name: str, held: Sample, top: Tensor, bottom: Tensor, **fields: Any) -> Measurement:
    num, den = held.sums(top), held.sums(bottom)
    values = np.divide(num, den, out=np.zeros_like(num), where=den > 0)
    return mean_measurement(name, "fraction", values, den, **fields)


def _norm_baselines(
    samples: tuple[Sample, Sample],
    errors: Sequence[Tensor],
    l0: tuple[Tensor, Tensor],
    squared: Tensor,
    predicted: Tensor,
    **fields: Any,
) -> list[Measurement]:
    """R2 of predicting |e|^2 from the token's mean, from |x|, from L0; each fitted where B was."""
    train, held = samples
    known = errors[0].square().sum(1)
    guesses = {"norm_r2_of_token_mean": token_means(train.token, known, held.token)}
    for name, (a, b) in {
        "norm_r2_of_activation_norm": (train.x.double().norm(dim=1), held.x.double().norm(dim=1)),
        "norm_r2_of_l0": l0,
    }.items():
        line = least_squares_map(a[:, None], known[:, None], bias=True)
        guesses[name] = (with_constant(b[:, None], True) @ line)[:, 0]
    return [
        r2_measurement(name, held, squared[:, None], (squared - g)[:, None], **fields)
        for name, g in guesses.items()
    ] + [_over_token_mean(held, squared, predicted, guesses["norm_r2_of_token_mean"], **fields)]


def _over_token_mean(
    held: Sample, squared: Tensor, predicted: Tensor, by_token: Tensor, **fields: Any
) -> Measurement:
    """norm_r2 minus the token mean's R2, on the same documents: a ratio of two sums."""
    gained = (squared - by_token).square() - (squared - predicted).square()
    whole = (squared - squared.mean()).square()
    return share_measurement("norm_r2_over_token_mean", held, gained, whole, **fields)


def token_means(token: Tensor, value: Tensor, wanted: Tensor) -> Tensor:
    """Return for each wanted token the mean value at that token, or the overall mean where it is unknown."""
    ids, place, count = torch.unique(token, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, place, value.double()) / count
    at = torch.searchsorted(ids, wanted).clamp_max(len(ids) - 1)
    return torch.where(ids[at] == wanted, mean[at], value.double().mean())


def _controls(
    x: tuple[Tensor, Tensor], error: Sequence[Tensor], held: Sample, bias: bool, **fields: Any
) -> list[Measurement]:
    generator = torch.Generator().manual_seed(fields["seed"])
    d = x[0].shape[1]
    basis = torch.linalg.qr(torch.randn(d, max(1, d // 8), generator=generator, dtype=torch.float64)).Q
    out = []
    for name, made in (
        ("vector_r2 of isotropic noise", [_noise(e, generator) for e in error]),
        ("vector_r2 of a projection", [rows @ basis @ basis.T for rows in x]),
    ):
        solved = least_squares_map(x[0], made[0], bias)
        out.append(
            r2_measurement(name, held, made[1], made[1] - with_constant(x[1], bias) @ solved, **fields)
        )
    return out


def _noise(error: Tensor, generator: torch.Generator) -> Tensor:
    """Return vectors of random direction with the error's norms."""
    noise = torch.randn(error.shape, generator=generator, dtype=torch.float64)
    return noise * (error.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))


def _bounds(low: float, high: float) -> tuple[float | None, float | None]:
    return None if math.isnan(low) else low, None if math.isnan(high) else high
