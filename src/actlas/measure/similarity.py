"""How alike two representations of the same tokens are, and whether that finds the same layer again.

    representation_similarity(a, b, kind)     one number for rows a [n, d_a] and b [n, d_b] of the same tokens
    layer_matching(matrix)                    for each layer of one model: is its most similar layer of the
                                              other model the one of the same number?

| kind | what |
| --- | --- |
| `itda` | Jaccard overlap of atom labels, size of (A and B) / size of (A or B); takes `AtomLabels` |
| `cka` | linear CKA: norm(B'A)^2 / (norm(A'A) norm(B'B)), Frobenius norms, columns centred |
| `svcca` | mean canonical correlation of the first 20 singular directions of each |
| `relative` | mean cosine of the rows' vectors of cosines to the same 300 anchor rows |
| `linreg` | R2 of predicting b from a by least squares, on rows that were not fitted; not symmetric |

The released code of the ITDA paper scales columns to unit norm before CKA: `unit_columns=True`.

Sources: "Inference-Time Decomposition of Activations (ITDA)", section 4 and its code; Kornblith et al.
2019 (CKA, regression); Raghu et al. 2017 (SVCCA); Moschella et al. 2023 (relative representations).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.measurement import Measurement
from actlas.measure.samples import rate_measurement

SimilarityKind = Literal["itda", "cka", "svcca", "relative", "linreg"]


@dataclass(frozen=True)
class AtomLabels:
    """The names of a dictionary's atoms: which tokens they are.

    Attributes:
        labels: (document, position) of every atom.
        seeds: those that every dictionary of the same text starts with.
        data: hash of the text that was read; empty if unknown.
    """

    labels: frozenset[tuple[Hashable, int]]
    seeds: frozenset[tuple[Hashable, int]] = frozenset()
    data: str = ""


def representation_similarity(
    a: Any,
    b: Any,
    kind: SimilarityKind = "cka",
    *,
    exclude_seed: bool = True,
    unit_columns: bool = False,
    components: int = 20,
    anchors: int = 300,
    seed: int = 0,
) -> float:
    """Return how alike two representations are; 1 for the same.

    Args:
        a, b: rows `[n, d_a]` and `[n, d_b]` of the same tokens in the same order; for `"itda"`
            `AtomLabels`, or a dictionary that has them as `atom_labels`.
        kind: see the table in the module's text.
        exclude_seed: leave out atoms that are seeds of either dictionary; they are the same in every
            model and raise every overlap (`"itda"`).
        unit_columns: scale centred columns to unit norm first (`"cka"`), so that a few large channels do
            not decide.
        components: singular directions (`"svcca"`).
        anchors: anchor rows (`"relative"`); all rows if there are fewer.
        seed: of the anchors, and of the split of `"linreg"`.

    Raises:
        InputError: an unknown kind, too few rows, or dictionaries of different texts.
        ShapeError: not as many rows in a as in b.
        NonFiniteError: NaN or infinity.
    """
    if kind not in get_args(SimilarityKind):
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(get_args(SimilarityKind))}")
    if kind == "itda":
        return jaccard(a, b, exclude_seed=exclude_seed)
    x, y = _rows(a, "a"), _rows(b, "b")
    if len(x) != len(y):
        raise ShapeError(f"a has {len(x)} rows and b has {len(y)}; give the same tokens to both")
    if len(x) < 4:
        raise InputError(f"{len(x)} rows are too few to compare representations; give at least 4")
    if kind == "cka":
        return _cka(x, y, unit_columns)
    if kind == "svcca":
        return _svcca(x, y, components)
    if kind == "relative":
        return _relative(x, y, anchors, seed)
    return _regression(x, y, seed)


def jaccard(a: Any, b: Any, *, exclude_seed: bool = True) -> float:
    """Return the share of atom labels that two dictionaries have in common; 0 if there are none.

    Raises:
        InputError: no labels, or dictionaries that were fitted on different texts.
    """
    one, other = _labels(a), _labels(b)
    if one.data and other.data and one.data != other.data:
        raise InputError(
            f"the dictionaries were fitted on different texts ({one.data[:8]} and {other.data[:8]}); labels "
            "can be compared only where both models read the same tokens"
        )
    left_out = one.seeds | other.seeds if exclude_seed else frozenset()
    first, second = one.labels - left_out, other.labels - left_out
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def similarity_matrix(
    a: Mapping[Any, Any], b: Mapping[Any, Any], kind: SimilarityKind = "cka", **options: Any
) -> Tensor:
    """Return the similarity of every layer of one model with every layer of another.

    Args:
        a, b: layer -> what `representation_similarity` takes, in the order of the layers.
        kind, options: see `representation_similarity`.

    Returns:
        float64 `[len(a), len(b)]`.
    """
    values = [[representation_similarity(x, y, kind, **options) for y in b.values()] for x in a.values()]
    return torch.tensor(values, dtype=torch.float64)


def layer_matching(
    *matrices: Tensor, name: str = "layer matching", group: Mapping[str, str] | None = None
) -> Measurement:
    """Return the share of layers whose most similar layer in the other model has the same number.

    Args:
        matrices: `[L, L]` each, of two models with L layers; each is read in both directions.
        name, group: of the measurement.

    Raises:
        ShapeError: a matrix that is not square: the models must have as many layers.
        InputError: no matrix.
    """
    if not matrices:
        raise InputError("layer matching needs at least one matrix of similarities")
    hits: list[bool] = []
    for matrix in matrices:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"layer matching needs [L, L], not {list(matrix.shape)}")
        own = torch.arange(len(matrix))
        hits += (matrix.argmax(1) == own).tolist() + (matrix.argmax(0) == own).tolist()
    layers = len(matrices[0])
    return rate_measurement(
        name,
        hits,
        better="higher",
        group=group,
        note=f"{len(matrices)} pairs of models, {layers} layers, both directions; chance {1 / layers:.2f}",
        details={"chance": 1 / layers},
    )


def _cka(x: Tensor, y: Tensor, unit_columns: bool) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    if unit_columns:
        x, y = (z / z.norm(dim=0).clamp(min=1e-12) for z in (x, y))
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).pow(2).sum() / own) if own > 0 else 0.0


def _svcca(x: Tensor, y: Tensor, components: int) -> float:
    most = min(components, x.shape[1], y.shape[1], len(x) - 1)
    if components < 1:
        raise InputError(f"components is {components}; it must be at least 1")
    bases = [torch.linalg.svd(z - z.mean(0), full_matrices=False)[0][:, :most] for z in (x, y)]
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1).mean())


def _relative(x: Tensor, y: Tensor, anchors: int, seed: int) -> float:
    if anchors < 1:
        raise InputError(f"anchors is {anchors}; it must be at least 1")
    at = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:anchors]
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    return float(torch.cosine_similarity(x @ x[at].T, y @ y[at].T, dim=1).mean())


def _regression(x: Tensor, y: Tensor, seed: int) -> float:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, test = order[: len(x) // 2], order[len(x) // 2 :]
    mean_x, mean_y = x[fit].mean(0), y[fit].mean(0)
    weights = torch.linalg.lstsq(x[fit] - mean_x, y[fit] - mean_y, driver="gelsd").solution
    missed = y[test] - mean_y - (x[test] - mean_x) @ weights
    spread = (y[test] - y[test].mean(0)).pow(2).sum()
    return float(1 - missed.pow(2).sum() / spread) if spread > 0 else 0.0


def _rows(given: Any, which: str) -> Tensor:
    if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point():
        said = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ShapeError(f"{which} must be rows of floats [n, d], not {said}")
    x = given.detach().to("cpu", torch.float64)
    bad = ~torch.isfinite(x).all(1)
    if bool(bad.any()):
        raise NonFiniteError(f"{which} holds NaN or infinity in row {int(bad.nonzero()[0])}")
    return x


def _labels(given: Any) -> AtomLabels:
    found = getattr(given, "atom_labels", given)
    if not isinstance(found, AtomLabels) or not found.labels:
        raise InputError(f"{type(given).__name__} has no atom labels; give dictionaries that ITDA fitted")
    return found
