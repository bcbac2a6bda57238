"""What a search for a smaller or faster model is asked (`Goal`), tries (`Mix`) and measures (`Row`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from actlas.core.edit import Edit
from actlas.core.errors import InputError

ORIGINAL = "original"
"""The model as it was given, in transformers."""
LEAN = "lean loop"


@dataclass(frozen=True, eq=False)
class Mix:
    """One way to run the model.

    Attributes:
        name: what tables call it.
        weights: format or method of the weights.
        edits: what makes it of the original.
        bytes: weights of the linear layers and the output head, as this mix holds them.
        bits: mean bits of a code over the blocks' weights.
        skipped: share of the blocks' weights that was asked to be skipped.
        lean: whether the lean loop can run it; `why_not` says why it cannot.
        why_not: the reason.
    """

    name: str
    weights: str
    edits: tuple[Edit, ...]
    bytes: int
    bits: float = 32.0
    skipped: float = 0.0
    lean: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured of a mix.

    Attributes:
        name, weights, bits, skipped, bytes: of the mix.
        runtime: what generates: `"lean loop"`, `"transformers"`, or `"forward pass"` (encoders).
        quality: perplexity over that of the original on the same held-out tokens (for encoders:
            1 + mean cosine distance from the original's embeddings).
        low, high: its paired 95% interval.
        touched: share of the blocks' weights that a token needed, counted.
        rate: tokens a second, median of the repeats; `None`: not measured.
        speed: that over the original's in the same repeats, median.
        speed_low, speed_high: least and greatest ratio of the repeats.
        fits: whether it keeps within what was asked.
        frontier: whether no other row is both faster and better.
        chosen: whether it is the answer.
        note: what a reader must know.
    """

    name: str
    weights: str
    bits: float
    skipped: float
    bytes: int
    runtime: str
    quality: float | None = None
    low: float | None = None
    high: float | None = None
    touched: float | None = None
    rate: float | None = None
    speed: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    fits: bool = False
    frontier: bool = False
    chosen: bool = False
    note: str = ""

    @property
    def fast(self) -> float:
        """What rows are compared by: the ratio to the original in the same repeats, if known."""
        return self.speed if self.speed is not None else self.rate or 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Row:
        """Rebuild from `to_json`; unknown fields of later versions are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in record.items() if k in known})


@dataclass(frozen=True)
class Goal:
    """What the result must keep.

    Attributes:
        keep: the most that the perplexity may rise, as a fraction (0.01 is 1%); `None`: anything.
        rule: what must keep within it: the upper end of the 95% interval (`"upper"`), or the estimate itself
            (`"estimate"`, PPL-p% as in Sparsing Law).
        bits: the most bits of a code, on average over the blocks' weights.
        bytes: the most bytes of weights (linear layers and output head).
    """

    keep: float | None = 0.01
    rule: str = "upper"
    bits: float | None = None
    bytes: int | None = None

    @classmethod
    def checked(cls, keep: float | None, rule: str, bits: float | None, most_bytes: int | None) -> Goal:
        """Return a goal.

        Raises:
            InputError: a budget or a limit that makes no sense, or an unknown rule.
        """
        if keep is not None and not 0 <= keep < 10:
            raise InputError(f"keep is the rise of the perplexity as a fraction, 0.01 for 1%; it is {keep}")
        if rule not in ("upper", "estimate"):
            raise InputError(f"rule is {rule!r}; it must be 'upper' or 'estimate'")
        if bits is not None and not 1 <= bits <= 32:
            raise InputError(f"bits is {bits:g}; it must lie between 1 and 32")
        if most_bytes is not None and most_bytes <= 0:
            raise InputError(f"most_bytes is {most_bytes}; it must be above 0")
        return cls(keep, rule, bits, most_bytes)

    @property
    def size(self) -> bool:
        """Whether the size is limited: then the best quality within it is looked for, else the fastest."""
        return self.bits is not None or self.bytes is not None

    def small(self, mix: Mix | Row) -> bool:
        """Say whether a mix is as small as was asked."""
        return (self.bits is None or mix.bits <= self.bits + 1e-6) and (
            self.bytes is None or mix.bytes <= self.bytes
        )

    def good(self, quality: float | None, high: float | None) -> bool:
        """Say whether a quality is within the budget."""
        if self.keep is None:
            return True
        bound = high if self.rule == "upper" and high is not None else quality
        return bound is not None and bound <= 1 + self.keep + 1e-12

    def say(self) -> str:
        """Return the goal in words."""
        parts = []
        if self.bits is not None:
            parts.append(f"at most {self.bits:g} bits a code")
        if self.bytes is not None:
            parts.append(f"at most {self.bytes / 1e6:g} MB of weights")
        if self.keep is not None:
            how = "upper end of the 95% interval" if self.rule == "upper" else "estimate"
            parts.append(f"perplexity at most {100 * self.keep:g}% above the original's ({how})")
        aim = "the best quality" if self.size else "the fastest"
        return f"{aim} with {' and '.join(parts)}" if parts else aim


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        tokens, context: held-out text for each quality, in windows of how many tokens.
        calibration, gradients: tokens of other text, read forward and backward once.
        written: tokens that each variant generates in a repeat.
        repeats: of the race.
        step: levels of skipped inputs are multiples of this.
    """

    tokens: int = 4096
    context: int = 256
    calibration: int = 4096
    gradients: int = 1024
    written: int = 32
    repeats: int = 5
    step: float = 0.05


@dataclass
class Measured:
    """Everything that a search has measured, while it goes on."""

    mixes: dict[str, Mix] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, mix: Mix, row: Row) -> None:
        """Take a mix and its row."""
        self.mixes[mix.name], self.rows[mix.name] = mix, row


def on_frontier(rows: Sequence[Row]) -> set[str]:
    """Return the names of rows than which no other is at least as fast and as good, and better in one."""
    known = [r for r in rows if r.rate is not None and r.quality is not None]
    return {r.name for r in known if not any(_beats(other, r) for other in known)}


def _beats(a: Row, b: Row) -> bool:
    assert a.quality is not None and b.quality is not None
    as_good = a.fast >= b.fast and a.quality <= b.quality
    return as_good and (a.fast > b.fast or a.quality < b.quality)


def choose(rows: Iterable[Row], goal: Goal, *, near: float = 0.03) -> str | None:
    """Return the name of the answer among rows that fit, or `None`.

    Without a limit on size: the fastest; among rows within 3% of its speed (timings are no finer), the one
    with the fewest bytes, and then of the best quality. Where the lean loop runs none of them, packed weights
    are ordinary float weights in transformers, so speeds differ by noise alone and the fewest bytes decide.
    With a limit: the best quality; among rows of the lean loop within 0.1% of it, the fastest.
    """
    fitting = [r for r in rows if r.fits and r.quality is not None]
    if not fitting:
        return None
    if goal.size:
        best = min(fitting, key=lambda r: (r.quality or 0.0, r.bytes))
        close = [
            r for r in fitting if (r.quality or 0.0) <= (best.quality or 0.0) * 1.001 and r.runtime == LEAN
        ]
        return max(close, key=lambda r: (r.fast, -r.bytes)).name if best.runtime == LEAN else best.name
    if not any(r.runtime == LEAN for r in fitting):
        return min(fitting, key=lambda r: r.bytes).name
    fastest = max(r.fast for r in fitting)
    close = [r for r in fitting if r.fast >= fastest * (1 - near)]
    return min(close, key=lambda r: (r.bytes, r.quality or 0.0, -r.fast)).name
