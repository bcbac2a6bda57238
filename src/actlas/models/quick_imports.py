"""Import torch and transformers in two thirds of the time.

Three things make `import transformers` slow, and none does anything for somebody who loads a model:

- Importing makes about a million objects that live as long as the process. Python's cyclic garbage
  collector walks over all of them again and again while they are made. `quick_imports` pauses it, and
  afterwards hands the new objects to the oldest generation, which is where they would have ended.
- transformers reads the 2,500 source files of its models to learn which names they export, once for
  `transformers` and once more for `transformers.models`. `quick_imports` remembers the first answer,
  and shows the function that looks for a file's `__all__` only the part of the file that has it.
- Losses for object detection import all of `scipy.optimize` for one function. They get a function that
  imports it when it is first called.

Nothing changes afterwards: the collector runs again, and both libraries are left as they were found.
"""

from __future__ import annotations

import copy
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_SCANNER = "transformers.utils.import_utils"
_OPTIMIZE = "scipy.optimize"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Make the imports inside the `with` block quick; harmless if everything is imported already."""
    collecting = gc.isenabled()
    gc.disable()
    finders = _QuickScan(), _LateOptimize()
    sys.meta_path[:0] = finders
    try:
        yield
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)
            finder.undo()
        if collecting:
            if gc.get_freeze_count() == 0:  # nobody keeps frozen objects that must stay so
                gc.freeze()
                gc.unfreeze()
            gc.enable()


class _QuickScan(MetaPathFinder):
    """Replaces two functions of transformers' import machinery right after their module was executed."""

    def __init__(self) -> None:
        self._replaced: list[tuple[ModuleType, str, Callable[..., Any]]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _SCANNER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            self._replace(module, "create_import_structure_from_path", _remembered)
            self._replace(module, "fetch__all__", _from_last_all)

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec

    def _replace(
        self, module: ModuleType, name: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        original = getattr(module, name, None)
        if original is not None:  # another version of transformers may not have it: it is imported as it is
            setattr(module, name, by(original))
            self._replaced.append((module, name, original))

    def undo(self) -> None:
        """Put transformers' own functions back."""
        for module, name, original in self._replaced:
            setattr(module, name, original)
        self._replaced.clear()


class _LateOptimize(MetaPathFinder, Loader):
    """Puts a stand-in for `scipy.optimize` in place, which gives way as soon as more is wanted of it."""

    def __init__(self) -> None:
        self._stand_in: ModuleType | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == _OPTIMIZE and self._stand_in is None else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the stand-in: one function that is late, and everything else from the real module."""

        def linear_sum_assignment(*args: Any, **options: Any) -> Any:
            return importlib.import_module(_OPTIMIZE).linear_sum_assignment(*args, **options)

        def from_the_real_one(name: str) -> Any:
            if name.startswith("__"):  # the import machinery looking at the stand-in itself
                raise AttributeError(name)
            self.undo()
            return getattr(importlib.import_module(_OPTIMIZE), name)

        self._stand_in = module
        module.__dict__.update(linear_sum_assignment=linear_sum_assignment, __getattr__=from_the_real_one)

    def undo(self) -> None:
        """Take the stand-in away; the next import gets the real module."""
        if self._stand_in is not None and sys.modules.get(_OPTIMIZE) is self._stand_in:
            del sys.modules[_OPTIMIZE]
            vars(sys.modules["scipy"]).pop("optimize", None)


def _remembered(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Scan each folder once, whether it is asked for by its own path or by a file in it."""
    seen: dict[str, Any] = {}
    depth = 0

    def remembered(path: str | os.PathLike[str]) -> Any:
        nonlocal depth
        folder = os.path.dirname(path) if os.path.isfile(path) else os.fspath(path)
        if folder not in seen:
            depth += 1
            try:
                seen[folder] = scan(path)
            finally:
                depth -= 1
        # The scan calls itself for each folder; only the outermost answer goes to somebody who may change it.
        return seen[folder] if depth else copy.deepcopy(seen[folder])

    return remembered


def _from_last_all(fetch: Callable[[str], Any]) -> Callable[[str], Any]:
    """The names come from the last line that starts with `__all__`: what stands before it is not needed."""

    def from_last_all(content: str) -> Any:
        return fetch(content[content.rfind("\n__all__") + 1 :])

    return from_last_all
