"""PCA as a lens: the directions in which a site's activations vary most.

    C = X^T X / n - m m^T = sum_i l_i v_i v_i^T        l_1 >= l_2 >= ...
    encode(x) = V (x - m)          decode(c) = m + V^T c

It is computed from a calibration's `X^T X` and mean, so it streams; or from rows that were read
already. Massive-activation rows would be the first component of nearly every residual stream; a
calibration leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.calibration import Calibration, calibrate
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.layout import HEAD_KINDS
from actlas.core.lens import Lens, check_finite
from actlas.core.measurement import Measurement
from actlas.core.methods import method

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(kw_only=True, eq=False)
class PCA(Lens):
    """Principal components of a site.

    Attributes:
        mean: float32 `[d]`.
        components: float32 `[k, d]`, orthonormal rows, the largest variance first; of each, the entry
            of largest magnitude is positive.
        variance: float32 `[k]`, variance along each component (population, divided by n).
        total: sum of all d variances.
        count: rows it was computed from.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    total: float
    count: int

    def __post_init__(self) -> None:
        k, d = self.components.shape if self.components.ndim == 2 else (0, 0)
        if self.mean.shape != (d,) or self.variance.shape != (k,):
            raise ShapeError(
                f"PCA needs mean [d], components [k, d] and variance [k], not {list(self.mean.shape)}, "
                f"{list(self.components.shape)} and {list(self.variance.shape)}"
            )
        check_finite("PCA", mean=self.mean, components=self.components, variance=self.variance)

    @property
    def channels(self) -> int:
        return self.components.shape[1]

    @property
    def features(self) -> int:
        return self.components.shape[0]

    @property
    def explained(self) -> Tensor:
        """Share of the total variance along each component, `[k]`."""
        return self.variance / self.total if self.total > 0 else torch.zeros_like(self.variance)

    def encode(self, x: Tensor) -> Tensor:
        """Return coordinates along the components, `[..., k]`."""
        components = self.components.to(x.device)
        return (self.flat(x).to(components.dtype) - self.mean.to(components)) @ components.T

    def decode(self, codes: Tensor) -> Tensor:
        """Return activations `[..., d]` with these coordinates and nothing outside the components."""
        components = self.components.to(codes.device)
        return codes.to(components.dtype) @ components + self.mean.to(components)

    def direction(self, feature: int) -> Tensor:
        return self.components[feature]


@method(
    "pca",
    room="core",
    returns="Lens",
    data="corpus",
    summary="principal components of a site's activations, streamed over a corpus",
    example="actlas fit pca smollm2 prose --site blocks.15.resid_post -o pca/",
)
def fit_pca(
    model: Model | None,
    data: Calibration | Tensor | Iterable[Any],
    site: str,
    *,
    components: int | None = None,
    keep_massive: bool = False,
    max_tokens: int | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> PCA:
    """Compute the principal components of a site.

    Args:
        model: whose activations are read; may be `None` for rows or a calibration.
        data: a corpus; a `Calibration` with `"hessian"` at the site; or rows `[n, d]`.
        site: one site.
        components: how many to keep; default all d (or n - 1 for fewer rows).
        keep_massive: include massive-activation rows (corpora only).
        max_tokens, batch_tokens, seed: for a corpus, see `calibrate`.

    Raises:
        InputError: fewer than two rows, more components than channels, or statistics that the
            calibration has not got.
    """
    fingerprint = None if model is None else model.fingerprint
    if isinstance(data, Tensor):
        mean, covariance, count = _of_rows(data)
    else:
        if isinstance(data, Calibration):
            calibration = data
            fingerprint = calibration.fingerprint
        elif model is None:
            raise InputError("a corpus needs a model to read it; give one, or rows [n, d]")
        else:
            resolved = model.resolve(site)
            if len(resolved) != 1:
                raise InputError(f"PCA reads one site; {site!r} names {len(resolved)}")
            site = resolved[0].name
            calibration = calibrate(
                model,
                data,
                resolved,
                ("moments", "hessian"),
                batch_tokens=batch_tokens,
                max_tokens=max_tokens,
                seed=seed,
                keep_massive=keep_massive,
            )
        statistics = calibration[site]
        mean, covariance, count = statistics.mean, statistics.covariance, statistics.count
    return _decompose(mean, covariance, count, components, site, fingerprint, _heads(model, site))


def _decompose(
    mean: Tensor,
    covariance: Tensor,
    count: int,
    k: int | None,
    site: str,
    fingerprint: Any,
    heads: int | None,
) -> PCA:
    d = len(mean)
    most = min(d, max(count - 1, 1))
    if count < 2:
        raise InputError(f"PCA needs at least 2 rows, not {count}; give more text")
    if k is not None and not 1 <= k <= d:
        raise InputError(f"components is {k}; {site} has {d} channels, so it must be 1 to {d}")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    keep = min(k or most, most)
    values, rows = values.flip(0).clamp(min=0), vectors.T.flip(0)[:keep]
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    total = float(covariance.diagonal().sum())
    share = float(values[:keep].sum()) / total if total > 0 else 0.0
    explained = Measurement(
        name="explained variance",
        value=share,
        unit="fraction",
        n=count,
        group={"site": site},
        interval="none: it describes these rows",
        better="higher",
        note=f"of {keep} of {d} components, on the rows they were computed from",
        details={"components": keep},
    )
    return PCA(
        site=site,
        heads=heads,
        fingerprint=fingerprint,
        measurements=(explained,),
        mean=mean.to(torch.float32),
        components=(rows * sign).to(torch.float32),
        variance=values[:keep].to(torch.float32),
        total=total,
        count=count,
    )


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ShapeError(f"rows must be floats [n, d], not {rows.dtype} {list(rows.shape)}")
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError("the rows hold NaN or infinity; leave those out")
    x = rows.detach().to("cpu", torch.float64)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / len(x), len(x)


def _heads(model: Model | None, site: str) -> int | None:
    if model is None:
        return None
    found = model.resolve(site)[0]
    features = found.features
    return features[0] if found.kind in HEAD_KINDS and features is not None and len(features) == 2 else None
