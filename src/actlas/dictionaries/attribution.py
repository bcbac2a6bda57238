"""Attribution SAE: a ReLU autoencoder whose penalty counts how much a feature matters for a metric.

    loss = |x - x_hat|^2 + l1 sum_j z_j + alpha sum_j |z_j g.d_j| + beta |g.(x - x_hat)|

g is the gradient of a metric at x (for a task: of the logit difference), so z_j g.d_j is, to first order,
what feature j adds to the metric. The third term makes few features matter; the last keeps what matters
out of the reconstruction error. Gradients are brought to a mean norm of 1 in every batch, so that alpha
and beta are in the units of the L1 weight, whatever the metric's scale. (The published terms use g as it
is; `normalise=False` does too.)

    x, g = attribution_rows(model, task("ioi", model.tokenizer), "blocks.21.resid_post")
    fit = AttributionSAE.create(site, 576, 1152)
    train(fit, RowsSource(x, gradient=g), TrainSettings(tokens=200_000))

Source: Makelov, Lange and Nanda 2024, "Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control", appendix, after "Attribution dictionary learning" (Anthropic, April 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.relu import ReluSAE, sparsity
from actlas.dictionaries.task_runs import Position

if TYPE_CHECKING:
    from typing_extensions import Self

    from actlas.core.model import Model
    from actlas.data.task_items import TaskItem


@dataclass(kw_only=True, eq=False)
class AttributionSAE(ReluSAE):
    """A ReLU autoencoder with attribution penalties.

    Attributes:
        attribution: alpha, the weight of sum_j |z_j g.d_j|.
        unexplained: beta, the weight of |g.(x - x_hat)|.
        normalise: bring the gradients of a batch to a mean norm of 1 first.
    """

    attribution: float = 1.0
    unexplained: float = 1.0
    normalise: bool = True
    architecture: ClassVar[str] = "attribution"
    default_sparsity: ClassVar[float] = 1.0
    #: The data source must give the metric's gradient beside every row.
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attribution", "unexplained"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")

    @classmethod
    def create(cls, site: str, d: int, width: int, *, seed: int = 0, **options: Any) -> Self:
        return super().create(site, d, width, seed=seed, **options)

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        if batch.gradient is None:
            raise InputError(
                "an attribution SAE trains on rows with gradients of a metric; collect them "
                "(attribution_rows, then RowsSource(x, gradient=g))"
            )
        z = self.pre(batch.x).relu()
        error = batch.target - (z @ self.W_dec + self.b_dec)
        n = len(batch)
        penalty, unexplained = attribution_terms(z, error, self.W_dec, batch.gradient, self.normalise)
        squared, l1 = error.square().sum() / n, z.sum() / n
        warm = state.sparsity_weight
        loss = squared + warm * (sparsity(self, state) * l1 + self.attribution * penalty)
        parts = {"l1": float(l1.detach()), "attribution": float(penalty.detach())}
        parts["unexplained attribution"] = float(unexplained.detach())
        return Objective(
            loss + self.unexplained * unexplained, error.detach().square().sum(), codes_of(z), parts
        )


def attribution_terms(
    z: Tensor, error: Tensor, W_dec: Tensor, gradient: Tensor, normalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Return mean_i sum_j |z_ij g_i.d_j| and mean_i |g_i.e_i|.

    Args:
        z: activations `[n, m]`. error: e = x - x_hat, `[n, d]`. W_dec: `[m, d]`. gradient: g, `[n, d]`.
        normalise: divide g by its mean norm; gradients that are all 0 stay 0.
    """
    g = gradient.to(z)
    if normalise:
        norm = g.norm(dim=1).mean()
        g = g / norm if float(norm) > 0 else g
    return (z * (g @ W_dec.T)).abs().sum(1).mean(), (g * error).sum(1).abs().mean()


def attribution_rows(
    model: Model, items: Sequence[TaskItem], site: str, *, position: Position = "last", batch: int = 32
) -> tuple[Tensor, Tensor]:
    """Return activations and the gradients of each prompt's logit difference there, both `[n, d]`.

    Args:
        model: a causal language model with a tokenizer.
        items: prompts whose answers' tokens are known.
        site: one site.
        position: which token's activation.
        batch: prompts in one pass.

    Raises:
        InputError: see `TaskRuns`.
    """
    from actlas.dictionaries.task_runs import TaskRuns

    runs = TaskRuns(model, items, site, position=position, batch=batch)
    name = runs.sites[0].name
    x = runs.values[name]
    gradient = torch.zeros_like(x)
    for rows, place in runs.batches:
        trace = model.trace([items[i].prompt for i in rows], name, grad=True, stop=False)
        last = trace.logits[:, -1].float()
        difference = sum(
            last[j, int(items[i].answer_id or 0)] - last[j, list(items[i].wrong_ids)].mean()
            for j, i in enumerate(rows)
        )
        assert isinstance(difference, Tensor)
        found = trace.gradients(difference)[name][:, place]
        gradient[rows] = found.detach().flatten(1).to("cpu", torch.float32)
    return x, gradient
