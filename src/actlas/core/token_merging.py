"""Blocks of a vision transformer that go on with fewer tokens: matching, merging, and the block itself.

Tokens alternate between two sets, A (even) and B (odd). Every A token is matched with the B token whose key,
averaged over heads, is most similar; the r best matches are merged, weighted by the number of patches that a
token stands for (its size s):

    m_b = (s_b x_b + sum_a s_a x_a) / (s_b + sum_a s_a)

Attention counts a token as often as it stands for patches: log s is added to the logits of its key. The class
token is never merged. Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461).

`SlimBlock` is a ViT block with a reduction between attention and MLP, where the released codes of ToMe and
PYRA have it. It shares the submodules of the block whose place it takes, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find, join
from actlas.core.swap import SwapModule

if TYPE_CHECKING:
    from actlas.core.installation import Installation
    from actlas.core.model import Model

#: (tokens to be merged away, their targets), both size-weighted `[batch, r, d]` -> the former, changed.
Modulate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Matching:
    """Which tokens of A are merged into which of B.

    Attributes:
        source: places in A, int64 `[batch, r]`.
        target: their partners' places in B, int64 `[batch, r]`.
        rest: the other places in A, sorted, int64 `[batch, n_A - r]`.
    """

    source: Tensor
    target: Tensor
    rest: Tensor


def match_tokens(metric: Tensor, r: int, protected: int = 1) -> Matching:
    """Match tokens by the cosine of their metric.

    Args:
        metric: `[batch, tokens, d]`, e.g. keys averaged over heads.
        r: how many tokens go.
        protected: leading tokens that are not merged (the class token).

    Raises:
        InputError: more tokens should go than half of the unprotected ones.
    """
    tokens = metric.shape[1]
    if not 0 <= r <= (tokens - protected) // 2:
        raise InputError(
            f"{r} of {tokens} tokens cannot be merged away; at most half of the unprotected ones can, "
            f"{(tokens - protected) // 2}"
        )
    unit = F.normalize(metric, dim=-1)
    a, b = unit[:, ::2], unit[:, 1::2]
    similarity = a @ b.transpose(1, 2)
    similarity[:, : (protected + 1) // 2] = -torch.inf
    similarity[:, :, : protected // 2] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    source = order[:, :r]
    return Matching(source, partner.gather(1, source), order[:, r:].sort(-1).values)


def merge_matched(
    x: Tensor, size: Tensor, matching: Matching, modulate: Modulate | None = None
) -> tuple[Tensor, Tensor]:
    """Merge matched tokens; return tokens `[batch, tokens - r, d]` and their sizes `[batch, tokens - r, 1]`.

    Args:
        x: tokens `[batch, tokens, d]`.
        size: patches that each stands for, `[batch, tokens, 1]`.
        matching: from `match_tokens`.
        modulate: changes what is merged away.
    """
    weighted = _parts(x * size, matching, modulate)
    sizes = _parts(size, matching, None)
    return weighted / sizes, sizes


def _parts(x: Tensor, matching: Matching, modulate: Modulate | None) -> Tensor:
    a, b = x[:, ::2], x[:, 1::2]
    source, target = _take(a, matching.source), matching.target
    if modulate is not None:
        source = modulate(source, _take(b, target))
    merged = b.scatter_add(1, target.unsqueeze(-1).expand_as(source), source)
    return torch.cat([_take(a, matching.rest), merged], 1)


def _take(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass
class Tokens:
    """What the blocks of one forward pass hand on.

    Attributes:
        size: patches that each token stands for, `[batch, tokens, 1]`; `None` while it is 1 for all.
        counts: tokens that entered the MLP of each block, for the last pass.
    """

    size: Tensor | None = None
    counts: list[int] | None = None


class SlimBlock(nn.Module):
    """A ViT block that drops or merges tokens between attention and MLP.

    Args:
        block: the block whose place it takes (of transformers' ViT).
        index: its number; block 0 starts a pass.
        r: how many tokens go.
        tokens: shared by the blocks of one model.
        keep_best: drop the tokens to which the class token attends least, instead of merging.
        modulate: see `merge_matched`.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        r: int,
        tokens: Tokens,
        *,
        keep_best: bool = False,
        modulate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.index, self.r, self.keep_best = index, r, keep_best
        self.modulate = modulate
        self.tokens = tokens

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output, `[batch, tokens - r, d]`."""
        tokens = self.tokens
        if self.index == 0:
            tokens.size, tokens.counts = None, []
        attention: Any = self.attention
        x = self.layernorm_before(hidden_states)  # type: ignore[operator]
        q, k, v = (
            p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        bias = None if tokens.size is None else tokens.size.log().transpose(1, 2).unsqueeze(1)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scaling)
        out = attention.o_proj(z.transpose(1, 2).flatten(2))
        x = self.dropout(out) + hidden_states  # type: ignore[operator]
        if self.r:
            x = self._reduce(x, q, k, bias, attention.scaling)
        assert tokens.counts is not None
        tokens.counts.append(x.shape[1])
        y: Tensor = self.dropout(self.mlp(self.layernorm_after(x))) + x  # type: ignore[operator]
        return y

    def _reduce(self, x: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        tokens = self.tokens
        if self.keep_best:
            if self.r > x.shape[1] - 2:
                raise InputError(f"{self.r} of {x.shape[1] - 1} patches cannot be dropped; one must stay")
            logits = q[:, :, :1] @ k.transpose(2, 3) * scale
            seen = logits.softmax(-1).mean(1)[:, 0, 1:]
            kept = seen.topk(x.shape[1] - 1 - self.r).indices.sort(-1).values + 1
            first = torch.zeros_like(kept[:, :1])
            return _take(x, torch.cat([first, kept], 1))
        size = tokens.size if tokens.size is not None else torch.ones_like(x[..., :1])
        matching = match_tokens(k.detach().mean(1), self.r)
        x, tokens.size = merge_matched(x, size, matching, self.modulate)
        return x


def check_schedule(model: Model, schedule: Sequence[int]) -> None:
    """Raise unless a schedule says how many tokens go after each block of a ViT.

    Raises:
        ModelError: the model is no ViT of transformers.
        InputError: a wrong number of blocks, or counts that are no whole numbers of at least 0.
    """
    if model.layout is None or model.layout.family != "vit" or model.tower is None:
        raise ModelError(
            f"{model.name} ({model.kind}) is no ViT of transformers, so its tokens cannot be merged"
        )
    if len(schedule) != model.tower.n_blocks:
        raise InputError(
            f"the schedule has {len(schedule)} entries; {model.name} has {model.tower.n_blocks} blocks"
        )
    for count in schedule:
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise InputError(f"the schedule holds {count!r}; it must hold whole numbers of at least 0")


def install_slim_blocks(
    installation: Installation,
    schedule: Sequence[int],
    *,
    keep_best: bool = False,
    modulate: Sequence[nn.Module | None] | None = None,
) -> Tokens:
    """Swap every block of the installation's model for a `SlimBlock`; return what they share."""
    model = installation.model
    check_schedule(model, schedule)
    assert model.tower is not None
    shared = Tokens()
    for i, r in enumerate(schedule):
        path = join(model.tower.blocks, str(i))
        block = find(model.module, path)
        assert block is not None
        if isinstance(block, SlimBlock):
            raise InputError("this model's tokens are merged or dropped by another edit already")
        made = SlimBlock(
            block, i, r, shared, keep_best=keep_best, modulate=modulate[i] if modulate is not None else None
        )
        installation.swap(SwapModule(path, made))
    return shared


def tokens_per_block(tokens: int, schedule: Sequence[int]) -> list[int]:
    """Return how many tokens enter each block's MLP, for `tokens` at the start."""
    counts = []
    for r in schedule:
        tokens -= r
        counts.append(tokens)
    return counts
