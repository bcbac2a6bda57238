"""The experts of a Mixtral-like block as tensors, and replacements that hold fewer of them.

    p      = softmax(R x)                            R [E, d], the router
    y      = sum over the k best e of p_e / Z f_e(x)         Z: their sum, or 1 where gates are not
    renormalised
    f_e(x) = W_down_e (a(W_gate_e x) * (W_up_e x))

transformers keeps W_gate and W_up of all experts in one tensor `gate_up_proj [E, 2D, d]` and W_down in
`down_proj [E, d, D]` (Mixtral, Qwen-MoE, OLMoE). `expert_blocks` finds them; `fewer_experts` makes the edit
that puts a smaller router and smaller stacks in their places. The replacements are called as the originals
are, so every site of the block stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.activation_function import activation_function, activation_name
from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import Tap, find, join
from actlas.core.model import Model
from actlas.core.swap import SwapModule, register_module


@dataclass(frozen=True, eq=False)
class ExpertBlock:
    """One block's experts (views of the model's own tensors).

    Attributes:
        block: its number.
        router_path, experts_path: submodules, from the model's root.
        router: R `[E, d]`.
        gate_up: `[E, 2D, d]`, gate rows first.
        down: `[E, d, D]`.
        top_k: experts that a token runs.
        normalise: whether the gates of the chosen experts are divided by their sum.
        activation: transformers name of a.
    """

    block: int
    router_path: str
    experts_path: str
    router: Tensor
    gate_up: Tensor
    down: Tensor
    top_k: int
    normalise: bool
    activation: str

    @property
    def n_experts(self) -> int:
        return int(self.down.shape[0])

    def run(self, x: Tensor, expert: int) -> Tensor:
        """Return f_e(x), `[n, d]`, for rows `[n, d]`."""
        return _run(x, self.gate_up[expert], self.down[expert], self.activation)


def expert_blocks(model: Model) -> list[ExpertBlock]:
    """Return the experts of every block that has some.

    Raises:
        ModelError: the model has no Mixtral-like block.
    """
    tower, found = model.tower, []
    for number in range(model.n_blocks or 0):
        assert tower is not None
        paths = []
        for kind in ("moe.router", "moe.experts"):
            tap = tower.sites.get(kind)
            paths.append(tap.module if isinstance(tap, Tap) else "")
        root = model.block(number)
        router, experts = (find(root, p) if p else None for p in paths)
        stacks = [getattr(experts, n, None) for n in ("gate_up_proj", "down_proj")]
        weight = getattr(router, "weight", None)
        if router is None or any(not isinstance(t, Tensor) or t.ndim != 3 for t in stacks):
            continue
        gate_up, down = (t.detach() for t in stacks if isinstance(t, Tensor))
        if not isinstance(weight, Tensor) or not hasattr(router, "top_k"):
            continue
        found.append(
            ExpertBlock(
                number,
                join(tower.blocks, str(number), paths[0]),
                join(tower.blocks, str(number), paths[1]),
                weight.detach(),
                gate_up,
                down,
                int(router.top_k),  # type: ignore[arg-type]
                bool(getattr(router, "norm_topk_prob", True)),
                getattr(experts, "activation", "") or activation_name(model) or "silu",
            )
        )
    if not found:
        raise ModelError(
            f"{model.name} has no block with stacked experts; Mixtral, Qwen-MoE and OLMoE layouts have "
            "(upcycled mixtures are in actlas.nn)"
        )
    return found


@register_module
class ExpertRouter(nn.Module):
    """A softmax router over C experts that keeps one or several rows for each.

    With several rows (`rows > experts`) an expert's logit is the log of the sum of the exponentials of its
    rows, so its probability is the sum of theirs.

    Args:
        d: channels. rows: rows of R. experts: C. top_k: experts a token runs. normalise: see `ExpertBlock`.
    """

    def __init__(self, d: int, rows: int, experts: int, top_k: int, normalise: bool = True) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.hidden_dim, self.norm_topk_prob = top_k, experts, d, normalise
        self.weight = nn.Parameter(torch.zeros(rows, d))
        self.group: Tensor
        self.register_buffer("group", torch.arange(rows) % experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits, gates, chosen experts) of rows `[n, d]`, as transformers' routers do."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(x, self.weight)
        if len(self.weight) != self.num_experts:
            member = self.group == torch.arange(self.num_experts, device=x.device).unsqueeze(1)
            logits = logits.unsqueeze(1).masked_fill(~member, -torch.inf).logsumexp(-1)
        gates, chosen = torch.softmax(logits.float(), -1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
        return logits, gates, chosen

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "d": self.hidden_dim,
            "rows": len(self.weight),
            "experts": self.num_experts,
            "top_k": self.top_k,
            "normalise": self.norm_topk_prob,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ExpertRouter:
        """Build an empty one of these sizes."""
        return cls(**config)


@register_module
class StackedExperts(nn.Module):
    """C gated experts in two stacked tensors, called as `MixtralExperts` is.

    Args:
        d: channels. hidden: D. experts: C. activation: transformers name of a.
    """

    def __init__(self, d: int, hidden: int, experts: int, activation: str = "silu") -> None:
        super().__init__()
        self.num_experts, self.activation = experts, activation
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * hidden, d))
        self.down_proj = nn.Parameter(torch.zeros(experts, d, hidden))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the gated sum over the chosen experts, `[n, d]`."""
        y = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            tokens, places = torch.where(top_k_index == e)
            if len(tokens):
                out = _run(hidden_states[tokens], self.gate_up_proj[e], self.down_proj[e], self.activation)
                y = y.index_add(0, tokens, (out * top_k_weights[tokens, places, None]).to(y.dtype))
        return y

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        experts, d, hidden = self.down_proj.shape
        return {"d": d, "hidden": hidden, "experts": experts, "activation": self.activation}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StackedExperts:
        """Build an empty one of these sizes."""
        return cls(**config)


def fewer_experts(
    old: ExpertBlock, router: Tensor, gate_up: Tensor, down: Tensor, group: Tensor | None = None
) -> Edit:
    """Return the edit that puts other experts in a block.

    Args:
        old: the block as it is.
        router: rows `[C, d]`, or `[rows, d]` with `group`.
        gate_up, down: stacks of C experts.
        group: int64 `[rows]`, the expert each row belongs to.

    The gates of min(top_k, C) experts are used.

    Raises:
        InputError: sizes that do not fit each other.
    """
    count, d, hidden = down.shape
    if gate_up.shape != (count, 2 * hidden, d) or (group is None and len(router) != count):
        raise InputError(
            f"{len(router)} router rows, gate_up {list(gate_up.shape)} and down {list(down.shape)} do not fit"
        )
    new_router = ExpertRouter(d, len(router), count, min(old.top_k, count), old.normalise).to(router)
    new_experts = StackedExperts(d, hidden, count, old.activation).to(down)
    with torch.no_grad():
        new_router.weight.copy_(router)
        new_router.group.copy_(torch.arange(count) if group is None else group)
        new_experts.gate_up_proj.copy_(gate_up)
        new_experts.down_proj.copy_(down)
    return compose(
        [
            SwapModule(old.router_path, new_router.eval()),
            SwapModule(old.experts_path, new_experts.eval()),
        ]
    )


def _run(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(activation_function(activation)(gate) * up, down)
