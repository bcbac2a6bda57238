"""Keep transformers short: no bars or advice on the terminal, and its errors quoted in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the block, and put them back after it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException, length: int = 300) -> str:
    """Return an error's first words as one line, for a message that quotes it."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= length else words[: length - 1] + "…"
