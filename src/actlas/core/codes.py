"""Sparse codes: which features of a dictionary are active at a token, and how strongly.

A dictionary of 32,768 features at which 32 are active is 64 numbers a token, not 32,768. Codes are
therefore pairs (index, value), `k` places for each token:

    codes.indices    int64  [..., k]     which feature
    codes.values     float  [..., k]     its value; 0 marks a place that is not used
    codes.dense()    float  [..., features]

No feature stands twice at one token. Values may be negative where the dictionary's are (ITDA).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ShapeError


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes of activations `[..., d]`: `indices` and `values` `[..., k]`, and the number of features."""

    indices: Tensor
    values: Tensor
    features: int

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape or self.indices.ndim < 1:
            raise ShapeError(
                f"codes need indices and values of one shape [..., k], not {list(self.indices.shape)} and "
                f"{list(self.values.shape)}"
            )

    @classmethod
    def from_dense(cls, z: Tensor, k: int | None = None) -> Codes:
        """Return the codes of a dense tensor.

        Args:
            z: `[..., features]`; what is not zero is active.
            k: keep at most so many, those of largest magnitude; default: as many places as the token
                with most active features needs (at least one).
        """
        if z.ndim < 1 or z.shape[-1] == 0:
            raise ShapeError(f"dense codes are [..., features], not {list(z.shape)}")
        most = int((z != 0).sum(-1).max()) if z.numel() else 1
        places = max(1, min(most if k is None else k, z.shape[-1]))
        indices = z.abs().topk(places, dim=-1, sorted=False).indices
        return cls(indices, z.gather(-1, indices), z.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """The shape of the activations that were encoded, without their channels."""
        return self.indices.shape[:-1]

    @property
    def places(self) -> int:
        """How many features a token can have here."""
        return self.indices.shape[-1]

    @property
    def active(self) -> Tensor:
        """Which places are used, bool `[..., k]`."""
        return self.values != 0

    @property
    def l0(self) -> Tensor:
        """How many features are active, int64 `[...]`."""
        return self.active.sum(-1)

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __getitem__(self, rows: Any) -> Codes:
        """Return the codes of some tokens; `rows` indexes the leading axes."""
        if self.indices.ndim == 1:
            raise InputError("these codes are of one token; there are no rows to choose")
        return Codes(self.indices[rows], self.values[rows], self.features)

    def flatten(self) -> Codes:
        """Return the same codes with one leading axis, `[n, k]`."""
        return Codes(
            self.indices.reshape(-1, self.places), self.values.reshape(-1, self.places), self.features
        )

    def reshape(self, *shape: int) -> Codes:
        """Return the same codes with other leading axes."""
        return Codes(
            self.indices.reshape(*shape, self.places), self.values.reshape(*shape, self.places), self.features
        )

    def dense(self) -> Tensor:
        """Return the codes as `[..., features]`."""
        z = self.values.new_zeros(*self.shape, self.features)
        return z.scatter_add_(-1, self.indices, self.values)

    def of(self, feature: int) -> Tensor:
        """Return the value of one feature, `[...]`; 0 where it is not active."""
        here = self.indices == self.check_feature(feature)
        return (self.values * here.to(self.values.dtype)).sum(-1)

    def only(self, features: Collection[int]) -> Codes:
        """Return the codes with every other feature switched off."""
        return self._masked(self._member(features))

    def without(self, features: Collection[int]) -> Codes:
        """Return the codes with these features switched off."""
        return self._masked(~self._member(features))

    def counts(self) -> Tensor:
        """Return at how many tokens each feature is active, int64 `[features]`."""
        flat = self.indices.reshape(-1)[self.active.reshape(-1)]
        return torch.bincount(flat, minlength=self.features)

    def to(self, *args: Any, **kwargs: Any) -> Codes:
        """Return the codes with values moved or cast; indices only move."""
        values = self.values.to(*args, **kwargs)
        return Codes(self.indices.to(values.device), values, self.features)

    def detach(self) -> Codes:
        """Return the codes outside the autograd graph."""
        return Codes(self.indices, self.values.detach(), self.features)

    def check_feature(self, feature: int) -> int:
        """Return the feature's number, or raise InputError."""
        if not 0 <= feature < self.features:
            raise InputError(f"there is no feature {feature}; there are 0 to {self.features - 1}")
        return feature

    @staticmethod
    def cat(parts: Collection[Codes]) -> Codes:
        """Join codes of one dictionary along the first axis; narrower ones get unused places."""
        parts = list(parts)
        if not parts or len({p.features for p in parts}) > 1:
            raise InputError("codes can be joined when there are some, all of one dictionary")
        places = max(p.places for p in parts)
        indices = [torch.nn.functional.pad(p.indices, (0, places - p.places)) for p in parts]
        values = [torch.nn.functional.pad(p.values, (0, places - p.places)) for p in parts]
        return Codes(torch.cat(indices), torch.cat(values), parts[0].features)

    def _member(self, features: Collection[int]) -> Tensor:
        wanted = torch.zeros(self.features, dtype=torch.bool, device=self.indices.device)
        for feature in features:
            wanted[self.check_feature(int(feature))] = True
        return wanted[self.indices]

    def _masked(self, kept: Tensor) -> Codes:
        return Codes(
            self.indices, torch.where(kept, self.values, torch.zeros_like(self.values)), self.features
        )
