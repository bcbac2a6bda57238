"""Where rows of activations come from, and a random priority that depends on nothing else.

A row is one token's activation at one site. Its origin (document, position) names it for good: the
same row has the same priority in whichever batch, part or order it is read. That is what makes a
reservoir of rows mergeable (`actlas.core.calibration.accumulators.Reservoir`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


@dataclass
class Origin:
    """The origins of n rows.

    Attributes:
        names: the documents that the rows come from, in any order.
        document: int64 `[n]`, index into `names`.
        position: int64 `[n]`, position of the token in its document.
        place: int64 `[n]`, position of the token in the sequence that the model saw (its window).
        token: int64 `[n]`, token id; -1 where there are no tokens (images).
        seed: of the priorities.
    """

    names: Sequence[str]
    document: Tensor
    position: Tensor
    place: Tensor
    token: Tensor
    seed: int = 0
    _priority: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.document)

    def select(self, index: Tensor) -> Origin:
        """Return the origins of some of the rows.

        Args:
            index: bool `[n]` or int64 `[m]`.
        """
        return Origin(
            self.names,
            self.document[index],
            self.position[index],
            self.place[index],
            self.token[index],
            self.seed,
            self.priority[index],
        )

    @property
    def priority(self) -> Tensor:
        """Pseudo-random int64 `[n]` in [0, 2^63), from (seed, document name, position) alone."""
        if self._priority is None:
            keys = np.array([document_key(name, self.seed) for name in self.names], dtype=np.uint64)
            mixed = _mix(keys[self.document.numpy()] + _GOLDEN * self.position.numpy().astype(np.uint64))
            self._priority = torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))
        return self._priority


def document_key(name: str, seed: int) -> int:
    """Return a 64-bit hash of a document's name and a seed, the same on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, salt=_salt(seed))
    return int.from_bytes(digest.digest(), "little")


def _salt(seed: int) -> bytes:
    return (seed % (1 << 128)).to_bytes(16, "little")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit keys (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIX_A
        x = (x ^ (x >> np.uint64(27))) * _MIX_B
        scrambled: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return scrambled
