"""What a head or an MLP does to the answer: directly, unconditionally, and in all.

    effects = node_effects(model, pairs, labels=ids, kind="direct")
    effects.top(5), effects.carrying(0.8)       # the largest, and how few carry 80% of the sum

The answer's score is its logit minus the mean logit of all labels (`labels`), or minus the wrong answer's.
A node's output o at the last token counts

    direct         y . o / sigma                  y = W_U' n through the final norm, whose scale is held
    unconditional  y . (o - o') / sigma           o' from another prompt (or the mean), everything behind held
    total          score - score(o replaced)      everything behind runs again

Direct and total can disagree: later heads make up for what is taken away, or use what the node wrote.

Source: Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?" (arXiv 2307.09458), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from actlas.circuits.last_token import LastToken
from actlas.circuits.nodes import Node, nodes
from actlas.circuits.patching import patch
from actlas.circuits.readers import readers_of, through_norm
from actlas.core.errors import InputError, ModelError
from actlas.core.intervals import bootstrap_mean, bootstrap_statistic
from actlas.core.layout import weight_matrix
from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model

Kind = Literal["direct", "unconditional", "total"]
Baseline = Literal["resample", "mean", "zero"]


@dataclass(frozen=True, eq=False)
class NodeEffects:
    """Effects of nodes on the answer's score.

    Attributes:
        nodes: the nodes, at the last token.
        values: float64 `[nodes, n]`, logits.
        kind, baseline: how they were found.
        score: the answer's score in the unchanged run, float64 `[n]`.
        task: name.
        seed: of resampling and intervals.
    """

    nodes: tuple[Node, ...]
    values: Tensor = field(repr=False)
    kind: Kind
    baseline: Baseline
    score: Tensor = field(repr=False)
    task: str
    seed: int = 0

    @property
    def means(self) -> Tensor:
        """Mean effect of each node, `[nodes]`."""
        return self.values.mean(1)

    def order(self) -> list[int]:
        """Numbers of the nodes, largest positive mean effect first."""
        found: list[int] = self.means.argsort(descending=True, stable=True).tolist()
        return found

    def of(self, node: Node) -> Tensor:
        """Return one node's effect on every prompt, `[n]`.

        Raises:
            InputError: it was not measured.
        """
        for i, known in enumerate(self.nodes):
            if known.site == node.site:
                return self.values[i]
        raise InputError(f"{node.label} is not among the {len(self.nodes)} nodes that were measured")

    def carrying(self, share: float = 0.8) -> int:
        """Return the least number of nodes whose effects make up a share of all positive mean effects.

        Raises:
            InputError: a share outside 0 to 1, or no node has a positive effect.
        """
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; it must lie above 0 and at most at 1")
        positive = self.means.clamp_min(0).sort(descending=True).values
        if not float(positive.sum()) > 0:
            raise InputError("no node has a positive effect, so none carries a share of it")
        running = positive.cumsum(0) / positive.sum()
        return int((running < share - 1e-12).sum()) + 1

    def carrying_measured(self, share: float = 0.8) -> Measurement:
        """Return that number as a share of all nodes, with a bootstrap over prompts."""
        wide = self.values.numpy()

        def needed(counts: Any) -> Any:
            import numpy as np

            means = np.clip(counts @ wide.T, 0, None)
            ordered = -np.sort(-means, axis=1)
            running = ordered.cumsum(1) / ordered.sum(1, keepdims=True)
            return ((running < share - 1e-12).sum(1) + 1) / len(wide)

        n = wide.shape[1]
        low, high = bootstrap_statistic(needed, n, seed=self.seed) if n > 1 else (float("nan"),) * 2
        count = self.carrying(share)
        return Measurement(
            "nodes that carry the effect", count / len(wide), "fraction", n, low, high,
            "bootstrap over prompts", self.seed, group={"task": self.task, "kind": self.kind}, better="lower",
            note=f"{count} of {len(wide)} nodes make up {share:.0%} of all positive {self.kind} effects",
        )  # fmt: skip

    def top(self, k: int = 10) -> tuple[Measurement, ...]:
        """Return the nodes with the largest mean effects as measurements, with intervals over prompts."""
        found = []
        for i in self.order()[:k]:
            x = self.values[i].numpy()
            low, high = bootstrap_mean(x, seed=self.seed) if len(x) > 1 else (float("nan"),) * 2
            group = {"task": self.task, "kind": self.kind, "component": self.nodes[i].label}
            found.append(
                Measurement(
                    "node-effect", float(x.mean()), "logits", len(x), low, high, "bootstrap over prompts",
                    self.seed, group=group, note=f"{self.kind} effect on the answer's score; mean score "
                    f"{float(self.score.mean()):.3g}",
                )
            )  # fmt: skip
        return tuple(found)


def node_effects(
    model: Model,
    pairs: PromptPairs,
    *,
    kind: Kind = "direct",
    baseline: Baseline = "resample",
    labels: Sequence[int] | Tensor | None = None,
    over: str | Sequence[Node] = "components",
    seed: int = 0,
) -> NodeEffects:
    """Measure nodes at the last token of the clean prompts.

    Args:
        model: a causal language model with a layout.
        pairs: prompts and answers.
        kind: `"direct"`, `"unconditional"` or `"total"`; see the module docstring.
        baseline: what stands in a node's place: its output in another prompt, its mean over the prompts, or
            zero. `"direct"` has no need of one.
        labels: token ids of all possible answers; by default the score is answer minus wrong answer.
        over: `"components"`, `"heads"`, `"mlps"`, or nodes.
        seed: which other prompt, and intervals.

    Raises:
        InputError: an unknown kind or baseline, an answer that is no label, or one prompt where others are
            needed.
    """
    for said, known, name in ((kind, Kind, "kind"), (baseline, Baseline, "baseline")):
        if said not in get_args(known):
            raise InputError(f"{name} is {said!r}; it must be {', '.join(get_args(known))}")
    if kind != "direct" and baseline == "resample" and len(pairs) < 2:
        raise InputError("one prompt has no other to take an activation from; give at least 2")
    chosen = nodes(model, over, positions="last") if isinstance(over, str) else [*over]
    wanted = None if labels is None else torch.as_tensor(labels)
    runs = LastToken(model, dict(pairs.clean), "blocks.0.attn.z")
    last = f"blocks.{(model.n_blocks or 1) - 1}.resid_post"
    sites = sorted({n.site.split("[")[0] for n in chosen} | {last})
    trace = runs.trace(sites)
    rows = answer_rows(model, pairs, trace[last][:, -1], wanted)
    score = _score(runs.logits(), pairs, wanted)
    if kind == "total":
        return _total(model, pairs, chosen, wanted, baseline, score, seed)
    values = torch.empty(len(chosen), len(pairs), dtype=torch.float64)
    outputs: dict[str, Tensor] = {}
    for i, node in enumerate(chosen):
        name = node.site.split("[")[0]
        if name not in outputs:
            outputs[name] = _written(model, name, trace[name][:, -1].double(), rows)
        found = outputs[name][:, :, node.index] if node.index is not None else outputs[name].sum(2)
        own = found.diagonal()  # found[i, j]: prompt i's reading of prompt j's output
        values[i] = own if kind == "direct" else own - _other(found, baseline, seed)
    return NodeEffects(tuple(chosen), values, kind, baseline, score, pairs.task, seed)


def answer_rows(model: Model, pairs: PromptPairs, x: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return what reads each prompt's score off a part of its last residual state, float64 `[n, d]`.

    Args:
        model: the model.
        pairs: prompts and answers.
        x: last residual states `[n, d]`, at which the final norm's scale is held.
        labels: as for `node_effects`.
    """
    weight = _head(model)
    right = weight[pairs.answer_ids]
    other = (
        weight[pairs.wrong_ids] if labels is None else _labels(pairs, labels, weight).mean(0, keepdim=True)
    )
    return through_final_norm(model, right.double() - other.double(), x)


