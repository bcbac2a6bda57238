"""Ways to add a vector to a running model, for measuring what notices them on one's own model.

    with injected(model, 12, vector, "inner hook"):
        report = audit(model)

| way | what is done |
| --- | --- |
| `edit` | an Actlas edit |
| `hook`, `pre-hook` | a forward hook on the block, a pre-hook on the next one |
| `inner hook` | a forward hook on the block's MLP |
| `swapped forward` | the block object gets a `forward` of its own |
| `late hook` | a hook that acts only from token 64 on: a trigger |
| `bias` | the vector becomes a bias of the MLP's last linear map: the weights are changed |

Everything is taken back when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edits import Add
from actlas.core.errors import InputError, did_you_mean
from actlas.core.layout import find

if TYPE_CHECKING:
    from actlas.core.model import Model

WAYS = ("edit", "hook", "pre-hook", "inner hook", "swapped forward", "late hook", "bias")
TRIGGER = 64


@contextmanager
def injected(model: Model, block: int, vector: Tensor, way: str) -> Iterator[Model]:
    """Add a vector `[d]` to what leaves a block, for the length of a `with` block.

    Raises:
        InputError: an unknown way, or one that this model does not allow.
        ModelError: there is no such block.
    """
    if way not in WAYS:
        raise InputError(f"there is no way {way!r} to inject a vector{did_you_mean(way, WAYS)}; see WAYS")
    module = model.block(block)
    if way == "edit":
        with model.edit(Add(f"blocks.{block}.resid_post", vector)):
            yield model
        return
    undo = _inject(model, block, module, vector, way)
    try:
        yield model
    finally:
        undo()


def _inject(model: Model, block: int, module: nn.Module, vector: Tensor, way: str) -> Callable[[], None]:
    if way in ("hook", "inner hook", "late hook"):
        target = module
        if way == "inner hook":
            site = model.resolve(f"blocks.{block}.mlp.out")[0]
            found = find(model.module, site.module)
            if found is None or site.absent is not None or site.tap.end != "output":
                raise InputError(f"{model.name} has no MLP output of its own in block {block}")
            target = found
        late = TRIGGER if way == "late hook" else 0

        def after(m: nn.Module, args: Any, output: Any) -> Any:
            return _added(output, vector, late)

        return target.register_forward_hook(after).remove
    if way == "pre-hook":
        following = model.block(block + 1)

        def before(m: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (_added(args[0], vector), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": _added(kwargs["hidden_states"], vector)}

        return following.register_forward_pre_hook(before, with_kwargs=True).remove
    if way == "swapped forward":
        original = module.forward
        module.__dict__["forward"] = lambda *args, **kwargs: _added(original(*args, **kwargs), vector)
        return lambda: module.__dict__.pop("forward", None)
    return _as_bias(model, block, vector)


def _as_bias(model: Model, block: int, vector: Tensor) -> Callable[[], None]:
    """Put the vector into the bias of the linear map that the MLP ends with."""
    linear = find(model.module, model.resolve(f"blocks.{block}.mlp.act")[0].module)
    if linear is None or not hasattr(linear, "bias"):
        raise InputError(f"the MLP of block {block} does not end with a linear map")
    old: Any = linear.bias
    if old is None:
        linear.bias = nn.Parameter(vector.to(model.device, model.dtype).clone(), requires_grad=False)
    else:
        linear.bias = nn.Parameter(old.detach() + vector.to(old), requires_grad=False)

    def undo() -> None:
        linear.bias = old

    return undo


def _added(output: Any, vector: Tensor, late: int = 0) -> Any:
    if isinstance(output, Tensor):
        if not late:
            return output + vector.to(output)
        place = torch.arange(output.shape[1], device=output.device) >= late
        return output + place.to(output.dtype)[None, :, None] * vector.to(output)
    if isinstance(output, tuple):
        return (_added(output[0], vector, late), *output[1:])
    raise InputError(f"a block that returns {type(output).__name__} cannot be injected into")
