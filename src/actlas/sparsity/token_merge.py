"""Fewer tokens for a vision transformer, without training: merging (ToMe) and pruning.

    with model.edit(TokenMerge((8, 8, 8, 8))):           # after each of four blocks, eight tokens fewer
        model.logits(images)

`TokenMerge` merges the most similar tokens, `TokenPrune` drops those to which the class token attends least
(averaged over heads). Both act between attention and MLP of each block; `actlas.core.token_merging` has the
equations. `even_schedule` gives the same number to every block.

Sources: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461); for pruning by the class
token's attention Liang et al. 2022, "EViT" (arXiv 2202.07800), here without its fused token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from actlas.core.edit import Edit, WholeEdit, register_edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.token_merging import check_schedule, install_slim_blocks

if TYPE_CHECKING:
    from actlas.core.installation import Installation


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class TokenMerge(WholeEdit):
    """Merge the most similar tokens.

    Attributes:
        schedule: how many tokens go after each block's attention; one entry a block.
    """

    whole: ClassVar[str] = "it changes the number of tokens of all images"

    schedule: tuple[int, ...]
    #: Whether tokens are dropped instead of merged.
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", tuple(self.schedule))

    def describe(self) -> str:
        return f"{type(self).__name__} of {sum(self.schedule)} tokens over {len(self.schedule)} blocks"

    def _attach(self, installation: Installation) -> None:
        install_slim_blocks(installation, self.schedule, keep_best=self.drops)

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"schedule": list(self.schedule)}, {}

    @classmethod
    def _rebuild(cls, record: Any, tensors: Any) -> Edit:
        return cls(tuple(record["schedule"]))


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class TokenPrune(TokenMerge):
    """Drop the tokens to which the class token attends least.

    Attributes:
        schedule: how many tokens go after each block's attention; one entry a block.
    """

    drops: ClassVar[bool] = True


def even_schedule(model: Model, tokens: int) -> tuple[int, ...]:
    """Return the schedule that takes `tokens` away in equal steps, one for each block (the rest early).

    Raises:
        InputError: fewer than 0.
    """
    blocks = model.n_blocks or 1
    if tokens < 0:
        raise InputError(f"tokens is {tokens}; it must be at least 0")
    return tuple(tokens // blocks + (i < tokens % blocks) for i in range(blocks))


@method(
    "token-merge",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="merge the most similar tokens of a vision transformer, block by block (ToMe)",
    example="actlas fit token-merge google/vit-base-patch16-224 --option tokens=96 -o merged/",
    papers=("pyra",),
)
def fit_token_merge(model: Model, *, tokens: int) -> Edit:
    """Return the edit that merges `tokens` tokens away in equal steps. Nothing is fitted.

    Raises:
        ModelError: no ViT.
        InputError: fewer than 0 tokens.
    """
    return _checked(model, TokenMerge(even_schedule(model, tokens)))


@method(
    "token-prune",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="drop the tokens of a vision transformer to which the class token attends least",
    example="actlas fit token-prune google/vit-base-patch16-224 --option tokens=96 -o pruned/",
)
def fit_token_prune(model: Model, *, tokens: int) -> Edit:
    """Return the edit that drops `tokens` tokens in equal steps. Nothing is fitted.

    Raises:
        ModelError: no ViT.
        InputError: fewer than 0 tokens.
    """
    return _checked(model, TokenPrune(even_schedule(model, tokens)))


def _checked(model: Model, edit: TokenMerge) -> Edit:
    check_schedule(model, edit.schedule)
    return edit.bind(model.fingerprint)
