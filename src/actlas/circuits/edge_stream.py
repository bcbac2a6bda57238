"""The residual stream of prompt pairs, cut into what each writer adds and what each receiver reads.

    x_r  =  sum over writers w before r of a_w                       what receiver r reads, before its norm
    q_h  =  W_q^h norm(x_r) + b                                       and so for keys, values, MLP inputs

`EdgeStream` holds one batch of pairs: the writers' outputs on both prompts, the gradients of a metric at the
receivers' inputs (through the exact derivative of the norm), and runs in which every receiver sees its own
mixture of clean and corrupted writers. Everything starts at the first column in which the prompts differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.attribution_patching import _Passes as Passes
from actlas.circuits.graph import Graph
from actlas.circuits.metrics import Metric
from actlas.circuits.nodes import Node
from actlas.circuits.prefix import only_columns
from actlas.circuits.readers import _weight as input_weight
from actlas.circuits.readers import readers_of
from actlas.core.errors import ModelError
from actlas.core.hooks import Function, attach
from actlas.core.layout import find

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model
    from actlas.core.sites import Site

QKV = ("q", "k", "v")


class Weights:
    """What a graph's runs need of a model, looked up once: sites, norms, projections.

    Args:
        model: a causal language model with a layout.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.graph = model, Graph.of(model)
        tower = model.tower
        assert tower is not None
        self.prefix = f"{tower.name}." if tower.name else ""
        self._sites: dict[str, Site] = {}
        self._out: dict[int, Tensor] = {}
        self._in: dict[tuple[int, str], Tensor] = {}
        self._norms: dict[tuple[int, str], Function] = {}

    def site(self, block: int, kind: str) -> Site:
        """Return a site of a block."""
        name = f"{self.prefix}blocks.{block}.{kind}"
        if name not in self._sites:
            self._sites[name] = self.model.resolve(name)[0]
        return self._sites[name]

    def mid(self, block: int) -> str:
        """Return the kind of site at which the stream enters a block's MLP branch."""
        return "resid_pre" if self.graph.parallel else "resid_mid"

    def out(self, block: int) -> Tensor:
        """Return the output projection by head, `[d, heads, head_dim]`, in the model's dtype."""
        if block not in self._out:
            matrix = readers_of(self.model, f"{self.prefix}blocks.{block}.attn.z").matrix
            self._out[block] = matrix.to(self.model.dtype).unflatten(1, (self.graph.heads, -1))
        return self._out[block]

    def into(self, block: int, kind: str) -> Tensor:
        """Return the query, key or value projection by head, `[heads, head_dim, d]`."""
        key = (block, kind)
        if key not in self._in:
            weight = input_weight(self.model, self.site(block, f"attn.{kind}")).to(self.model.dtype)
            heads = self.graph.heads if kind == "q" else self.graph.groups
            self._in[key] = weight.unflatten(0, (heads, -1))
        return self._in[key]

    def norm(self, block: int, branch: str) -> Function:
        """Return the norm before attention (`"attn"`) or before the MLP (`"mlp"`), without its hooks."""
        key = (block, branch)
        if key not in self._norms:
            module = find(self.model.module, self.site(block, f"{branch}_norm").module)
            if module is None:
                raise ModelError(f"block {block} of {self.model.name} has no norm before its {branch}")
            self._norms[key] = module.forward
        return self._norms[key]


