"""Run measures by name on a model: one call, one list of measurements.

    measure(model)                                        # everything that applies, quickly
    measure(model, ["perplexity", "task-accuracy"])       # on the default text and tasks
    measure(model, ["perplexity"], "book.txt", tokens=20_000)
    measure(model, ["task-accuracy"], "ioi", edits=[edit], quick=False)
    measure(model, None, {"corpus": "code", "task": ["ioi", "capitals"]})

Measures that share their forward passes are run together, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actlas.core.errors import InputError, NonFiniteError, did_you_mean
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.registry import OWN_DATA, DataKind, MeasureInfo, find_measure, measures
from actlas.measure.samples import missing

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

TASKS = (
    "ioi",
    "capitals",
    "agreement",
    "sentiment",
    "true-false",
    "multiple-choice",
    "induction",
    "arithmetic",
)
TASK_ITEMS, QUICK_TASK_ITEMS = 128, 48
IMAGES, QUICK_IMAGES = 256, 32


def measure(
    model: Model,
    names: Sequence[str] | str | None = None,
    data: Any = None,
    *,
    edits: Sequence[Edit] = (),
    seed: int = 0,
    quick: bool = True,
    tokens: int | None = None,
    **options: Any,
) -> list[Measurement]:
    """Measure a model and return one list of measurements, in the order of the names.

    Args:
        model: what to measure.
        names: measures to run (`measures()` lists them); all that apply to this kind of model if
            missing.
        data: text, tasks, images or pairs: an object of `actlas.data`, a name or path, a list of
            texts, or a mapping from kind (`"corpus"`, `"task"`, `"images"`, `"pairs"`) to one of these.
            What is missing is the default of its kind.
        edits: installed while measuring, on top of those installed already.
        seed: of data, bootstraps and everything else that is random.
        quick: use each measure's quick options (fewer tokens and items).
        tokens: how many tokens measures on text read, instead of their own choice.
        **options: given to every measure that takes them, e.g. `context=256`.

    Returns:
        Measurements. A measure that was asked for by name and does not apply to this kind of model
        gives one with value `nan` and a note; so does, when no names were given, one whose sites
        this model has not got.

    Raises:
        InputError: unknown measure, data that cannot be found, an option that no measure takes.
        NonFiniteError: NaN or infinity in what the model computes.
    """
    infos = _chosen(model, names, by_kind(data))
    given = dict(options) if tokens is None else {"tokens": tokens, **options}
    _check_options(given, infos)
    source = _Data(model, data, seed, quick)
    out: dict[str, list[Measurement]] = {}
    installing: AbstractContextManager[Any] = model.edit(*edits) if edits else nullcontext()
    with installing, progress("measuring", total=len(infos), unit="measures") as advance:
        for members in _together(infos, model):
            note = "" if members[0].applies_to(model.kind) else _not_for(members[0], model)
            if not note:
                try:
                    found = _run(model, members, source, given, seed, quick)
                except NonFiniteError:
                    raise
                except InputError as error:
                    if names is not None:
                        raise
                    note = str(error)
            if note:
                found = [missing(info.name, info.unit, note) for info in members]
            for info in members:
                shared = info.together is not None
                out[info.name] = [m for m in found if m.name == info.name] if shared else found
            advance(len(members), note=members[-1].name)
        under = tuple(e.describe() for e in model.installed)
    ordered = [m for info in infos for m in out[info.name]]
    return [replace(m, under=m.under or under) for m in ordered]


def _chosen(model: Model, names: Sequence[str] | str | None, given: Mapping[str, Any]) -> list[MeasureInfo]:
    if names is None:
        return [
            info
            for info in measures().values()
            if info.applies_to(model.kind) and (info.data not in OWN_DATA or info.data in given)
        ]
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise InputError(f"no measure was named; known: {', '.join(measures())}")
    return [find_measure(name) for name in dict.fromkeys(wanted)]


def _not_for(info: MeasureInfo, model: Model) -> str:
    return f"needs a model of kind {' or '.join(info.needs)}; {model.name} is of kind {model.kind}"


def _together(infos: list[MeasureInfo], model: Model) -> list[list[MeasureInfo]]:
    """Group the measures that one function computes; those that do not apply stay alone."""
    groups: dict[Any, list[MeasureInfo]] = {}
    for info in infos:
        shared = info.together is not None and info.applies_to(model.kind)
        key = (inspect.unwrap(info.together), info.data) if info.together and shared else info.name
        groups.setdefault(key, []).append(info)
    return list(groups.values())


def _run(
    model: Model,
    members: list[MeasureInfo],
    source: _Data,
    given: Mapping[str, Any],
    seed: int,
    quick: bool,
) -> list[Measurement]:
    function = members[0].together or members[0].function
    takes = inspect.signature(function).parameters
    chosen: dict[str, Any] = {"seed": seed} if "seed" in takes else {}
    for info in members if quick else ():
        chosen |= {k: v for k, v in info.quick.items() if k in takes}
    chosen |= {k: v for k, v in given.items() if k in takes}
    if members[0].data == "none":
        return _as_list(function(model, **chosen))
    data = source[members[0].data]
    if members[0].data == "task" and members[0].together is None:
        return [m for task in data for m in _as_list(function(model, task, **chosen))]
    return _as_list(function(model, data, **chosen))


def _as_list(found: Measurement | list[Measurement]) -> list[Measurement]:
    return [found] if isinstance(found, Measurement) else list(found)


def _check_options(given: Mapping[str, Any], infos: Sequence[MeasureInfo]) -> None:
    taken = {option for info in infos for option in info.options}
    for option in given:
        if option not in taken and option != "tokens":
            raise InputError(
                f"none of the measures takes an option {option!r}{did_you_mean(option, taken)}"
                f" (they take {', '.join(sorted(taken)) or 'none'})"
            )


class _Data:
    """The data of each kind, found when first needed."""

    def __init__(self, model: Model, data: Any, seed: int, quick: bool) -> None:
        self._model = model
        self._given = by_kind(data)
        self._seed = seed
        self._quick = quick
        self._found: dict[str, Any] = {}

    def __getitem__(self, kind: DataKind) -> Any:
        if kind not in self._found:
            self._found[kind] = self._find(kind, self._given.get(kind))
        return self._found[kind]

    def _find(self, kind: DataKind, given: Any) -> Any:
        from actlas import data as room

        if kind == "corpus":
            if given is None or isinstance(given, str) or hasattr(given, "__fspath__"):
                return room.corpus("mixed" if given is None else given, seed=self._seed)
            return given
        if kind == "task":
            return self._tasks(given)
        if kind == "images":
            return self._images(given) if given is None or isinstance(given, str) else given
        return given  # pairs, requests, questions: the measures make their own or say what they need

    def _images(self, name: str | None) -> Any:
        """Digits for a model whose classes they are, photographs for any other."""
        from actlas import data as room

        n = QUICK_IMAGES if self._quick else IMAGES
        if name is not None:
            return room.images(name, n=n, seed=self._seed)
        classes = {str(c) for c in (getattr(self._model.config, "id2label", None) or {}).values()}
        if set("0123456789") <= classes:
            return room.images("digits", n=n, seed=self._seed)
        try:
            return room.images("photos", n=n, seed=self._seed)
        except InputError:  # photographs need Pillow
            return room.images("digits", n=n, size=224, seed=self._seed)

    def _tasks(self, given: Any) -> list[Any]:
        from actlas import data as room

        n = QUICK_TASK_ITEMS if self._quick else TASK_ITEMS
        wanted = TASKS if given is None else [given] if isinstance(given, str) or _is_task(given) else given
        found = []
        for task in wanted:
            if not isinstance(task, str):
                found.append(task)
                continue
            try:
                found.append(room.task(task, self._model.tokenizer, n=n, seed=self._seed))
            except InputError:
                if given is not None:
                    raise  # a default task that this tokenizer cannot express is left out
        if not found:
            raise InputError(f"none of the tasks {', '.join(map(str, wanted))} suits this tokenizer")
        return found


def by_kind(data: Any) -> dict[str, Any]:
    """Sort data by the kind of measure that it serves.

    Raises:
        InputError: a mapping with an unknown kind.
    """
    if data is None:
        return {}
    if isinstance(data, Mapping):
        kinds = ("corpus", "task", "images", "pairs", *OWN_DATA)
        unknown = next((k for k in data if k not in kinds), None)
        if unknown is not None:
            raise InputError(f"data of unknown kind {unknown!r}: one of {', '.join(kinds)}")
        return dict(data)
    return {_kind_of(data): data}


def _kind_of(data: Any) -> str:
    if isinstance(data, str):
        from actlas.data import tasks

        return "task" if data in tasks() else "images" if data in ("digits", "photos") else "corpus"
    if _is_task(data):
        return "task"
    if hasattr(data, "pixels"):
        return "images"
    first = data[0] if isinstance(data, Sequence) and len(data) else None
    if _is_task(first) or (isinstance(first, str) and _kind_of(first) == "task"):
        return "task"
    if hasattr(first, "prompt") and hasattr(first, "target"):
        return "requests"
    if hasattr(first, "question") and hasattr(first, "options"):
        return "questions"
    return "pairs" if hasattr(first, "left") and hasattr(first, "right") else "corpus"


def _is_task(data: Any) -> bool:
    return hasattr(data, "chance") and hasattr(data, "items")
