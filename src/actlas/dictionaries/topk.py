"""TopK sparse autoencoders (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

    z     = TopK(W_enc (x - b_dec) + b_enc)                the k largest, if positive; the rest 0
    x_hat = z W_dec + b_dec
    loss  = |x - x_hat|^2  +  aux * |e - e_hat|^2          summed over channels, averaged over rows

`e = x - x_hat` and `e_hat` is its reconstruction from the `d/2` largest dead features (AuxK), which is
how features that stopped firing come back. No gradient flows through the choice of features.

Only k of m features take part at a row, so only the encoder's product is dense. With `S` the chosen
features, `g = 2 (x_hat - x) / n` and `dz_ij = g_i . W_dec[j]` for j in S_i:

    dW_dec[j] = sum_i z_ij g_i        dW_enc[j] = sum_i dz_ij (x_i - b_dec)
    db_enc    = sum_i dz_i            db_dec    = sum_i g_i - db_enc W_enc

These sums are `kernels.sparse_codes`, and with Adam's step in one pass `kernels.fused_step`; the tests hold
them to autograd on the dense formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.sae import SAE, Moments
from actlas.kernels.encode import Precision, bfloat16_is_fast, encode_topk
from actlas.kernels.fused_step import fused_row_step, gradient_norm
from actlas.kernels.row_steps import adam_rows
from actlas.kernels.sparse_codes import gather_dot, scatter_outer, sparse_decode, topk

if TYPE_CHECKING:
    from typing_extensions import Self


def check_k(k: Any, width: int) -> None:
    """Raise InputError unless `k` is a number of features that the dictionary can have active."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= width:
        raise InputError(f"k is {k!r}; it must be between 1 and the width, {width}")


