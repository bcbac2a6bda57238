"""How much each section of a card may run: the one place where the card's time is planned.

A bare forward pass of a model with 135 million parameters reads about 300 tokens a second on two
cores. The quick card spends about 45,000 token passes on it, that is a little over two minutes; the
full card about ten times as many. Larger models get proportionally less, down to a floor, so that the
plan depends on the model and not on how busy the machine is: the same seed gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from actlas.core.errors import InputError

REFERENCE_PARAMETERS = 135_000_000


@dataclass(frozen=True)
class Budget:
    """What each section may use.

    Attributes:
        task_prompts: prompts of each task, 15 to 50 tokens each.
        text_tokens: tokens for loss by kind of text, over all kinds.
        atlas_tokens: tokens read with every site of the atlas.
        dictionary_tokens: tokens on which the dictionary of the middle layer is fitted.
        feature_tokens: tokens on which its features are named.
        sparsity_tokens: tokens of one pass of the search for PPL-p%.
        sparsity_passes: passes of that search.
        quantize_tokens: tokens of one pass; there is one pass a number format and one without.
        cost_tokens, cost_repeats: size and number of timed passes (six are the fewest whose range
            covers the median with 95%).
        new_tokens: tokens that are decoded for the speed of writing.
        images: images for a classifier.
        pairs: sentence pairs for an encoder.
    """

    quick: bool = True
    task_prompts: int = 64
    text_tokens: int = 6144
    atlas_tokens: int = 1536
    dictionary_tokens: int = 5120
    feature_tokens: int = 4096
    sparsity_tokens: int = 1024
    sparsity_passes: int = 5
    quantize_tokens: int = 1024
    cost_tokens: int = 128
    cost_repeats: int = 6
    new_tokens: int = 12
    images: int = 48
    pairs: int = 48


QUICK = Budget()
FULL = Budget(
    quick=False,
    task_prompts=400,
    text_tokens=65_536,
    atlas_tokens=16_384,
    dictionary_tokens=32_768,
    feature_tokens=32_768,
    sparsity_tokens=8192,
    sparsity_passes=16,
    quantize_tokens=16_384,
    cost_tokens=512,
    cost_repeats=15,
    new_tokens=64,
    images=512,
    pairs=400,
)
_FLOOR = Budget(
    task_prompts=30,
    text_tokens=768,
    atlas_tokens=256,
    dictionary_tokens=1024,
    feature_tokens=512,
    sparsity_tokens=256,
    sparsity_passes=5,
    quantize_tokens=256,
    cost_tokens=64,
    cost_repeats=3,
    new_tokens=6,
    images=16,
    pairs=16,
)


def budget_for(parameters: int, *, quick: bool = True, scale: float = 1.0) -> Budget:
    """Return the budget for a model of this size.

    Args:
        parameters: how many parameters the model has; above 135 million everything shrinks in
            proportion, down to a floor.
        quick: the quick card or the full one.
        scale: multiplies everything (tests use small values).

    Raises:
        InputError: `scale` is not positive.
    """
    if scale <= 0:
        raise InputError(f"scale={scale} leaves nothing to measure; it must be above 0")
    whole = QUICK if quick else FULL
    share = min(1.0, REFERENCE_PARAMETERS / max(parameters, 1))
    sizes = {}
    for field in fields(Budget):
        if field.name == "quick":
            continue
        most, least = getattr(whole, field.name), getattr(_FLOOR, field.name)
        if field.name.endswith(("repeats", "passes")):
            sizes[field.name] = most if scale >= 1 else max(2, round(most * scale))
        else:
            sizes[field.name] = max(8, round(max(most * share, min(most, least)) * scale))
    return Budget(quick=quick, **sizes)
