"""Fewer tokens in a language model's later blocks: drop those with the lowest score, without training.

    with model.edit(PruneTokens({20: 0.1, 24: 0.2}, scores="column_mean")):
        model.generate(prompt)

After block l the `floor(r_l n)` tokens of a prompt of n tokens (in total, since ratios may only grow with
depth) whose score is lowest go no further: later blocks neither compute them nor attend to them. With A the
attention of block l, over heads h, queries i and keys t,

    first_token    score_t = sum_h A[h, t, 0]                      attention that t pays to the first token
    column_mean    score_t = sum_h sum_{i >= t} A[h, i, t] / (n - t)    attention that t receives
    random         drawn;     reversed    minus first_token

The first and the last token always stay. What stays keeps its position, and so do the tokens that are
generated; these are never dropped. Of a dropped token the model's output is what its state was when it was
dropped, so that shapes do not change and a sentence's positions can be compared; compare only positions that
all variants keep.

Source: Shen et al. 2024, "Agile-Quant" (arXiv 2312.05693); `first_token` is the direction of the released
code. In a model whose first token is an attention sink it says that a token attends to nothing in particular.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from torch import Tensor

from actlas.core.edit import Edit, WholeEdit, register_edit
from actlas.core.errors import InputError, ModelError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.sparsity.token_scores import Scores, keep_best, token_scores

if TYPE_CHECKING:
    from actlas.core.installation import Installation


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class PruneTokens(WholeEdit):
    """Drop the lowest-scored prompt tokens from some block on.

    Attributes:
        schedule: block -> share of the prompt's tokens that are gone after it; not falling with depth.
        scores: what is kept.
        seed: of `"random"`.
    """

    whole: ClassVar[str] = "it changes the number of tokens of a whole prompt"
    may_do_nothing: ClassVar[bool] = True

    schedule: Mapping[int, float]
    scores: Scores = "first_token"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scores not in get_args(Scores):
            raise InputError(f"scores is {self.scores!r}; it must be {', '.join(get_args(Scores))}")
        steps = {int(i): float(r) for i, r in sorted(self.schedule.items(), key=lambda step: int(step[0]))}
        if not steps:
            raise InputError("the schedule is empty; give {block: share of tokens that are gone after it}")
        last = 0.0
        for block, ratio in steps.items():
            if not 0 <= ratio < 1:
                raise InputError(f"block {block} is to drop {ratio:g} of the tokens; shares lie in [0, 1)")
            if ratio < last:
                raise InputError(
                    f"the share falls to {ratio:g} at block {block} after {last:g}; tokens do not come back, "
                    "so that shares may not fall with depth"
                )
            last = ratio
        object.__setattr__(self, "schedule", steps)

    def describe(self) -> str:
        steps = ", ".join(f"{r:.0%} after block {i}" for i, r in self.schedule.items())
        return f"PruneTokens by {self.scores}: {steps}"

    def _attach(self, installation: Installation) -> None:
        if any(isinstance(e, PruneTokens) and e is not self for e in installation.edits) or any(
            isinstance(e, PruneTokens) for e in installation.model.installed
        ):
            raise InputError(f"{self.describe()}: tokens are pruned by another edit already; leave one out")
        from actlas.sparsity.token_pruning_run import PruningRun

        PruningRun(self, installation).attach()

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        steps = {str(i): r for i, r in self.schedule.items()}
        return {"schedule": steps, "scores": self.scores, "seed": self.seed}, {}

    @classmethod
    def _rebuild(cls, record: Any, tensors: Any) -> Edit:
        return cls({int(i): r for i, r in record["schedule"].items()}, record["scores"], record["seed"])


def spread(total: float, first: int, last: int) -> dict[int, float]:
    """Return the schedule that drops `total` in equal steps `1 - (1 - total)^(1/m)` after m blocks.

    Args:
        total: share that is gone at the end, in [0, 1).
        first, last: the first and the last block of the schedule.
    """
    if not 0 <= total < 1:
        raise InputError(f"{total:g} of the tokens cannot be dropped; a share lies in [0, 1)")
    if last < first or first < 0:
        raise InputError(f"the schedule goes from block {first} to {last}; it must not end before it begins")
    steps = last - first + 1
    return {first + i: 1 - (1 - total) ** ((i + 1) / steps) for i in range(steps)}


@method(
    "prune-tokens",
    room="sparsity",
    returns="Edit",
    data="none",
    summary="drop the prompt tokens with the lowest score in a language model's later blocks",
    example="actlas fit prune-tokens smollm2 --ratio 0.2 --scores column_mean -o pruned/",
    papers=("agile-quant",),
)
def fit_prune_tokens(
    model: Model,
    *,
    ratio: float = 0.2,
    scores: Scores = "first_token",
    first: int | None = None,
    blocks: int = 1,
    seed: int = 0,
) -> Edit:
    """Return the edit that drops `ratio` of a prompt. Nothing is fitted.

    Args:
        model: a causal language model.
        ratio: share of the tokens that are gone in the end.
        scores: see `PruneTokens`.
        first: block after which pruning begins; default: ten before the end, or half the model.
        blocks: over how many blocks it is spread.
        seed: of `"random"`.

    Raises:
        InputError: a ratio, block or score that does not exist. ModelError: no causal language model.
    """
    if model.n_blocks is None or model.kind != "causal-lm":
        raise ModelError(f"{model.name} ({model.kind}) is no causal language model with known blocks")
    n = model.n_blocks
    start = max(n - 10, n // 2) - 1 if first is None else first
    edit = PruneTokens(spread(ratio, max(start, 0), max(start, 0) + blocks - 1), scores, seed)
    if max(edit.schedule) >= n - 1:
        raise InputError(
            f"the schedule ends at block {max(edit.schedule)}; {model.name} can prune up to {n - 2}"
        )
    return edit.bind(model.fingerprint)


__all__ = ["PruneTokens", "Scores", "fit_prune_tokens", "keep_best", "spread", "token_scores"]
