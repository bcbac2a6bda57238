"""R-Sparse: one budget of weights, shared by the columns of large inputs and a low-rank map for the rest.

A layer of `in x out` weights that may touch the share 1 - s of them spends alpha of it on exact columns:

    kept share of inputs = (1 - s) alpha            scored by |x_i| ||(V S)[i, :]|| = |x_i| ||W[:, i]||
    rank = floor(in out (1 - s) (1 - alpha) / (in + out))

alpha = 1 is WINA's rule, without a low-rank map (and is returned as a SkipInputs); alpha = 0 is low rank
only. `alpha="search"` looks for one alpha per kind of layer (q, k, v, o, gate, up, down) by a small
evolutionary search that minimises the loss on the corpus; its start population holds alpha = 1, and the
best member is never lost, so on its own text the search is never worse than alpha = 1.

Source: Zhang et al. 2025, "R-Sparse" (arXiv 2504.19449). Its code counts k and v as if they had hidden-size
outputs; true shapes are used here, and a rank of 0 has no branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from actlas.core.calibration import Calibration
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.skip_inputs import SkipInputs
from actlas.core.swap import SwapModule
from actlas.measure.likelihood import nll
from actlas.measure.linear_layers import LinearLayer, linear_layers
from actlas.sparsity.input_sparsity import calibrate_inputs, check_sparsity, finish
from actlas.sparsity.rank_aware import RankAwareLinear, low_rank


class RankAware:
    """R-Sparse for one model and budget, at any alpha; decompositions are made once.

    Args:
        model: a model with a layout and plain linear layers.
        calibration: of `calibrate_inputs`.
        sparsity: share of each layer's weights that is not touched, in (0, 1).
    """

    def __init__(self, model: Model, calibration: Calibration, sparsity: float) -> None:
        self.model, self.calibration = model, calibration
        self.sparsity = check_sparsity(sparsity)
        self.layers = linear_layers(model)
        self._maps: dict[str, tuple[Tensor, Tensor]] = {}
        self._rules: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def kinds(self) -> list[str]:
        """Names of the kinds of layers, in order."""
        return list(dict.fromkeys(layer.name for layer in self.layers))

    def rank(self, layer: LinearLayer, alpha: float) -> int:
        """Return the rank that a layer's budget pays for."""
        budget = layer.size * (1 - self.sparsity) * (1 - alpha)
        return int(budget / (layer.rows + layer.columns))

    def edit(self, alpha: float | Mapping[str, float]) -> Edit:
        """Return the edit at one alpha, or at one for each kind of layer.

        Raises:
            InputError: an alpha outside [0, 1].
        """
        made = [
            self._one(layer, alpha if isinstance(alpha, (int, float)) else alpha[layer.name])
            for layer in self.layers
        ]
        return finish(self.model, made, "all")

    def _one(self, layer: LinearLayer, alpha: float) -> Edit:
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is the share of the budget for exact columns, in [0, 1], not {alpha}")
        norms, scores = self._rule(layer)
        rank = self.rank(layer, alpha)
        skipped = int((1 - (1 - self.sparsity) * alpha) * len(scores))
        threshold = float(scores[skipped]) if skipped < len(scores) else float("inf")
        if rank == 0:
            return SkipInputs(layer.input_site, norms, threshold)
        up, down = self._map(layer)
        bias = getattr(layer.module(self.model), "bias", None)
        new = RankAwareLinear.of(
            layer.weight(self.model), bias, up[:, -rank:], down[-rank:], factor=norms, threshold=threshold
        )
        return SwapModule(layer.path, new)

    def _rule(self, layer: LinearLayer) -> tuple[Tensor, Tensor]:
        """Return the column norms and the sorted scores of the calibration tokens."""
        if layer.path not in self._rules:
            norms = layer.column_norms(self.model)
            scores = self.calibration[layer.reads].rows.abs() * norms.cpu()
            self._rules[layer.path] = norms, scores.flatten().sort().values
        return self._rules[layer.path]

    def _map(self, layer: LinearLayer) -> tuple[Tensor, Tensor]:
        if layer.path not in self._maps:
            most = min(layer.rows, layer.columns, self.rank(layer, 0.0))
            up, down = low_rank(layer.weight(self.model), most)
            self._maps[layer.path] = up.float(), down.float()
        return self._maps[layer.path]


