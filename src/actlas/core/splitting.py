"""Cut a model in two at a site: run the first part once, the rest as often as needed.

    head, tail = split_at(model, "blocks.12.resid_post")
    state = head("The capital of France is")     # one forward pass, stopped at the site
    for strength in (0, 2, 4, 8):
        logits = tail(state, state.activation + strength * vector).logits

`tail` re-runs only the blocks after the site: those before it are skipped, each handing on what `head`
captured, while embeddings, masks and rotary tables are computed by the model itself. So a suffix costs
its share of the model, and its output equals a full forward pass with the activation written at the
site. Models without a layout have no blocks to skip; there the tail is a full pass with the write.

Sites inside a block (`blocks.12.attn.z`) re-run that block from its start with the value written.
Installed edits apply in both parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ShapeError, SiteError
from actlas.core.hooks import attach
from actlas.core.installation import PassWatcher
from actlas.core.layout import Tower, find, join
from actlas.core.model import Model
from actlas.core.sites import Site
from actlas.core.trace import StopForward


@dataclass
class SplitState:
    """What `head` captured.

    Attributes:
        site: where the model was cut.
        activation: the value at the site, `[batch, pos, ...]`.
        encoded: the model's arguments.
        stream: the tensor that enters the first block that `tail` runs, or `None`.
        returned: what the last skipped block returned, as it returned it.
        skip: how many blocks `tail` skips.
    """

    site: Site
    activation: Tensor
    encoded: dict[str, Any]
    stream: Tensor | None
    returned: Any
    skip: int


Head = Callable[[Any], SplitState]
Tail = Callable[..., Any]


def split_at(model: Model, site: str) -> tuple[Head, Tail]:
    """Return `(head, tail)` with `tail(head(x))` equal to the model.

    Args:
        model: the model.
        site: one site, canonical or `module:`.

    Returns:
        head: inputs -> SplitState; runs the model up to the site.
        tail: (state, activation=None, grad=False) -> the model's output with `activation` (default:
            the captured one) at the site. The batch may differ from the captured one by a whole
            factor or by a captured batch of 1, so several edits of one prompt run at once.

    Raises:
        SiteError: no such site, or a pattern that names several.
    """
    sites = model.resolve(site)
    if len(sites) != 1:
        raise SiteError(f"{site!r} names {len(sites)} sites; a model is cut at one")
    where = sites[0]
    tower = model.layout.tower(where.tower) if model.layout is not None else None
    skip = _blocks_before(where, tower)

    def head(inputs: Any) -> SplitState:
        return _run_head(model, where, tower, skip, model.encode(inputs))

    def tail(
        state: SplitState, activation: Tensor | None = None, *, grad: bool = False, **options: Any
    ) -> Any:
        return _run_tail(model, tower, state, activation, grad, options)

    return head, tail


def _blocks_before(site: Site, tower: Tower | None) -> int:
    if tower is None or site.kind == "module" or site.kind == "embed":
        return 0
    if site.block is None:
        return tower.n_blocks
    return site.block + 1 if site.kind == "resid_post" else site.block


def _run_head(
    model: Model, site: Site, tower: Tower | None, skip: int, encoded: dict[str, Any]
) -> SplitState:
    found: dict[str, Any] = {}
    watcher = PassWatcher(model)

    def read(x: Tensor) -> Tensor:
        if "activation" not in found:
            found["activation"] = x.detach().clone() if site.tap.copy else x.detach()
            raise StopForward
        return x

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        found["returned"] = output

    with ExitStack() as stack:
        watcher.start()
        stack.callback(watcher.stop)
        if skip and tower is not None:
            last = find(model.module, join(tower.blocks, str(skip - 1)))
            assert last is not None
            stack.callback(last.register_forward_hook(returned).remove)
        handle = attach(model.module, site, read, batch=lambda: watcher.of(site).batch)
        stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        with suppress(StopForward):
            model._call(encoded, **_no_cache(model, encoded))
    if "activation" not in found:
        raise InputError(f"{site.name} never ran in this forward pass")
    output = found.get("returned")
    stream = output[0] if isinstance(output, (tuple, list)) else output
    return SplitState(site, found["activation"], encoded, stream, output, skip)


def _run_tail(
    model: Model,
    tower: Tower | None,
    state: SplitState,
    activation: Tensor | None,
    grad: bool,
    options: dict[str, Any],
) -> Any:
    value = state.activation if activation is None else activation
    factor = _factor(value, state)
    encoded = {k: _repeat(v, factor) for k, v in state.encoded.items()}
    at_boundary = state.site.kind == "resid_post" and state.skip > 0
    watcher = PassWatcher(model)
    with ExitStack() as stack:
        watcher.start()
        stack.callback(watcher.stop)
        if tower is not None and state.skip:
            entering = value if at_boundary else _repeat(state.stream, factor)
            stack.enter_context(_skipped(model, tower, state, entering))
        if not at_boundary and activation is not None:
            handle = attach(
                model.module, state.site, lambda x: value.to(x), batch=lambda: watcher.of(state.site).batch
            )
            stack.callback(handle.remove)
        stack.enter_context(torch.set_grad_enabled(grad))
        return model._call(encoded, **_no_cache(model, encoded), **options)


def _factor(value: Tensor, state: SplitState) -> int:
    have, want = value.shape[0], state.activation.shape[0]
    if value.shape[1:] != state.activation.shape[1:] or have % want:
        raise ShapeError(
            f"the activation has shape {list(value.shape)}; at {state.site.name} it must be "
            f"{list(state.activation.shape)}, or a multiple of its batch"
        )
    return have // want


def _repeat(value: Any, factor: int) -> Any:
    if factor == 1 or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.repeat_interleave(factor, dim=0)


@contextmanager
def _skipped(model: Model, tower: Tower, state: SplitState, entering: Tensor | None) -> Iterator[None]:
    """Let the first blocks return at once; the last of them hands on `entering`."""
    assert entering is not None
    if isinstance(state.returned, tuple):
        handed: Any = (entering, *state.returned[1:])
    else:
        handed = entering
    replaced: list[nn.Module] = []
    try:
        for i in range(state.skip):
            block = find(model.module, join(tower.blocks, str(i)))
            assert block is not None
            if "forward" in block.__dict__:
                raise InputError(f"block {i} is being read at its attention; split the model outside that")
            block.__dict__["forward"] = lambda *args, **kwargs: handed
            replaced.append(block)
        yield
    finally:
        for block in replaced:
            del block.__dict__["forward"]


def _no_cache(model: Model, encoded: dict[str, Any]) -> dict[str, Any]:
    from actlas.core.model import _takes_cache

    return {"use_cache": False} if _takes_cache(model.module) and "use_cache" not in encoded else {}
