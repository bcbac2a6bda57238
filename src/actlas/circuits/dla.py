"""Direct logit attribution: what each part of a model adds to the answer's logit by itself.

    logit(answer) - logit(wrong)  =  (u_answer - u_wrong) . norm(x)       x: the stream at the last token
    part p adds                      g(u_answer - u_wrong) . a_p / r      sum of a_p = x, r: the norm's scale

The final norm's scale r is that of the whole stream and is kept as it is, so the parts add up to the logit
difference exactly (a bias of the head or of the norm is its own part). A head's share splits further over the
tokens it attends to: `A[last, s] W_O^h v_s`. What is measured is only the direct way to the logits; what a
part does through later parts is left out, and is what patching measures.

Source: Elhage et al. 2021; Wang et al. 2022 (arXiv 2211.00593), section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.graph import INPUT, Graph
from actlas.circuits.readers import readers_of, through_norm
from actlas.core.errors import InputError, ModelError
from actlas.core.intervals import bootstrap_mean
from actlas.core.layout import weight_matrix
from actlas.core.measurement import Measurement
from actlas.core.methods import method

if TYPE_CHECKING:
    from actlas.core.model import Model

By = Literal["component", "head", "token"]
BIAS = "bias"


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """What every part adds to logit(answer) - logit(wrong), directly.

    Attributes:
        labels: names of the parts.
        values: `[n, parts]` float64, in logits.
        total: the model's logit difference, `[n]` float64.
        model, task: their names.
        seed: of intervals.
    """

    labels: tuple[str, ...]
    values: Tensor = field(repr=False)
    total: Tensor = field(repr=False)
    model: str
    task: str
    seed: int = 0

    @property
    def means(self) -> Tensor:
        """Mean over prompts, `[parts]` float64."""
        return self.values.mean(0)

    @property
    def unexplained(self) -> Tensor:
        """The part of the logit difference that the parts do not add up to, `[n]`."""
        return self.total - self.values.sum(1)

    def top(self, k: int = 10) -> list[Measurement]:
        """Return the `k` largest parts in absolute value with 95% intervals over prompts."""
        order = self.means.abs().argsort(descending=True, stable=True)[:k].tolist()
        found = []
        for i in order:
            x = self.values[:, i].numpy()
            low, high = bootstrap_mean(x, seed=self.seed) if len(x) > 1 else (math.nan, math.nan)
            bounds = (None if math.isnan(low) else low, None if math.isnan(high) else high)
            found.append(
                Measurement(
                    "direct effect", float(x.mean()), "logits", len(x), *bounds, "bootstrap over prompts",
                    self.seed, group={"task": self.task, "part": self.labels[i]},
                )
            )  # fmt: skip
        return found


def dla(
    model: Model,
    pairs: PromptPairs,
    by: By = "component",
    *,
    head: tuple[int, int] | None = None,
    side: str = "clean",
    batch: int = 8,
    seed: int = 0,
) -> DirectEffects:
    """Attribute the logit difference to what writes into the last token's stream.

    Args:
        model: a causal language model whose parts add up.
        pairs: prompts with right and wrong answers.
        by: `"component"` (input, attention layers, MLPs), `"head"` (input, heads, attention biases, MLPs), or
            `"token"`: the tokens that one head attends to, by their distance from the last (`"-1"` is last).
        head: (block, head), for `"token"`.
        side: `"clean"` or `"corrupt"` prompts.
        batch: prompts a pass.
        seed: of the intervals.

    Raises:
        InputError: an unknown `by` or side, or no head where one is needed. SiteError: a head that does
        not exist. ModelError: no output head, or parts that do not add up.
    """
    if by not in ("component", "head", "token"):
        raise InputError(f"by is {by!r}; it must be 'component', 'head' or 'token'")
    if side not in ("clean", "corrupt"):
        raise InputError(f"side is {side!r}; it must be 'clean' or 'corrupt'")
    if (head is None) == (by == "token"):
        raise InputError("give head=(block, head) with by='token', and only there")
    graph = Graph.of(model)
    if head is not None:
        model.resolve(f"blocks.{head[0]}.attn.z[head={head[1]}]")
    labels: list[str] = []
    values, totals = [], []
    for start in range(0, len(pairs), batch):
        part = pairs.take(slice(start, start + batch))
        functional = Functional(model, part)
        if by == "token":
            assert head is not None
            found, total = _by_token(model, graph, part, side, functional, head)
            missing = pairs.width - found.shape[1]
            found = torch.cat([found.new_zeros(len(found), missing), found], 1)
            labels = [str(i - pairs.width) for i in range(pairs.width)]
        else:
            labels, found, total = _by_part(model, graph, part, side, functional, by)
        values.append(found)
        totals.append(total)
    return DirectEffects(tuple(labels), torch.cat(values), torch.cat(totals), model.name, pairs.task, seed)


@method(
    "dla",
    room="circuits",
    returns="Measurement",
    data="task",
    summary="direct logit attribution: what each head and MLP adds to the answer's logit by itself",
    example="actlas fit dla smollm2 ioi --option top=15",
)
def fit_dla(
    model: Model, data: Any, *, by: str = "head", prompts: int = 32, top: int = 10, seed: int = 0
) -> tuple[Measurement, ...]:
    """Return the largest direct effects on a task's logit difference.

    Args:
        model: a causal language model with a tokenizer.
        data: a task.
        by: `"component"` or `"head"`.
        prompts: pairs of prompts.
        top: how many parts are returned.
        seed: of the intervals.
    """
    pairs = PromptPairs.from_task(model, data, n=prompts, seed=seed)
    return tuple(dla(model, pairs, cast("By", by), seed=seed).top(top))


class Functional:
    """The logit difference as a linear functional of the stream, up to the final norm's scale.

    Attributes:
        rows: `[n, d]` float64, gain (and centring) of the final norm included.
        bias: `[n]`, what the biases of norm and head add.
    """

    def __init__(self, model: Model, pairs: PromptPairs) -> None:
        head, self.norm = model.unembed_module, model.final_norm_module
        if head is None:
            raise ModelError(f"{model.name} has no output head over a vocabulary")
        weight = weight_matrix(head).detach()
        rows = (weight[pairs.answer_ids] - weight[pairs.wrong_ids]).double()
        given = getattr(head, "bias", None)
        self.bias = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        if isinstance(given, Tensor):
            self.bias += (given[pairs.answer_ids] - given[pairs.wrong_ids]).detach().double()
        self.plain = rows
        if self.norm is not None:
            with torch.no_grad():
                zero = self.norm(torch.zeros(1, rows.shape[1], device=rows.device, dtype=model.dtype))
            self.bias += rows @ zero[0].double()
            self.offset = zero[0].double()
            rows = through_norm(rows, self.norm)
        self.rows = rows

    def scale(self, x: Tensor) -> Tensor:
        """Return what the final norm multiplies the stream `x` `[n, d]` by, `[n]` float64."""
        if self.norm is None:
            return torch.ones(len(x), dtype=torch.float64, device=x.device)
        with torch.no_grad():
            y = self.norm(x).double() - self.offset
        eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        linear = x.double() @ through_norm(eye, self.norm).T
        return (y * linear).sum(1) / linear.square().sum(1).clamp_min(1e-300)


def _by_part(
    model: Model, graph: Graph, pairs: PromptPairs, side: str, functional: Functional, by: str
) -> tuple[list[str], Tensor, Tensor]:
    kinds = ("attn.out", "attn.z", "mlp.out") if by == "head" else ("attn.out", "mlp.out")
    names = {k: [f"blocks.{b}.{k}" for b in range(graph.blocks)] for k in kinds}
    first, last = "blocks.0.resid_pre", f"blocks.{graph.blocks - 1}.resid_post"
    every = [first, *(n for b in range(graph.blocks) for n in (names[k][b] for k in kinds)), last]
    trace = model.trace(dict(getattr(pairs, side)), every, stop=False)
    rows = functional.rows * functional.scale(trace[last][:, -1])[:, None]
    dot = lambda name: (trace[name][:, -1].double() * rows).sum(1)  # noqa: E731
    labels, found = [INPUT], [dot(first)]
    for b in range(graph.blocks):
        whole = dot(names["attn.out"][b])
        if by == "head":
            wide = readers_of(model, names["attn.z"][b]).matrix.unflatten(1, (graph.heads, -1))
            z = trace[names["attn.z"][b]][:, -1].double()
            heads = torch.einsum("nd,dha,nha->nh", rows, wide.to(rows), z)
            labels += [f"L{b}H{h}" for h in range(graph.heads)]
            found += list(heads.unbind(1))
            rest = whole - heads.sum(1)
            if float(rest.abs().max()) > 1e-6 * max(float(heads.abs().max()), 1.0):
                labels.append(f"attention bias {b}")
                found.append(rest)
        else:
            labels.append(f"attention {b}")
            found.append(whole)
        labels.append(f"MLP {b}")
        found.append(dot(names["mlp.out"][b]))
    labels.append(BIAS)
    found.append(functional.bias)
    logits = trace.logits[:, -1].double()
    picked = [logits.gather(1, ids[:, None])[:, 0] for ids in (pairs.answer_ids, pairs.wrong_ids)]
    return labels, torch.stack(found, 1).cpu(), (picked[0] - picked[1]).cpu()


def _by_token(
    model: Model, graph: Graph, pairs: PromptPairs, side: str, functional: Functional, head: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    block, number = head
    group = number // (graph.heads // graph.groups)
    names = [f"blocks.{block}.attn.{k}" for k in ("v", "pattern", "z")]
    last = f"blocks.{graph.blocks - 1}.resid_post"
    trace = model.trace(dict(getattr(pairs, side)), [*names, last], attention_rows=1)
    rows = functional.rows * functional.scale(trace[last][:, -1])[:, None]
    wide = readers_of(model, names[2]).matrix.unflatten(1, (graph.heads, -1))[:, number]  # [d, head_dim]
    reads = rows @ wide.to(rows)  # [n, head_dim]
    pattern = trace[names[1]][:, number, -1].double()
    found = pattern * torch.einsum("na,npa->np", reads, trace[names[0]][:, :, group].double())
    total = (reads * trace[names[2]][:, -1, number].double()).sum(1)
    return found.cpu(), total.cpu()
