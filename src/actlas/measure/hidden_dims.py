"""How many hidden dimensions a token uses, and whether neighbouring tokens use the same ones.

    A_t   = the fewest dimensions that hold a share `energy` of |h_t|^2
    usage = |A_t| / d
    overlap of neighbours = |A_t and A_{t+1}| / |A_t or A_{t+1}|
    shared dimensions     = those in A_t for at least 90% of the tokens of a stretch of 64

A vector without any preferred dimension concentrates too: of a Gaussian's squares the largest 43% hold 90%.
So the control turns the same activations by one random rotation, which keeps norms and angles and takes the
dimensions' meaning away; the control of the overlap pairs a token with one of another document.

Source: the observation of "Mixture of Hidden-Dimensions Transformer" (2024): few dimensions are strongly
active for a token, some of them for many tokens in a row. The measures and controls are our completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.errors import InputError, ShapeError
from actlas.core.measurement import Measurement
from actlas.measure.reading import read, token_rows
from actlas.measure.registry import measure
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.model import Model

STRETCH, ALWAYS = 64, 0.9
Array = NDArray[np.float64]


def used_dims(x: Tensor, energy: float = 0.9) -> Tensor:
    """Return the dimensions that each token uses, bool `[n, d]`: the fewest that hold the energy.

    Args:
        x: activations `[n, d]`.
        energy: share of the squared magnitude, in (0, 1].

    Raises:
        InputError: an energy outside (0, 1]. ShapeError: not a matrix.
    """
    if not 0 < energy <= 1:
        raise InputError(f"energy is a share and must lie in (0, 1], not {energy}")
    if x.ndim != 2 or not x.numel():
        raise ShapeError(f"hidden dimensions are counted over [tokens, dimensions], not {list(x.shape)}")
    squares, order = x.double().square().sort(dim=1, descending=True, stable=True)
    before = squares.cumsum(1) - squares  # what the larger ones hold already
    kept = before < energy * squares.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter(1, order, kept)


def hidden_dim_usage(x: Tensor, energy: float = 0.9) -> Array:
    """Return the share of dimensions that each token of `x` `[n, d]` uses, `[n]`."""
    found: Array = used_dims(x, energy).double().mean(1).numpy()
    return found


def neighbour_overlap(
    used: Tensor, documents: NDArray[np.int64], *, shuffled: bool = False, seed: int = 0
) -> Array:
    """Return the overlap (shared over joint dimensions) of each token with the next one of its document.

    Args:
        used: bool `[n, d]`, in the order of the text.
        documents: of each token, `[n]`.
        shuffled: pair each of these tokens with a random token of another document instead (a control).
        seed: of that.

    Raises:
        InputError: no two tokens of one document follow each other; or nothing to pair with.
    """
    first = np.flatnonzero(documents[1:] == documents[:-1])
    if not len(first):
        raise InputError("no document has two tokens that follow each other")
    second = first + 1
    if shuffled:
        generator = np.random.default_rng(seed)
        second = np.array([_other(documents, int(i), generator) for i in first])
    a, b = used[first], used[second]
    found: Array = ((a & b).sum(1).double() / (a | b).sum(1).clamp_min(1)).numpy()
    return found


def _other(documents: NDArray[np.int64], i: int, generator: np.random.Generator) -> int:
    others = np.flatnonzero(documents != documents[i])
    if not len(others):
        raise InputError("there is one document only; a token of another one is needed as a control")
    return int(generator.choice(others))


def shared_dims(
    used: Tensor, documents: NDArray[np.int64], *, stretch: int = STRETCH, always: float = ALWAYS
) -> tuple[Array, NDArray[np.int64]]:
    """Return the share of dimensions that a stretch of tokens shares, and the document of each stretch.

    Args:
        used: bool `[n, d]`, in the order of the text.
        documents: of each token; a stretch lies in one document, what is left of it is not used.
        stretch: tokens.
        always: share of the stretch's tokens that must use a dimension.

    Raises:
        InputError: no document has so many tokens.
    """
    shares, owners = [], []
    for name in np.unique(documents):
        rows = np.flatnonzero(documents == name)
        for start in range(0, len(rows) - stretch + 1, stretch):
            part = used[rows[start : start + stretch]].double().mean(0)
            shares.append(float((part >= always).double().mean()))
            owners.append(name)
    if not shares:
        raise InputError(f"no document has {stretch} tokens; take a shorter stretch")
    return np.array(shares), np.array(owners)


@measure(
    "hidden-dim-usage",
    summary="how few hidden dimensions a token uses, and whether its neighbours use the same",
    unit="fraction",
    needs=("causal-lm",),
    data="corpus",
    quick={"tokens": 1024},
    source="Mixture of Hidden-Dimensions Transformer (2024), the observation",
)
def measure_hidden_dims(
    model: Model,
    corpus: Any,
    *,
    seed: int = 0,
    sites: str | Sequence[str] | None = None,
    energy: float = 0.9,
    tokens: int = 4096,
    context: int = 128,
) -> list[Measurement]:
    """Measure usage, overlap of neighbours and shared dimensions of the residual stream.

    Args:
        model: a causal language model with a layout.
        corpus: text.
        seed: of the rotation, the pairs and the bootstrap over documents.
        sites: where; the middle block's `resid_post` if missing. Massive tokens are left out.
        energy: share of the squared magnitude.
        tokens, context: how much text is read, in windows of how many tokens, one a document.

    Returns:
        for each site `hidden-dim-usage`, the same after a random rotation, `hidden-dim-overlap` of
        neighbours and of tokens of different documents, their paired difference, `shared-hidden-dims`.

    Raises:
        InputError: an energy outside (0, 1].
    """
    if sites is None:
        sites = [f"blocks.{(model.n_blocks or 1) // 2}.resid_post"]
    names = [s.name for s in model.resolve(sites)]
    rows: dict[str, list[Tensor]] = {n: [] for n in names}
    documents: dict[str, list[NDArray[np.int64]]] = {n: [] for n in names}
    seen: dict[str, int] = {}
    for trace in read(model, corpus, names, tokens=tokens, context=context, per_document=context):
        here, index = token_rows(trace)
        numbers = np.array([seen.setdefault(name, len(seen)) for name in here])[index]
        for name in names:
            x = trace.rows(name).flatten(1).float().cpu()
            ordinary = ~massive_rows(x)
            rows[name].append(x[ordinary])
            documents[name].append(numbers[ordinary.numpy()])
    return [
        m
        for name in names
        for m in _measured(torch.cat(rows[name]), np.concatenate(documents[name]), name, energy, seed)
    ]


def _measured(
    x: Tensor, documents: NDArray[np.int64], site: str, energy: float, seed: int
) -> list[Measurement]:
    used = used_dims(x, energy)
    turned = hidden_dim_usage(x @ _rotation(x.shape[1], seed), energy)
    usage = used.double().mean(1).numpy()
    pairs = documents[:-1][documents[1:] == documents[:-1]]

    def mean(name: str, values: Array, owners: NDArray[np.int64], **more: Any) -> Measurement:
        group = {"site": site, **more}
        return mean_measurement(
            name, "fraction", values, clusters=owners, seed=seed, over="documents", group=group,
            details={"energy": energy},
        )  # fmt: skip

    found = [
        mean("hidden-dim-usage", usage, documents),
        mean("hidden-dim-usage", turned, documents, control="random rotation"),
        mean("hidden-dim-usage less than rotated", turned - usage, documents),
    ]
    near = neighbour_overlap(used, documents)
    found.append(mean("hidden-dim-overlap", near, pairs))
    if len(np.unique(documents)) > 1:
        far = neighbour_overlap(used, documents, shuffled=True, seed=seed)
        found.append(mean("hidden-dim-overlap", far, pairs, control="another document"))
        found.append(mean("hidden-dim-overlap of neighbours over strangers", near - far, pairs))
    try:
        shares, owners = shared_dims(used, documents)
    except InputError as error:
        return [*found, missing("shared-hidden-dims", "fraction", str(error), group={"site": site})]
    return [*found, mean("shared-hidden-dims", shares, owners)]


def _rotation(d: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix `[d, d]`."""
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0].float()
