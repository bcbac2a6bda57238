"""What could change a model's activations without a trace in its weights: a list, by name.

`inventory(model)` walks over all modules and reports, each as a `Finding`:

* edits that Actlas has installed, and hooks on modules or on all modules at once;
* methods that an instance has in place of its class's own (`forward`, `_call_impl`, ...);
* methods of a class that come from another file than the class;
* parametrisations, and modules of a class or tensors of a name that the configuration does not imply;
* torch function modes that are active.

Nothing here runs the model. `reexecution` finds what these functions do, `fingerprint` what weights have
become.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.modules import module as module_internals
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from actlas.core.layout import plain_module

if TYPE_CHECKING:
    from actlas.core.model import Model

Kind = Literal[
    "edit", "hook", "global hook", "swapped method", "patched class", "parametrisation",
    "module", "tensor", "function mode", "added vector", "change", "weights",
]  # fmt: skip
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_OURS = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Finding:
    """One thing that changes, or could change, what a model computes.

    Attributes:
        kind: what sort of thing it is.
        where: module path or site.
        said: in words.
        details: JSON-able extras, e.g. the size of an added vector.
    """

    kind: Kind
    where: str
    said: str
    details: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        return f"{self.kind}{place}: {self.said}"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {"kind": self.kind, "where": self.where, "said": self.said, "details": dict(self.details)}


def inventory(model: Model) -> list[Finding]:
    """Return everything found on a model as it is now; empty for a plain model."""
    module = plain_module(model.module)
    found = [Finding("edit", "", edit.describe()) for edit in model.installed]
    declared = _declared_hooks(model)
    for path, child in module.named_modules():
        found += _hooks(path, child, declared)
        found += _methods(path, child, bool(model._installations))
        if parametrize.is_parametrized(child):
            names = ", ".join(child.parametrizations)
            found.append(Finding("parametrisation", path, f"{names} computed by a parametrisation"))
    for name in GLOBAL_HOOKS:
        for hook in getattr(module_internals, name).values():
            found.append(Finding("global hook", "", f"{_name(hook)} on every module"))
    found += _patched_classes(module)
    found += _beyond_configuration(module)
    modes: list[Any] = getattr(torch.overrides, "_get_current_function_mode_stack", list)()
    found += [Finding("function mode", "", f"{type(mode).__name__} is active") for mode in modes]
    return found


def _declared_hooks(model: Model) -> set[int]:
    """Return the ids of the hooks that belong to installed edits, which are listed as edits."""
    found: set[int] = set()
    for installation in model._installations:
        owners = [getattr(undo, "__self__", None) for undo in installation._undo]
        for handle in [*owners, *installation.watcher._handles]:
            if isinstance(handle, RemovableHandle):
                found.add(handle.id)
    return found


def _hooks(path: str, module: nn.Module, declared: set[int]) -> Iterator[Finding]:
    for name in HOOKS:
        for number, hook in (getattr(module, name, None) or {}).items():
            if number not in declared:
                kind = name.strip("_").removesuffix("s").replace("_", " ")
                yield Finding("hook", path, f"{kind} {_name(hook)}")


def _methods(path: str, module: nn.Module, ours: bool) -> Iterator[Finding]:
    for name, value in shadowing(module).items():
        if not (ours and _is_ours(value)):
            yield Finding(
                "swapped method", path, f"{name} is {_name(value)}, not {type(module).__name__}'s own"
            )


def shadowing(module: nn.Module) -> dict[str, Any]:
    """Return the functions that an instance has in place of its class's methods, by name."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if callable(value)
        and not isinstance(value, (nn.Module, type))
        and callable(getattr(type(module), name, None))
    }


def _patched_classes(module: nn.Module) -> Iterator[Finding]:
    for cls in dict.fromkeys(type(m) for m in module.modules()):
        for base in cls.__mro__:
            if base is nn.Module or not issubclass(base, nn.Module):
                continue
            method = vars(base).get("forward")
            home = getattr(sys.modules.get(base.__module__), "__file__", None)
            source = _file(method)
            if home and source and not _same_package(source, home) and "forward" in vars(base):
                yield Finding(
                    "patched class", base.__name__, f"forward is {_name(method)} from {Path(source).name}, "
                    f"not from {base.__module__}",
                )  # fmt: skip
    own = nn.Module.__dict__["_call_impl"]
    if _file(own) and not _same_package(_file(own) or "", str(torch.__file__)):
        yield Finding("patched class", "Module", f"_call_impl is {_name(own)}, not torch's own")


def _beyond_configuration(module: nn.Module) -> Iterator[Finding]:
    """Compare a transformers model with an empty one of the same configuration."""
    config, build = getattr(module, "config", None), getattr(type(module), "_from_config", None)
    if config is None or not callable(build):
        return
    try:
        with torch.device("meta"):
            fresh = build(config)
    except Exception:  # a configuration that transformers cannot build from tells nothing
        return
    if not isinstance(fresh, nn.Module):
        return
    expected, actual = dict(fresh.named_modules()), dict(module.named_modules())
    for path, child in actual.items():
        if ".parametrizations" in path or parametrize.is_parametrized(child):
            continue
        if path not in expected:
            yield Finding("module", path, f"{type(child).__name__} that the configuration does not imply")
        elif type(expected[path]) is not type(child):
            said = f"{type(child).__name__} where the configuration implies {type(expected[path]).__name__}"
            yield Finding("module", path, said)
    names = {n for n, _ in fresh.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in fresh.named_buffers(remove_duplicate=False)}
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        parent = name.rpartition(".")[0]
        if name not in names and parent in expected and ".parametrizations." not in name:
            what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            said = f"a {what} {list(tensor.shape)} that the configuration does not imply"
            yield Finding("tensor", name, said)


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)
    name = getattr(inner, "__qualname__", None) or type(inner).__name__
    return f"{getattr(inner, '__module__', None) or '?'}.{name}"


def _file(function: Any) -> str | None:
    if function is None:
        return None
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else code.co_filename


def _same_package(source: str, home: str) -> bool:
    """Whether a function's file lies in the package of its class (decorators live elsewhere in it)."""
    folder = Path(home).resolve()
    parts = folder.parts
    if "site-packages" in parts:
        top = parts.index("site-packages") + 2
        folder = Path(*parts[:top]) if len(parts) > top else folder
    path = Path(source).resolve()
    return path == folder or folder in path.parents or path.parent == Path(home).resolve().parent


def _is_ours(function: Callable[..., Any]) -> bool:
    """Whether a function's code lies in Actlas itself (its edits list themselves)."""
    inner = getattr(function, "func", function)
    code = getattr(inner, "__code__", None)
    return code is not None and str(Path(code.co_filename).resolve()).startswith(_OURS)
