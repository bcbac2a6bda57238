"""What an Activation Beacon has read: condensed keys and values, and those of the unfinished window.

All keys are as they were before rotation, so they can stand at any position. A memory is a value: growing
and condensing give another one, so it can be kept, gone back to and shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import ArtifactError, FingerprintError
from actlas.core.fingerprint import Fingerprint
from actlas.core.model import Model
from actlas.store.identity import weights_digest


@dataclass(frozen=True, eq=False)
class BeaconMemory:
    """Keys and values of each block, `[rows, kv heads, tokens, head width]`: condensed ones first.

    Attributes:
        keys, values: one tensor a block; empty before anything was read.
        condensed: how many tokens of them are beacons.
        windows: how many windows have been condensed.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    condensed: int = 0
    windows: int = 0

    @property
    def rows(self) -> int | None:
        """Rows of the batch, or `None` if nothing was read."""
        return self.keys[0].shape[0] if self.keys else None

    @property
    def raw_tokens(self) -> int:
        """Tokens of the unfinished window."""
        return self.keys[0].shape[2] - self.condensed if self.keys else 0

    def held(self, block: int) -> tuple[Tensor | None, Tensor | None]:
        """Return keys and values of a block."""
        return (self.keys[block], self.values[block]) if self.keys else (None, None)

    def grown(self, fresh: Sequence[tuple[Tensor, Tensor]]) -> BeaconMemory:
        """Return the memory with further raw tokens."""
        if not self.keys:
            return BeaconMemory(tuple(k for k, _ in fresh), tuple(v for _, v in fresh))
        keys = tuple(torch.cat([a, k], 2) for a, (k, _) in zip(self.keys, fresh, strict=True))
        values = tuple(torch.cat([a, v], 2) for a, (_, v) in zip(self.values, fresh, strict=True))
        return BeaconMemory(keys, values, self.condensed, self.windows)

    def condense(self, made: Sequence[tuple[Tensor, Tensor]], stride: int) -> BeaconMemory:
        """Return the memory with beacons in the place of the first `stride` raw tokens."""
        m = self.condensed

        def swap(held: Tensor, new: Tensor) -> Tensor:
            return torch.cat([held[:, :, :m], new, held[:, :, m + stride :]], 2)

        keys = tuple(swap(a, k) for a, (k, _) in zip(self.keys, made, strict=True))
        values = tuple(swap(a, v) for a, (_, v) in zip(self.values, made, strict=True))
        return BeaconMemory(keys, values, m + made[0][0].shape[2], self.windows + 1)

    def save(self, path: str | Path, model: Model) -> Path:
        """Save as JSON and safetensors, marked with the model that it belongs to."""
        tensors = {f"keys.{i}": k for i, k in enumerate(self.keys)}
        tensors |= {f"values.{i}": v for i, v in enumerate(self.values)}
        about = {
            "condensed": self.condensed,
            "windows": self.windows,
            "blocks": len(self.keys),
            "fingerprint": model.fingerprint.to_json(),
            "weights": weights_digest(model),
        }
        return save_artifact(path, "beacon-memory", about, tensors)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> BeaconMemory:
        """Load a saved memory.

        Raises:
            ArtifactError: not a whole, untampered memory.
            FingerprintError: it was made by another model, or with other weights.
        """
        about, tensors = load_artifact(path, "beacon-memory")
        Fingerprint.from_json(about.get("fingerprint"), path).check(model.fingerprint, str(path))
        if about.get("weights") != weights_digest(model):
            raise FingerprintError(f"{path} was made with other weights than {model.name} has")
        try:
            keys, values = ([tensors[f"{n}.{i}"] for i in range(about["blocks"])] for n in ("keys", "values"))
            return cls(tuple(keys), tuple(values), int(about["condensed"]), int(about["windows"]))
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is an incomplete beacon memory ({error})") from error
