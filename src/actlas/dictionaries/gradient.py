"""Gradient SAE (g-SAE): a TopK autoencoder whose choice of features counts what moving along them would do.

    z     = ReLU(W_enc (x - b_dec) + b_enc)
    s     = z + beta * z * w,      w_i = |W_dec[i] . g| / mean_j |W_dec[j] . g|,      g = dL/dx
    x_hat = sum of z_i W_dec[i] over the k features of largest s,  + b_dec
    loss  = |x - x_hat|^2  +  AuxK                                as for TopK

Olmo et al. 2024, "Features that Make a Difference: Leveraging Gradients for Improved Dictionary
Learning". L is the model's next-token loss; only the choice depends on g: values stay z, and no gradient
flows through the choice. `beta = 0` is TopK; `selection="attribution"` chooses by z * w alone, the limit of
a large beta. The published score has no normaliser; dividing by the mean over features makes beta
independent of the loss's reduction and scale, and a row without a gradient (g = 0) is chosen as by TopK.

A gradient needs labels and a backward pass, and later tokens leak into it. Reading with the dictionary
therefore uses plain TopK with the learned weights (`encode`); `encode_with_gradient` is there to measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries.objective import Batch
from actlas.dictionaries.topk import TopKSAE
from actlas.kernels.sparse_codes import topk

if TYPE_CHECKING:
    from typing_extensions import Self

Selection = Literal["gradient", "attribution"]


@dataclass(kw_only=True, eq=False)
class GradientSAE(TopKSAE):
    """A TopK autoencoder trained with gradient-aware selection.

    Attributes:
        selection: `"gradient"`: by z + beta z w; `"attribution"`: by z w.
        beta: weight of the gradient in the choice.
    """

    selection: Selection = "gradient"
    beta: float = 0.1
    architecture: ClassVar[str] = "gradient"
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection not in ("gradient", "attribution"):
            raise InputError(f"selection is {self.selection!r}; it must be 'gradient' or 'attribution'")
        if not 0 <= self.beta < float("inf"):
            raise InputError(
                f"beta is {self.beta}; it must be 0 or more (infinity is selection='attribution')"
            )

    @classmethod
    def create(cls, site: str, d: int, width: int, *, seed: int = 0, **options: Any) -> Self:
        return super().create(site, d, width, seed=seed, **options)

    def select(self, pre: Tensor, batch: Batch) -> Codes:
        if batch.gradient is None:
            raise InputError(
                "a gradient SAE trains on rows with gradients; collect them (RowsSource(x, gradient=g), "
                "LiveSource(..., gradient=True))"
            )
        return self.choose(pre.relu(), batch.gradient)

    def choose(self, z: Tensor, gradient: Tensor) -> Codes:
        """Return the codes of the k features of largest score, from activations `[n, m]`."""
        if not self.beta and self.selection == "gradient":
            values, indices = topk(z, self.k)
            return Codes(indices, values, self.features)
        _, indices = topk(self.score_features(z, gradient), self.k)
        return Codes(indices, z.gather(1, indices), self.features)

    def score_features(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return the selection score s, `[n, m]`."""
        moved = (gradient.to(z) @ self.W_dec.detach().T).abs()
        mean = moved.mean(1, keepdim=True)
        without = torch.ones_like(mean) if self.selection == "attribution" else torch.zeros_like(mean)
        weight = torch.where(mean > 0, moved / mean, without)
        return z * weight if self.selection == "attribution" else z * (1 + self.beta * weight)

    def encode_with_gradient(self, x: Tensor, gradient: Tensor) -> Codes:
        """Return the codes `[n, k]` of rows `[n, d]` as a training step would choose them.

        Args:
            x: activations. gradient: dL/dx at them, of the same shape.

        Raises:
            ShapeError: the shapes differ.
        """
        if x.ndim != 2 or gradient.shape != x.shape:
            raise ShapeError(
                f"x and gradient must be rows [n, d], not {list(x.shape)} and {list(gradient.shape)}"
            )
        return self.choose(self.pre(self.flat(x).to(self.W_enc) * self.scale).relu(), gradient)
