"""Path patching: the effect of one part on another, or on the logits, with every other path frozen.

    1. run the clean prompts with the sender's output from the corrupted prompts, all other heads (and, if
       asked, MLPs) frozen to the clean run: only MLPs and the stream carry the change on
    2. the receivers' queries, keys or values are what that run made of them; everything else is clean
    3. run on, and read the metric

With the logits as receiver step 1 is all. With `freeze="everything"` the path is the direct one: the stream
alone carries the sender's change. A query at one token is reached by senders at that token only, because all
heads, which alone move anything between tokens, are frozen; keys and values by senders at every token.

Source: Goldowsky-Dill et al. 2023 (arXiv 2304.05969); Wang et al. 2022 (arXiv 2211.00593), section 3; Prakash
et al. 2024 (arXiv 2402.14811), section 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from actlas.circuits.effects import Effects, check_difference
from actlas.circuits.graph import Graph
from actlas.circuits.metrics import Metric, MetricFunction
from actlas.circuits.nodes import Node
from actlas.circuits.patching import say_inert
from actlas.circuits.prefix import SharedRun, Write
from actlas.circuits.sources import Source, at, read_both
from actlas.core.errors import InputError
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model
    from actlas.core.sites import Site

Channel = Literal["logits", "q", "k", "v"]
Freeze = Literal["heads", "everything"]
BATCH_TOKENS = 4096


def path_patch(
    model: Model,
    pairs: PromptPairs,
    senders: Sequence[Node],
    receivers: Sequence[Node] = (),
    *,
    channel: Channel = "logits",
    freeze: Freeze = "heads",
    metric: str | MetricFunction = "logit_difference",
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> Effects:
    """Patch the paths from each sender to all receivers together.

    Args:
        model: a causal language model whose parts add up.
        pairs: clean prompts, and corrupted ones whose activations are sent.
        senders: heads or MLPs, one path each; their positions say from which tokens.
        receivers: heads (`head(20, 3, "last")`), for the channels q, k and v. Keys and values shared by
            several heads move for all of them.
        channel: what the path enters: `"logits"`, or the receivers' `"q"`, `"k"` or `"v"`.
        freeze: `"heads"` lets MLPs carry the change on, as in the sources; `"everything"` freezes them too.
        metric: see `patch`.
        seed: of the intervals.
        batch_tokens: about how many tokens are run at once.

    Returns:
        Effects of mode `"noise"`, one a sender: the share of the difference between the runs that is lost.

    Raises:
        InputError: senders or receivers that make no sense, or a metric that is constant.
    """
    graph = Graph.of(model)
    _check(model, senders, receivers, channel, freeze)
    prefix = f"{model.tower.name}." if model.tower is not None and model.tower.name else ""
    kinds = ("attn.z", "mlp.out")
    frozen = [s for kind in kinds for s in model.resolve(f"{prefix}blocks.*.{kind}")]
    wanted = {n.block for n in receivers}
    inputs = [] if channel == "logits" else [model.resolve(f"blocks.{b}.attn.{channel}")[0] for b in wanted]
    sites = sorted([*frozen, *inputs], key=lambda s: s.order)
    run, other_logits, source = read_both(model, pairs, sites, "noise", seed=seed)
    judge = Metric.of(metric, pairs, run.logits)
    clean, corrupt = judge.whole(run.logits), judge.whole(other_logits)
    check_difference(clean, corrupt, judge.name)
    patched = clean.repeat(len(senders), 1)
    paths = _Paths(run, source, pairs, graph, sites, receivers, channel, freeze, judge)
    groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for i, node in enumerate(senders):
        if channel != "logits" and node.block > max(wanted):
            continue
        where = at(pairs, node.position) & source.mask
        where = where & at(pairs, "last") if channel == "logits" else where
        first = where.to(torch.int8).argmax(1)
        for row in where.any(1).nonzero()[:, 0].tolist():
            groups[node.block, run.width - run.first_column(int(first[row]))].append((i, row))
    with progress("path patching", total=sum(map(len, groups.values())), unit="paths") as advance:
        for (block, width), jobs in sorted(groups.items()):
            size = max(1, batch_tokens // width)
            for k in range(0, len(jobs), size):
                part = jobs[k : k + size]
                found = paths.run([(senders[i], row) for i, row in part], block, width)
                patched[[i for i, _ in part], [row for _, row in part]] = found.to(patched)
                advance(len(part))
    inert = (patched == clean).all(1)
    ends = "the logits" if channel == "logits" else f"{channel} of {', '.join(n.label for n in receivers)}"
    return Effects(
        tuple(senders), patched.double().cpu(), clean.double().cpu(), corrupt.double().cpu(), "noise",
        judge.name, judge.unit, f"path patching to {ends} ({freeze} frozen)", model.name, pairs.task,
        inert.cpu(), seed, say_inert(inert, pairs),
    )  # fmt: skip


class _Paths:
    """Runs paths, many (sender, prompt) at once."""

    def __init__(
        self,
        run: SharedRun,
        source: Source,
        pairs: PromptPairs,
        graph: Graph,
        sites: Sequence[Site],
        receivers: Sequence[Node],
        channel: Channel,
        freeze: Freeze,
        judge: Metric,
    ) -> None:
        self.run_, self.source, self.pairs, self.graph, self.judge = run, source, pairs, graph, judge
        self.sites = {(s.block, s.kind): s for s in sites}
        self.receivers, self.channel, self.freeze = receivers, channel, freeze

    def run(self, jobs: Sequence[tuple[Node, int]], block: int, width: int) -> Tensor:
        """Return the metric of each (sender, prompt); the senders lie in one block."""
        rows = torch.tensor([row for _, row in jobs], device=self.pairs.answer_ids.device)
        block = block if self.run_.shares else 0
        columns = None if self.judge.columns is None else self.judge.columns[rows]
        taken: dict[int, Tensor] = {}
        writes: list[tuple[Site, Write]] = []
        for (b, kind), site in self.sites.items():
            if b is None or b < block:
                continue
            if kind in ("attn.z", "mlp.out"):
                senders = [n if n.block == b and n.kind == kind else None for n, _ in jobs]
                if kind == "attn.z" or self.freeze == "everything" or any(senders):
                    writes.append((site, self._freeze(site, senders, rows, width)))
            else:
                writes.append((site, self._take(taken, b)))
        if self.channel == "logits":
            logits = self.run_.rerun(rows, block=block, width=width, writes=writes, columns=columns)
            return self.judge.function(logits, rows)
        self.run_.rerun(rows, block=block, width=width, writes=writes, columns=columns)
        second: list[tuple[Site, Write]] = []
        for b, value in taken.items():
            site = self.sites[b, f"attn.{self.channel}"]
            second.append((site, self._receive(value, b, rows, width)))
        first = min(taken)
        logits = self.run_.rerun(rows, block=first, width=width, writes=second, columns=columns)
        return self.judge.function(logits, rows)

    def _freeze(self, site: Site, senders: Sequence[Node | None], rows: Tensor, width: int) -> Write:
        """Write the clean activation, and the corrupted one at the sender of each row."""
        clean, other = (x[site.name][rows, -width:] for x in (self.source.base, self.source.other))
        new = clean.clone()
        replies = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for i, node in enumerate(senders):
            if node is None:
                continue
            replies[i] = True
            mask = (at(self.pairs, node.position) & self.source.mask)[rows[i], -width:]
            if node.index is None:
                new[i, mask] = other[i, mask]
            else:
                new[i, mask, node.index] = other[i, mask, node.index]
        heads = site.kind == "attn.z"

        def write(x: Tensor) -> Tensor:
            if heads or self.freeze == "everything":
                return new.to(x)
            return torch.where(replies.reshape(-1, *([1] * (x.ndim - 1))), new.to(x), x)

        return write

    def _take(self, taken: dict[int, Tensor], block: int) -> Write:
        def read(x: Tensor) -> Tensor:
            taken[block] = x.clone()
            return x

        return read

    def _receive(self, value: Tensor, block: int, rows: Tensor, width: int) -> Write:
        share = 1 if self.channel == "q" else self.graph.heads // self.graph.groups

        def write(x: Tensor) -> Tensor:
            x = x.clone()
            for node in self.receivers:
                if node.block != block or node.index is None:
                    continue
                mask = at(self.pairs, node.position)[rows, -width:]
                i = node.index // share
                x[:, :, i] = torch.where(mask.unsqueeze(-1), value[:, :, i], x[:, :, i])
            return x

        return write


def _check(
    model: Model, senders: Sequence[Node], receivers: Sequence[Node], channel: str, freeze: str
) -> None:
    if channel not in ("logits", "q", "k", "v"):
        raise InputError(f"channel is {channel!r}; it must be 'logits', 'q', 'k' or 'v'")
    if freeze not in ("heads", "everything"):
        raise InputError(f"freeze is {freeze!r}; it must be 'heads' or 'everything'")
    if not senders:
        raise InputError("there is no sender; give at least one head or MLP")
    for node in senders:
        model.resolve(node.site)
        if node.kind not in ("attn.z", "mlp.out") or (node.kind == "attn.z" and node.index is None):
            raise InputError(f"a sender is a head or an MLP, not {node.site}")
    if (channel == "logits") == bool(receivers):
        raise InputError("give receivers with channel q, k or v, and none with the logits")
    for node in receivers:
        model.resolve(node.site)
        if node.kind != "attn.z" or node.index is None:
            raise InputError(f"a receiver is a head, not {node.site}")
