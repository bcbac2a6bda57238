"""Switch: the mixture of experts with a learned router, as the baseline.

    p = softmax(R x),  R [M, d]
    k = 1: the best expert with gate p_j, so that the router learns from the task (Switch)
    k > 1: the k best, gates renormalised to sum to 1

Source: Fedus et al. 2022, "Switch Transformers", section 2; the router is float32 as recommended there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.swap import register_module
from actlas.nn.experts import MixtureOfExperts, Routing


@register_module
class SwitchMoE(MixtureOfExperts):
    """A mixture of GELU experts with a learned router; arguments as `MixtureOfExperts`."""

    kind = "switch"
    standard_activation = "gelu"

    def __init__(self, d: int, hidden: int, experts: int = 8, top_k: int = 2, **options: Any) -> None:
        super().__init__(d, hidden, experts, top_k, **options)
        self.router = nn.Linear(d, experts, bias=False, dtype=torch.float32)

    def route(self, x: Tensor) -> Routing:
        scores = F.linear(x.float(), self.router.weight.float())
        gates, experts = torch.softmax(scores, dim=-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        return Routing(experts, gates, scores)
