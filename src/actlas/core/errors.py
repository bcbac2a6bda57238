"""The one error family of Actlas.

Every error that a user can cause is an `ActlasError` whose message is one line: what was wrong,
with which value, and what would be right. The command line prints that line and exits with status
2 for `InputError` (the user's input was bad) and 1 for `FailureError` (the input was fine, the
work could not be finished).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ActlasError(Exception):
    """Base of all errors that Actlas raises on purpose."""

    exit_status = 1


class InputError(ActlasError, ValueError):
    """Something the user gave is wrong: a name, a shape, a file, a value."""

    exit_status = 2


class SiteError(InputError):
    """A site name that this model has not got, or that cannot be read or edited here."""


class ShapeError(InputError):
    """A tensor of the wrong shape or dtype."""


class ArtifactError(InputError):
    """A file or folder that is not a whole, untampered Actlas artifact."""


class FingerprintError(ArtifactError):
    """An artifact that was made for another model."""


class ModelError(InputError):
    """A model that is unknown, unreachable or unfit for what was asked."""


class NonFiniteError(InputError):
    """NaN or infinity where a finite activation is needed."""


class FailureError(ActlasError):
    """The input was fine, but the work could not be finished (disk full, download failed, ...)."""


def did_you_mean(wrong: str, valid: Iterable[str], most: int = 3) -> str:
    """Return `"; did you mean a, b or c?"` for the nearest valid names, or an empty string.

    Args:
        wrong: the name that was not found.
        valid: the names that exist.
        most: how many to offer.
    """
    names = difflib.get_close_matches(wrong, list(valid), n=most, cutoff=0.5)
    if not names:
        return ""
    said = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]
    return f"; did you mean {said}?"
