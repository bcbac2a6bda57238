"""How much of one text is in another: ROUGE-1 and ROUGE-L, and where two token sequences part.

ROUGE (Lin 2004) counts words (lower case, letters and digits): the F-score of shared words, or of the longest
common subsequence. Both lie between 0 (nothing shared) and 1 (the same words, for L in the same order).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.lower())


def rouge_1(text: str, reference: str) -> float:
    """Return the F-score of shared words; 1 if both are empty."""
    a, b = words(text), words(reference)
    return _f_score(sum((Counter(a) & Counter(b)).values()), len(a), len(b))


def rouge_l(text: str, reference: str) -> float:
    """Return the F-score of the longest common subsequence of words; 1 if both are empty."""
    a, b = words(text), words(reference)
    return _f_score(longest_common(a, b), len(a), len(b))


def longest_common(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            kept = row[j]
            row[j] = before + 1 if x == y else max(row[j], row[j - 1])
            before = kept
    return row[-1]


def shared_start(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the share of `b`'s tokens before the first that `a` has otherwise; 1 if b is empty."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same / len(b) if len(b) else 1.0


def _f_score(shared: int, a: int, b: int) -> float:
    if not a and not b:
        return 1.0
    return 2 * shared / (a + b)
