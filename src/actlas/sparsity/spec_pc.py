"""SpecPC: the attention of a draft model decides which tokens of a prompt the target reads at all.

    score_j = pool_j( max_{layers >= l0, heads, r < W} (r / (W - 1)) A[r, j] )

where A are the attention rows of the prompt's last W tokens in the draft (and, unweighted, of the tokens that
it wrote). The best positions are taken with their neighbours, nearest first, until C positions are chosen;
the last W are always among them. The target reads the chosen tokens as a fresh prompt, at places 0 to C - 1.

`SpecKVPC` compresses the prompt first and the cache after it: the draft's answer, written for the whole
prompt, stands behind the compressed one, and SpecKV cuts the cache as in `spec_kv.py`.

Source: Galim et al. 2025, "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373), section 5 and the
released code (specpc/), whose defaults these are.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edit import Edit, register_edit
from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.sparsity.kv_policy import KeptLayer, KVPolicy, check_sizes
from actlas.sparsity.spec_kv import SpecKV, _named, look_ahead, read_draft


@dataclass(frozen=True)
class Selector:
    """How SpecPC scores and chooses; see the module docstring.

    Attributes:
        capacity: tokens that are chosen.
        window: W, last tokens that vote and are always chosen.
        pool: width of the max-pool over positions.
        neighbors: how many positions around a chosen one are chosen with it (itself included).
        skip_layers: first layers of the draft that have no vote.
    """

    capacity: int = 1024
    window: int = 64
    pool: int = 64
    neighbors: int = 64
    skip_layers: int = 8

    def __post_init__(self) -> None:
        check_sizes(
            capacity=self.capacity,
            window=self.window,
            pool=self.pool,
            neighbors=self.neighbors,
            skip_layers=self.skip_layers,
        )
        if self.window > self.capacity:
            raise InputError(f"window is {self.window}; it must not be above the capacity, {self.capacity}")

    def scores(self, draft: Model, ids: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Return the score of every prompt token before pooling, float32 `[n]`.

        Args:
            draft: whose attention is read.
            ids: one prompt `[1, n]`.
            ahead: tokens behind it whose attention votes too, `[1, m]`.

        Raises:
            InputError: several prompts, or more skipped layers than the draft has.
        """
        layers = draft.n_blocks or 0
        if self.skip_layers >= layers:
            raise InputError(
                f"skip_layers is {self.skip_layers}, and the draft has {layers} layers; some must vote"
            )
        if ids.shape[0] != 1:
            raise InputError(f"a prompt is compressed alone, not with {ids.shape[0] - 1} others")
        n, m = ids.shape[1], 0 if ahead is None else ahead.shape[1]
        rows = min(self.window, n)
        weight = torch.cat([torch.linspace(0, 1, rows), torch.ones(m)]) if rows > 1 else torch.ones(rows + m)
        best = torch.zeros(n, device=draft.device)

        def read(pattern: Tensor) -> Tensor:
            part = pattern[0, :, -(rows + m) :, :n].float() * weight.to(pattern.device)[:, None]
            torch.maximum(best, part.amax((0, 1)), out=best)
            return pattern

        whole = ids if ahead is None else torch.cat([ids, ahead.to(ids)], 1)
        with ExitStack() as stack:
            for site in draft.resolve([f"blocks.{i}.attn.pattern" for i in range(self.skip_layers, layers)]):
                stack.callback(attach(draft.module, site, read, last_rows=rows + m).remove)
            draft.forward({"input_ids": whole.to(draft.device)})
        return best

    def choose(self, scores: Tensor) -> Tensor:
        """Return the chosen positions, sorted, int64 `[capacity]`; all of a prompt that fits."""
        n = scores.shape[0]
        if n <= self.capacity:
            return torch.arange(n)
        # Scores are not negative, so that -inf at the borders is as good as zero.
        pooled = F.max_pool1d(scores[None, None], self.pool, 1, self.pool // 2)[0, 0, :n].cpu()
        reach = sorted(range(-(self.neighbors // 2), self.neighbors - self.neighbors // 2), key=abs)
        chosen = dict.fromkeys(range(n - self.window, n))
        for centre in pooled.argsort(dim=-1, descending=True, stable=True).tolist():
            for place in (centre + step for step in reach):
                if len(chosen) >= self.capacity:
                    return torch.tensor(sorted(chosen))
                if 0 <= place < n:
                    chosen.setdefault(place)
        return torch.tensor(sorted(chosen))


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SpecPC(KVPolicy):
    """Let the target read only the tokens of a prompt that a draft attends to.

    Attributes:
        capacity: tokens that are read.
        draft: as in `SpecKV`.
        window, pool, neighbors, skip_layers: see `Selector`.
        lookahead_tokens: tokens that the draft writes; 1 (the default) reads its prompt alone.
    """

    capacity: int = 1024
    draft: Model | Edit | None = None
    window: int = 64
    pool: int = 64
    neighbors: int = 64
    skip_layers: int = 8
    lookahead_tokens: int = 1

    def __post_init__(self) -> None:
        check_sizes(lookahead_tokens=self.lookahead_tokens)
        self.selector  # noqa: B018  (checks the sizes)

    @property
    def selector(self) -> Selector:
        """The rule."""
        return Selector(self.capacity, self.window, self.pool, self.neighbors, self.skip_layers)

    @property
    def evicts(self) -> bool:
        return False

    def rows(self, length: int, ahead: int) -> int:
        return 0

    def choose(self, layer: KeptLayer, pattern: Tensor | None, length: int) -> Tensor:
        return torch.arange(length).expand(*layer.positions.shape[:2], -1)

    def lookahead(self, draft: Model | None, ids: Tensor) -> Tensor | None:
        assert draft is not None
        return look_ahead(draft, ids, self.lookahead_tokens) if self.lookahead_tokens > 1 else None

    def select(self, draft: Model | None, ids: Tensor, ahead: Tensor | None) -> Tensor | None:
        assert draft is not None
        return self.selector.choose(self.selector.scores(draft, ids, ahead))

    def describe(self) -> str:
        return f"SpecPC to {self.capacity} tokens, {_named(self.draft)}"


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SpecKVPC(SpecKV):
    """Compress the prompt, then the cache, with one draft.

    Attributes:
        capacity, window, kernel, reduce, draft, lookahead_tokens: of the cache; see `SpecKV`.
        prompt_capacity: tokens of the prompt that are read.
        prompt_window, pool, neighbors, skip_layers: see `Selector`.
    """

    prompt_capacity: int = 2048
    prompt_window: int = 64
    pool: int = 64
    neighbors: int = 64
    skip_layers: int = 8
    lookahead_tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.selector  # noqa: B018  (checks the sizes)

    @property
    def selector(self) -> Selector:
        """The rule that compresses the prompt."""
        return Selector(self.prompt_capacity, self.prompt_window, self.pool, self.neighbors, self.skip_layers)

    def select(self, draft: Model | None, ids: Tensor, ahead: Tensor | None) -> Tensor | None:
        if ids.shape[1] <= self.prompt_capacity:
            return None
        assert draft is not None
        return self.selector.choose(self.selector.scores(draft, ids, ahead))

    def limit(self, length: int) -> int:
        return min(self.capacity, self.prompt_capacity)

    def describe(self) -> str:
        return (
            f"SpecKV-PC to {self.prompt_capacity} tokens and {self.capacity} positions, {_named(self.draft)}"
        )


@method(
    "spec-pc",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="read only those tokens of a prompt that a draft attends to",
    example="actlas fit spec-pc smollm2 --option capacity=512 --option draft=shallow/ -o short/",
    papers=("draft-approx",),
)
def fit_spec_pc(
    model: Model,
    *,
    draft: Model | Edit | str | None = None,
    capacity: int = 1024,
    window: int = 64,
    pool: int = 64,
    neighbors: int = 64,
    skip_layers: int = 8,
    lookahead_tokens: int = 1,
) -> SpecPC:
    """Return the policy, bound to the model; see `SpecPC` for the options. Nothing is fitted."""
    made = SpecPC(capacity, read_draft(draft), window, pool, neighbors, skip_layers, lookahead_tokens)
    return made.bind(model.fingerprint)  # type: ignore[return-value]


@method(
    "spec-kv-pc",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="compress a prompt and then its cache, by the attention of a draft",
    example="actlas fit spec-kv-pc smollm2 --option capacity=256 --option draft=shallow/ -o both/",
    papers=("draft-approx",),
)
def fit_spec_kv_pc(
    model: Model,
    *,
    draft: Model | Edit | str | None = None,
    capacity: int = 256,
    window: int = 32,
    lookahead_tokens: int = 8,
    prompt_capacity: int = 2048,
    prompt_window: int = 64,
    pool: int = 64,
    neighbors: int = 64,
    skip_layers: int = 8,
) -> SpecKVPC:
    """Return the policy, bound to the model; see `SpecKVPC` for the options. Nothing is fitted."""
    made = SpecKVPC(
        capacity,
        window,
        draft=read_draft(draft),
        lookahead_tokens=lookahead_tokens,
        prompt_capacity=prompt_capacity,
        prompt_window=prompt_window,
        pool=pool,
        neighbors=neighbors,
        skip_layers=skip_layers,
    )
    return made.bind(model.fingerprint)  # type: ignore[return-value]
