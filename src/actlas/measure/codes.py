"""Activation codes: which units are on, as a hash of the input.

    ActivationCode(model, sites="relu", threshold=None)       .fit(x)  .encode(x) -> packed bits  .bits(x)

What is measured on codes is in `code_measures`.

The on/off pattern of a network's rectifiers is a binary code of its input, `c(x) = [post-activation >
0]` over all units; it also names the linear region that `x` lies in. In trained networks of sufficient
width nearly every sample has a code of its own (*redundancy ratio*, samples minus distinct codes over
samples, near 0), and codes of one class are near each other in Hamming distance (*categorisation*:
K-means, K-nearest-neighbours and logistic regression on codes come close to the network's accuracy).

Units that are constant over the fitted (training) inputs carry nothing and are dropped; the released
code drops them over training and test data jointly, which leaks a little. Smooth activations have no
canonical bit: name their site and a threshold (for a gated language-model MLP, the sign of the gate
pre-activation, `blocks.i.mlp.gate` at 0).

Source: He, Lei et al. 2021, "Neural networks behave as hash encoders: an empirical study", sections
3-4. Differences: K-means clusters are matched to labels one to one (Hungarian) and purity is given
too, where the released code relabels greedily in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from actlas.core.errors import InputError, NonFiniteError, SiteError

if TYPE_CHECKING:
    from actlas.core.model import Model

Packed = NDArray[np.uint8]
Bits = NDArray[np.bool_]


class _Rectifiers(TorchDispatchMode):
    """Collects the outputs of every rectifier, whether a module or a function calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        clamps = name in ("clamp_min", "clamp_min_", "clamp", "clamp_", "hardtanh", "hardtanh_")
        if name in ("relu", "relu_") or (clamps and len(args) > 1 and args[1] == 0):
            self.outputs.append(out > 0)  # now, because later operators may write in place
        return out


class ActivationCode:
    """Reads inputs as bit-packed activation codes.

    Args:
        model: a Model or any module.
        sites: `"relu"` for every rectifier in the order in which they run, or a site pattern of a
            Model, or names of submodules of a plain module.
        threshold: a unit is on where its activation is greater. Must be given with `sites` other than
            `"relu"`, because smooth activations have no canonical zero.
        batch: inputs per forward pass.

    Attributes:
        kept: indices of the units in use after `fit`; all before it (`None`).
        units: how many units the model has at these sites (known after the first pass).
    """

    def __init__(
        self,
        model: Model | nn.Module,
        sites: str | Sequence[str] = "relu",
        threshold: float | None = None,
        *,
        batch: int = 256,
    ) -> None:
        if sites != "relu" and threshold is None:
            raise InputError(f"sites {sites!r} need a threshold: at which value is a unit on?")
        self.model, self.sites, self.batch = model, sites, batch
        self.threshold = 0.0 if threshold is None else threshold
        if sites == "relu" and self.threshold != 0:
            raise InputError(f"rectifiers are on above 0; name the sites to use threshold {threshold}")
        self.kept: NDArray[np.int64] | None = None
        self.units: int | None = None

    def fit(self, x: Any) -> ActivationCode:
        """Keep the units that are neither always on nor always off over `x`; returns itself."""
        ever: Any = None
        always: Any = None
        for bits in self._chunks(x):
            ever = bits.any(0) if ever is None else ever | bits.any(0)
            always = bits.all(0) if always is None else always & bits.all(0)
        if ever is None:
            raise InputError("no inputs to fit the code on: give at least one")
        self.kept = np.flatnonzero(ever & ~always)
        return self

    @property
    def width(self) -> int:
        """How many bits a code has."""
        if self.kept is not None:
            return len(self.kept)
        if self.units is None:
            raise InputError("the code's width is known after fit or the first encode")
        return self.units

    def encode(self, x: Any) -> Packed:
        """Return the codes, uint8 [n, ceil(width / 8)], eight units a byte (`numpy.packbits`).

        Args:
            x: inputs of the model along the first axis: a tensor, or whatever a Model encodes.

        Raises:
            NonFiniteError: NaN among the activations.
        """
        parts = [np.packbits(self._kept(bits), axis=1) for bits in self._chunks(x)]
        if not parts:
            raise InputError("no inputs to encode: give at least one")
        return np.concatenate(parts)

    def bits(self, x: Any) -> Bits:
        """Return the codes unpacked, bool [n, width]."""
        return unpack(self.encode(x), self.width)

    def _kept(self, bits: Bits) -> Bits:
        return bits if self.kept is None else bits[:, self.kept]

    def _chunks(self, x: Any) -> Iterator[Bits]:
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch]
            bits = self._read(part)
            self.units = bits.shape[1]
            yield bits

    def _read(self, x: Any) -> Bits:
        module = self.model if isinstance(self.model, nn.Module) else self.model.module
        n = len(x)
        if self.sites == "relu":
            with torch.no_grad(), _Rectifiers() as seen:
                _run(self.model, x)
            found = seen.outputs
            if not found:
                raise SiteError(f"{type(module).__name__} has no rectifiers; name sites and a threshold")
        elif isinstance(self.model, nn.Module):
            found = self._hooked(module, x)
        else:
            trace = self.model.trace(x, self.sites)
            found = [self._on(value) for _, value in trace.items()]
        if any(t.shape[0] != n for t in found):
            bad = next(t for t in found if t.shape[0] != n)
            raise SiteError(f"an activation of shape {list(bad.shape)} does not have the {n} inputs first")
        return torch.cat([t.reshape(n, -1) for t in found], 1).cpu().numpy()

    def _on(self, value: Tensor) -> Tensor:
        if not torch.isfinite(value).all():
            raise NonFiniteError("activations hold NaN or infinity; a code needs finite values")
        return value > self.threshold

    def _hooked(self, module: nn.Module, x: Any) -> list[Tensor]:
        names = [self.sites] if isinstance(self.sites, str) else list(self.sites)
        found: list[Tensor] = []
        parts = dict(module.named_modules())
        unknown = [name for name in names if name not in parts]
        if unknown:
            raise SiteError(f"{type(module).__name__} has no submodule {unknown[0]!r}")
        handles = [
            parts[name].register_forward_hook(lambda _m, _a, out: found.append(self._on(out)))
            for name in names
        ]
        try:
            with torch.no_grad():
                module(x)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _run(model: Model | nn.Module, x: Any) -> Any:
    return model(x) if isinstance(model, nn.Module) else model.forward(x)


def unpack(codes: Packed, width: int) -> Bits:
    """Return packed codes as bool [n, width]."""
    return np.unpackbits(codes, axis=1, count=width).astype(bool)
