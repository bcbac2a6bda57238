"""Rotary position embeddings of a model, so that keys can be moved to other positions.

    rot(x, p)_i = x_i cos(p f_i) - x_{i+d/2} sin(p f_i)           d: the head's width, i < d/2
    rot(x, p)_{i+d/2} = x_{i+d/2} cos(p f_i) + x_i sin(p f_i)     f: the model's inverse frequencies

Rotations of one plane add up, rot(rot(x, a), b) = rot(x, a + b): a key that was cached at position a serves
at a + b, and rot(., -a) gives the key as it was before its position went in. Angles are computed in float64.

Source: "RoFormer" (Su et al. 2021), with the halves layout of llama-like models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import ModelError, ShapeError
from actlas.core.layout import find, join, plain_module

if TYPE_CHECKING:
    from actlas.core.model import Model

#: Kinds whose frequencies depend on how long the input is: a key cannot be moved after the fact.
_BY_LENGTH = ("dynamic", "longrope")
_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Rotary:
    """The rotation of one model.

    Attributes:
        frequencies: f, radians a position, `d / 2` numbers.
        kind: the rope type of the model's configuration, e.g. `"default"` or `"llama3"`.
        scaling: what the model multiplies cosines and sines by (1 unless YaRN); a moved key has it already.
    """

    frequencies: tuple[float, ...]
    kind: str = "default"
    scaling: float = 1.0

    def __call__(self, x: Tensor, positions: Tensor | Sequence[int] | int) -> Tensor:
        """Return `x` rotated by so many positions.

        Args:
            x: `[..., pos, d]`.
            positions: one number for each position (negative ones turn back), or one for all.

        Raises:
            ShapeError: another width than that of the model's heads.
        """
        half = len(self.frequencies)
        if x.shape[-1] != 2 * half:
            raise ShapeError(f"keys of this rotation are {2 * half} wide, not {x.shape[-1]}")
        where = torch.as_tensor(positions, dtype=torch.float64, device=x.device)
        angles = where[..., None] * torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {"frequencies": list(self.frequencies), "kind": self.kind, "scaling": self.scaling}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Rotary:
        """Rebuild from `to_json`."""
        return cls(tuple(record["frequencies"]), record["kind"], record["scaling"])


def rotary_of(model: Model) -> Rotary:
    """Return the rotation that a model applies to its keys.

    Raises:
        ModelError: it has none, or one whose cached keys cannot be moved (sliding windows, frequencies that
            depend on the length, only a part of each head).
    """
    config: Any = model.config
    config = getattr(config, "text_config", None) or config
    tower = model.tower
    kind = getattr(config, "model_type", "")
    if tower is None or kind not in _KNOWN:
        raise ModelError(f"{model.name} ({kind or 'no layout'}) is not of a kind with plain rotary keys")
    layers = set(getattr(config, "layer_types", None) or ())
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if (layers and layers != {"full_attention"}) or sliding:
        raise ModelError(f"{model.name} attends through sliding windows; its cached keys cannot be moved")
    root = tower.blocks.rpartition(".")[0]
    module: Any = find(plain_module(model.module), join(root, "rotary_emb"))
    frequencies = getattr(module, "inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise ModelError(
            f"{model.name} has no rotary embedding beside its blocks; its keys carry no rotation"
        )
    rope = str(getattr(module, "rope_type", "default"))
    if rope in _BY_LENGTH:
        raise ModelError(f"{model.name} has {rope} rotary frequencies, which depend on the input's length")
    if 2 * len(frequencies) != tower.head_dim:
        raise ModelError(
            f"{model.name} rotates {2 * len(frequencies)} of {tower.head_dim} channels of a head"
        )
    values = tuple(float(f) for f in frequencies.detach().double().cpu())
    return Rotary(values, rope, float(getattr(module, "attention_scaling", 1.0)))
