"""The module whose output says how good a rounding of its layers is, kept with its inputs to be run again.

For q, k and v this is the whole attention, for gate and up the whole MLP, for a layer with an input of its
own the layer itself: in general the smallest module that holds all layers that share the input.

    for part in inspect(block):
        base = part.outputs()
        with part.weights({"self_attn.q_proj": rounded, ...}):
            error = (part.outputs() - base).square().mean()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.layout import find, weight_matrix
from actlas.core.two_stream import BlockView
from actlas.quantize.block_inputs import batch_inputs, capped, real_rows


@dataclass
class Inspected:
    """Layers that share an input, and the smallest module that holds them.

    Attributes:
        names: of the layers, relative to the block.
        rows: their input over all calibration tokens, `[n, in]`.
        module: the module.
        calls: arguments of the module in each batch; empty for a single layer, which is run on `rows`.
        masks: real tokens of each batch.
    """

    names: tuple[str, ...]
    rows: Tensor
    module: nn.Module
    linears: dict[str, nn.Module]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Return the module's outputs for all real tokens, `[n, out]`."""
        if not self.calls:
            linear = self.module
            out: Tensor = linear(self.rows)
            return out
        outs = []
        for (args, kwargs), mask in zip(self.calls, self.masks, strict=True):
            result = self.module(*args, **kwargs)
            outs.append(real_rows(result[0] if isinstance(result, (tuple, list)) else result, mask))
        return torch.cat(outs)

    @contextmanager
    def weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let layers have other weights `[out, in]` for a while."""
        before = {name: self.linears[name].weight for name in values}
        try:
            for name, value in values.items():
                layer = self.linears[name]
                flipped = type(layer).__name__ == "Conv1D"
                like = before[name]
                assert isinstance(like, Tensor)
                layer._parameters["weight"] = nn.Parameter(
                    (value.T if flipped else value).to(like.dtype), requires_grad=False
                )
            yield
        finally:
            for name, own in before.items():
                assert isinstance(own, nn.Parameter)
                self.linears[name]._parameters["weight"] = own

    def gram(self, cap: float | None = None) -> Tensor:
        """Return `X^T X` of the rows, float64 `[in, in]`; see `block_inputs.shared_inputs` for the cap."""
        rows = self.rows if cap is None else self.rows * capped(self.rows, cap).unsqueeze(1)
        d = self.rows.shape[1]
        total = torch.zeros(d, d, dtype=torch.float64, device=self.rows.device)
        for part in rows.split(256):
            total += part.T @ part
        return total

    def weight(self, name: str) -> Tensor:
        """Return a layer's weight `[out, in]`, detached, float32 or wider."""
        w = weight_matrix(self.linears[name]).detach()
        return w if w.dtype.itemsize >= 4 else w.float()


@torch.no_grad()
def inspect(block: BlockView, names: Sequence[str]) -> list[Inspected]:
    """Run the block once on all calibration tokens and keep what its layers and their modules receive.

    Args:
        block: as a visitor of `two_stream` gets it.
        names: relative names of the layers.
    """
    found: dict[tuple[str, ...], list[Tensor]] = {}
    batches: dict[tuple[str, ...], list[int]] = {}
    for batch in range(block.n_batches):
        for key, rows in batch_inputs(block, batch, names):
            found.setdefault(key, []).append(rows)
            batches.setdefault(key, []).append(batch)
    holders = {key: _holder(key) for key in found}
    calls = _calls(block, {h for key, h in holders.items() if len(key) > 1})
    out = []
    for key, parts in found.items():
        linears = {name: _find(block.module, name) for name in key}
        if len(key) == 1:
            out.append(Inspected(key, torch.cat(parts), linears[key[0]], linears))
            continue
        holder = holders[key]
        part = Inspected(key, torch.cat(parts), _find(block.module, holder), linears)
        for batch in batches[key]:
            part.calls.append(calls[batch][holder])
            part.masks.append(block.mask(batch))
        out.append(part)
    return out


def _find(root: nn.Module, path: str) -> nn.Module:
    module = find(root, path) if path else root
    assert module is not None
    return module


def _holder(names: Sequence[str]) -> str:
    """Return the path of the smallest module that holds all layers; `""`: the block."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for steps in zip(*parts, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)


def _calls(block: BlockView, holders: set[str]) -> list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    out: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []
    if not holders:
        return out

    def keep(name: str, into: dict[str, Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into[name] = (args, kwargs)

        return hook

    for batch in range(block.n_batches):
        seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        with ExitStack() as stack:
            for name in holders:
                handle = _find(block.module, name).register_forward_pre_hook(
                    keep(name, seen), with_kwargs=True
                )
                stack.callback(handle.remove)
            block.forward(block.hidden(batch)[1], batch)
        out.append(seen)
    return out
