"""ActQuantizer: activations on an integer grid, with ranges for a tensor, slices of channels, channels or
timesteps.

    q = clip(round(x / s) + z, 0, 2^b - 1),      x_hat = s (q - z),      z an integer, so that 0 stays 0

    quantizer = ActQuantizer(8, channels=64)                   # one range
    quantizer = ActQuantizer(8, segments=(64, 32))             # a range for each half of a concatenation
    quantizer = ActQuantizer(4, segments=(1,) * 64)            # a range for each channel
    quantizer = ActQuantizer(4, channels=64, times=(199, 100, 0))      # a range for each timestep
    quantizer.calibrate(x)                                     # or set_range(low, high)

A *segment* is a run of neighbouring channels that share a range. With `times`, a row of the batch takes the
range of the calibrated timestep nearest to its own (`core.timestep`). With `knee`, values are bent before
rounding and bent back after it (LogNP polishing, QuartDepth), which gives small values finer steps:

    Phi(x) = sign(x) (log2(|x| + a) - log2 a),           Phi^-1(u) = sign(u) a (2^|u| - 1)

The forward pass is differentiable: straight through for x inside the range, and as in LSQ for the scales,
which are parameters that do not ask for a gradient unless somebody sets them to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.numbers import QuantSpec, lp_search, params_of, quantize
from actlas.core.polish import depolish, knee_of, polish
from actlas.core.swap import register_module
from actlas.core.timestep import current_timestep

_TINY = 1e-8
_MOST = 1 << 14


@register_module
class ActQuantizer(nn.Module):
    """See the module's text.

    Args:
        bits: 2 to 8.
        channels: of the activation; with `segments`, their sum.
        segments: sizes of the runs of channels that share a range; default all channels.
        axis: where the channels are: 1 for images `[batch, channels, ...]`, -1 for rows of features.
        times: timesteps with a range of their own; default none.
        polished: bend values before rounding; the knees come from `calibrate` or are set.
        dynamic: take the range from each row of the batch as it comes (no calibration, no timesteps).

    Raises:
        InputError: sizes that do not fit together.
    """

    def __init__(
        self,
        bits: int,
        channels: int | None = None,
        *,
        segments: Sequence[int] | None = None,
        axis: int = 1,
        times: Sequence[int] | None = None,
        polished: bool = False,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        if segments is None and channels is None:
            raise InputError("an activation quantiser needs the number of channels, or segments of them")
        sizes = tuple(int(s) for s in (segments or (channels or 0,)))
        if any(s < 1 for s in sizes) or (channels is not None and sum(sizes) != channels):
            raise InputError(f"segments {list(sizes)} do not make {channels} channels")
        if not 2 <= bits <= 8:
            raise InputError(f"activations have 2 to 8 bits here, not {bits}")
        if axis not in (1, -1):
            raise InputError(f"the channels' axis is {axis}; it must be 1 or -1")
        if times is not None and (not len(times) or dynamic):
            raise InputError("a range for each timestep needs timesteps, and ranges that are calibrated")
        self.bits, self.segments, self.axis, self.dynamic = int(bits), sizes, axis, dynamic
        self.spec = QuantSpec(self.bits, granularity="channel")
        rows = len(times) if times is not None else 1
        self.scale = nn.Parameter(torch.ones(rows, len(sizes)), requires_grad=False)
        self.register_buffer("zero", torch.zeros(rows, len(sizes)))
        self.register_buffer("times", None if times is None else torch.tensor([int(t) for t in times]))
        self.register_buffer("knee", torch.ones(sum(sizes)) if polished else None)
        self.register_buffer("ready", torch.tensor(dynamic))

    zero: Tensor
    times: Tensor | None
    knee: Tensor | None
    ready: Tensor

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return sum(self.segments)

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "bits": self.bits,
            "segments": list(self.segments),
            "axis": self.axis,
            "times": None if self.times is None else [0] * len(self.times),
            "polished": self.knee is not None,
            "dynamic": self.dynamic,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ActQuantizer:
        """Build an empty one of these sizes."""
        return cls(**config)

    # -- ranges ---------------------------------------------------------------------------------

    def set_range(self, low: Tensor, high: Tensor, time: int | None = None) -> None:
        """Set the ends of the range (in polished units), one for each segment.

        Args:
            low, high: `[segments]`.
            time: index of the timestep; default all of them.

        Raises:
            NonFiniteError: NaN or infinite ends.
        """
        found = params_of(low.reshape(-1, 1), self.spec, low.reshape(-1, 1), high.reshape(-1, 1), "the range")
        assert found.zero is not None
        rows = slice(None) if time is None else slice(time, time + 1)
        with torch.no_grad():
            self.scale[rows] = found.scale.reshape(1, -1).to(self.scale)
            self.zero[rows] = found.zero.reshape(1, -1).to(self.zero)
            self.ready.fill_(True)

    @torch.no_grad()
    def calibrate(
        self, x: Tensor, t: Tensor | None = None, *, rule: str = "lp", percentile: float = 95.0
    ) -> None:
        """Set the ranges (and knees) from a batch of activations.

        Args:
            x: activations, `[batch, channels, ...]` or `[batch, ..., channels]`.
            t: the timestep of each row, `[batch]`; needed with `times`. A calibrated timestep takes the rows
                that are nearest to it.
            rule: `"minmax"`, or `"lp"`: the range, shrunk in steps of 1%, with the least L_2.4 error.
            percentile: of the knees.

        Raises:
            InputError: an empty batch, no rows for a timestep, or an unknown rule.
            NonFiniteError: NaN or infinite activations.
        """
        if rule not in ("lp", "minmax"):
            raise InputError(f"there is no range rule {rule!r}; there are lp and minmax")
        if x.numel() == 0:
            raise InputError("no activations to calibrate on; the calibration data never reached this place")
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("the activations to calibrate on hold NaN or infinite values")
        self._check(x)
        if self.dynamic:
            return
        if self.knee is not None:
            self.knee.copy_(knee_of(x.movedim(self.axis, 0).flatten(1), percentile))
        if self.times is None:
            self._fit(x, None, rule)
            return
        if t is None or len(t) != len(x):
            raise InputError("ranges for timesteps are calibrated with the timestep of every row")
        nearest = self._nearest(t)
        for i, time in enumerate(self.times.tolist()):
            rows = (nearest == i).nonzero().flatten()
            if not len(rows):
                raise InputError(
                    f"no calibration data is nearest to timestep {time}; leave it out of the table"
                )
            self._fit(x[rows], i, rule)

    @torch.no_grad()
    def start_learning(self, x: Tensor) -> None:
        """Begin as LSQ does: around 0, with the scale `2 mean|x| / sqrt(Q_p)` of each segment; it then
        learns.
        """
        self._check(x)
        most = 2 ** (self.bits - 1) - 1
        parts = x.movedim(self.axis, 0).flatten(1).float().split(self.segments)
        scale = torch.stack([2 * p.abs().mean() / most**0.5 for p in parts])
        self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)).expand_as(self.scale))
        self.zero.fill_(2 ** (self.bits - 1))
        self.ready.fill_(True)
        self.scale.requires_grad_(True)

    def _fit(self, x: Tensor, time: int | None, rule: str) -> None:
        flat = x.movedim(self.axis, 0).flatten(1).float()
        knee = None if self.knee is None else self.knee.unsqueeze(1).expand(flat.shape)
        if len(set(self.segments)) == 1:  # all at once
            n = len(self.segments)
            parts = [(flat.reshape(n, -1), None if knee is None else knee.reshape(n, -1))]
        else:
            rows = flat.split(self.segments)
            knees = [None] * len(rows) if knee is None else list(knee.split(self.segments))
            parts = [
                (p.reshape(1, -1), None if k is None else k.reshape(1, -1))
                for p, k in zip(rows, knees, strict=True)
            ]
        ends = torch.cat([self._ends(p, k, rule) for p, k in parts])
        self.set_range(ends[:, 0], ends[:, 1], time)

    def _ends(self, values: Tensor, knee: Tensor | None, rule: str) -> Tensor:
        """Return the ends of the range of each row, `[rows, 2]`, in bent units where there are knees."""
        bent = values if knee is None else polish(values, knee)
        ends = torch.stack(bent.aminmax(dim=1), 1)
        if rule == "minmax":
            return ends
        step = values.shape[1] // _MOST + 1  # a sample for the search; the ends are those of all values
        bent, knee = bent[:, ::step], None if knee is None else knee[:, ::step]
        if knee is None:
            found = lp_search(torch.cat([bent, ends], 1), self.spec)
            assert found.zero is not None
            top = 2**self.bits - 1
            return torch.cat([-found.scale * found.zero, found.scale * (top - found.zero)], 1)
        want = depolish(bent, knee)
        best, least = ends, torch.full((len(ends),), torch.inf)
        for i in range(80):  # as lp_search, with the error of the values that are bent back
            tried = ends * (1 - 0.01 * i)
            params = params_of(bent, self.spec, tried[:, :1], tried[:, 1:])
            error = (depolish(quantize(bent, self.spec, params), knee) - want).abs().pow(2.4).sum(1)
            better = error < least
            best, least = torch.where(better.unsqueeze(1), tried, best), torch.where(better, error, least)
        return best

    # -- rounding -------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, of the same shape and dtype.

        Raises:
            InputError: it was never calibrated, or there is no timestep.
        """
        self._check(x)
        if not bool(self.ready):
            raise InputError("an activation quantiser was never calibrated; call calibrate(x) or set_range")
        knee = None if self.knee is None else self._over_channels(self.knee, x)
        y = x if knee is None else polish(x, knee)
        scale, zero = self._ranges(y)
        top = 2**self.bits - 1
        code = (_rounded(y / scale) + zero).clamp(0, top)
        y = (code - zero) * scale
        return (y if knee is None else depolish(y, knee)).to(x.dtype)

    def _ranges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, shaped to broadcast against x."""
        if self.dynamic:
            parts = x.detach().movedim(self.axis, 1).flatten(2) if x.ndim > 2 else x.detach().unsqueeze(-1)
            low = torch.stack([p.flatten(1).amin(1) for p in parts.split(self.segments, 1)], 1).clamp_max(0)
            high = torch.stack([p.flatten(1).amax(1) for p in parts.split(self.segments, 1)], 1).clamp_min(0)
            scale = ((high - low) / (2**self.bits - 1)).clamp_min(_TINY)
            return self._by_row(scale, x), self._by_row((-low / scale).round(), x)
        scale = self.scale.clamp_min(_TINY)
        if self.times is None:
            return self._by_row(scale, x), self._by_row(self.zero, x)
        index = self._nearest(current_timestep(len(x), "an activation quantiser").to(self.times.device))
        return self._by_row(scale[index], x), self._by_row(self.zero[index], x)

    def _by_row(self, values: Tensor, x: Tensor) -> Tensor:
        """Shape `[rows or 1, segments]` to broadcast against x."""
        if len(self.segments) > 1:
            values = values.repeat_interleave(torch.tensor(self.segments, device=values.device), 1)
        shape = [1] * x.ndim
        shape[0], shape[self.axis] = values.shape
        return values.reshape(shape)

    def _over_channels(self, values: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = len(values)
        return values.reshape(shape)

    def _nearest(self, t: Tensor) -> Tensor:
        assert self.times is not None
        return (t.reshape(-1, 1).float() - self.times.float()).abs().argmin(1)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[self.axis] != self.channels:
            raise ShapeError(
                f"activations of shape {list(x.shape)} reach a quantiser of {self.channels} channels "
                f"on axis {self.axis}"
            )


def _rounded(x: Tensor) -> Tensor:
    """Round, straight through."""
    return x + (x.round() - x).detach()
