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

These sums are `kernels.sparse_codes`; the tests hold them to autograd on the dense formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.dictionaries.sae import SAE
from actlas.kernels.encode import Precision, bfloat16_is_fast, encode_topk
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
        n, m = len(batch), self.features
        x = batch.x - self.b_dec if self.centred else batch.x
        codes = self._chosen(x, batch, state)
        indices, z = codes.indices, codes.values
        if self.centred and batch.y is None:
            error = sparse_decode(indices, z, self.W_dec).sub_(x)  # b_dec cancels
        else:
            error = self.decode_scaled(codes) - batch.target
        squared = error.square().sum()
        revive = -error if state.settings.aux and bool(state.dead.any()) else None
        g = error.mul_(2 / n)
        dz = gather_dot(indices, g, self.W_dec).mul_(codes.active)
        found = {
            "W_enc": scatter_outer(indices, dz, x, m),
            "b_enc": z.new_zeros(m).index_add_(0, indices.reshape(-1), dz.reshape(-1)),
            "W_dec": scatter_outer(indices, z, g, m),
            "b_dec": g.sum(0),
        }
        if self.centred:
            found["b_dec"] -= found["b_enc"] @ self.W_enc
        loss, parts = squared / n, {}
        if revive is not None:
            auxiliary = self._auxiliary_gradients(batch, revive, state, found)
            loss, parts = loss + state.settings.aux * auxiliary, {"aux": float(auxiliary)}
        return Objective(loss, squared, codes, parts), found if _free(state) else self.constrain(found)

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
        self, batch: Batch, error: Tensor, state: TrainState, found: dict[str, Tensor]
    ) -> Tensor:
        """Add the auxiliary loss's gradients to `found` and return the loss; dense in dead features only."""
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
        leaves = [W_enc, b_enc, W_dec] + ([b_dec] if self.centred else [])
        parts = torch.autograd.grad(state.settings.aux * loss, leaves)
        for name, part in zip(("W_enc", "b_enc", "W_dec"), parts[:3], strict=True):
            found[name].index_add_(0, dead, part)
        if self.centred:
            found["b_dec"] += parts[3]
        return loss.detach()


def _free(state: TrainState) -> bool:
    return state.settings.decoder_norm == "free"
