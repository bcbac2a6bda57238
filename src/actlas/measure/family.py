"""Register several measures that come out of one function.

    register_family(cost, [Member("parameters", "elements of all parameters", "count"), ...], data="none")

Each member becomes a measure of its own (it calls the shared function and keeps the measurements of
its name); the runner calls the shared function once for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from actlas.core.measurement import Measurement
from actlas.measure.registry import DataKind, measure


class Member(NamedTuple):
    """One measure of a family: what `measure()` wants to know about it.

    `alone` are options with which the shared function does no more than this member needs.
    """

    name: str
    summary: str
    unit: str
    alone: Mapping[str, Any] | None = None
    needs: tuple[str, ...] | None = None


def register_family(
    together: Callable[..., list[Measurement]],
    members: Sequence[Member],
    *,
    needs: tuple[str, ...] = ("any",),
    data: DataKind = "corpus",
    quick: Mapping[str, Any] | None = None,
    source: str = "",
) -> None:
    """Register every member; arguments as of `actlas.measure.registry.measure`.

    Args:
        together: returns the measurements of all members from one pass.
        members: the names that `together` returns, with their summaries and units; a member's
            `needs` overrides the family's.
    """
    for member in members:
        register = measure(
            member.name,
            summary=member.summary,
            unit=member.unit,
            needs=member.needs or needs,
            data=data,
            quick=quick,
            source=source,
            together=together,
        )
        register(_single(together, member))


def _single(together: Callable[..., list[Measurement]], member: Member) -> Callable[..., list[Measurement]]:
    @functools.wraps(together)
    def single(*args: Any, **kwargs: Any) -> list[Measurement]:
        options = {**(member.alone or {}), **kwargs}
        return [m for m in together(*args, **options) if m.name == member.name]

    single.__qualname__ = f"{together.__qualname__}[{member.name}]"
    return single
