"""Attach a function to a site: the one place where forward hooks are made.

`attach(model, site, function)` calls `function(value) -> value` with the site's canonical value
whenever a forward pass reaches it. Returning the same tensor leaves the pass untouched, bit for bit;
returning another writes it back through the site's views. Hooks run in the order in which they were
attached, so a reader that is attached after an edit reads what the edit wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from actlas.core import functions
from actlas.core.errors import SiteError
from actlas.core.layout import find
from actlas.core.sites import Site

Function = Callable[[Tensor], Tensor]


class Handle(Protocol):
    """What `attach` returns."""

    def remove(self) -> None:
        """Detach the function."""
        ...


def attach(
    root: nn.Module,
    site: Site,
    function: Function,
    *,
    batch: Callable[[], int] | None = None,
    raw: Callable[[Tensor], Tensor] | None = None,
    explicit: bool = False,
    last_rows: int | None = None,
) -> Handle:
    """Call `function` with the value at a site in every forward pass.

    Args:
        root: the whole model.
        site: where; it must not be absent.
        function: gets the canonical value and returns it or a replacement of the same shape.
        batch: returns the batch size of the running pass (needed by sites on flattened batches).
        raw: called first with the hooked tensor itself (for gradients); returns it or a stand-in.
        explicit, last_rows: for attention sites; see `actlas.core.functions.watch`.

    Returns:
        A handle; `remove()` detaches.
    """
    module = find(root, site.module)
    if module is None or site.absent is not None:
        raise SiteError(f"{site.name} does not exist here: {site.absent or 'no such module'}")
    tap = site.tap

    def change(x: Tensor) -> Tensor:
        if raw is not None:
            x = raw(x)
        whole = _unflatten(x, batch) if tap.flat else x
        value = site.read(whole)
        new = function(value)
        if new is value:
            return x
        written = site.write(whole, new.to(value.dtype))
        return written.reshape(x.shape) if tap.flat else written

    if tap.end in ("scores", "pattern", "linear"):
        return functions.watch(module, tap.end, change, explicit=explicit, last_rows=last_rows)
    if tap.end == "input":
        return module.register_forward_pre_hook(_input_hook(change, tap.in_place), with_kwargs=True)
    return module.register_forward_hook(_output_hook(change, tap.pick))


def _unflatten(x: Tensor, batch: Callable[[], int] | None) -> Tensor:
    n = batch() if batch is not None else 1
    return x.unflatten(0, (n, x.shape[0] // n)) if x.ndim == 2 else x


def _input_hook(change: Function, in_place: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key: int | str
        if args and isinstance(args[0], Tensor):
            key, x = 0, args[0]
        else:
            found = next(((k, v) for k, v in kwargs.items() if isinstance(v, Tensor)), None)
            if found is None:
                raise SiteError(f"{type(module).__name__} was called without a tensor input")
            key, x = found
        new = change(x)
        if new is x:
            return None
        if in_place:
            x.copy_(new)
            return None
        if isinstance(key, int):
            return (new, *args[1:]), kwargs
        return args, {**kwargs, key: new}

    return hook


def _output_hook(change: Function, pick: int | str | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = _pick(output, pick)
        if x is None:
            raise SiteError(f"{type(module).__name__} returned no tensor; name another module")
        new = change(x)
        return None if new is x else _put(output, pick, new)

    return hook


def _pick(output: Any, pick: int | str | None) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(pick, str):
        value = getattr(output, pick, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, (tuple, list)) and output:
        value = output[pick if isinstance(pick, int) else 0]
        return value if isinstance(value, Tensor) else None
    for name in ("last_hidden_state", "logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, dict):
        return next((v for v in output.values() if isinstance(v, Tensor)), None)
    return None


def _put(output: Any, pick: int | str | None, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    if isinstance(output, (tuple, list)):
        index = pick if isinstance(pick, int) else 0
        items = [*output[:index], new, *output[index + 1 :]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    name = pick if isinstance(pick, str) else None
    if name is None:
        name = next(n for n in ("last_hidden_state", "logits") if getattr(output, n, None) is not None)
    if hasattr(output, "__dataclass_fields__") and not isinstance(output, dict):
        return replace(output, **{name: new})
    copy = type(output)(**output)
    copy[name] = new
    return copy
