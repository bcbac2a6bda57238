"""Which linear map reads what: the dataflow of one small forward pass, without knowing the architecture.

Every tensor of a pass that autograd records knows which operation made it, so the recorded graph is walked
backwards from the inputs of norms and linear maps until a norm, a linear map or a parameter is met:

    plain walk      through views and copies only: the very same numbers
    additive walk   through sums too (and products with a constant): what was added into a residual stream
    any walk        through every operation: what the value depends on at all

Parameters that are used without a module of their own (position tables, class tokens) are met as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.layout import plain_module
from actlas.core.model import Model
from actlas.core.transforms.norms import NormUse, norm_use

_PLAIN = frozenset(
    f"{name}Backward0"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Expand", "Permute"),
        *("Transpose", "Slice", "Unsqueeze", "Squeeze", "Select", "NativeDropout", "AsStrided", "T"),
    )
) | {"SqueezeBackward1", "NativeDropoutBackward0"}
_SUMS = frozenset({"AddBackward0", "CatBackward0", "MulBackward0", "DivBackward0", "IndexBackward0"})
_TABLE = "EmbeddingBackward0"


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map with a two-dimensional weight (GPT-2's `Conv1D` too)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@dataclass
class Sources:
    """Where a walk ended: module paths, parameter names, and operations that it does not pass."""

    modules: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    blocked: set[str] = field(default_factory=set)


@dataclass
class Flow:
    """What was recorded.

    Attributes:
        order: paths of linear maps and norms in the order in which they ran.
        linears: linear maps by path.
        norms: how each norm uses its weight, by path.
        shapes: shape of what each of them returned.
    """

    order: list[str] = field(default_factory=list)
    linears: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, NormUse] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    _made: dict[Any, str] = field(default_factory=dict)
    _read: dict[str, Any] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)

    def read(self, path: str, *, sums: bool = False, anything: bool = False) -> Sources:
        """Return the sources of what `path` received.

        Args:
            path: a linear map or norm.
            sums: walk through sums.
            anything: walk through every operation.
        """
        found, seen, stack = Sources(), set(), [self._read.get(path)]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = type(node).__name__
            if node in self._made:
                found.modules.add(self._made[node])
            elif name == "AccumulateGrad":
                found.parameters.add(self._names.get(id(node.variable), "?"))
            elif anything or name in _PLAIN or (sums and name in _SUMS) or (sums and name == _TABLE):
                inputs = [n for n, _ in node.next_functions if n is not None]
                if name in ("MulBackward0", "DivBackward0") and len(inputs) > 1 and not anything:
                    found.blocked.add(name.removesuffix("Backward0").lower())
                    continue
                stack += inputs
            else:
                found.blocked.add(name.removesuffix("Backward0").lower())
        return found


@contextmanager
def _recording(module: nn.Module) -> Iterator[None]:
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def record(model: Model, inputs: Mapping[str, Any]) -> Flow:
    """Run one pass with gradients on and return its dataflow.

    Args:
        model: the model.
        inputs: arguments of the module, e.g. of `probe_inputs`.
    """
    root, flow, handles = plain_module(model.module), Flow(), []
    flow._names = {id(p): n for n, p in root.named_parameters()}

    def hook(path: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = _first(args, kwargs)
            if x is None or not isinstance(output, Tensor):
                return
            if path in flow._read:
                flow.repeated.add(path)
                return
            flow.order.append(path)
            flow.widths[path] = output.shape[-1]
            flow._read[path] = x.grad_fn
            flow._made[output.grad_fn] = path

        return seen

    try:
        for path, part in root.named_modules():
            if is_linear(part):
                flow.linears[path] = part
            elif (use := norm_use(part)) is not None:
                flow.norms[path] = use
            else:
                continue
            handles.append(part.register_forward_hook(hook(path), with_kwargs=True))
        with _recording(root):
            model._call(dict(inputs), **cache_off(root))
    finally:
        for handle in handles:
            handle.remove()
    ran = set(flow.order)
    flow.linears = {p: m for p, m in flow.linears.items() if p in ran}
    flow.norms = {p: m for p, m in flow.norms.items() if p in ran}
    return flow


def cache_off(module: nn.Module) -> dict[str, Any]:
    """Return the argument that keeps a module from making a cache, where it takes it."""
    from actlas.core.layout import forward_parameters

    return {"use_cache": False} if "use_cache" in forward_parameters(module) else {}


def probe_inputs(model: Model, tokens: int = 4, seed: int = 0) -> dict[str, Any]:
    """Return a small input for a model: random tokens; pictures or sound where it has these too.

    Raises:
        InputError: the model's configuration does not say what it reads.
    """
    config = getattr(model.config, "text_config", None) or model.config
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(plain_module(model.module), "main_input_name", "input_ids")
    vocabulary = model.vocab_size
    made: dict[str, Any] = {}
    if kind == "pixel_values":
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            channels = getattr(config, "num_channels", 3)
            made = {kind: torch.randn(1, channels, size, size, generator=generator)}
    elif kind == "input_features" and getattr(config, "num_mel_bins", None):
        frames = 2 * config.max_source_positions
        made = {kind: torch.randn(1, config.num_mel_bins, frames, generator=generator)}
    if vocabulary is not None and kind != "pixel_values":
        tokens = min(tokens, model.context_length or tokens)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, tokens), generator=generator)
        if kind == "input_ids":
            made["input_ids"] = ids
        if getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = ids
    if not made:
        raise InputError(
            f"{model.name} does not say what it reads; give a small input: slots(model, inputs={{...}})"
        )
    return {k: (v.to(model.dtype) if v.is_floating_point() else v).to(model.device) for k, v in made.items()}