def label_rows(model: Model, labels: Tensor, x: Tensor) -> Tensor:
    """Return what reads each label's centred logit, float64 `[n, labels, d]`; see `answer_rows`."""
    rows = _head(model)[labels].double()
    rows = rows - rows.mean(0, keepdim=True)
    return torch.stack([through_final_norm(model, r.expand(len(x), -1), x) for r in rows], 1)


def through_final_norm(model: Model, rows: Tensor, x: Tensor) -> Tensor:
    """Pull functionals `[n, d]` back through the final norm, its scale held at states `x` `[n, d]`."""
    norm = model.final_norm_module
    scale = model.tower.logit_scale if model.tower is not None else 1.0
    rows = rows.double().cpu() * scale
    if norm is None:
        return rows
    back = through_norm(rows, norm)
    wide = x.double().cpu()
    probe = through_norm(torch.ones(1, wide.shape[1], dtype=torch.float64), norm)
    if float(probe.sum().abs()) < 1e-6 * float(probe.abs().max()):  # LayerNorm
        wide = wide - wide.mean(1, keepdim=True)
    return back / wide.square().mean(1, keepdim=True).sqrt()


def _written(model: Model, name: str, x: Tensor, rows: Tensor) -> Tensor:
    """Return `rows[i] . output of part p in prompt j`, float64 `[n, n, parts]` (one part for an MLP)."""
    if x.ndim == 2:
        return (rows @ x.cpu().T).unsqueeze(-1)
    wide = readers_of(model, name).matrix.unflatten(1, x.shape[1:]).cpu()  # [d, heads, head_dim]
    return torch.einsum("nd,dhk,mhk->nmh", rows, wide, x.cpu())


