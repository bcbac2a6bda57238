"""The registry of measures: what can be measured, on what, and in which unit.

A measure is a plain function `fn(model, data, *, seed=0, ...) -> Measurement | list[Measurement]`
(`fn(model, *, seed=0, ...)` if it needs no data). The decorator writes it into the registry and
leaves it callable as it is:

    @measure("perplexity", summary="how surprised the model is by real text", unit="nats",
             needs=("causal-lm",), data="corpus", quick={"tokens": 2048})
    def perplexity(model: Model, corpus: Corpus, *, seed: int = 0, tokens: int = 8192) -> Measurement: ...

The one thing the decorator adds to a call: measurements that do not say what they were measured
under get the descriptions of the edits that are installed on the model.

Several measures that come from the same forward passes name one function in `together`; the runner
then calls that function once and keeps the measurements whose names were asked for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

from actlas.core.errors import InputError, did_you_mean
from actlas.core.measurement import Measurement

DataKind = Literal["corpus", "task", "images", "pairs", "requests", "questions", "none"]

#: Kinds without a default: measures on them run when they are asked for, or when their data is given.
OWN_DATA: tuple[DataKind, ...] = ("requests", "questions")
KINDS = (
    "causal-lm",
    "encoder",
    "seq2seq",
    "image-classifier",
    "image-encoder",
    "image-text",
    "speech",
    "module",
)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class MeasureInfo:
    """One entry of the registry.

    Attributes:
        name: what a user asks for, e.g. `"perplexity"`.
        summary: one line for a person who chooses.
        unit: unit of the value.
        needs: model kinds that it applies to, or `("any",)`.
        data: what the second argument is; `"none"` if there is no second argument.
        quick: options that the quick mode changes, e.g. fewer tokens.
        source: paper and section, where it has one.
        function: the measure itself.
        together: a function with the same arguments that returns the measurements of several
            measures from one pass; the runner calls it instead of `function`.
        options: names of the keyword options that `function` takes.
    """

    name: str
    summary: str
    unit: str
    needs: tuple[str, ...]
    data: DataKind
    quick: Mapping[str, Any]
    source: str
    function: Callable[..., Measurement | list[Measurement]] = field(repr=False)
    together: Callable[..., list[Measurement]] | None = field(default=None, repr=False)
    options: tuple[str, ...] = ()

    def applies_to(self, kind: str) -> bool:
        """Return whether a model of this kind can be measured so."""
        return "any" in self.needs or kind in self.needs

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary without the functions."""
        return {
            "name": self.name,
            "summary": self.summary,
            "unit": self.unit,
            "needs": list(self.needs),
            "data": self.data,
            "quick": dict(self.quick),
            "source": self.source,
            "options": list(self.options),
        }


_registry: dict[str, MeasureInfo] = {}
_loaded = False


def measure(
    name: str,
    *,
    summary: str,
    unit: str,
    needs: tuple[str, ...] = ("any",),
    data: DataKind = "corpus",
    quick: Mapping[str, Any] | None = None,
    source: str = "",
    together: Callable[..., list[Measurement]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as a measure; the function stays directly callable.

    Args:
        name: unique name in lower case with hyphens.
        summary: one line that says what it tells a reader.
        unit: unit of its value.
        needs: model kinds (`registry.KINDS`) that it applies to, or `("any",)`.
        data: kind of its second argument, or `"none"`.
        quick: options that quick mode sets, e.g. `{"tokens": 2048}`; the function must take them.
        source: paper and section.
        together: see `MeasureInfo.together`.

    Raises:
        InputError: a name that is taken, an unknown kind of model or data, a quick option that the
            function does not take.
    """
    unknown = [k for k in needs if k != "any" and k not in KINDS]
    if unknown:
        raise InputError(
            f"measure {name!r} needs unknown model kind {unknown[0]!r}: one of {', '.join(KINDS)} or any"
        )
    if data not in get_args(DataKind):
        raise InputError(f"measure {name!r} wants data {data!r}: one of {', '.join(get_args(DataKind))}")

    def register(function: Callable[P, R]) -> Callable[P, R]:
        options = _options(function)
        for option in quick or {}:
            if option not in options:
                raise InputError(
                    f"measure {name!r}: quick option {option!r} is none of its options {', '.join(options)}"
                )
        known = _registry.get(name)
        if known is not None and not _same(known.function, function):
            raise InputError(f"measure {name!r} is registered already, by {known.function.__module__}")
        marked = mark_under(function)
        _registry[name] = MeasureInfo(
            name=name,
            summary=summary,
            unit=unit,
            needs=tuple(needs),
            data=data,
            quick=dict(quick or {}),
            source=source,
            function=cast("Callable[..., Measurement | list[Measurement]]", marked),
            together=None if together is None else mark_under(together),
            options=options,
        )
        return marked

    return register


def measures() -> dict[str, MeasureInfo]:
    """Return every registered measure by name, in the order of their names.

    Imports the measure room's own modules the first time.
    """
    global _loaded
    if not _loaded:
        import actlas.measure as room

        for module in sorted(m.name for m in pkgutil.iter_modules(room.__path__)):
            importlib.import_module(f"{room.__name__}.{module}")
        _loaded = True
    return dict(sorted(_registry.items()))


def find_measure(name: str) -> MeasureInfo:
    """Return one measure.

    Raises:
        InputError: no measure has this name; the message offers the nearest names.
    """
    known = measures()
    if name not in known:
        raise InputError(
            f"no measure is called {name!r}{did_you_mean(name, known) or '; known: ' + ', '.join(known)}"
        )
    return known[name]


def mark_under(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a measure so that its measurements say which edits were installed.

    The first argument must be a Model. Measurements whose `under` is filled keep it.
    """
    if getattr(function, "_marks_under", False):
        return function

    @functools.wraps(function)
    def measured(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        under = tuple(e.describe() for e in getattr(model, "installed", ()))
        result = function(*args, **kwargs)
        if not under:
            return result
        if isinstance(result, Measurement):
            return cast("R", _under(result, under))
        if isinstance(result, list):
            return cast("R", [_under(m, under) for m in result])
        return result

    measured._marks_under = True  # type: ignore[attr-defined]
    return measured


def _under(measurement: Measurement, under: tuple[str, ...]) -> Measurement:
    return measurement if measurement.under else replace(measurement, under=under)


def _options(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    )


def _same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """A module that is imported again (a reload) may register its own function again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
