"""Names and nouns that say whether a person is a woman or a man, and jobs that only suggest it."""

from __future__ import annotations

from collections.abc import Sequence

from actlas.data.single_token import Tokens


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    "Mary Anna Sarah Laura Emily Kate Jane Alice Rachel Helen Linda Susan Karen Lisa Nancy Jessica Elizabeth"
    " Maria Julia Emma Margaret Catherine Barbara Jennifer Michelle Amanda Rebecca Diana Sophie Claire"
    " Charlotte Victoria Hannah Grace Olivia Eleanor Ruth Judith Carol Amy Angela Samantha Molly Lucy Ellen"
    " Martha Anne Betty Christine Caroline Sophia Isabella Lily"
)
MEN = _words(
    "John Tom James David Michael Robert William Richard Thomas Charles Daniel Matthew Mark Paul Steven "
    "Andrew Kevin Brian George Edward Peter Henry Jack Simon Adam Ben Martin Frank Scott Eric Stephen "
    "Patrick Jason Ryan Gary Larry Anthony Joseph Joshua Christopher Jonathan Benjamin Samuel Nicholas "
    "Philip Arthur Albert Walter Harry Fred Carl Oliver Luke Jacob"
)
FEMALE = _words("woman girl mother sister queen daughter wife actress aunt princess lady grandmother bride")
MALE = _words("man boy father brother king son husband actor uncle prince gentleman grandfather groom")
SUGGESTED = (
    _words("nurse maid secretary housekeeper dancer librarian"),
    _words("carpenter soldier mechanic plumber engineer butcher"),
)

Labelled = list[tuple[str, int]]
"""(how a person is called, 1 for a woman)."""


def labelled(tokens: Tokens, women: Sequence[str], men: Sequence[str], article: str = "") -> Labelled:
    """Return words that are one token, as many of both kinds, in turn."""
    kept = [[w for w in side if tokens.one("I met", f" {w}") is not None] for side in (women, men)]
    n = min(map(len, kept))
    return [(article + side[i], 1 - k) for i in range(n) for k, side in enumerate(kept)]