def _other(found: Tensor, baseline: Baseline, seed: int) -> Tensor:
    if baseline == "zero":
        return torch.zeros(len(found), dtype=found.dtype)
    if baseline == "mean":
        return found.mean(1)
    return found.gather(1, others(len(found), seed)[:, None])[:, 0]


def others(n: int, seed: int) -> Tensor:
    """Return another prompt for each of `n`, int64, each used once."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    found = torch.empty(n, dtype=torch.int64)
    found[order] = order.roll(1)
    return found


def _total(
    model: Model,
    pairs: PromptPairs,
    chosen: Sequence[Node],
    labels: Tensor | None,
    baseline: Baseline,
    score: Tensor,
    seed: int,
) -> NodeEffects:
    def judge(logits: Tensor, some: PromptPairs) -> Tensor:
        return _score(logits, some, labels).to(logits.device)

    at_last = [Node(n.site, "last") for n in chosen]
    found = patch(model, pairs, at_last, mode=baseline, metric=judge, seed=seed)
    return NodeEffects(tuple(at_last), found.changes, "total", baseline, score, pairs.task, seed)


def _score(logits: Tensor, pairs: PromptPairs, labels: Tensor | None) -> Tensor:
    right = logits.gather(1, pairs.answer_ids[:, None].to(logits.device))[:, 0].double()
    if labels is None:
        return (right - logits.gather(1, pairs.wrong_ids[:, None].to(logits.device))[:, 0].double()).cpu()
    return (right - logits[:, labels.to(logits.device)].double().mean(1)).cpu()


def _head(model: Model) -> Tensor:
    if model.unembed_module is None:
        raise ModelError(f"{model.name} has no output head over a vocabulary")
    return weight_matrix(model.unembed_module).detach()


def _labels(pairs: PromptPairs, labels: Tensor, weight: Tensor) -> Tensor:
    if labels.ndim != 1 or len(labels.unique()) != len(labels) or len(labels) < 2:
        raise InputError(f"labels are {labels.tolist()}; give at least 2 different token ids")
    if not bool(torch.isin(pairs.answer_ids.cpu(), labels.cpu()).all()):
        raise InputError("an answer of the task is none of the labels; give the ids of every possible answer")
    return weight[labels.to(weight.device)]
