"""Nodes: the parts of a model that can be patched, and lists of them.

    head(5, 3)                     one attention head's output, all positions
    head(5, 3, "last")             ... at the last token only
    mlp(7)                         an MLP's output
    Node("blocks.9.resid_pre", -2) the residual stream at the token before the last
    nodes(model, "components")     every head and every MLP

A position is `"all"`, `"last"`, `"changed"` (the first token in which the prompts of a pair differ), a
name that the pairs know (`PromptPairs.named`), or a negative number that counts from the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actlas.core.errors import InputError, SiteError, did_you_mean

if TYPE_CHECKING:
    from actlas.core.dictionary import Dictionary
    from actlas.core.model import Model

Position = str | int
OVER = {
    "heads": "attn.z",
    "mlps": "mlp.out",
    "attn": "attn.out",
    "layers": "resid_pre",
    "positions": "resid_pre",
    "neurons": "mlp.act",
}
KINDS = ("components", *OVER, "features")
_NAME = re.compile(r"^(?:\w+\.)?blocks\.(\d+)\.([\w.]+?)(?:\[(?:head|channel)=([\d,]+)\])?$")
_SHORT = {"attn.z": "heads", "mlp.out": "MLP", "attn.out": "attention", "mlp.act": "neurons"}


@dataclass(frozen=True)
class Node:
    """One place that can be patched.

    Attributes:
        site: a site inside a block, `"blocks.5.attn.z[head=3]"`.
        position: which tokens; see the module docstring.
        feature: number of a dictionary's feature, whose site it then is.
    """

    site: str
    position: Position = "all"
    feature: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.position, int) and self.position >= 0:
            raise InputError(
                f"position {self.position} counts from the start; prompts are aligned at the end, so give a"
                " negative number, 'last', 'changed' or 'all'"
            )

    @property
    def block(self) -> int:
        """The block's number.

        Raises:
            SiteError: the site is in no block.
        """
        return int(self._match()[1])

    @property
    def kind(self) -> str:
        """What kind of site it is: `"attn.z"`, `"mlp.out"`, ..."""
        return self._match()[2]

    @property
    def index(self) -> int | None:
        """The head or channel, or `None` for the whole site."""
        found = self._match()[3]
        return None if found is None else int(found)

    @property
    def label(self) -> str:
        """A short name: `L5H3`, `MLP 5`, `L5 resid_pre at -2`."""
        if self.feature is not None:
            said = f"L{self.block} feature {self.feature}"
        elif self.kind == "attn.z" and self.index is not None:
            said = f"L{self.block}H{self.index}"
        elif self.kind == "mlp.act" and self.index is not None:
            said = f"L{self.block}N{self.index}"
        elif self.kind == "mlp.out":
            said = f"MLP {self.block}"
        else:
            part = "" if self.index is None else f"[{self.index}]"
            said = f"L{self.block} {self.kind}{part}"
        return said if self.position == "all" else f"{said} at {self.position}"

    @property
    def column(self) -> str:
        """Where it stands in the row of its layer on a heat map."""
        if self.position != "all" and self.index is None and self.feature is None:
            return str(self.position)
        if self.feature is not None:
            return str(self.feature)
        return str(self.index) if self.index is not None else _SHORT.get(self.kind, self.kind)

    def _match(self) -> re.Match[str]:
        found = _NAME.match(self.site)
        if found is None or (found[3] and "," in found[3]):
            raise SiteError(
                f"{self.site!r} is no single place in one block; write e.g. 'blocks.5.attn.z[head=3]'"
            )
        return found


def head(block: int, number: int, position: Position = "all") -> Node:
    """Return the node of an attention head's output (`attn.z`)."""
    return Node(f"blocks.{block}.attn.z[head={number}]", position)


def mlp(block: int, position: Position = "all") -> Node:
    """Return the node of an MLP's output."""
    return Node(f"blocks.{block}.mlp.out", position)


def nodes(
    model: Model,
    over: str,
    *,
    layers: Sequence[int] | None = None,
    positions: Position | Sequence[Position] = "all",
    lens: Dictionary | None = None,
) -> list[Node]:
    """Return the nodes that a word means.

    Args:
        model: the model.
        over: `"components"` (heads and MLPs), `"heads"`, `"mlps"`, `"attn"` (attention outputs),
            `"layers"` (the stream before each block), `"positions"` (the same at single positions),
            `"neurons"`, or `"features"` of `lens`; or a site pattern.
        layers: only these blocks.
        positions: one position, or several for one node each.
        lens: the dictionary whose features are meant.

    Raises:
        InputError: an unknown word, a layer that does not exist, or no lens.
        SiteError: the model has not got such a site.
    """
    blocks = _blocks(model, layers)
    at: list[Position] = [positions] if isinstance(positions, (str, int)) else list(positions)
    if not at:
        raise InputError("no position was given; give at least one, e.g. 'last'")
    if over == "components":
        return [n for o in ("heads", "mlps") for n in nodes(model, o, layers=layers, positions=at)]
    if over == "features":
        if lens is None:
            raise InputError("features are those of a dictionary; give one with lens (--lens)")
        site = model.resolve(lens.site)[0].name
        return [Node(site, p, j) for j in range(lens.features) for p in at]
    if over not in OVER:
        if "." in over:
            names = [s.name for s in model.resolve(over)]
            kept = [n for name in names for p in at if (n := Node(name, p)).block in blocks]
            if kept:
                return kept
        raise InputError(
            f"there is nothing called {over!r} to patch{did_you_mean(over, KINDS)}"
            f"; it can be {', '.join(KINDS)} or a site such as 'blocks.*.attn.v[head=0]'"
        )
    kind = OVER[over]
    found = [model.resolve(f"blocks.{b}.{kind}")[0] for b in blocks]
    axis = {"heads": "head", "neurons": "channel"}.get(over)
    if axis is None:
        return [Node(s.name, p) for s in found for p in at]
    counts = [(s, s.features[0] if s.features else 0) for s in found]
    return [Node(f"{s.name}[{axis}={i}]", p) for s, count in counts for i in range(count) for p in at]


def _blocks(model: Model, layers: Sequence[int] | None) -> list[int]:
    n = model.n_blocks
    if n is None:
        raise SiteError(f"{model.name} has no layout, so its heads and layers are not known")
    if layers is None:
        return list(range(n))
    wrong = [b for b in layers if not -n <= b < n]
    if wrong or not layers:
        raise InputError(f"{model.name} has blocks 0 to {n - 1}, not {wrong[0] if wrong else 'none'}")
    return sorted({b % n for b in layers})
