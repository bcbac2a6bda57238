"""Massive-activation rows: recognised one by one, reported, and not averaged in.

In most decoder language models a few tokens (nearly always the first of a sequence) carry residual
activations thousands of times larger than all others, in one or a few fixed channels (Sun et al.
2024, "Massive Activations in Large Language Models"). One such row among thousands decides a
channel's mean, second moment and maximum, so statistics that include it describe that row only.

Sun et al. call an activation massive if it exceeds 100 and is about 1,000 times the median magnitude
of its hidden state, over all tokens. A row has to be judged alone here, or the answer would depend on
its batch, and a massive row's own median is larger too (45 against 2 in `smollm2`), so the criterion
is: the largest magnitude of the row is

    more than 100  and more than 100 times the row's median magnitude,   or
    more than 1000 and more than  50 times the row's median magnitude.

What it does on `smollm2` (38 texts, 5,479 tokens; `blocks.{i}.resid_post`): from block 2 to block 8
the rows beyond the criterion lie at 180 to 750 times their median and all others below magnitude 60;
from block 11 on, the first token of every sequence (magnitude 2e4, 480 to 520 times its median)
against at most 101 times for ordinary rows. While the model builds those rows up (block 1) or takes
them down (blocks 9 and 28), there is no gap, and up to 0.5% of the rows are borderline. Models in which
the criterion catches more than one row in ten have large ordinary channels; `calibrate` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actlas.core.calibration.origin import Origin

#: (magnitude, times the row's median magnitude): a row beyond both numbers of a pair is massive.
CRITERION: tuple[tuple[float, float], ...] = ((100.0, 100.0), (1000.0, 50.0))
_MOST_RECORDS = 64


def massive_rows(rows: Tensor) -> Tensor:
    """Say which rows are massive, each judged by itself.

    Args:
        rows: residual-stream activations `[n, d]`, finite.

    Returns:
        bool `[n]`, on the device of `rows`.
    """
    magnitude = rows.abs()
    largest = magnitude.amax(1)
    massive = torch.zeros_like(largest, dtype=torch.bool)
    suspect = (largest > min(m for m, _ in CRITERION)).nonzero().squeeze(1)
    if len(suspect):
        median = magnitude[suspect].median(1).values
        top = largest[suspect]
        found = torch.zeros_like(suspect, dtype=torch.bool)
        for bound, times in CRITERION:
            found |= (top > bound) & (top > times * median)
        massive[suspect] = found
    return massive


@dataclass(frozen=True)
class MassiveRow:
    """One massive row: where it was and its largest activation.

    Attributes:
        value: the activation of largest magnitude, with its sign.
        channel: where in the row it stands.
        document: the document's id.
        position: the token's position in the document.
        place: the token's position in the sequence that the model saw.
        token: token id.
    """

    value: float
    channel: int
    document: str
    position: int
    place: int
    token: int

    def rank(self) -> tuple[float, str, int]:
        """Return a key that sorts the largest first, the same in any order of arrival."""
        return (-abs(self.value), self.document, self.position)


@dataclass
class MassiveRows:
    """What was found at one site; counts are exact, `examples` are the largest 64.

    Attributes:
        count: how many massive rows there were.
        channels: for each channel that held a row's largest activation, in how many rows.
        positions: for each position in the sequence that the model saw, how many rows stood there.
        examples: the rows with the largest activations, largest first.
        kept: whether these rows were put into the statistics (`keep_massive=True`).
    """

    count: int = 0
    channels: dict[int, int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    examples: list[MassiveRow] = field(default_factory=list)
    kept: bool = False

    @property
    def largest(self) -> float:
        """The largest massive activation's magnitude; 0 if there is none."""
        return abs(self.examples[0].value) if self.examples else 0.0

    @property
    def documents(self) -> list[str]:
        """The documents of `examples`, each once, in that order."""
        return list(dict.fromkeys(row.document for row in self.examples))

    @property
    def first(self) -> int:
        """How many of the rows were the first of their sequence."""
        return self.positions.get(0, 0)

    @classmethod
    def of(cls, rows: Tensor, origin: Origin, kept: bool = False) -> MassiveRows:
        """Return the record of massive rows `[m, d]` that were just found."""
        channel = rows.abs().argmax(1, keepdim=True)
        columns = zip(
            rows.gather(1, channel).squeeze(1).tolist(),
            channel.squeeze(1).tolist(),
            [origin.names[i] for i in origin.document.tolist()],
            origin.position.tolist(),
            origin.place.tolist(),
            origin.token.tolist(),
            strict=True,
        )
        found = [MassiveRow(*row) for row in columns]
        channels = dict(Counter(row.channel for row in found))
        positions = dict(Counter(row.place for row in found))
        return cls(len(found), channels, positions, found, kept)

    def merge(self, other: MassiveRows) -> MassiveRows:
        """Return what would have been found by one pass over the rows of both."""
        kept = self.kept or other.kept
        examples = sorted([*self.examples, *other.examples], key=MassiveRow.rank)[:_MOST_RECORDS]
        return MassiveRows(
            self.count + other.count,
            _add(self.channels, other.channels),
            _add(self.positions, other.positions),
            examples,
            kept,
        )

    def describe(self) -> str:
        """Return one line for a person."""
        if not self.count:
            return "no massive activations"
        done = "kept in the statistics" if self.kept else "left out of the statistics"
        common = sorted(self.channels, key=lambda c: (-self.channels[c], c))[:3]
        return (
            f"{self.count:,} massive rows {done}: {self.first:,} at the first token, "
            f"largest {self.largest:,.0f}, mostly in channel {' or '.join(map(str, common))}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "count": self.count,
            "channels": {str(k): v for k, v in sorted(self.channels.items())},
            "positions": {str(k): v for k, v in sorted(self.positions.items())},
            "examples": [dict(row.__dict__) for row in self.examples],
            "kept": self.kept,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MassiveRows:
        """Rebuild it from `to_json`'s dictionary."""
        return cls(
            int(record["count"]),
            {int(k): int(v) for k, v in record["channels"].items()},
            {int(k): int(v) for k, v in record["positions"].items()},
            [MassiveRow(**row) for row in record["examples"]],
            bool(record["kept"]),
        )


def _add(a: Mapping[int, int], b: Mapping[int, int]) -> dict[int, int]:
    return {k: a.get(k, 0) + b.get(k, 0) for k in sorted({*a, *b})}