class EdgeStream:
    """One batch of pairs, from the first column in which any of them differ.

    Args:
        weights: of the model.
        pairs: the pairs of this batch.

    Attributes:
        base: site -> activation `[n, pos, ...]` of the corrupted run.
        clean: the same of the clean run.
        logits: last logits of the clean and the corrupted run.
    """

    def __init__(self, weights: Weights, pairs: PromptPairs) -> None:
        self.weights, self.pairs, self.graph = weights, pairs, weights.graph
        sites = []
        for b in range(self.graph.blocks):
            kinds = ["resid_pre", "attn.q", "attn.k", "attn.v", "attn.z", "mlp_norm", "mlp.out"]
            kinds += [] if self.graph.parallel else ["resid_mid"]
            sites += [weights.site(b, kind) for kind in kinds]
        sites.append(weights.site(self.graph.blocks - 1, "resid_post"))
        sites.sort(key=lambda s: s.order)
        self._passes = Passes(weights.model, pairs, "noise", sites, [Node("blocks.0.resid_pre")])
        self._reads = {side: self._passes.read(side) for side in ("clean", "corrupt")}
        self.start = self._passes.shared
        self.base, self.clean = (
            {name: x[:, self.start :].contiguous() for name, x in self._reads[side].values.items()}
            for side in ("corrupt", "clean")
        )
        self.logits = {side: found.logits for side, found in self._reads.items()}

    def value(self, block: int, kind: str, side: str = "corrupt") -> Tensor:
        """Return an activation of one run, `[n, columns, ...]`."""
        values = self.base if side == "corrupt" else self.clean
        return values[self.weights.site(block, kind).name]

    def head_outputs(self, block: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Return what heads add to the stream, `[n, columns, heads, d]`, without bias, of `z`."""
        out = self.weights.out(block)
        chosen = slice(None) if heads is None else list(heads)
        return torch.einsum("npha,dha->nphd", z[:, :, chosen], out[:, chosen])

    @cached_property
    def differences(self) -> Tensor:
        """Clean minus corrupted output of every writer, `[n, writers, columns * d]`.

        Raises:
            ModelError: they do not add up to the difference of the streams.
        """
        found = [self.value(0, "resid_pre", "clean") - self.value(0, "resid_pre")]
        for b in range(self.graph.blocks):
            z = self.value(b, "attn.z", "clean") - self.value(b, "attn.z")
            found += list(self.head_outputs(b, z).unbind(2))
            found.append(self.value(b, "mlp.out", "clean") - self.value(b, "mlp.out"))
        every = torch.stack([x.flatten(1) for x in found], 1)
        last = self.graph.blocks - 1
        whole = (self.value(last, "resid_post", "clean") - self.value(last, "resid_post")).flatten(1)
        gap = float((every.sum(1) - whole).abs().max())
        if gap > 1e-2 * float(whole.abs().max()) + 1e-4:
            raise ModelError(
                f"the parts of {self.weights.model.name} do not add up to its residual stream (by {gap:.3g}),"
                " so its edges are not known; patch whole components instead"
            )
        return every

    def gradients(self, judge: Metric, step: float | None = None) -> Tensor:
        """Return the metric's gradient at the input of every receiver, `[n, receivers, columns * d]`.

        Args:
            judge: the metric, for these pairs.
            step: `None`: at the clean run; else at the run whose embeddings lie at this fraction of the way
                from the clean to the corrupted prompts.
        """
        between = None
        if step is not None:
            clean, corrupt = (self._reads[side].embedding for side in ("clean", "corrupt"))
            between = clean + step * (corrupt - clean)
        grads, values, _ = self._passes.gradient(judge, between)
        w, found = self.weights, []
        for b in range(self.graph.blocks):
            into = []
            for kind in QKV:
                g = grads[w.site(b, f"attn.{kind}").name][:, self.start :]
                into.append(torch.einsum("npha,had->hnpd", g, w.into(b, kind)))
            x = values[w.site(b, "resid_pre").name][:, self.start :]
            found.append(_pull_back(w.norm(b, "attn"), x, torch.cat(into)))
            g = grads[w.site(b, "mlp_norm").name][:, self.start :]
            x = values[w.site(b, w.mid(b)).name][:, self.start :]
            found.append(_pull_back(w.norm(b, "mlp"), x, g.unsqueeze(0)))
        last = w.site(self.graph.blocks - 1, "resid_post")
        found.append(grads[last.name][:, self.start :].unsqueeze(0))
        return torch.cat(found).flatten(2).transpose(0, 1)

    def run(self, edges: Tensor) -> Tensor:
        """Return the last logits of the run in which only some edges carry the clean prompt.

        Every receiver's input is that of the corrupted run, plus, for each of its edges, what the edge's
        writer does now minus what it did in the corrupted run. The input's edges carry the clean
        embeddings. No edges: the corrupted run; all edges: the clean run.

        Args:
            edges: bool `[receivers, writers]`.

        Returns:
            float32 `[n, k]` at the columns that `logit_difference` needs, see `columns`.
        """
        w, graph = self.weights, self.graph
        changes: dict[int, Tensor] = {0: self.value(0, "resid_pre", "clean") - self.value(0, "resid_pre")}
        senders = edges.any(0)

        def entering(receiver: int, base: Tensor) -> Tensor | None:
            sources = edges[receiver].nonzero()[:, 0].tolist()
            present = [changes[s] for s in sources if s in changes]
            return base + sum(present[1:], present[0]) if present else None

        def attention(block: int, kind: str) -> Any:
            def write(x: Tensor) -> Tensor:
                new = self.value(block, f"attn.{kind}").clone()
                base = self.value(block, "resid_pre")
                norm = w.norm(block, "attn")
                before: Tensor | None = None
                for i, receiver in enumerate(graph.span(block, kind)):
                    now = entering(receiver, base)
                    if now is not None:
                        before = norm(base) if before is None else before
                        new[:, :, i] += (norm(now) - before) @ w.into(block, kind)[i].T
                return new

            return write

        def sent(block: int) -> Any:
            def read(z: Tensor) -> Tensor:
                heads = [h for h in range(graph.heads) if bool(senders[graph.writer(block, h)])]
                if heads:
                    made = self.head_outputs(block, z - self.value(block, "attn.z"), heads)
                    for i, h in enumerate(heads):
                        changes[graph.writer(block, h)] = made[:, :, i]
                return z

            return read

        def into_mlp(block: int) -> Any:
            def write(x: Tensor) -> Tensor:
                now = entering(graph.span(block, "mlp")[0], self.value(block, w.mid(block)))
                norm: Tensor = self.value(block, "mlp_norm") if now is None else w.norm(block, "mlp")(now)
                return norm

            return write

        def out_of_mlp(block: int) -> Any:
            def read(x: Tensor) -> Tensor:
                if bool(senders[graph.writer(block)]):
                    changes[graph.writer(block)] = x - self.value(block, "mlp.out")
                return x

            return read

        def into_logits(x: Tensor) -> Tensor:
            base = self.value(graph.blocks - 1, "resid_post")
            now = entering(len(graph.receivers) - 1, base)
            return base if now is None else now

        with ExitStack() as stack:
            n = len(self.pairs)
            hooks = [
                (w.site(b, kind), function)
                for b in range(graph.blocks)
                for kind, function in (
                    *((f"attn.{k}", attention(b, k)) for k in QKV),
                    ("attn.z", sent(b)),
                    ("mlp_norm", into_mlp(b)),
                    ("mlp.out", out_of_mlp(b)),
                )
            ]
            hooks.append((w.site(graph.blocks - 1, "resid_post"), into_logits))
            for site, function in hooks:
                stack.callback(attach(w.model.module, site, function, batch=lambda: n).remove)
            columns = self.columns
            narrow = stack.enter_context(only_columns(w.model, columns))
            stack.enter_context(torch.no_grad())
            output = w.model._call(self._passes._arguments("corrupt", self.start))
        logits: Tensor = (output.logits if hasattr(output, "logits") else output)[:, -1].float()
        return logits if narrow else logits.gather(1, columns)

    @property
    def columns(self) -> Tensor:
        """The tokens whose logits a run returns: right and wrong answer, `[n, 2]`."""
        return torch.stack([self.pairs.answer_ids, self.pairs.wrong_ids], 1)


def _pull_back(norm: Function, x: Tensor, grads: Tensor) -> Tensor:
    """Return gradients `[r, n, pos, d]` at a norm's output as gradients at its input `x` `[n, pos, d]`."""
    with torch.enable_grad():
        wide = x.detach().expand_as(grads).clone().requires_grad_()
        (found,) = torch.autograd.grad(norm(wide), wide, grads.to(wide.dtype))
    return found
