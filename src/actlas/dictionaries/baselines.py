"""Plain dictionaries, which every learned one must beat: PCA, k-means, NMF, random atoms.

    PCA      x ~ m + sum_{i<=k} v_i (v_i . (x - m))       the k directions of most variance
    k-means  x ~ c_j,  j = argmin_j |x - c_j|             one active feature a row, of value 1
    NMF      (x+, x-) ~ z H,  z >= 0, H >= 0              parts of the positive and the negative half
    random   x ~ m + sum_j z_j d_j by matching pursuit    d_j: random activations, or random directions

K-means and NMF are scikit-learn's, in their mini-batch form. Activations are of both signs, so NMF sees
`[max(x, 0), max(-x, 0)]`, and an atom is the difference of its halves.

Random activations are the baseline to take seriously: matching pursuit over a few thousand of them
rebuilds a residual stream nearly as well as a dictionary whose atoms were chosen. `evaluate` shows random
atoms beside every dictionary; `fit_random_dictionary` is one that can be saved and used by itself.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import check_finite
from actlas.core.methods import method
from actlas.core.pca import PCA
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.evaluation.controls import UnitDirections, control_dictionaries
from actlas.dictionaries.fit import open_source, quality
from actlas.dictionaries.objective import Batch
from actlas.dictionaries.sae import parse_width
from actlas.dictionaries.sources import RowsSource

if TYPE_CHECKING:
    from actlas.core.model import Model

#: Rows that a baseline is fitted on; more change little and cost memory.
ROWS = 65_536


@dataclass(kw_only=True, eq=False)
class KMeansDictionary(Dictionary):
    """Centroids as atoms; a row's nearest one is active, with value 1.

    Attributes:
        centroids: float32 `[m, d]`.
    """

    centroids: Tensor

    def __post_init__(self) -> None:
        if self.centroids.ndim != 2 or not len(self.centroids):
            raise ShapeError(f"KMeansDictionary needs centroids [m, d], not {list(self.centroids.shape)}")
        check_finite("KMeansDictionary", centroids=self.centroids)

    @property
    def channels(self) -> int:
        return self.centroids.shape[1]

    @property
    def features(self) -> int:
        return self.centroids.shape[0]

    @property
    def atoms(self) -> Tensor:
        return self.centroids

    def encode_rows(self, x: Tensor) -> Codes:
        c = self.centroids
        x = x.to(c)
        nearest = (c.square().sum(1) - 2 * x @ c.T).argmin(1, keepdim=True)
        return Codes(nearest, torch.ones_like(nearest, dtype=c.dtype), self.features)


@dataclass(kw_only=True, eq=False)
class NMFDictionary(Dictionary):
    """Non-negative parts of the positive and negative halves of activations.

    Attributes:
        parts: float32 `[m, 2 d]`, not negative: what a feature adds to the positive and the negative half.
        iterations: multiplicative updates with which codes are found.
    """

    parts: Tensor
    iterations: int = 100

    def __post_init__(self) -> None:
        if self.parts.ndim != 2 or self.parts.shape[1] % 2:
            raise ShapeError(f"NMFDictionary needs parts [m, 2 d], not {list(self.parts.shape)}")
        if bool((self.parts < 0).any()):
            raise InputError("parts hold negative numbers; those of NMF are never negative")
        check_finite("NMFDictionary", parts=self.parts)

    @property
    def channels(self) -> int:
        return self.parts.shape[1] // 2

    @property
    def features(self) -> int:
        return self.parts.shape[0]

    @property
    def atoms(self) -> Tensor:
        positive, negative = self.parts.split(self.channels, dim=1)
        return positive - negative

    def encode_rows(self, x: Tensor) -> Codes:
        """Minimise `|v - z H|^2` over z >= 0 (Lee and Seung's update), v the two halves of a row."""
        v, h = halves(x.to(self.parts)), self.parts
        gram, given = h @ h.T, v @ h.T
        z = given.clamp_min(0) / gram.sum(1).clamp_min(1e-12)
        for _ in range(self.iterations):
            z = z * given / (z @ gram).clamp_min(1e-12)
        return codes_of(torch.where(z > 1e-6 * z.amax(1, keepdim=True), z, torch.zeros_like(z)))


def halves(x: Tensor) -> Tensor:
    """Return `[max(x, 0), max(-x, 0)]`, `[n, 2 d]`."""
    return torch.cat([x.clamp_min(0), (-x).clamp_min(0)], dim=1)


def pca_dictionary(pca: PCA, k: int | None = None) -> Dictionary:
    """Return a PCA as a dictionary whose codes are the coordinates along its first k components.

    Raises:
        InputError: more components than there are.
    """
    k = pca.features if k is None else k
    if not 1 <= k <= pca.features:
        raise InputError(f"k is {k}; it must be between 1 and the {pca.features} components")
    return UnitDirections(  # the atoms are orthogonal, so k steps of matching pursuit give all k coordinates
        site=pca.site,
        heads=pca.heads,
        fingerprint=pca.fingerprint,
        directions=pca.components[:k],
        centre=pca.mean,
        k=k,
    )


@method(
    "kmeans",
    room="dictionaries",
    returns="Lens",
    data="corpus",
    summary="k-means centroids as a dictionary: the plainest clustering of a site's activations",
    example="actlas fit kmeans smollm2 prose --site blocks.15.resid_post --option width=512 -o kmeans/",
)
def fit_kmeans(
    model: Model | None,
    data: Any,
    site: str,
    *,
    width: int | str = 512,
    rows: int = ROWS,
    max_tokens: int | None = None,
    seed: int = 0,
) -> KMeansDictionary:
    """Cluster activations.

    Args:
        model: whose activations are read; may be `None` for rows or a store.
        data: a corpus, a store or rows `[n, d]`.
        site: where.
        width: number of clusters, or a multiple of the channels such as `"1x"`.
        rows: fitted on at most so many.
        max_tokens: read at most so many tokens of a corpus.
        seed: of the first centroids.

    Raises:
        InputError: more clusters than rows.
    """
    from sklearn.cluster import MiniBatchKMeans

    batch, held, fields = _read(model, data, site, rows, max_tokens, seed)
    m = parse_width(width, batch.x.shape[1])
    if m > len(batch):
        raise InputError(f"width is {m}, but there are {len(batch)} rows to cluster; give more text")
    found = MiniBatchKMeans(m, batch_size=4096, n_init=1, random_state=seed).fit(batch.x.numpy())
    lens = KMeansDictionary(centroids=torch.from_numpy(found.cluster_centers_).float(), **fields)
    return _measured(lens, batch, held)


@method(
    "nmf",
    room="dictionaries",
    returns="Lens",
    data="corpus",
    summary="non-negative matrix factorisation of a site's activations, as a dictionary",
    example="actlas fit nmf smollm2 prose --site blocks.15.resid_post --option width=64 -o nmf/",
)
def fit_nmf(
    model: Model | None,
    data: Any,
    site: str,
    *,
    width: int | str = 64,
    rows: int = ROWS,
    max_tokens: int | None = None,
    iterations: int = 30,
    seed: int = 0,
) -> NMFDictionary:
    """Factorise activations into non-negative parts.

    Args:
        model, data, site, width, rows, max_tokens, seed: see `fit_kmeans`.
        iterations: passes over the rows.

    Raises:
        InputError: more parts than rows.
    """
    from sklearn.decomposition import MiniBatchNMF
    from sklearn.exceptions import ConvergenceWarning

    batch, held, fields = _read(model, data, site, rows, max_tokens, seed)
    m = parse_width(width, batch.x.shape[1])
    if m > len(batch):
        raise InputError(f"width is {m}, but there are {len(batch)} rows to factorise; give more text")
    solver = MiniBatchNMF(m, batch_size=1024, max_iter=iterations, random_state=seed, init="random")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver.fit(halves(batch.x).numpy())
    parts = torch.from_numpy(solver.components_).float()
    parts = parts / parts.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return _measured(NMFDictionary(parts=parts, **fields), batch, held)


@method(
    "random-dictionary",
    room="dictionaries",
    returns="Lens",
    data="corpus",
    summary="random activations (or directions) as atoms: the baseline of every dictionary",
    example="actlas fit random-dictionary smollm2 prose --site blocks.15.resid_post --option k=32 -o random/",
)
def fit_random_dictionary(
    model: Model | None,
    data: Any,
    site: str,
    *,
    width: int | str = 4096,
    k: int = 32,
    kind: Literal["activations", "directions"] = "activations",
    rows: int = ROWS,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Dictionary:
    """Draw a dictionary at random; it is read by matching pursuit.

    Args:
        model, data, site, width, rows, max_tokens, seed: see `fit_kmeans`.
        k: steps of the pursuit.
        kind: atoms are `"activations"` of the data, or `"directions"` from the sphere.

    Raises:
        InputError: an unknown kind, or a width or k that does not fit.
    """
    if kind not in ("activations", "directions"):
        raise InputError(f"kind is {kind!r}; it must be 'activations' or 'directions'")
    batch, held, fields = _read(model, data, site, rows, max_tokens, seed)
    m = parse_width(width, batch.x.shape[1])
    if not 1 <= k <= m:
        raise InputError(f"k is {k}; it must be between 1 and the width, {m}")
    shape = KMeansDictionary(centroids=torch.zeros(m, batch.x.shape[1]), **fields)
    name = {"activations": "random atoms", "directions": "random directions"}[kind]
    return _measured(control_dictionaries(shape, batch.x, k, seed)[name], batch, held)


def _read(
    model: Model | None, data: Any, site: str, rows: int, max_tokens: int | None, seed: int
) -> tuple[Batch, Batch | None, dict[str, Any]]:
    """Return rows to fit on, held-out rows if there are some, and the fields that every lens has."""
    if rows < 1:
        raise InputError(f"rows is {rows}; it must be at least 1")
    heads = None
    if model is not None:
        found = model.resolve(site)
        if len(found) != 1:
            raise InputError(f"site {site!r} names {len(found)} sites; a dictionary is fitted at one")
        site, features = found[0].name, found[0].features
        heads = features[0] if features is not None and len(features) == 2 else None
    limit = math.ceil(1.25 * rows) if max_tokens is None else max_tokens
    source, held = open_source(model, data, site, max_tokens=limit, seed=seed)
    batch = source.sample(min(rows, len(source)) if isinstance(source, RowsSource) else rows, seed)
    fingerprint = model.fingerprint if model is not None else getattr(data, "fingerprint", None)
    fields = {"site": site, "heads": heads, "fingerprint": fingerprint, "skip_above": source.skip_above}
    return batch, held, fields


def _measured(lens: Any, batch: Batch, held: Batch | None) -> Any:
    lens.measurements = quality(lens, batch if held is None else held, held is not None)
    return lens
