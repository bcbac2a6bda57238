"""The one progress line: what is being done, how far it is, and how long it will still take.

    with progress("perplexity", total=len(batches)) as advance:
        for batch in batches:
            ...
            advance()

Nothing is shown for work that ends within two seconds, when standard error is not a terminal and
`ACTLAS_PROGRESS` is not set, or when `ACTLAS_PROGRESS=0`. Output goes to standard error, so that
`--json` keeps standard output clean.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]
_DELAY = 2.0
_EVERY = 0.5
_depth = 0


def _wanted() -> bool:
    setting = os.environ.get("ACTLAS_PROGRESS")
    return sys.stderr.isatty() if setting is None else setting not in ("0", "")


def format_seconds(seconds: float) -> str:
    """Return `"42 s"`, `"3 min 10 s"` or `"2 h 5 min"`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"


@contextmanager
def progress(what: str, total: float | None = None, unit: str = "") -> Iterator[Advance]:
    """Yield `advance(amount=1, note="")`; call it after each step of the work.

    Args:
        what: a few words for the person who waits.
        total: how many steps there are, for the estimate; `None` if unknown.
        unit: what is counted, e.g. `"tokens"`.
    """
    global _depth
    start = time.monotonic()
    done, last = 0.0, start + _DELAY - _EVERY
    shown = False
    wanted = _wanted()
    live = wanted and sys.stderr.isatty()
    _depth += 1

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal done, last, shown
        done += amount
        now = time.monotonic()
        if not wanted or now - last < (_EVERY if live else 10 * _EVERY) or (_depth > 1 and not live):
            return
        last = now
        spent = now - start
        line = f"{what}: "
        if total:
            left = spent / max(done, 1e-9) * max(total - done, 0)
            line += f"{min(done / total, 1):4.0%} ({done:,.0f} of {total:,.0f} {unit}".rstrip() + ")"
            line += f", {format_seconds(left)} left"
        else:
            line += f"{done:,.0f} {unit}".rstrip() + f", {format_seconds(spent)}"
        if note:
            line += f" - {note}"
        sys.stderr.write(f"\r\x1b[2K{line[:200]}" if live else line + "\n")
        sys.stderr.flush()
        shown = True

    try:
        yield advance
    finally:
        _depth -= 1
        if shown and live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
