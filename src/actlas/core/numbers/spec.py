"""QuantSpec: one description of every number format, and of what shares a scale.

    spec = QuantSpec.parse("int4-g64")          # also "int8-channel-sym", "fp8-e4m3-channel", "mxfp4"
    codes = encode(weight, spec, params_of(weight, spec))
    spec.bits_per_weight(576, 1536)             # 4.31: codes, scales and zero points, as they are stored

Grids:

    int      2^b even steps. Asymmetric with a zero point that is an integer ("int": then 0 is on the grid) or
             the group's minimum ("float"); or symmetric around 0; or `centred`: levels at half steps, no 0
    float    a sign, `exp_bits` of exponent and the rest of mantissa, times the scale
    mx       the same elements, with a shared power of two for each 32 (OCP Microscaling)
    nvfp4    e2m1 elements, an e4m3 scale for each 16 and one float32 scale for the tensor
    table    the levels of a table times the scale (nf4: quantiles of a Gaussian)
    log2     powers of two from 1 down to 2^-(2^b - 1), and 0: for probabilities
    binary   a sum of b signs, each with a scale of its own (multi-basis binary coding)

A tensor is read along its last axis: a *channel* is one row of it (an output channel of a weight, a token of
an activation), a *group* is `group_size` neighbours in a row.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from actlas.core.errors import InputError

Grid = Literal["int", "float", "mx", "nvfp4", "table", "log2", "binary"]
Granularity = Literal["tensor", "channel", "group"]
MX_GROUP, NVFP4_GROUP = 32, 16
TABLES = ("nf4",)
_LONGEST = 2048


@dataclass(frozen=True)
class QuantSpec:
    """A number format; see the module's text.

    Attributes:
        bits: of one code (for `binary`: how many signs are summed).
        grid: the kind of levels.
        symmetric: integer levels around 0, without a zero point.
        granularity, group_size: what shares a scale.
        zero_point: of asymmetric integers.
        exp_bits: of floats.
        table: which table.
        centred: integer levels at half steps, without 0.
        scale_rule: `"max"`: the range of the values; `"gaussian"`: the multiple of their root mean square
            that has the least squared error on a Gaussian (symmetric and centred integers only).

    Raises:
        InputError: a combination that does not exist, with what would be right.
    """

    bits: int = 4
    grid: Grid = "int"
    symmetric: bool = False
    granularity: Granularity = "group"
    group_size: int | None = None
    zero_point: Literal["int", "float"] = "int"
    exp_bits: int | None = None
    table: str | None = None
    centred: bool = False
    scale_rule: Literal["max", "gaussian"] = "max"

    def __post_init__(self) -> None:
        if self.grid not in get_args(Grid):
            raise InputError(f"there is no grid {self.grid!r}; there are {', '.join(get_args(Grid))}")
        if self.granularity not in get_args(Granularity):
            raise InputError(
                f"granularity is {self.granularity!r}; it must be {', '.join(get_args(Granularity))}"
            )
        least, most = _BITS[self.grid]
        if self.grid == "int" and self.centred:
            least = 1
        if not isinstance(self.bits, int) or not least <= self.bits <= most:
            raise InputError(f"{self.grid} numbers have {least} to {most} bits, not {self.bits}")
        if self.grid in ("mx", "nvfp4"):
            size = MX_GROUP if self.grid == "mx" else NVFP4_GROUP
            object.__setattr__(self, "granularity", "group")
            object.__setattr__(self, "group_size", size)
        if self.grid == "nvfp4" or (self.grid == "mx" and self.bits == 4):
            object.__setattr__(self, "exp_bits", 2)
        if self.grid in ("float", "mx"):
            e = self.exp_bits
            if e is None or not 1 <= e <= self.bits - 1 or e > 5:
                raise InputError(
                    f"a float of {self.bits} bits needs 1 to {min(5, self.bits - 1)} exponent bits, not {e}"
                )
        if self.grid == "table":
            object.__setattr__(self, "table", self.table or "nf4")
            if self.table not in TABLES:
                raise InputError(f"there is no table {self.table!r}; there is {', '.join(TABLES)}")
        if self.granularity == "group":
            if self.group_size is None:
                object.__setattr__(self, "group_size", 64)
            if not isinstance(self.group_size, int) or self.group_size < 2:
                raise InputError(f"a group has at least 2 entries, not {self.group_size}")
        elif self.group_size is not None:
            object.__setattr__(self, "group_size", None)
        if self.scale_rule == "gaussian" and not (self.grid == "int" and (self.symmetric or self.centred)):
            raise InputError("the Gaussian rule for scales needs symmetric or centred integers")

    # -- names ----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """A name that `parse` reads back, e.g. `"int4-g64"`."""
        if self.grid == "mx":
            short = {(4, 2): "mxfp4", (8, 4): "mxfp8"}.get((self.bits, self.exp_bits or 0))
            return short or f"mxfp{self.bits}-{_layout(self)}"
        if self.grid == "nvfp4":
            return "nvfp4"
        if self.grid == "log2":
            return f"log2-{self.bits}"
        head = {"float": f"fp{self.bits}-{_layout(self)}", "table": self.table or ""}.get(
            self.grid, f"{self.grid}{self.bits}"
        )
        where = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        tail = ""
        if self.grid == "int":
            tail += "-sym" if self.symmetric else ""
            tail += "-centred" if self.centred else ""
            tail += "-float" if not (self.symmetric or self.centred) and self.zero_point == "float" else ""
            tail += "-gaussian" if self.scale_rule == "gaussian" else ""
        return f"{head}-{where}{tail}"

    @classmethod
    def parse(cls, name: str | QuantSpec) -> QuantSpec:
        """Return the format of a name.

        Raises:
            InputError: it is not one, with examples.
        """
        if isinstance(name, QuantSpec):
            return name
        known = _HEAD.fullmatch(name.strip().lower())
        if known is None:
            raise InputError(
                f"{name!r} is no number format; examples: int4-g64, int3-channel, int8-channel-sym, "
                "fp8-e4m3-channel, fp4-e2m1-g32, nf4-g64, mxfp4, nvfp4, log2-4, binary2-channel"
            )
        kind, bits, exp, words = known["kind"], known["bits"], known["exp"], known["rest"].split("-")[1:]
        options: dict[str, object] = {}
        for word in words:
            if word in ("tensor", "channel"):
                options["granularity"] = word
            elif group := re.fullmatch(r"g(\d+)", word):
                options |= {"granularity": "group", "group_size": int(group[1])}
            elif word == "sym":
                options["symmetric"] = True
            elif word == "centred":
                options["centred"] = True
            elif word == "float":
                options["zero_point"] = "float"
            elif word == "gaussian":
                options["scale_rule"] = "gaussian"
            elif word == "token":
                options["granularity"] = "channel"
            else:
                raise InputError(
                    f"{word!r} in the number format {name!r} is not known; "
                    "it may say tensor, channel, token, g64 (a group size), sym, centred, float or gaussian"
                )
        if kind == "nvfp4":
            return cls(4, "nvfp4")
        if not bits:
            raise InputError(f"{name!r} does not say how many bits; write e.g. int4-g64")
        if kind in ("nf", "log2-", "binary", "int"):
            grid: Grid = {"nf": "table", "log2-": "log2", "binary": "binary", "int": "int"}[kind]  # type: ignore[assignment]
            if grid == "log2":
                options.setdefault("granularity", "tensor")
            return cls(int(bits), grid, **options)  # type: ignore[arg-type]
        e = int(exp[1]) if exp else {("fp", 8): 4, ("mxfp", 8): 4, ("mxfp", 4): 2, ("fp", 4): 2}.get(
            (kind, int(bits)), 2
        )  # fmt: skip
        if exp and 1 + e + int(exp[3]) != int(bits):
            raise InputError(f"{exp} has {1 + e + int(exp[3])} bits with its sign, not {bits} (in {name!r})")
        return cls(int(bits), "mx" if kind == "mxfp" else "float", exp_bits=e, **options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.name

    def with_group(self, size: int | None) -> QuantSpec:
        """Return the same grid with groups of another size; `None`: one scale a channel."""
        if size is None:
            return replace(self, granularity="channel", group_size=None)
        return replace(self, granularity="group", group_size=size)

    # -- shapes ---------------------------------------------------------------------------------

    def check(self, columns: int, where: str = "this tensor") -> None:
        """Raise unless rows of `columns` entries can be cut into groups.

        Raises:
            InputError: the group size does not divide them; the message lists those that do.
        """
        if self.granularity == "group" and columns % (self.group_size or 1):
            fixed = self.grid in ("mx", "nvfp4")
            legal = ", ".join(str(g) for g in legal_groups(columns)) or "none"
            more = "that format has no other size" if fixed else f"legal sizes are {legal}, or channel"
            raise InputError(
                f"{where} has rows of {columns}, which groups of {self.group_size} do not divide; {more}"
            )

    def groups(self, x: Tensor) -> Tensor:
        """Return x as `[rows, groups, entries]`, what shares a scale along the last axis (a view)."""
        if self.granularity == "tensor":
            return x.reshape(1, 1, -1)
        rows = x.reshape(-1, x.shape[-1])
        if self.granularity == "channel":
            return rows.unsqueeze(1)
        self.check(x.shape[-1])
        return rows.reshape(len(rows), -1, self.group_size or 1)

    def bits_per_weight(self, rows: int, columns: int, scale_bits: int = 16) -> float:
        """Return stored bits over entries: codes, scales and zero points."""
        size = {"tensor": rows * columns, "channel": columns}.get(self.granularity, self.group_size or 1)
        if self.grid == "mx":
            return self.bits + 8 / size
        if self.grid == "nvfp4":
            return self.bits + 8 / size + 32 / (rows * columns)
        if self.grid == "binary":
            return self.bits + self.bits * scale_bits / size
        extra: float = 0 if self.grid == "log2" else scale_bits
        if self.grid == "int" and not (self.symmetric or self.centred):
            extra += scale_bits if self.zero_point == "float" else self.bits
        return self.bits + extra / size


_BITS = {
    "int": (2, 16),
    "float": (3, 8),
    "mx": (4, 8),
    "nvfp4": (4, 4),
    "table": (4, 4),
    "log2": (2, 6),
    "binary": (1, 8),
}
_HEAD = re.compile(
    r"(?P<kind>nvfp4|mxfp|int|nf|fp|log2-|binary)(?P<bits>\d*)(-(?P<exp>e\dm\d))?(?P<rest>(-[a-z0-9]+)*)"
)


def legal_groups(columns: int, least: int = 16, most: int = _LONGEST) -> list[int]:
    """Return the group sizes that divide rows of `columns` entries and are multiples of 16."""
    return [g for g in range(least, min(columns, most) + 1, 16) if columns % g == 0]


def nearest_group(columns: int, size: int) -> int:
    """Return the legal group size nearest to `size` (the smaller of two), or the whole row."""
    legal = legal_groups(columns)
    return min(legal, key=lambda g: (abs(math.log(g / size)), g)) if legal else columns


def _layout(spec: QuantSpec) -> str:
    e = spec.exp_bits or 0
    return f"e{e}m{spec.bits - 1 - e}"
