"""From dense activations to sparse codes, in time linear in what is active.

Kinds without a fixed k (ReLU, JumpReLU, Gated, BatchTopK, crosscoders) compute all features of a row and
keep those that are not zero. `Codes.from_dense` finds them with a partial sort, which is right for k of
them; early in training half of all features fire, and then the sort would cost more than the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actlas.core.codes import Codes


def codes_of(z: Tensor) -> Codes:
    """Return the codes of dense activations `[n, m]`: what is not zero is active, in the order of features.

    The codes are outside the autograd graph.
    """
    z = z.detach()
    n, m = z.shape
    rows, features = z.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=n)
    places = max(1, int(counts.max())) if n else 1
    if places > m // 2:
        return Codes(torch.arange(m, device=z.device).expand(n, m), z, m)
    place = torch.arange(len(rows), device=z.device) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(n, places, dtype=torch.int64, device=z.device)
    values = z.new_zeros(n, places)
    indices[rows, place] = features
    values[rows, place] = z[rows, features]
    return Codes(indices, values, m)
