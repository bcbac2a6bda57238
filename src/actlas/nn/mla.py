"""Multi-head latent attention (MLA): keys and values of all heads from one small vector per token.

    c   = RMSNorm(W_dkv x)                 [rank]            what is cached, with
    k_r = RoPE(W_kr x)                     [rope]            one for all heads
    q_h = (W_q x)_h = [q_n, RoPE(q_r)]     [nope + rope]
    k_h = [W_uk_h c, k_r],   v_h = W_uv_h c
    score = (q_n . W_uk_h c + q_r . k_r) / sqrt(nope + rope)

The cache holds rank + rope numbers a token and layer, whatever the number of heads. For decoding, the
*absorbed* form never makes keys and values: since q_n . (W_uk c) = (W_uk^T q_n) . c and sum_j a_j W_uv c_j =
    W_uv sum_j a_j c_j,
attention runs on the latents c themselves. Both forms are the same function; the absorbed one costs heads x
rank instead of heads x nope a pair of tokens, and no up-projection of the past.

There is no compression of queries (as in PLM and DeepSeek-V2-Lite). Rotary pairs are halves (as in Llama).

Sources: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1; PLM 2025 (arXiv 2503.12167).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError

Absorb = Literal["auto", "always", "never"]


class LatentCache:
    """What MLA keeps of past tokens: latents `[batch, pos, rank]` and rotated keys `[batch, pos, rope]`."""

    def __init__(self) -> None:
        self.latent: Tensor | None = None
        self.key: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.latent is None else self.latent.shape[1]

    def append(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; return all of them."""
        self.latent = latent if self.latent is None else torch.cat([self.latent, latent], 1)
        self.key = key if self.key is None else torch.cat([self.key, key], 1)
        return self.latent, self.key

    @property
    def numbers(self) -> int:
        """How many numbers are held for each sequence."""
        return (
            0
            if self.latent is None or self.key is None
            else len(self) * (self.latent.shape[-1] + self.key.shape[-1])
        )


class MLAttention(nn.Module):
    """Causal multi-head latent attention.

    Args:
        d: channels of the residual stream.
        heads: number of heads.
        rank: of the latent c.
        nope: channels of a head's query and key without position.
        rope: channels with it; even.
        v_dim: channels of a head's value.
        absorb: `"auto"` absorbs where one token is decoded on a cache.
        theta: base of the rotary frequencies.
        eps: of the RMSNorm on c.

    Raises:
        InputError: sizes that are not positive, an odd `rope`, an unknown `absorb`.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        *,
        rank: int = 512,
        nope: int = 128,
        rope: int = 64,
        v_dim: int = 128,
        absorb: Absorb = "auto",
        theta: float = 10_000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = {"d": d, "heads": heads, "rank": rank, "nope": nope, "rope": rope, "v_dim": v_dim}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if rope % 2:
            raise InputError(f"rope is {rope}; rotary channels come in pairs, so it must be even")
        if absorb not in ("auto", "always", "never"):
            raise InputError(f"absorb is {absorb!r}; it must be 'auto', 'always' or 'never'")
        self.d, self.heads, self.rank, self.nope, self.rope, self.v_dim = d, heads, rank, nope, rope, v_dim
        self.absorb, self.theta = absorb, theta
        self.q_proj = nn.Linear(d, heads * (nope + rope), bias=False)
        self.kv_down = nn.Linear(d, rank + rope, bias=False)
        self.kv_norm = nn.RMSNorm(rank, eps=eps)
        self.k_up = nn.Linear(rank, heads * nope, bias=False)
        self.v_up = nn.Linear(rank, heads * v_dim, bias=False)
        self.o_proj = nn.Linear(heads * v_dim, d, bias=False)

    @property
    def cache_numbers(self) -> int:
        """Numbers cached for each token: rank + rope."""
        return self.rank + self.rope

    def forward(self, x: Tensor, cache: LatentCache | None = None, mask: Tensor | None = None) -> Tensor:
        """Return `[batch, pos, d]`.

        Args:
            x: `[batch, pos, d]`.
            cache: of the tokens before; these are added.
            mask: bool `[batch, all positions]`: which tokens may be attended to (`False`: padding, on the
                right, or on the left without effect on relative positions). Default all.

        Raises:
            ShapeError: `x` of another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.d:
            raise ShapeError(f"MLAttention reads [batch, pos, {self.d}]; it was given {list(x.shape)}")
        batch, new = x.shape[:2]
        past = 0 if cache is None else len(cache)
        positions = torch.arange(past, past + new, device=x.device)
        q = self.q_proj(x).unflatten(-1, (self.heads, self.nope + self.rope)).transpose(1, 2)
        q_n, q_r = q.split([self.nope, self.rope], dim=-1)
        q_r = rotate(q_r, positions, self.theta)
        latent, key = self.kv_down(x).split([self.rank, self.rope], dim=-1)
        latent, key = self.kv_norm(latent), rotate(key, positions, self.theta)
        if cache is not None:
            latent, key = cache.append(latent, key)
        seen = torch.arange(latent.shape[1], device=x.device) <= positions[:, None]
        allowed = seen if mask is None else seen & mask[:, None, None, :].bool()
        absorbed = self.absorb == "always" or (self.absorb == "auto" and past > 0 and new == 1)
        k_up = self.k_up.weight.unflatten(0, (self.heads, self.nope))  # [heads, nope, rank]
        v_up = self.v_up.weight.unflatten(0, (self.heads, self.v_dim))  # [heads, v_dim, rank]
        if absorbed:
            query = torch.einsum("bhtn,hnr->bhtr", q_n, k_up)
            scores = torch.einsum("bhtr,bsr->bhts", query, latent)
        else:
            scores = torch.einsum("bhtn,bhsn->bhts", q_n, torch.einsum("bsr,hnr->bhsn", latent, k_up))
        scores = (scores + torch.einsum("bhtp,bsp->bhts", q_r, key)) / math.sqrt(self.nope + self.rope)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        pattern = F.softmax(scores.float(), dim=-1).to(x.dtype)
        if absorbed:
            z = torch.einsum("bhtr,hvr->bhtv", torch.einsum("bhts,bsr->bhtr", pattern, latent), v_up)
        else:
            z = torch.einsum("bhts,bhsv->bhtv", pattern, torch.einsum("bsr,hvr->bhsv", latent, v_up))
        out: Tensor = self.o_proj(z.transpose(1, 2).reshape(batch, new, -1))
        return out


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Return `x` `[..., pos, channels]` with rotary positions; pairs are (i, i + channels / 2)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions.float()[:, None] * frequencies
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
