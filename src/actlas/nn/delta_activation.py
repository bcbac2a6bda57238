"""Delta activation layers: a network for video that learns to change little from frame to frame.

    q = theta round(x / theta)                                       theta = |theta_raw|, learned
    penalty = rate * n_out * mean over t >= 1 of |q_t - q_{t-1}|     added to the loss
    z_t = z_{t-1} + W (q_t - q_{t-1}),   z_{-1} = bias               delta inference (`DeltaStream`)

In training the output is q itself; only the penalty sees time. In inference a linear or convolutional layer
keeps its last result and adds W times the change, so zeros of the change cost nothing, and the result is that
of the frame alone, up to rounding. Gradients pass through round unchanged. The released code flips the sign
of the gradient to theta through the multiplication, `dL/dtheta = -sum g round(x / theta)`, so that the
penalty enlarges steps instead of amplitudes; `theta_grad="lsq"` is the usual one, `sum g (round(x / theta) -
x / theta)`.

Source: Yousefzadeh and Sifalakis 2021, "Training for temporal sparsity in deep neural networks, application
    in video
processing" (arXiv 2107.07305), and the released layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.layout import find
from actlas.core.swap import register_module

ThetaGrad = Literal["released", "lsq"]
_SMALLEST = 1e-6


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, released: bool) -> Tensor:
        ctx.save_for_backward(x, theta)
        ctx.released = released
        return theta * torch.round(x / theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = grads
        x, theta = ctx.saved_tensors
        steps = torch.round(x / theta)
        to_theta = -g * steps if ctx.released else g * (steps - x / theta)
        return g, to_theta.sum_to_size(theta.shape), None


@register_module
class DeltaActivation(nn.Module):
    """Quantise `[batch, time, ...]` with a learned step, and penalise change over time.

    Args:
        theta: the step to begin with.
        features: shape of the learned steps, which broadcasts against a frame: `()` for one a layer,
            `(channels, 1, 1)` for one a channel of images, the frame's own shape for one a neuron.
        rate: of the penalty; 0 only quantises.
        fan_out: n_out, how many weights a value meets in the next layer.
        theta_grad: see the module docstring.

    Attributes:
        penalty: of the last forward pass with gradients; `temporal_penalty(model)` adds them up.

    Raises:
        InputError: a step, rate or fan-out that is not positive, or an unknown `theta_grad`.
    """

    def __init__(
        self,
        theta: float = 0.1,
        features: tuple[int, ...] = (),
        *,
        rate: float = 0.0,
        fan_out: float = 1.0,
        theta_grad: ThetaGrad = "released",
    ) -> None:
        super().__init__()
        if not 0 < theta < float("inf") or not 0 <= rate < float("inf") or fan_out <= 0:
            raise InputError(f"theta={theta:g}, rate={rate:g}, fan_out={fan_out:g}: all must be positive")
        if theta_grad not in ("released", "lsq"):
            raise InputError(f"theta_grad is {theta_grad!r}; it must be 'released' or 'lsq'")
        self.theta_raw = nn.Parameter(torch.full(tuple(features), float(theta)))
        self.rate, self.fan_out, self.theta_grad = rate, fan_out, theta_grad
        self.penalty: Tensor | None = None

    @property
    def theta(self) -> Tensor:
        """The steps, positive."""
        return self.theta_raw.abs().clamp_min(_SMALLEST)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3:
            raise ShapeError(f"DeltaActivation reads [batch, time, ...]; it was given {list(x.shape)}")
        q: Tensor = _Quantise.apply(x, self.theta, self.theta_grad == "released")
        self.penalty = None
        if torch.is_grad_enabled() and self.rate and q.shape[1] > 1:
            self.penalty = self.rate * self.fan_out * (q[:, 1:] - q[:, :-1]).abs().mean()
        return q

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "penalty": None}

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            "features": list(self.theta_raw.shape),
            "rate": self.rate,
            "fan_out": self.fan_out,
            "theta_grad": self.theta_grad,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DeltaActivation:
        """Build one with these settings."""
        return cls(**{**config, "features": tuple(config["features"])})


def temporal_penalty(module: nn.Module) -> Tensor:
    """Return the sum of the penalties of all delta activations, at their last forward pass.

    Raises:
        InputError: there is none, or none with a rate has run with gradients.
    """
    found = [m.penalty for m in module.modules() if isinstance(m, DeltaActivation) and m.penalty is not None]
    if not found:
        raise InputError(
            "no delta activation with a rate has run with gradients; call the model on clips first"
        )
    return torch.stack(found).sum()


class DeltaLayer(nn.Module):
    """A linear or convolutional layer that is given frame after frame and multiplies only what changed.

    Args:
        layer: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        threshold: changes of at most this are left out, and made up for when they have grown (0: exact).
        sync: recompute from the whole frame every so many frames, against rounding; 0 never.

    Attributes:
        multiplied, total: entries of the input that had to be multiplied, of all; first frames count whole.
    """

    def __init__(self, layer: nn.Module, *, threshold: float = 0.0, sync: int = 0) -> None:
        super().__init__()
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise InputError(
                f"{type(layer).__name__} has no delta form; linear and convolutional layers have"
            )
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode != "zeros":
            raise InputError(f"padding mode {layer.padding_mode!r} has no delta form here; 'zeros' has")
        if threshold < 0 or sync < 0:
            raise InputError(f"threshold={threshold:g}, sync={sync}: neither may be negative")
        self.layer, self.threshold, self.sync = layer, threshold, sync
        self.multiplied = self.total = 0
        self.reset()

    def reset(self) -> None:
        """Forget the clip; the next frame is a first one."""
        self.last: Tensor | None = None
        self.state: Tensor | None = None
        self.frames = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for one frame."""
        if self.last is not None and x.shape != self.last.shape:
            raise ShapeError(
                f"this clip has frames of shape {list(self.last.shape)}, and one of {list(x.shape)} came; "
                "call reset() between clips"
            )
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("a frame holds NaN or infinity, which would stay in the state for ever")
        fresh = self.last is None or (self.sync > 0 and self.frames % self.sync == 0)
        if fresh or self.last is None or self.state is None:
            self.multiplied += int(torch.count_nonzero(x))
            self.last, self.state = x.clone(), self.layer(x)
        else:
            delta = x - self.last
            if self.threshold:
                delta = torch.where(delta.abs() > self.threshold, delta, torch.zeros_like(delta))
            self.multiplied += int(torch.count_nonzero(delta))
            self.last = self.last + delta if self.threshold else x.clone()
            self.state = self.state + self._without_bias(delta)
        self.total += x.numel()
        self.frames += 1
        return self.state

    def _without_bias(self, delta: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(delta, layer.weight)
        assert isinstance(layer, nn.modules.conv._ConvNd)
        return layer._conv_forward(delta, layer.weight, None)  # type: ignore[operator, no-any-return, unused-ignore]


class DeltaStream:
    """Runs a frame-by-frame network on changes: its linear and convolutional layers become delta layers.

        with DeltaStream(network) as stream:
            for frame in clip: y = network(frame)
        stream.multiplied_rate

    Args:
        module: a network that takes one frame.
        threshold, sync: see `DeltaLayer`.
        skip: paths of layers that stay as they are.
    """

    def __init__(
        self, module: nn.Module, *, threshold: float = 0.0, sync: int = 0, skip: tuple[str, ...] = ()
    ) -> None:
        self.module = module
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.layers = {
            n: DeltaLayer(m, threshold=threshold, sync=sync)
            for n, m in module.named_modules()
            if n and isinstance(m, kinds) and n not in skip
        }
        if not self.layers:
            raise InputError(f"{type(module).__name__} has no linear or convolutional layer")
        self._open: Any = None

    def reset(self) -> None:
        """Begin a new clip."""
        for layer in self.layers.values():
            layer.reset()

    @property
    def multiplied_rate(self) -> float:
        """Share of layer inputs that had to be multiplied, over all frames so far."""
        total = sum(layer.total for layer in self.layers.values())
        return sum(layer.multiplied for layer in self.layers.values()) / max(1, total)

    def __enter__(self) -> DeltaStream:
        self._open = self._swapped()
        self._open.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self.reset()
        originals = {}
        try:
            for path, layer in self.layers.items():
                parent, _, name = path.rpartition(".")
                owner = find(self.module, parent)
                assert owner is not None
                originals[path] = (owner, name, layer.layer)
                setattr(owner, name, layer)
            yield
        finally:
            for owner, name, original in originals.values():
                setattr(owner, name, original)
