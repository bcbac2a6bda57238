"""The registry of methods: everything that `actlas fit` can fit.

A method is a plain function `fit(model, data, *, site=..., **options)` that returns a Lens, an Edit or
Measurements. The decorator writes it into the registry and leaves it callable as it is:

    @method("probe", room="core", returns="Lens", data="labelled",
            summary="a linear probe for a label, with held-out accuracy and a shuffled-label control",
            example="actlas fit probe smollm2 pairs.jsonl --site blocks.15.resid_post -o probe/")
    def fit_probe(model, data, site, *, method="logistic", ...) -> Probe: ...

What `data` is. Methods never open files or know corpus names: the caller (the command line, a card)
turns a path or a name into one of these before it calls `fit`.

* `"corpus"`: an iterable of strings or documents (`.text`, `.id`). On the command line: a bundled name,
  a text file, a folder, or JSONL with `text`. A method whose options have `site` may be given a `Store` of
  harvested activations instead (on the command line its folder), if it says so.
* `"labelled"`: a sequence of `(text, label)`, the label a bool, 0/1 or a number; or pairs, as below. On
  the command line: JSONL with `text` and `label`, or as below.
* `"pairs"`: a sequence of `(positive text, negative text)`. On the command line: JSONL with `positive`
  and `negative`, or the name of a task, whose pairs are taken.
* `"task"`: a task: `.items` with `.prompt`, `.answer`, `.wrong`. On the command line: a task's name.
* `"requests"`: facts to write, a sequence of `data.edit_requests.EditRequest` or mappings with its fields.
  On the command line: JSONL with `prompt` and `target` (and `paraphrases`, `locality`).
* `"none"`: nothing: `fit(model, **options)`.

A room of methods has a module `actlas.<room>.register` that imports its method files. `methods()`
imports those modules when it is first called, so `import actlas` does not pay for them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args

from actlas.core.errors import InputError, did_you_mean

Returns = Literal["Lens", "Edit", "Measurement"]
DataKind = Literal["corpus", "labelled", "pairs", "task", "requests", "none"]

#: Rooms that may have methods, in the order in which they are listed.
ROOMS: tuple[str, ...] = (
    "measure",
    "dictionaries",
    "steering",
    "circuits",
    "explain",
    "sparsity",
    "quantize",
    "training",
    "nn",
    "security",
    "merge",
    "select",
)
_OWN = (
    "actlas.core.edits",
    "actlas.core.skip_inputs",
    "actlas.core.packed_weights",
    "actlas.core.quant_linear",
    "actlas.core.quant_edit",
    "actlas.core.dictionary_edits",
    "actlas.core.probe",
    "actlas.core.pca",
    "actlas.core.tuned_lens",
)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MethodInfo:
    """One entry of the registry.

    Attributes:
        name: what a user asks for, e.g. `"probe"`.
        room: the room it lives in.
        returns: what `fit` returns.
        data: what the second argument is; see the module docstring.
        summary: one line for a person who chooses.
        fit: the function.
        example: a command line that works on a bundled model.
        papers: slugs of the papers that it implements.
        options: name -> default of its keyword options (`...` for a required one).
        open: whether it takes further options, which it checks itself (those of an architecture, say).
        data_optional: whether it has data of its own where none is given.
    """

    name: str
    room: str
    returns: Returns
    data: DataKind
    summary: str
    fit: Callable[..., Any] = field(repr=False)
    example: str = ""
    papers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    open: bool = False
    data_optional: bool = False

    @property
    def needs_site(self) -> bool:
        """Whether the user must say at which site to fit."""
        return self.options.get("site", None) is ...

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary without the function; required options have no default."""
        return {
            "name": self.name,
            "room": self.room,
            "returns": self.returns,
            "data": self.data,
            "summary": self.summary,
            "example": self.example,
            "papers": list(self.papers),
            "options": {
                name: {"required": True} if default is ... else {"default": _plain(default)}
                for name, default in self.options.items()
            },
        }


_METHODS: dict[str, MethodInfo] = {}
_imported = False


def method(
    name: str,
    *,
    room: str,
    returns: Returns,
    summary: str,
    data: DataKind = "corpus",
    example: str = "",
    papers: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Register a fit function; see the module docstring.

    Raises:
        ValueError: two methods with one name, or an unknown kind of data or result.
    """
    if returns not in get_args(Returns) or data not in get_args(DataKind):
        raise ValueError(f"method {name!r}: returns={returns!r}, data={data!r} is not a known kind")

    def register(fit: F) -> F:
        known = _METHODS.get(name)
        if known is not None and known.fit.__module__ != fit.__module__:
            raise ValueError(f"two methods are called {name!r}: {known.fit.__module__} and {fit.__module__}")
        options = _options(fit, 1 if data == "none" else 2)
        kinds = (p.kind for p in inspect.signature(fit).parameters.values())
        more = inspect.Parameter.VAR_KEYWORD in kinds
        second = list(inspect.signature(fit).parameters.values())[1:2]
        own = data != "none" and bool(second) and second[0].default is not inspect.Parameter.empty
        _METHODS[name] = MethodInfo(
            name, room, returns, data, summary, fit, example, papers, options, more, own
        )
        return fit

    return register


def methods() -> dict[str, MethodInfo]:
    """Return every method by name, sorted by room and name."""
    import_rooms()
    order = ("core", *ROOMS)
    ranked = sorted(_METHODS.values(), key=lambda m: (order.index(m.room) if m.room in order else 99, m.name))
    return {m.name: m for m in ranked}


def find_method(name: str) -> MethodInfo:
    """Return one method.

    Raises:
        InputError: there is none of that name; the message offers the nearest.
    """
    known = methods()
    if name not in known:
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise InputError(f"there is no method {name!r}{hint}")
    return known[name]


def import_rooms() -> None:
    """Import the method files of all rooms that this installation has; once."""
    global _imported
    if _imported:
        return
    for module in _OWN:
        importlib.import_module(module)
    for room in ROOMS:
        if find_spec(f"actlas.{room}") is not None and find_spec(f"actlas.{room}.register") is not None:
            importlib.import_module(f"actlas.{room}.register")
    _imported = True


def _options(fit: Callable[..., Any], leading: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, (name, parameter) in enumerate(inspect.signature(fit).parameters.items()):
        if i < leading or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        found[name] = ... if parameter.default is parameter.empty else parameter.default
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)