@dataclass(kw_only=True, eq=False)
class TopKSAE(SAE):
    """A TopK autoencoder; `k` features at most are active at a token."""

    k: int = 32
    architecture: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k, self.features)

    @classmethod
    def create(cls, site: str, d: int, width: int, *, seed: int = 0, k: int = 32, **options: Any) -> Self:
        check_k(k, width)
        return super().create(site, d, width, seed=seed, k=k, **options)

    def activate(self, pre: Tensor) -> Codes:
        values, indices = topk(pre, self.k, relu=True)
        return Codes(indices, values, self.features)

    def select(self, pre: Tensor, batch: Batch) -> Codes:
        """Return the codes that a training step uses; a kind may choose by more than the value."""
        return self.activate(pre)

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        """The dense form of the loss, for devices and kinds without sparse kernels."""
        pre = self.pre(batch.x)
        ranked = pre.detach() * self.W_dec.detach().norm(dim=1) if _free(state) else pre.detach()
        chosen = self.select(ranked, batch)
        values = pre.gather(1, chosen.indices).relu() * chosen.active
        z = torch.zeros_like(pre).scatter_add(1, chosen.indices, values)
        error = z @ self.W_dec + self.b_dec - batch.target
        n = len(batch)
        loss = error.square().sum() / n
        auxiliary = self.auxiliary(pre, -error.detach(), state)
        parts = {} if auxiliary is None else {"aux": float(auxiliary.detach())}
        whole = loss if auxiliary is None else loss + state.settings.aux * auxiliary
        codes = Codes(chosen.indices, values.detach(), self.features)
        return Objective(whole, error.detach().square().sum(), codes, parts)

    def gradients(self, batch: Batch, state: TrainState) -> tuple[Objective, dict[str, Tensor]]:
        objective, p = self._pieces(batch, state)
        indices, m = objective.codes.indices, self.features
        found = {
            "W_enc": scatter_outer(indices, p.dz, p.x, m),
            "b_enc": p.b_enc,
            "W_dec": scatter_outer(indices, objective.codes.values, p.g, m),
            "b_dec": p.b_dec,
        }
        if p.dead is not None:
            for name, part in p.revive.items():
                found[name].index_add_(0, p.dead, part)
        return objective, found if _free(state) else self.constrain(found)

    def step(self, batch: Batch, state: TrainState, moments: Moments, rate: float) -> Objective | None:
        """Do a whole step in place, without ever writing the gradients; `None` if it cannot be done so."""
        if type(self)._pieces is not TopKSAE._pieces or type(self).gradients is not TopKSAE.gradients:
            return None
        objective, p = self._pieces(batch, state)
        codes, s, unit = objective.codes, state.settings, not _free(state)
        extra = {name: (p.dead, part) for name, part in p.revive.items()} if p.dead is not None else {}
        encoder = codes.indices, p.dz, p.x
        decoder = codes.indices, codes.values, p.g
        factor = 1.0
        if s.clip is not None:
            squares = [
                gradient_norm(self.W_enc, *encoder, extra=extra.get("W_enc")) ** 2,
                gradient_norm(self.W_dec, *decoder, remove_parallel=unit, extra=extra.get("W_dec")) ** 2,
                float(p.b_enc.square().sum() + p.b_dec.square().sum()),
            ]
            norm = math.sqrt(sum(squares))
            factor = s.clip / norm if norm > s.clip else 1.0
        options: dict[str, Any] = {
            "step": state.step + 1, "lr": rate, "beta1": s.betas[0], "beta2": s.betas[1], "eps": s.eps,
            "gradient_scale": factor,
        }  # fmt: skip
        fused_row_step(self.W_enc, *moments["W_enc"], *encoder, extra=extra.get("W_enc"), **options)
        fused_row_step(
            self.W_dec, *moments["W_dec"], *decoder, extra=extra.get("W_dec"),
            remove_parallel=unit, renormalise=unit, **options,
        )  # fmt: skip
        adam_rows(self.b_enc, p.b_enc, *moments["b_enc"], **options)
        adam_rows(self.b_dec, p.b_dec, *moments["b_dec"], **options)
        return objective

    def _pieces(self, batch: Batch, state: TrainState) -> tuple[Objective, _Pieces]:
        """Return the objective and all that its gradients are made of."""
        n, m = len(batch), self.features
        x = batch.x - self.b_dec if self.centred else batch.x
        codes = self._chosen(x, batch, state)
        indices, z = codes.indices, codes.values
        if self.centred and batch.y is None:
            error = sparse_decode(indices, z, self.W_dec).sub_(x)  # b_dec cancels
        else:
            error = self.decode_scaled(codes) - batch.target
        squared = error.square().sum()
        dead = state.dead.nonzero().squeeze(1) if state.settings.aux else torch.empty(0)
        auxiliary, revive = self._auxiliary_gradients(batch, -error, state) if len(dead) else (None, {})
        g = error.mul_(2 / n)
        dz = gather_dot(indices, g, self.W_dec).mul_(codes.active)
        b_enc = z.new_zeros(m).index_add_(0, indices.reshape(-1), dz.reshape(-1))
        b_dec = g.sum(0)
        if self.centred:
            b_dec -= b_enc @ self.W_enc
        loss, parts = squared / n, {}
        if auxiliary is not None:
            b_dec += revive.pop("b_dec")
            b_enc.index_add_(0, dead, revive.pop("b_enc"))
            loss, parts = loss + state.settings.aux * auxiliary, {"aux": float(auxiliary)}
        pieces = _Pieces(x, g, dz, b_enc, b_dec, dead if auxiliary is not None else None, revive)
        return Objective(loss, squared, codes, parts), pieces

    def _chosen(self, x: Tensor, batch: Batch, state: TrainState) -> Codes:
        """Return the codes of centred rows, as a training step uses them."""
        norms = self.W_dec.norm(dim=1) if _free(state) else None
        if type(self).select is not TopKSAE.select:
            pre = torch.addmm(self.b_enc, x, self.W_enc.T)
            codes = self.select(pre if norms is None else pre * norms, batch)
            return (
                codes
                if norms is None
                else Codes(codes.indices, codes.values / norms[codes.indices], self.features)
            )
        dtype = state.settings.dtype
        fast = dtype == "bfloat16" or (dtype == "auto" and not x.is_cuda and bfloat16_is_fast())
        precision: Precision = "bfloat16" if fast and x.dtype == torch.float32 else "float32"
        values, indices = encode_topk(x, self.W_enc, self.b_enc, self.k, scale=norms, precision=precision)
        return Codes(indices, values if norms is None else values / norms[indices], self.features)

    def after_step(self, state: TrainState) -> None:
        if not _free(state):
            super().after_step(state)

    def finish(self, state: TrainState) -> None:
        """Fold atoms' norms into the encoder, where they were free to move."""
        if _free(state):
            norms = self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
            self.W_dec /= norms
            self.W_enc *= norms
            self.b_enc *= norms.squeeze(1)

    def auxiliary(self, pre: Tensor, error: Tensor, state: TrainState) -> Tensor | None:
        """Return the squared error of reconstructing `error` from dead features, or `None` without any."""
        dead = state.dead.nonzero().squeeze(1)
        if not len(dead) or not state.settings.aux:
            return None
        some = pre[:, dead].relu()
        most = max(1, self.channels // 2)
        if len(dead) > most:
            kept = some.detach().topk(most, dim=1, sorted=False).indices
            some = torch.zeros_like(some).scatter(1, kept, some.gather(1, kept))
        share = min(1.0, len(dead) / most)
        return share * (some @ self.W_dec[dead] - error).square().sum() / len(error)

    def _auxiliary_gradients(
        self, batch: Batch, error: Tensor, state: TrainState
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the auxiliary loss and its gradients, of the dead features' rows only (`b_dec`: whole)."""
        dead = state.dead.nonzero().squeeze(1)
        W_enc, W_dec = (w[dead].requires_grad_() for w in (self.W_enc, self.W_dec))
        b_enc, b_dec = self.b_enc[dead].requires_grad_(), self.b_dec.detach().clone().requires_grad_()
        x = batch.x - b_dec if self.centred else batch.x
        some = torch.addmm(b_enc, x, W_enc.T).relu()
        most = max(1, self.channels // 2)
        if len(dead) > most:
            kept = some.detach().topk(most, dim=1, sorted=False).indices
            some = torch.zeros_like(some).scatter(1, kept, some.gather(1, kept))
        share = min(1.0, len(dead) / most)
        loss = share * (some @ W_dec - error).square().sum() / len(error)
        leaves = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        found = torch.autograd.grad(state.settings.aux * loss, list(leaves.values()), allow_unused=True)
        parts = {
            name: torch.zeros_like(leaves[name]) if part is None else part
            for name, part in zip(leaves, found, strict=True)
        }
        return loss.detach(), parts


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What the gradients of a step are made of; `revive` are the auxiliary loss's, of the `dead` rows."""

    x: Tensor
    g: Tensor
    dz: Tensor
    b_enc: Tensor
    b_dec: Tensor
    dead: Tensor | None
    revive: dict[str, Tensor]


def _free(state: TrainState) -> bool:
    return state.settings.decoder_norm == "free"
