"""The registry of card sections: each is a function from a context to a `SectionResult`.

    @section("sparsity", title="Sparsity", order=60, needs=("causal-lm",), cost=3.0)
    def sparsity(context: Context) -> SectionResult: ...

A section imports what it measures with, says for which kinds of model it makes sense, and touches no
other section. Rooms that are added later put a file into `report/sections/` (or call `section` when
they are imported) and the card shows it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from actlas.core.errors import InputError, did_you_mean
from actlas.report.content import SectionResult

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.report.budget import Budget
    from actlas.report.fill import Fill

T = TypeVar("T")


@dataclass
class Context:
    """What a section gets.

    Attributes:
        model: the model, with the card's edits installed.
        budget: how many tokens, prompts and images a section may use.
        seed: the seed of every random choice.
        fill: what the author of the card wrote.
        edits: the edits that the card describes; empty for the plain model.
        command: how the card was asked for.
        example: the user's input for a module that cannot make its own.
        force: measure on training data too, and say so.
        shared: what one section computed and another can use (see `once`).
    """

    model: Model
    budget: Budget
    seed: int
    fill: Fill
    edits: tuple[Any, ...] = ()
    command: str = ""
    example: Any = None
    force: bool = False
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def notes_on(self, data: Any) -> list[str]:
        """Refuse data that the fill file names as training data; with `force`, return a note instead.

        Raises:
            InputError: the data's hash is that of the training data.
        """
        from actlas.report.evaluation import refuse_training_data

        note = refuse_training_data(data, self.fill.many("training_data", "sha256"), self.force)
        return [note] if note else []

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value under `key`, computing it the first time: sections share passes so."""
        if key not in self.shared:
            self.shared[key] = make()
        value: T = self.shared[key]
        return value


SectionFunction = Callable[[Context], SectionResult]


@dataclass(frozen=True)
class SectionInfo:
    """One entry of the registry.

    Attributes:
        id: short name, used in links and in `card(sections=...)`.
        title: the heading on the card.
        order: its place; small comes first.
        needs: kinds of model it makes sense for, or `("any",)`.
        cost: its share of the run, for the estimate of the time that is left.
        function: the section itself.
    """

    id: str
    title: str
    order: int
    needs: tuple[str, ...]
    cost: float
    function: SectionFunction

    def applies_to(self, kind: str) -> bool:
        """Return whether the section makes sense for a model of this kind."""
        return "any" in self.needs or kind in self.needs


_registry: dict[str, SectionInfo] = {}
_loaded = False


def section(
    id: str, *, title: str, order: int, needs: tuple[str, ...] = ("any",), cost: float = 1.0
) -> Callable[[SectionFunction], SectionFunction]:
    """Register a function as a section of every card; the function stays callable as it is.

    Args:
        id: unique name, lower case with hyphens.
        title: the heading.
        order: place on the card (identity 10, use 20, behaviour 30, ..., provenance 90).
        needs: kinds of model (`Model.kind`) that it makes sense for, or `("any",)`.
        cost: its share of the run relative to the others.

    Raises:
        InputError: the id is taken by another function.
    """

    def register(function: SectionFunction) -> SectionFunction:
        known = _registry.get(id)
        if known is not None and known.function.__module__ != function.__module__:
            raise InputError(f"section {id!r} is registered already, by {known.function.__module__}")
        _registry[id] = SectionInfo(id, title, order, tuple(needs), cost, function)
        return function

    return register


def known_sections() -> dict[str, SectionInfo]:
    """Return every registered section by id, in the order of the card."""
    global _loaded
    if not _loaded:
        import actlas.report.sections as room

        for module in sorted(m.name for m in pkgutil.iter_modules(room.__path__)):
            importlib.import_module(f"{room.__name__}.{module}")
        _loaded = True
    return {info.id: info for info in sorted(_registry.values(), key=lambda s: (s.order, s.id))}


def find_sections(ids: list[str] | tuple[str, ...] | None) -> list[SectionInfo]:
    """Return the sections with these ids in the order of the card, or all.

    Raises:
        InputError: an id that no section has; the message offers the nearest.
    """
    known = known_sections()
    if ids is None:
        return list(known.values())
    for name in ids:
        if name not in known:
            raise InputError(
                f"no section of the card is called {name!r}"
                f"{did_you_mean(name, known) or '; known: ' + ', '.join(known)}"
            )
    return [info for name, info in known.items() if name in ids]
