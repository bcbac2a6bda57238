"""Bit operations of a network: multiply-adds times the bits of both factors.

    BitOps = sum over layers of MACs * b_w * b_a

The multiply-adds are counted on the tensors that really flow (`measure.opcount`). A layer says its widths
with an attribute `bits` (both), or `weight_bits` and `activation_bits`, on itself or on a module around it; a
layer that says nothing counts with 32 bits. Quantised linear layers of `core.quant_linear` say them through
their formats.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.measurement import Measurement
from actlas.core.quant_linear import QuantLinear
from actlas.measure.opcount import count_operations

FLOAT_BITS = 32


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """Return the bits of a module's weights and activations, or `None` if it says nothing."""
    if isinstance(module, QuantLinear):
        return module.spec.bits, FLOAT_BITS if module.act_spec is None else module.act_spec.bits
    both = getattr(module, "bits", None)
    w, a = (getattr(module, n, both) for n in ("weight_bits", "activation_bits"))
    if isinstance(w, int) or isinstance(a, int):
        return w if isinstance(w, int) else FLOAT_BITS, a if isinstance(a, int) else FLOAT_BITS
    return None


def bit_operations(module: nn.Module, *args: Any, **kwargs: Any) -> Measurement:
    """Run a network once and count its bit operations.

    Args:
        module: the network.
        *args, **kwargs: its inputs.

    Returns:
        `bit-operations`; its details hold the multiply-adds by widths, and operators that could not be
        counted.
    """
    counts, _ = count_operations(module, args, kwargs)
    known = {name: widths_of(part) for name, part in module.named_modules()}
    total, by_width, unknown = 0, dict[str, int](), set[str]()
    for entry in counts:
        if not entry.counted:
            unknown.add(entry.op)
            continue
        w, a = _nearest(entry.module, known)
        total += entry.macs * w * a
        by_width[f"{w}x{a}"] = by_width.get(f"{w}x{a}", 0) + entry.macs
    return Measurement(
        "bit-operations",
        float(total),
        "bit operations",
        1,
        better="lower",
        note=f"not counted: {', '.join(sorted(unknown))}" if unknown else "",
        details={"macs": by_width},
    )


def _nearest(name: str, known: dict[str, tuple[int, int] | None]) -> tuple[int, int]:
    while True:
        found = known.get(name)
        if found is not None:
            return found
        if not name:
            return FLOAT_BITS, FLOAT_BITS
        name = name.rpartition(".")[0]
