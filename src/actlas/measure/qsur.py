"""QSUR: how well values fill the cube of levels that they are rounded to.

Data of d channels fill an ellipsoid (of their covariance Q diag(l) Q^T, at some confidence: chi2); levels
fill the cube that covers it. The quantization space utilization rate is the ratio of the two volumes:

    V_ellipsoid = pi^(d/2) / Gamma(d/2 + 1) * chi2^(d/2) * prod sqrt(l_i)
    V_cube      = edge^d
    edge        = 2 sqrt(chi2 * l_1) * max_i |q_1i|    "top":       the largest eigenvector alone (the paper)
                  2 sqrt(chi2 * max_i cov_ii)          "ellipsoid": the exact extent of the ellipsoid
                  max x - min x over all channels      "range":     what a per-tensor quantizer sees

The number here is log(QSUR) / d, the mean share of a channel on a logarithmic scale: QSUR itself underflows
at a few hundred channels. Rotations raise it by making the edge small (all |q_1i| = 1/sqrt(d)), scales by
making all l_i equal; both together reach the most that there is.

Source: "OstQuant" (Hu et al. 2025), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from actlas.core.calibration import calibrate
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.measure.observing import jackknife
from actlas.measure.registry import measure

if TYPE_CHECKING:
    from actlas.core.model import Model

Edge = Literal["top", "ellipsoid", "range"]
_FLOOR = 1e-7  # of the largest eigenvalue: directions that hold nothing but rounding
_FOLDS = 4


def log_qsur(x: Tensor, *, edge: Edge = "ellipsoid", confidence: float = 0.99) -> float:
    """Return log(QSUR) / d of rows `[n, d]`.

    Args:
        x: activations or weights, one row a token or an output channel; at least d + 1 rows, or the volume
            would be 0 (directions below 1e-7 of the largest variance count as that).
        edge: of the cube; see the module's text.
        confidence: of the ellipsoid; it only matters for `"range"`.

    Raises:
        InputError: too few rows, constant rows, or an edge that does not exist.
        NonFiniteError: NaN or infinity.
    """
    if edge not in get_args(Edge):
        raise InputError(f"edge is {edge!r}; it must be one of {', '.join(get_args(Edge))}")
    if x.ndim != 2 or x.shape[0] <= x.shape[1]:
        raise InputError(f"QSUR of {list(x.shape)} needs [rows, channels] with more rows than channels")
    if not 0 < confidence < 1:
        raise InputError(f"confidence lies between 0 and 1, not {confidence}")
    wide = x.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError("QSUR of values that hold NaN or infinity")
    from scipy.stats import chi2

    d = wide.shape[1]
    size = float(chi2.ppf(confidence, d))
    centred = wide - wide.mean(0)
    cov = centred.T @ centred / (len(wide) - 1)
    values, vectors = torch.linalg.eigh(cov)
    top = float(values[-1])
    if not top > 0:
        raise InputError("QSUR of constant channels is not defined")
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    volume = ball / d + 0.5 * math.log(size) + 0.5 * float(values.clamp_min(_FLOOR * top).log().mean())
    if edge == "top":
        cube = math.log(2) + 0.5 * math.log(size * top) + math.log(float(vectors[:, -1].abs().max()))
    elif edge == "ellipsoid":
        cube = math.log(2) + 0.5 * math.log(size * float(cov.diagonal().max()))
    else:
        cube = math.log(float(wide.max() - wide.min()))
    return volume - cube


@measure(
    "qsur",
    summary="how well activations fill the cube of levels they are rounded to (log QSUR a channel)",
    unit="nats/channel",
    needs=("causal-lm", "encoder"),
    quick={"tokens": 1536},
    source="OstQuant, section 3",
)
def qsur(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    sites: str | Sequence[str] = ("blocks.*.attn_norm", "blocks.*.mlp_norm"),
    edge: Edge = "ellipsoid",
    tokens: int = 4096,
    context: int = 256,
) -> list[Measurement]:
    """Measure log QSUR of the activations at some sites, under the edits that are installed.

    Args:
        model: the model.
        corpus: text; at least as many tokens as a site has channels, several times that is better.
        seed: of the sample of rows.
        sites: names or patterns.
        edge: of the cube; see `log_qsur`.
        tokens: how many rows.
        context: window length.

    Returns:
        one `qsur` for each site, `group={"site": name}`, with a jackknife interval over four parts of rows.

    Raises:
        InputError: fewer tokens than channels.
    """
    resolved = [s.name for s in model.resolve(sites)]
    context = min(context, model.context_length or context)
    found = calibrate(
        model, corpus, resolved, ("rows",), rows=tokens, max_tokens=tokens, context=context, seed=seed
    )
    out = []
    for name in resolved:
        rows = found[name].rows
        assert rows is not None
        value = log_qsur(rows, edge=edge)
        parts = torch.arange(len(rows)) * _FOLDS // len(rows)
        left = [log_qsur(rows[parts != f], edge=edge) for f in range(_FOLDS)] if _enough(rows) else []
        low, high = jackknife(value, left)
        out.append(
            Measurement(
                "qsur",
                value,
                "nats/channel",
                len(rows),
                low,
                high,
                "jackknife over rows",
                seed,
                group={"site": name},
                better="higher",
                note="log(QSUR) / d; massive tokens are left out",
                details={"edge": edge},
            )
        )
    return out


def _enough(rows: Tensor) -> bool:
    return len(rows) * (_FOLDS - 1) // _FOLDS > rows.shape[1] + 1
