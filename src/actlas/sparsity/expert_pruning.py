"""Expert pruning: keep the experts of each block that a text needs, drop the others.

    edit = prune_experts(model, corpus, keep=4)          # 4 experts a block are left
    with model.edit(edit): ...

The score of an expert on the calibration tokens, by gate g_e(x) (0 if not chosen):

    usage                  how many tokens chose it
    gate_mass              sum_x g_e(x)
    router_weighted_norm   mean over the tokens that chose it of g_e(x) ||f_e(x)||     (REAP's score)
    random                 a control

The router keeps the rows of the experts that stay, and the softmax runs over them. Sources: "Revisiting SMoE
Language Models" (UNCURL, 2024), whose baseline the first is; "REAP the Experts" (2025) for the third.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError
from actlas.core.expert_block import ExpertBlock, expert_blocks, fewer_experts
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.routing import RoutingTrace, trace_routing

ExpertScore = Literal["usage", "gate_mass", "router_weighted_norm", "random"]


@method(
    "prune-experts",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="keep only the experts of a mixture that a text needs, by usage, gate mass or REAP's score",
    example="actlas fit prune-experts my-mixtral/ prose --keep 4 -o fewer/",
    papers=("uncurl",),
)
def prune_experts(
    model: Model,
    data: Any,
    *,
    keep: int,
    score: ExpertScore = "router_weighted_norm",
    tokens: int = 8192,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that leaves `keep` experts in every block.

    Args:
        model: a Mixtral-like model.
        data: a corpus of the task.
        keep: experts that stay in each block.
        score: see the module docstring; ties go to the expert with the lower number.
        tokens, context: how much of the corpus is read.
        seed: of the random control.

    Raises:
        InputError: an unknown score, or `keep` is not 1 to the number of experts.
        ModelError: the model has no such experts.
    """
    if score not in get_args(ExpertScore):
        raise InputError(f"score is {score!r}; it must be one of {', '.join(get_args(ExpertScore))}")
    blocks = expert_blocks(model)
    for block in blocks:
        if not 1 <= keep <= block.n_experts:
            raise InputError(
                f"keep is {keep}; block {block.block} has {block.n_experts} experts, so 1 to "
                f"{block.n_experts}"
            )
    trace = trace_routing(model, data, tokens=tokens, context=context, inputs=score == "router_weighted_norm")
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for block in blocks:
        values = expert_scores(block, trace, score, generator)
        best = torch.argsort(values, descending=True, stable=True)[:keep].sort().values.to(block.down.device)
        edits.append(fewer_experts(block, block.router[best], block.gate_up[best], block.down[best]))
    return compose(edits).bind(model.fingerprint)


def expert_scores(
    block: ExpertBlock, trace: RoutingTrace, score: ExpertScore, generator: torch.Generator | None = None
) -> Tensor:
    """Return the score of each expert of a block, float64 `[E]`; higher is more needed."""
    layer = trace.layers.index(block.block)
    active, gates = trace.active[layer], trace.gates[layer]
    if score == "usage":
        return active.double().sum(0)
    if score == "gate_mass":
        return gates.double().sum(0)
    if score == "random":
        return torch.rand(block.n_experts, dtype=torch.float64, generator=generator)
    if not trace.inputs:
        raise InputError("router_weighted_norm needs the routers' inputs: trace_routing(..., inputs=True)")
    out = torch.zeros(block.n_experts, dtype=torch.float64)
    with torch.no_grad():
        for e in range(block.n_experts):
            rows = torch.where(active[:, e])[0]
            if len(rows):
                norm = block.run(trace.inputs[layer][rows].to(block.down), e).double().norm(dim=-1).cpu()
                out[e] = (gates[rows, e].double() * norm).mean()
    return out
