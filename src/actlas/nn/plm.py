"""PLM: a small language model for devices at the edge, of latent attention and squared-ReLU MLPs.

    model = PLM(PLMConfig(vocab=256, d=96, layers=3, heads=4, hidden=576, rank=48, nope=16, rope=8, v_dim=16))
    out = model(input_ids=ids, labels=ids)           # .loss, .logits

    h = h + MLA(RMSNorm(h));   h = h + W_down relu(W_up RMSNorm(h))^2

`PLMConfig()` is the published 1.8B: 32 layers, d 2048, 16 heads, 8192 neurons, a cache of 576 numbers a token
and layer (4,096 with ordinary attention of 16 heads of 128). The defaults of layers and width are from the
model's llama.cpp port, not from the paper's text. Train it with `training.schedules.WSDC`.

Source: PLM 2025, "PLM: Efficient Peripheral Language Models Hardware-Co-Designed for Ubiquitous Computing"
(arXiv 2503.12167).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError
from actlas.nn.mla import LatentCache, MLAttention
from actlas.nn.squared_relu import ReLU2MLP


@dataclass(frozen=True)
class PLMConfig:
    """Sizes of a PLM."""

    vocab: int = 151_936
    d: int = 2048
    layers: int = 32
    heads: int = 16
    hidden: int = 8192
    rank: int = 512
    nope: int = 128
    rope: int = 64
    v_dim: int = 128
    theta: float = 100_000.0
    eps: float = 1e-6

    @property
    def parameters(self) -> int:
        """How many parameters such a model has; embeddings are tied."""
        attention = self.d * (self.heads * (self.nope + self.rope) + self.rank + self.rope)
        attention += self.rank * self.heads * (self.nope + self.v_dim) + self.rank
        attention += self.heads * self.v_dim * self.d
        return self.layers * (attention + 2 * self.d * self.hidden + 2 * self.d) + (self.vocab + 1) * self.d

    @property
    def cache_numbers(self) -> int:
        """Numbers cached for a token and layer."""
        return self.rank + self.rope


@dataclass
class PLMOutput:
    """What a forward pass gives."""

    logits: Tensor
    loss: Tensor | None = None
    caches: list[LatentCache] | None = None


class PLMBlock(nn.Module):
    """One block: latent attention and a squared-ReLU MLP, each after an RMSNorm."""

    def __init__(self, config: PLMConfig) -> None:
        super().__init__()
        c = config
        self.input_layernorm = nn.RMSNorm(c.d, eps=c.eps)
        self.self_attn = MLAttention(
            c.d, c.heads, rank=c.rank, nope=c.nope, rope=c.rope, v_dim=c.v_dim, theta=c.theta, eps=c.eps
        )
        self.post_attention_layernorm = nn.RMSNorm(c.d, eps=c.eps)
        self.mlp = ReLU2MLP(c.d, c.hidden)

    def forward(self, x: Tensor, cache: LatentCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, mask)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class PLM(nn.Module):
    """A PLM with tied embeddings, started with normal weights of standard deviation 0.02."""

    def __init__(self, config: PLMConfig) -> None:
        super().__init__()
        if min(config.vocab, config.layers) < 1:
            raise InputError(f"vocab={config.vocab}, layers={config.layers}: both must be at least 1")
        self.sizes = config
        self.embed_tokens = nn.Embedding(config.vocab, config.d)
        self.layers = nn.ModuleList(PLMBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d, eps=config.eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        caches: list[LatentCache] | None = None,
        **_: Any,
    ) -> PLMOutput:
        """Run the model.

        Args:
            input_ids: `[batch, pos]`.
            attention_mask: which tokens are real, `[batch, all positions]`.
            labels: token ids to predict, shifted inside; -100 is left out.
            caches: one a layer (`new_caches()`), for decoding.
        """
        x = self.embed_tokens(input_ids)
        for i, block in enumerate(self.layers):
            x = block(x, None if caches is None else caches[i], attention_mask)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return PLMOutput(logits, loss, caches)

    def new_caches(self) -> list[LatentCache]:
        """Return empty caches."""
        return [LatentCache() for _ in self.layers]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, new: int) -> Tensor:
        """Return greedy continuations, `[batch, pos + new]`; prompts of equal length."""
        caches, ids, step = self.new_caches(), input_ids, input_ids
        for _ in range(new):
            step = self(step, caches=caches).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], 1)
        return ids
