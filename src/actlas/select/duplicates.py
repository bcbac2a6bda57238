"""Leave near copies out of a ranking: the same words in the same order, give or take a few.

    S(t) = the set of runs of five words of t          near copy:  |S(a) & S(b)| / |S(a) | S(b)| > threshold

A separate step, because a copy is as good as its original in every similarity, and a pool that holds
many fills the choice with them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from actlas.core.errors import InputError

_RUN = 5


def without_duplicates(
    order: Iterable[int], texts: Sequence[str], threshold: float, most: int | None = None
) -> list[int]:
    """Walk through a ranking and keep what is no near copy of something kept before.

    Args:
        order: numbers of texts, the best first.
        texts: all texts.
        threshold: overlap above which two texts are copies, 0 to 1.
        most: stop after so many.

    Raises:
        InputError: a threshold outside 0 to 1.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"the overlap of duplicates is {threshold:g}; it must lie between 0 and 1")
    kept: list[int] = []
    sizes: dict[int, int] = {}
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in order:
        if most is not None and len(kept) >= most:
            break
        own = runs(texts[i])
        common = Counter(j for run in own for j in holders[run])
        if any(n / (len(own) + sizes[j] - n) > threshold for j, n in common.items()):
            continue
        kept.append(i)
        sizes[i] = len(own)
        for run in own:
            holders[run].append(i)
    return kept


def runs(text: str) -> set[tuple[str, ...]]:
    """Return the runs of five words of a text (all of its words, if there are fewer)."""
    words = text.casefold().split()
    return {tuple(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))}
