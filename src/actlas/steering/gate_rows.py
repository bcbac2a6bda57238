"""Labelled prompts for gates: one row of activations for each, split by source into three parts.

A gate is fitted on the first part, its threshold is chosen on the second, and what is reported about it
comes from the third. Texts that share a source (the same text twice, the sides of a pair) stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.contrast import Where, read_rows
from actlas.core.errors import InputError
from actlas.core.probe_data import parse_items

if TYPE_CHECKING:
    from actlas.core.model import Model

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GateTexts:
    """Texts that a gate should open for (`y` 1) or stay closed for (`y` 0).

    Attributes:
        texts: the texts.
        y: float32 `[n]`, 0 or 1.
        group: int64 `[n]`; texts with one number come from one source.
    """

    texts: tuple[str, ...]
    y: Tensor
    group: Index

    @classmethod
    def of(cls, data: Iterable[Any], what: str, *, both: bool = True) -> GateTexts:
        """Return labelled texts or pairs (their positive sides have label 1) in this form.

        Args:
            data: see `actlas.core.probe_data`.
            what: what is fitted, for errors.
            both: whether texts of both labels are needed.

        Raises:
            InputError: labels that are not 0 and 1, or one class only.
        """
        texts, labels, groups, _ = parse_items(data)
        wrong = next((v for v in labels if v not in (0.0, 1.0)), None)
        if wrong is not None:
            raise InputError(f"{what} needs labels 0 and 1, not {wrong:g}: 1 where it should act")
        if not texts or 1.0 not in labels:
            raise InputError(f"{what} needs texts with label 1 (where it should act); there is none")
        if both and 0.0 not in labels:
            raise InputError(f"{what} needs texts with label 0 too (where it should do nothing)")
        return cls(tuple(texts), torch.tensor(labels), np.array(groups, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.texts)

    def split(self, shares: Sequence[float], seed: int) -> list[Index]:
        """Return the indices of `len(shares) + 1` parts, the first of which gets what the shares leave.

        Groups are drawn with the seed and within each label, so every part has its share of both.

        Raises:
            InputError: shares outside (0, 1), or too few texts of a label for so many parts.
        """
        if not all(0 < s < 1 for s in shares) or sum(shares) >= 1:
            raise InputError(f"held-out shares are {list(shares)}; they must be above 0 and sum to below 1")
        generator = np.random.default_rng(seed)
        parts: list[list[Index]] = [[] for _ in range(len(shares) + 1)]
        y = self.y.numpy()
        for label in (1.0, 0.0):
            # a group with both labels (a pair) is drawn once, with the positives
            groups = np.unique(self.group[y == 1] if label else np.setdiff1d(self.group, self.group[y == 1]))
            if not len(groups):
                continue
            if len(groups) <= len(shares):
                raise InputError(
                    f"{len(groups)} texts with label {label:g} are too few to be split into "
                    f"{len(shares) + 1} parts; give more"
                )
            groups = generator.permutation(groups)
            sizes = [max(1, round(len(groups) * s)) for s in shares]
            ends = np.cumsum([max(1, len(groups) - sum(sizes)), *sizes])
            for part, chosen in zip(parts, np.split(groups, ends[:-1]), strict=True):
                part.append(np.flatnonzero(np.isin(self.group, chosen)))
        return [np.sort(np.concatenate(p)) for p in parts]


def read_gate_rows(
    model: Model, texts: Sequence[str], sites: str | Sequence[str], position: Where = "last"
) -> Tensor:
    """Return the activations of texts at one or several sites, side by side, float32 `[n, sum of d]`."""
    rows, _ = read_rows(model, texts, sites, position=position)
    names = [s.name for s in model.resolve(sites)]
    return torch.cat([rows[name] for name in names], dim=1)
