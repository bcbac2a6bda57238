"""Any network as a list of blocks: which there are, in which order they run, what goes into them and out.

    for path in blocks_of(network, calls[:1]):
        data = capture(student, path, calls)          # inputs from the network as it is now
        target = capture(teacher, path, calls)        # outputs of the original

A block is a module that holds layers (linear maps, 2-d convolutions) and is no mere container: the network
itself, lists and sequences, and what holds a list of blocks are looked into; single layers there are blocks
of their own. So a U-Net gives its residual blocks, its attention and its single convolutions, and a
transformer its layers (the grouping of BRECQ, Li et al. 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.layout import find
from actlas.core.timestep import at_timestep
from actlas.core.trace import StopForward

Call = tuple[tuple[Any, ...], dict[str, Any]]


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear map or a 2-d convolution."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D"


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear maps and 2-d convolutions by path.

    Raises:
        InputError: there is none.
    """
    found = {n: m for n, m in network.named_modules() if n and is_layer(m)}
    if not found:
        raise InputError(f"{type(network).__name__} has no linear map and no 2-d convolution to quantise")
    return found


def blocks_of(network: nn.Module, call: Call) -> list[str]:
    """Return the paths of the blocks in the order in which they run.

    Args:
        network: any module.
        call: arguments of one forward pass, to see the order.

    Raises:
        InputError: no layer runs.
    """
    candidates = dict(_visit("", network))
    order: list[str] = []
    handles = []
    for path, module in candidates.items():

        def note(m: nn.Module, args: Any, path: str = path) -> None:
            if path not in order:
                order.append(path)

        handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            network(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise InputError(f"no layer of {type(network).__name__} ran on the calibration data")
    return order


def _visit(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if path and is_layer(module):
        return [(path, module)]
    if not any(is_layer(m) for m in module.modules()):
        return []
    lists = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    repeated = any(
        isinstance(m, nn.ModuleList) and any(is_layer(x) for x in m.modules()) for m in module.modules()
    )
    if path and not isinstance(module, lists) and not repeated:
        return [(path, module)]
    found = []
    for name, child in module.named_children():
        found += _visit(f"{path}.{name}" if path else name, child)
    return found


@dataclass
class BlockData:
    """What goes into a block and comes out, for all calibration data.

    Attributes:
        calls: arguments of the block, one entry for each call of the network.
        outputs: the block's output in each.
        times: the timestep of every row of each call, or `None`.
    """

    calls: list[Call]
    outputs: list[Tensor]
    times: list[Tensor | None]

    def batch(self, size: int, generator: torch.Generator) -> tuple[int, Tensor]:
        """Draw a call and rows of it."""
        i = int(torch.randint(len(self.calls), (), generator=generator))
        n = len(self.outputs[i])
        return i, torch.randperm(n, generator=generator)[:size]

    def run(self, block: nn.Module, i: int, rows: Tensor | None = None) -> Tensor:
        """Run a block on (rows of) a call."""
        args, kwargs = self.calls[i]
        t = self.times[i]
        n = len(self.outputs[i])
        if rows is not None:
            args = tuple(_rows(a, rows, n) for a in args)
            kwargs = {k: _rows(v, rows, n) for k, v in kwargs.items()}
            t = None if t is None else t[rows]
        if t is None:
            return first_tensor(block(*args, **kwargs))
        with at_timestep(t):
            return first_tensor(block(*args, **kwargs))

    def target(self, i: int, rows: Tensor | None = None) -> Tensor:
        """Return (rows of) the output of a call."""
        return self.outputs[i] if rows is None else self.outputs[i][rows]


def _rows(value: Any, rows: Tensor, n: int) -> Any:
    """Take rows of what has one entry a row of the batch; keep the rest."""
    if isinstance(value, Tensor) and value.ndim and len(value) == n:
        return value[rows]
    if isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
        return tuple(_rows(v, rows, n) for v in value)
    return value


@torch.no_grad()
def capture(
    network: nn.Module, path: str, calls: Sequence[Call], times: Sequence[Tensor | None] | None = None
) -> BlockData:
    """Run a network up to a block on all calls; keep what the block gets and gives.

    Raises:
        InputError: there is no such module, or it never ran.
    """
    block = find(network, path)
    if block is None:
        raise InputError(f"{type(network).__name__} has no module {path!r}")
    held: list[Call] = []
    outputs: list[Tensor] = []

    def keep(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        held.append((tuple(_detached(a) for a in args), {k: _detached(v) for k, v in kwargs.items()}))
        outputs.append(first_tensor(output).detach().clone())
        raise StopForward

    handle = block.register_forward_hook(keep, with_kwargs=True)
    try:
        for args, kwargs in calls:
            try:
                network(*args, **kwargs)
            except StopForward:
                continue
            raise InputError(f"{path} did not run on the calibration data")
    finally:
        handle.remove()
    if not outputs:
        raise InputError("there is no calibration data; give at least one batch")
    return BlockData(held, outputs, list(times) if times is not None else [None] * len(outputs))


def first_tensor(output: Any) -> Tensor:
    """Return a module's output, or the first of several."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise InputError(f"a block gives a {type(found).__name__}; a tensor (first) is needed")
    return found


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def replaced(network: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a deep copy of a network with modules put in the place of others."""
    made = copy.deepcopy(network)
    put(made, modules)
    return made.eval()


def put(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules at paths of a network."""
    for path, module in modules.items():
        parent_path, _, name = path.rpartition(".")
        parent = find(network, parent_path) if parent_path else network
        if parent is None or not hasattr(parent, name):
            raise InputError(f"{type(network).__name__} has no module {path!r}")
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            parent[int(name)] = module
        else:
            setattr(parent, name, module)


def observe(
    network: nn.Module, paths: Sequence[str], calls: Sequence[Call], see: Callable[[str, Tensor, int], object]
) -> None:
    """Run a network on all calls; hand over the input of each of some modules, with the call's number."""
    handles = []
    at = [0]
    for path in paths:
        module = find(network, path)
        assert module is not None

        def look(m: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            see(path, args[0].detach(), at[0])

        handles.append(module.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            for at[0], (args, kwargs) in enumerate(calls):
                network(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
