"""SpecKV: a draft model looks ahead, and the target keeps the keys and values that its answer will need.

SnapKV lets the prompt's last w tokens vote on what stays. SpecKV puts the draft's greedy answer of L tokens
behind the prompt, so that the (guessed) answer votes too:

    s_j = pool_j( max_{g, r} A[g, r, j] ),   rows r: w prompt tokens, L draft tokens; j < n - w

and the C - w best positions of every key-value head stay with the window. The draft's tokens leave the cache
before the target answers. A draft needs the target's tokenizer; an edit of the target (layers left out,
inputs skipped, coarser weights) makes one without a second checkpoint:

    edit = SpecKV(256, draft=fit_layer_skip(model, corpus, budget=6), lookahead_tokens=16)

Source: Galim et al. 2025, "Draft-based Approximate Inference for LLMs", section 4 (arXiv 2506.08373) and its
released code (speckv/), whose defaults these are. Ours: the first token comes from the full prompt, as in
SnapKV, where the released code reads the last prompt token again with the cut cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actlas.core.edit import Edit, register_edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.sparsity.kv_policy import check_sizes
from actlas.sparsity.kv_rules import Reduce, SnapKV


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SpecKV(SnapKV):
    """Keep what the prompt's last tokens and a draft's answer attend to.

    Attributes:
        draft: a model with the same tokenizer, or an edit that makes one of the target; `None`: the target
            itself (an oracle for greedy answers).
        lookahead: tokens that the draft writes; as many as the answer will have is best.
    """

    draft: Model | Edit | None = None
    lookahead_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(lookahead_tokens=self.lookahead_tokens)

    def lookahead(self, draft: Model | None, ids: Tensor) -> Tensor | None:
        assert draft is not None
        return look_ahead(draft, ids, self.lookahead_tokens)

    def describe(self) -> str:
        return (
            f"SpecKV of {self.capacity} positions, {_named(self.draft)}, {self.lookahead_tokens} tokens ahead"
        )


def look_ahead(draft: Model, ids: Tensor, tokens: int) -> Tensor:
    """Return the draft's greedy continuation of one prompt, int64 `[1, at most tokens]`.

    Raises:
        InputError: several prompts at once.
    """
    if ids.shape[0] != 1:
        raise InputError(f"a draft looks ahead for one prompt at a time, not {ids.shape[0]}")
    given = {"input_ids": ids.to(draft.device), "attention_mask": torch.ones_like(ids)}
    return draft.generate(given, max_new_tokens=tokens).sequences[:, ids.shape[1] :]


def read_draft(draft: Model | Edit | str | None) -> Model | Edit | None:
    """Return a draft as given, or the saved edit at a path (for the command line)."""
    return (Edit.load(draft) if draft else None) if isinstance(draft, str) else draft


def _named(draft: Model | Edit | None) -> str:
    if draft is None:
        return "the target as its draft"
    return f"draft {draft.name}" if isinstance(draft, Model) else f"draft by {draft.describe()}"


@method(
    "spec-kv",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="keep the keys and values that a draft's answer attends to",
    example="actlas fit spec-kv smollm2 --option capacity=256 --option draft=shallow/ -o spec/",
    papers=("draft-approx",),
)
def fit_spec_kv(
    model: Model,
    *,
    draft: Model | Edit | str | None = None,
    capacity: int = 256,
    window: int = 32,
    kernel: int = 7,
    reduce: Reduce = "max",
    lookahead_tokens: int = 16,
) -> SpecKV:
    """Return the policy, bound to the model; nothing is fitted.

    Args:
        model: the target.
        draft: a model, an edit of the target, or the folder of a saved edit.
        capacity, window, kernel, reduce, lookahead_tokens: see `SpecKV` and `SnapKV`.

    Raises:
        InputError: sizes that do not fit together.
    """
    made = SpecKV(capacity, window, kernel, reduce, read_draft(draft), lookahead_tokens)
    return made.bind(model.fingerprint)  # type: ignore[return-value]
