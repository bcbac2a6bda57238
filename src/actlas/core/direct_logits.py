"""What a direction in the residual stream does to the logits directly, past all later layers.

    logits = W_U norm(x)                 norm(x) = g * x / rms(x) (+ b), LayerNorm centres x first
    effect of a direction v, up to the positive factor 1 / rms(x):      W_U (g * v), centred over tokens

`g` is found by probing the model's own final norm, so norms that scale by `1 + w` (Gemma) or have no
weight need no special case. The derivative's second part, along x itself, is left out, as is usual in
direct logit attribution: it rescales all of x and does not belong to the direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.core.errors import ModelError, ShapeError
from actlas.core.layout import weight_matrix

if TYPE_CHECKING:
    from actlas.core.model import Model


def final_gain(model: Model) -> Tensor:
    """Return what the final norm multiplies each channel by, float32 `[d]`; ones where there is no norm."""
    d = model.d_model or 0
    norm = model.final_norm_module
    if norm is None:
        return torch.ones(d)
    probe = torch.ones(1, d, device=model.device, dtype=model.dtype)
    probe[:, 1::2] = -1  # mean 0 and root mean square 1 (d is even in practice; the rest is rounding)
    with torch.no_grad():
        both = norm(torch.cat([probe, -probe])).float()
    gain: Tensor = (both[0] - both[1]) / 2 * probe[0].float()
    return gain.cpu()


def direct_logits(model: Model, directions: Tensor) -> Tensor:
    """Return the direct effect of directions `[n, d]` on the logits, float32 `[n, vocabulary]`, mean 0.

    Raises:
        ModelError: the model has no output head.
        ShapeError: the directions do not live in the residual stream.
    """
    head = model.unembed_module
    if head is None:
        raise ModelError(f"{model.name} ({model.kind}) has no output head over a vocabulary")
    if directions.ndim != 2 or directions.shape[1] != model.d_model:
        raise ShapeError(f"directions are [n, {model.d_model}], not {list(directions.shape)}")
    with torch.no_grad():
        weight = weight_matrix(head).detach().float()
        scaled = directions.detach().float() * final_gain(model)
        logits = scaled.to(weight.device) @ weight.T
    centred: Tensor = logits - logits.mean(1, keepdim=True)
    return centred


def top_logits(model: Model, directions: Tensor, k: int = 8, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Return the tokens that each direction raises most and lowers most.

    Returns:
        ids int64 `[n, 2, k]` and effects float32 `[n, 2, k]`; `[:, 0]` raised, `[:, 1]` lowered, strongest
        first.
    """
    ids, effects = [], []
    for part in directions.split(chunk):
        logits = direct_logits(model, part)
        up, down = logits.topk(k, dim=1), (-logits).topk(k, dim=1)
        ids.append(torch.stack([up.indices, down.indices], 1).cpu())
        effects.append(torch.stack([up.values, -down.values], 1).cpu())
    return torch.cat(ids), torch.cat(effects)
