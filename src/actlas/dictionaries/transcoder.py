"""Transcoders: read one site, write another; a sparse stand-in for the layer between them.

    z     = sigma(W_enc s x + b_enc)                     x: what enters an MLP (`blocks.5.mlp_norm`)
    y_hat = (z W_dec + b_dec) / (s t)  [+ W_skip x]      y: what leaves it (`blocks.5.mlp.out`)
    loss  = |y - y_hat|^2  +  lambda * sum_i z_i         the penalty for ReLU only

Dunefsky, Chlenski and Nanda 2024, "Transcoders Find Interpretable LLM Feature Circuits" (sigma = ReLU, L1);
Paulo, Shabalin and Belrose 2025, "Transcoders Beat Sparse Autoencoders for Interpretability" (sigma = TopK,
and the skip path W_skip, which starts at 0: `SkipTranscoder`). A threshold makes sigma a JumpReLU, for
transcoders that were trained so elsewhere. `t` brings the outputs to a mean norm of sqrt(d_out), as `s` does
the inputs.

The edits of a transcoder apply at its target: `edit(i, 4.0)` adds there, `edit({i: 0})` takes one feature's
contribution out, `substitute()` puts the whole output in the layer's place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import ErrorPart, Operation, as_operation
from actlas.core.errors import InputError, ShapeError
from actlas.dictionaries.batch_topk import jump
from actlas.dictionaries.dense import codes_of
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.relu import sparsity
from actlas.dictionaries.sae import SAE
from actlas.kernels.sparse_codes import topk

if TYPE_CHECKING:
    from typing_extensions import Self

    from actlas.core.edit import Edit


@dataclass(kw_only=True, eq=False)
class Transcoder(SAE):
    """A transcoder from `site` to `target`.

    Attributes:
        target: the site that it reconstructs.
        target_scale: float32 `[1]`, t.
        k: features at a token (TopK); `None`: ReLU with an L1 penalty.
        threshold: float32 `[m]`, JumpReLU thresholds (scaled units); not trained.
    """

    target: str = ""
    target_scale: Tensor = field(default_factory=lambda: torch.ones(1))
    k: int | None = None
    threshold: Tensor | None = None
    architecture: ClassVar[str] = "transcoder"
    default_sparsity: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None and not 1 <= self.k <= self.features:
            raise InputError(f"k is {self.k}; it must be between 1 and the width, {self.features}")
        if self.k is not None and self.threshold is not None:
            raise InputError("a transcoder has k or a threshold, not both")

    @classmethod
    def create(
        cls, site: str, d: int, width: int, *, d_out: int | None = None, seed: int = 0, **options: Any
    ) -> Self:
        return super().create(site, d, width, d_out=d_out or d, seed=seed, **{**options, "centred": False})

    def prepared(self, sample: Batch) -> None:
        norm = float((sample.target * self.scale).norm(dim=1).mean())
        if not 0 < norm < math.inf:
            raise InputError(f"the target rows' mean norm is {norm}; nothing can be learned from them")
        self.target_scale.fill_(math.sqrt(len(self.b_dec)) / norm)
        self.b_dec *= self.target_scale

    def activate(self, pre: Tensor) -> Codes:
        if self.k is not None:
            values, indices = topk(pre, self.k)
            return Codes(indices, values, self.features)
        return codes_of(pre.relu() if self.threshold is None else jump(pre, self.threshold))

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        pre, n = self.pre(batch.x), len(batch)
        codes = self.activate(pre.detach())
        z = pre * codes.dense().ne(0) if self.k is not None or self.threshold is not None else pre.relu()
        written = (z @ self.W_dec + self.b_dec) / self.target_scale
        error = self.complete(batch.x, written) - batch.target
        squared = error.square().sum()
        loss, parts = squared * self.target_scale.square().squeeze() / n, {}
        if self.k is None and self.threshold is None:
            l1 = z.sum() / n
            loss = loss + state.sparsity_weight * sparsity(self, state) * l1
            parts["l1"] = float(l1.detach())
        return Objective(loss, squared.detach(), codes, parts)

    # -- as a dictionary ----------------------------------------------------------------------------

    @property
    def atoms(self) -> Tensor:
        return self.W_dec / (self.scale * self.target_scale)

    @property
    def offset(self) -> Tensor:
        return self.b_dec / (self.scale * self.target_scale)

    def direction(self, feature: int) -> Tensor:
        return self.W_dec[self.check_feature(feature)] / (self.scale * self.target_scale)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Return what codes write at the target, without a skip path: `[..., d_out]`."""
        return super().decode(codes) / self.target_scale

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the target's value `[..., d_out]` for inputs `[..., d]`, a skip path included."""
        return self.complete(self.flat(x), self.decode(self.encode(x)))

    def complete(self, x: Tensor, written: Tensor) -> Tensor:
        """Return what the codes wrote plus what goes past them; both in the same units."""
        return written

    def edit(self, feature: int | Mapping[int, Operation] = 0, strength: float = 1.0) -> Edit:
        from actlas.core.edits import Add
        from actlas.dictionaries.transcoder_edits import TranscoderEdit

        self._needs_target()
        if isinstance(feature, Mapping):
            operations = {self.check_feature(int(f)): as_operation(o) for f, o in feature.items()}
            if not operations:
                raise InputError("no feature was given; give {feature: operation}")
            edit = TranscoderEdit(self.target, self, operations=operations) * strength
        else:
            edit = Add(self.target, self.direction(feature).detach()) * strength
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)

    def substitute(
        self,
        error: ErrorPart = "drop",
        *,
        keep_error: bool = False,
        error_map: Tensor | None = None,
        only: Collection[int] | None = None,
        without: Collection[int] = (),
    ) -> Edit:
        """Return the edit that puts the transcoder's output in the target's place.

        Args:
            error, keep_error: `"drop"` the error, or `"keep"` it: then only what `only` and `without`
                leave out changes.
            only, without: features to keep, or to leave out.

        Raises:
            InputError: an error part other than these two, or features that do not exist.
        """
        from actlas.dictionaries.transcoder_edits import TranscoderEdit

        self._needs_target()
        if error not in ("drop", "keep") or error_map is not None:
            raise InputError(f"error is {error!r}; a transcoder's error is dropped or kept")
        edit: Edit = TranscoderEdit(
            self.target,
            self,
            whole=not keep_error and error == "drop",
            only=None if only is None else tuple(self.check_feature(int(f)) for f in only),
            without=tuple(self.check_feature(int(f)) for f in without),
        )
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)

    def _needs_target(self) -> None:
        if not self.target:
            raise InputError(
                "the transcoder does not know where it writes; set its target, e.g. 'blocks.5.mlp.out'"
            )

    def at(self, site: str, target: str) -> Self:
        """Return the same transcoder for other sites, e.g. of a model with other names."""
        return replace(self, site=site, target=target)


@dataclass(kw_only=True, eq=False)
class SkipTranscoder(Transcoder):
    """A transcoder with a linear path from input to output beside its features.

    Attributes:
        W_skip: float32 `[d_out, d]`, in the sites' units.
    """

    W_skip: Tensor
    architecture: ClassVar[str] = "skip-transcoder"
    trainable: ClassVar[tuple[str, ...]] = (*Transcoder.trainable, "W_skip")

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = (len(self.b_dec), self.channels)
        if self.W_skip.shape != shape:
            raise ShapeError(f"W_skip has shape {list(self.W_skip.shape)}; it must be {list(shape)}")

    @classmethod
    def create(
        cls, site: str, d: int, width: int, *, d_out: int | None = None, seed: int = 0, **options: Any
    ) -> Self:
        skip = torch.zeros(d_out or d, d)
        return super().create(site, d, width, d_out=d_out, seed=seed, W_skip=skip, **options)

    def complete(self, x: Tensor, written: Tensor) -> Tensor:
        return written + x.to(self.W_skip) @ self.W_skip.T