def search(
    loss: Callable[[Mapping[str, float]], float],
    kinds: Sequence[str],
    *,
    evaluations: int = 24,
    population: int = 8,
    spread: float = 0.1,
    seed: int = 0,
) -> tuple[dict[str, float], float]:
    """Look for the alpha of each kind that gives the least loss.

    The first members are alpha = 1, 0.9 and 0.75 everywhere and random ones; then children of two good
    parents (uniform crossover, Gaussian mutation of width `spread`, clipped to [0, 1]) replace the worst.

    Args:
        loss: what to minimise.
        kinds: names of the knobs.
        evaluations: how often `loss` is called.
        population: how many members are kept.
        spread: width of the mutations.
        seed: of every random choice.

    Returns:
        The best alphas and their loss; never worse than alpha = 1 everywhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return 1 - 0.3 * torch.rand(len(kinds), generator=generator)

    members: list[tuple[float, Tensor]] = []
    starts = [torch.full((len(kinds),), a) for a in (1.0, 0.9, 0.75)]
    for i in range(max(1, evaluations)):
        if i < population:
            child = starts[i] if i < len(starts) else draw()
        else:
            a, b = (
                members[int(torch.randint(len(members) // 2 + 1, (1,), generator=generator))][1] for _ in "ab"
            )
            child = torch.where(torch.rand(len(kinds), generator=generator) < 0.5, a, b)
            child = (child + spread * torch.randn(len(kinds), generator=generator)).clamp(0, 1)
        members.append((loss(dict(zip(kinds, child.tolist(), strict=True))), child))
        members = sorted(members, key=lambda m: m[0])[:population]
    best = members[0]
    return dict(zip(kinds, best[1].tolist(), strict=True)), best[0]


@method(
    "r-sparse",
    room="sparsity",
    returns="Edit",
    data="corpus",
    summary="large inputs exactly, the others through a low-rank map, at one budget of weights",
    example="actlas fit r-sparse smollm2 prose --sparsity 0.5 --option alpha=0.95 -o sparse/",
    papers=("r-sparse",),
)
def fit_r_sparse(
    model: Model,
    data: Any,
    *,
    sparsity: float = 0.5,
    alpha: float | Literal["search"] = 1.0,
    evaluations: int = 24,
    search_tokens: int = 512,
    tokens: int = 4096,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that computes every linear layer from exact columns and a low-rank map.

    Args:
        model: a model with a layout and plain linear layers.
        data: text; or a calibration of `calibrate_inputs`, if alpha is given.
        sparsity: share of the weights that is not touched, in (0, 1).
        alpha: share of the touched weights that are exact columns, or `"search"`.
        evaluations, search_tokens: of the search: how many, on how much text.
        tokens, context, seed: of the calibration; the seed also serves the search.

    Raises:
        InputError: a sparsity or alpha outside its range; a search without text.
    """
    calibration = calibrate_inputs(model, data, tokens=tokens, context=context, seed=seed)
    rule = RankAware(model, calibration, sparsity)
    if alpha != "search":
        if isinstance(alpha, str):
            raise InputError(f"alpha is {alpha!r}; it must be a number in [0, 1] or 'search'")
        return rule.edit(alpha)
    if isinstance(data, Calibration):
        raise InputError("alpha='search' measures the loss on text; give text instead of a calibration")
    texts = list(data)

    def loss(alphas: Mapping[str, float]) -> float:
        with model.edit(rule.edit(alphas)):
            found = nll(model, texts, tokens=search_tokens, context=context, per_document=search_tokens // 4)
        return float(found.nll.sum() / found.tokens.sum())

    best, _ = search(loss, rule.kinds, evaluations=evaluations, seed=seed)
    return rule.edit(best)
