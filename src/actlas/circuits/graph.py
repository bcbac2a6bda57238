"""The graph of a transformer: who writes into the residual stream, who reads it, and which edges there are.

    writers     input (what enters block 0), every head, every MLP
    receivers   every head's query, every key and value group, every MLP, the logits
    an edge     from a writer to a receiver that comes after it

Because all writers add to one stream, the input of a receiver is a sum over its edges, so an edge can be
patched by itself: only this receiver sees another value of that writer. Models whose query heads share keys
and values have one key and one value receiver for a group of heads.

Source: Elhage et al. 2021 (transformer circuits); Goldowsky-Dill et al. 2023 (arXiv 2304.05969); Syed et al.
2023 (arXiv 2310.10348).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.circuits.nodes import Node, head, mlp
from actlas.core.errors import InputError, ModelError

if TYPE_CHECKING:
    from actlas.core.model import Model

INPUT, LOGITS = "input", "logits"
_HEAD = re.compile(r"^L(\d+)H(\d+)$")
_MLP = re.compile(r"^MLP (\d+)$")


@dataclass(frozen=True)
class Graph:
    """Sizes of a model and, from them, its writers and receivers.

    Attributes:
        blocks, heads, groups: how many blocks, query heads and key-value groups a block has.
        parallel: attention and MLP of a block read the same stream, so no edge leads from one to the other.
    """

    blocks: int
    heads: int
    groups: int
    parallel: bool = False

    @classmethod
    def of(cls, model: Model) -> Graph:
        """Return a model's graph.

        Raises:
            ModelError: no layout, or a model whose parts do not simply add up: norms after the addition,
                or between a part and the stream.
        """
        tower = model.tower
        if tower is None or model.kind != "causal-lm":
            raise ModelError(f"{model.name} ({model.kind}) is no causal language model with a layout")
        if tower.post_norm or tower.attn_out_norm or tower.mlp_out_norm:
            raise ModelError(
                f"{model.name} has norms between its parts and the residual stream, so inputs are no sums"
                " over edges; patch whole components instead"
            )
        return cls(tower.n_blocks, tower.heads, tower.kv_heads or tower.heads, tower.parallel)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers, in the order in which they write."""
        each = [(*(f"L{b}H{h}" for h in range(self.heads)), f"MLP {b}") for b in range(self.blocks)]
        return (INPUT, *(name for names in each for name in names))

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """Names of the receivers: `L5H3.q`, `L5K1`, `L5V1`, `MLP 5`, `logits`."""
        found: list[str] = []
        for b in range(self.blocks):
            found += [f"L{b}H{h}.q" for h in range(self.heads)]
            found += [f"L{b}K{g}" for g in range(self.groups)] + [f"L{b}V{g}" for g in range(self.groups)]
            found.append(f"MLP {b}")
        return (*found, LOGITS)

    @property
    def _step(self) -> int:
        return self.heads + 2 * self.groups + 1

    def writer(self, block: int, part: int | None = None) -> int:
        """Return the number of a head, or of a block's MLP."""
        return 1 + block * (self.heads + 1) + (self.heads if part is None else part)

    def span(self, block: int, kind: str) -> range:
        """Return the numbers of a block's receivers of one kind: `"q"`, `"k"`, `"v"` or `"mlp"`."""
        at, h, g = block * self._step, self.heads, self.groups
        first, size = {"q": (0, h), "k": (h, g), "v": (h + g, g), "mlp": (h + 2 * g, 1)}[kind]
        return range(at + first, at + first + size)

    def before(self, block: int, kind: str) -> int:
        """Return how many writers, in order, may have an edge to a block's receivers of one kind."""
        return self.writer(block) if kind == "mlp" and not self.parallel else self.writer(block, 0)

    @cached_property
    def allowed(self) -> Tensor:
        """Which edges exist, bool `[receivers, writers]`."""
        found = torch.zeros(len(self.receivers), len(self.writers), dtype=torch.bool)
        for b in range(self.blocks):
            for kind in ("q", "k", "v", "mlp"):
                at = self.span(b, kind)
                found[at.start : at.stop, : self.before(b, kind)] = True
        found[-1] = True
        return found

    def inputs_of(self, writer: int) -> list[int]:
        """Return the receivers through which a writer gets its input; none for the model's input."""
        if writer == 0:
            return []
        block, part = divmod(writer - 1, self.heads + 1)
        if part == self.heads:
            return list(self.span(block, "mlp"))
        group = part // (self.heads // self.groups)
        return [self.span(block, "q")[part], self.span(block, "k")[group], self.span(block, "v")[group]]

    def node(self, name: str) -> Node:
        """Return the node of a head or MLP by name.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.writers[1:]:
            raise InputError(f"there is no part {name!r}; parts are called e.g. L5H3 or 'MLP 5'")
        if found := _HEAD.match(name):
            return head(int(found[1]), int(found[2]))
        at = _MLP.match(name)
        assert at is not None
        return mlp(int(at[1]))

    def pruned(self, edges: Tensor) -> Tensor:
        """Return the edges that lie on a path from the input to the logits, bool `[receivers, writers]`.

        What no signal enters does the same as in the ablated run, and what leads nowhere changes nothing.
        """
        kept = edges & self.allowed
        inputs = [self.inputs_of(w) for w in range(len(self.writers))]
        live = torch.zeros(len(self.writers), dtype=torch.bool)
        live[0] = True
        for w in range(1, len(live)):
            live[w] = bool((kept[inputs[w]] & live).any())
        kept = kept & live
        wanted = torch.zeros(len(self.receivers), dtype=torch.bool)
        wanted[-1] = True
        for w in range(len(live) - 1, 0, -1):
            if bool(kept[wanted, w].any()):
                wanted[inputs[w]] = True
        return kept & wanted[:, None]

    def parts(self, edges: Tensor) -> list[int]:
        """Return the writers (heads and MLPs) that send along an edge, in order."""
        return [w for w in edges.any(0).nonzero()[:, 0].tolist() if w]

    def without(self, edges: Tensor, writer: int) -> Tensor:
        """Return the edges without those that leave a writer, pruned."""
        cut = edges.clone()
        cut[:, writer] = False
        return self.pruned(cut)

    def random(self, count: int, seed: int) -> Tensor:
        """Return about `count` random edges, all on paths from the input to the logits.

        Paths are drawn backwards from the logits: a random earlier writer, one of its receivers, and so on,
        until the input is reached.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        edges = torch.zeros_like(self.allowed)
        limit = int(self.allowed.sum())
        reach = self.allowed.sum(1).tolist()
        while int(edges.sum()) < min(count, limit):
            receiver = len(self.receivers) - 1
            while True:
                writer = draw(reach[receiver])
                edges[receiver, writer] = True
                if writer == 0:
                    break
                options = self.inputs_of(writer)
                receiver = options[draw(len(options))]
        return edges

    def names(self, edges: Tensor) -> Iterator[tuple[int, int, str, str]]:
        """Yield (receiver, writer, name of the writer, name of the receiver) of each edge."""
        for r, w in edges.nonzero().tolist():
            yield r, w, self.writers[w], self.receivers[r]
