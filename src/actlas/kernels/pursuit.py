"""Matching pursuit: signed sparse codes of rows over a dictionary of unit atoms.

`r = x`; k times: `j = argmax_l |<r, D_l>|`, `a_j += <r, D_j>`, `r -= <r, D_j> D_j` (Mallat & Zhang 1993;
the code of ITDA, "Inference-Time Decomposition of Activations", section 3). The residual is never formed:
with the correlations `c = D x` and the Gram matrix `G = D Dᵀ`, a step is `c -= <r, D_j> G[j]`, one row of
the Gram matrix instead of a dense product with all atoms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.kernels.loading import native as _native
from actlas.kernels.loading import takes_rows, threads

_CHUNK = 1 << 22  # correlations held at a time


def matching_pursuit(x: Tensor, atoms: Tensor, k: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the signed codes of rows after k steps of matching pursuit.

    An atom that is picked again is merged with its first pick, so a row has at most k distinct atoms; the
    entries left over have value 0 and repeat the row's first index. Of atoms that correlate equally well
    the first is taken.

    Args:
        x: `[n, d]` float32 or float64; n may be 0.
        atoms: `[m, d]`, rows of unit norm.
        k: steps, `k >= 1`.
        gram: `atoms @ atoms.T` `[m, m]`, to save computing it when the same atoms are used again; a view of
            a larger matrix will do.

    Returns:
        `indices [n, k]` int64, in the order of the first picks, and `values [n, k]`, so that
        `x ≈ Σ_j values_ij atoms[indices_ij]`.

    Raises:
        ValueError: shapes that do not fit, k < 1, no atoms, or atoms that are not of unit norm.
    """
    _check(x, atoms, k, gram)
    native = _native()
    x, atoms = x.detach(), atoms.detach().to(x.dtype)
    gram = atoms @ atoms.T if gram is None else gram.detach()
    if native is None or not takes_rows(x, atoms, gram):
        return matching_pursuit_reference(x, atoms, k, gram)
    picks = torch.empty(len(x), k, dtype=torch.int64)
    steps = torch.empty(len(x), k)
    size = max(1, _CHUNK // len(atoms))
    for start in range(0, len(x), size):
        at = slice(start, start + size)
        correlations = x[at] @ atoms.T
        native.pursue(correlations.numpy(), gram.numpy(), picks[at].numpy(), steps[at].numpy(), threads())
    return _merge(picks, steps)


def matching_pursuit_reference(
    x: Tensor, atoms: Tensor, k: int, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `matching_pursuit` does, in plain PyTorch, on the device of `x`."""
    _check(x, atoms, k, gram)
    x, atoms = x.detach(), atoms.detach().to(x.dtype)
    gram = atoms @ atoms.T if gram is None else gram
    picks = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    steps = x.new_empty(len(x), k)
    size = max(1, _CHUNK // len(atoms))
    for start in range(0, len(x), size):
        at = slice(start, start + size)
        correlations = x[at] @ atoms.T
        for j in range(k):
            pick = correlations.abs().argmax(1)
            step = correlations.gather(1, pick[:, None])
            picks[at, j], steps[at, j] = pick, step[:, 0]
            correlations -= step * gram[pick]
    return _merge(picks, steps)


def _merge(picks: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Add the steps of an atom into its first pick, and close the gaps."""
    n, k = picks.shape
    if n == 0:
        return picks, steps
    same = picks.unsqueeze(2) == picks.unsqueeze(1)  # [n, k, k]
    first = same.to(torch.uint8).argmax(2)  # position of the first pick of the same atom
    values = torch.zeros_like(steps).scatter_add_(1, first, steps)
    repeated = first != torch.arange(k, device=picks.device)
    order = repeated.to(torch.uint8).argsort(dim=1, stable=True)
    indices = picks.masked_scatter(repeated, picks[:, :1].expand(n, k)[repeated])
    return indices.gather(1, order), values.gather(1, order)


def _check(x: Tensor, atoms: Tensor, k: int, gram: Tensor | None) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 [n, d], not {x.dtype} {list(x.shape)}")
    if atoms.ndim != 2 or not atoms.is_floating_point() or atoms.shape[1] != x.shape[1] or len(atoms) == 0:
        raise ValueError(
            f"atoms must be float [m, {x.shape[1]}], m >= 1, not {atoms.dtype} {list(atoms.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if gram is not None and (gram.shape != (len(atoms), len(atoms)) or gram.dtype != x.dtype):
        raise ValueError(
            f"gram must be {x.dtype} [{len(atoms)}, {len(atoms)}], not {gram.dtype} {list(gram.shape)}"
        )
    worst = (torch.linalg.vector_norm(atoms.detach(), dim=1) - 1).abs().max()
    if not worst <= 1e-3:
        raise ValueError(f"atoms must have unit norm; one is off by {float(worst):.3g}")
