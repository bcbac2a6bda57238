"""QuartDepth: 4-bit weights and activations for networks with heavy-tailed activations, such as depth
estimators.

    edit = quartdepth(model, images, w_bits=4, a_bits=4)

Layer by layer, in the order in which they run, with inputs from the network quantised so far:

1. Polishing: inputs are bent by Phi(x) = sign(x) (log2(|x| + a) - log2 a), with a knee a for each channel
   (the 95th percentile of |x|), rounded evenly and bent back (`core/act_quantizer.py`).
2. Compensation: what the rounded inputs do to the output is repaired in the weight (`compensation.py`).
3. Rounding: AdaRound of the repaired weight under the K-FAC approximation of the Fisher information,
   tr(G D A D^T), with G of the output's gradients when targets are drawn from the network's own predictive
   distribution (a unit Gaussian around the output, or its softmax), so that no labels are needed
   (`adaround.py`).

Polished codes must be turned back by a table before they are multiplied: this does not speed up ordinary
integer hardware. Norms, activation functions and sums stay float; first input and last layer have 8 bits.

Source: Shen et al. 2025, "QuartDepth: Post-Training Quantization for Real-Time Depth Estimation on the Edge".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.layout import find
from actlas.core.network_blocks import Call, capture, first_tensor, layers_of, observe
from actlas.core.progress import progress
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.adaround import kfac_losses, learn_rounding
from actlas.quantize.compensation import columns_of, compensate, output_rows
from actlas.quantize.soft_layers import SoftLayer
from actlas.quantize.soft_network import SoftNetwork, calibrate_acts, soften

if TYPE_CHECKING:
    from actlas.core.model import Model

Predicts = Literal["gaussian", "categorical"]
_ROWS = 4096


def quartdepth_network(
    network: nn.Module,
    calls: Sequence[Call],
    *,
    w_bits: int = 4,
    a_bits: int = 4,
    polish: bool = True,
    compensation: bool = True,
    iterations: int = 300,
    per_channel: bool = True,
    damp: float = 0.01,
    predicts: Predicts = "gaussian",
    lr: float = 1e-2,
    ends_bits: int | None = 8,
    seed: int = 0,
) -> SoftNetwork:
    """Quantise any network of linear maps and convolutions; every step can be left out.

    Args:
        network: the float network.
        calls: calibration data, a batch each.
        w_bits, a_bits: of weights and activations.
        polish, compensation: steps 1 and 2.
        iterations: of AdaRound for each layer; 0 rounds to nearest.
        per_channel: a range for each channel beside its knee; else one range in bent units.
        damp: of the compensation, and of G.
        predicts: what the output is: a mean, or logits.
        lr: of AdaRound.
        ends_bits: bits of the first and the last layer.
        seed: of rows and drawn targets.

    Raises:
        InputError: settings or data that make no sense.
    """
    if not calls:
        raise InputError("there is no calibration data; give at least one batch")
    if predicts not in ("gaussian", "categorical"):
        raise InputError(f"the output predicts {predicts!r}; it must be gaussian or categorical")
    few = (tuple(a[:2] if isinstance(a, Tensor) else a for a in calls[0][0]), calls[0][1])
    soft = soften(
        network,
        few,
        w_bits=w_bits,
        a_bits=a_bits,
        split=False,
        polished=polish,
        per_channel=per_channel,
        ends_bits=ends_bits,
    )
    if not compensation and not iterations:
        calibrate_acts(soft, calls, [None] * len(calls), seed=seed)
        soft.acts_on(True)
        return soft
    calibrate_acts(soft, calls, [None] * len(calls), seed=seed)
    soft.acts_on(True)
    originals = layers_of(network)
    fishers = fisher_factors(network, calls, list(soft.layers), predicts, damp, seed) if iterations else {}
    order: list[str] = []
    observe(
        network, list(soft.layers), calls[:1], lambda p, x, i: order.append(p) if p not in order else None
    )
    with progress("QuartDepth", len(order), "layers") as advance:
        for i, path in enumerate(order):
            layer = soft.layers[path]
            float_in = _inputs(soft.teacher, path, calls, originals[path], seed + i)
            real_in = _inputs(soft.network, path, calls, originals[path], seed + i, layer)
            groups = getattr(originals[path], "groups", 1)
            if compensation:
                target = compensate(layer.matrix.detach(), float_in, real_in, damp=damp, groups=groups)
                soft.layers[path] = _retarget(soft, path, layer, originals[path], target)
                layer = soft.layers[path]
            if iterations:
                a = _moment(real_in, groups)
                g = None if groups > 1 else fishers.get(path)
                loss, exact = kfac_losses(layer, a, g)
                soft.roundings[path] = learn_rounding(
                    {path: layer}, loss, exact, iterations=iterations, lr=lr, relative=True, where=path
                )
            advance()
    return soft


def fisher_factors(
    network: nn.Module,
    calls: Sequence[Call],
    paths: Sequence[str],
    predicts: Predicts = "gaussian",
    damp: float = 0.01,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return G = E[g g^T] of each layer's output gradients, `[out, out]`, damped by a share of its mean
    diagonal.

    The loss is -log p(y | x) with y drawn from the network's own distribution p: then E[g g^T] is the Fisher
    information, and no labels are needed.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {p: find(network, p) for p in paths}
    held: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(paths, 0)
    handles = []
    for path, layer in layers.items():
        assert layer is not None

        def keep(m: nn.Module, args: tuple[Tensor, ...], output: Tensor, path: str = path) -> Tensor:
            held[path] = output if output.requires_grad else output.detach().requires_grad_(True)
            return held[path]

        handles.append(layer.register_forward_hook(keep))
    try:
        with torch.enable_grad():
            for args, kwargs in calls:
                held.clear()
                out = first_tensor(network(*args, **kwargs))
                if predicts == "gaussian":
                    noise = torch.randn(out.shape, generator=generator)
                    loss = -(out * noise).sum()  # d/d out of |out - y|^2 / 2 at y = out + noise
                else:
                    drawn = torch.multinomial(out.detach().softmax(-1), 1, generator=generator)
                    loss = -out.log_softmax(-1).gather(-1, drawn).sum()
                reached = {p: t for p, t in held.items() if t.requires_grad}
                grads = torch.autograd.grad(loss, list(reached.values()), allow_unused=True)
                for path, gradient in zip(reached, grads, strict=True):
                    if gradient is None:
                        continue
                    own = layers[path]
                    assert own is not None
                    rows = output_rows(own, gradient).double()
                    moment = rows.T @ rows
                    total[path] = total.get(path, torch.zeros_like(moment)) + moment
                    counts[path] += len(rows)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, moment in total.items():
        if not bool(torch.isfinite(moment).all()):
            raise NonFiniteError(f"{path}: the gradients of its output hold NaN or infinite values")
        g = moment / max(1, counts[path])
        mean = g.diagonal().mean().clamp_min(1e-30)
        found[path] = g + damp * mean * torch.eye(len(g), dtype=g.dtype)
    return found


def quartdepth(
    model: Model | nn.Module,
    images: Tensor,
    *,
    batch: int = 32,
    predicts: Predicts = "gaussian",
    **options: object,
) -> QuantEdit:
    """Quantise a network of images by all three steps.

    Args:
        model: a model or module that is called with images alone.
        images: calibration images `[n, channels, height, width]`, as the network takes them.
        batch: images a call.
        predicts: `"gaussian"` for depth and other regressions, `"categorical"` for logits.
        options: of `quartdepth_network`.

    Raises:
        InputError: images of another shape.
    """
    network = model if isinstance(model, nn.Module) else model.module
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        raise InputError("images must be a tensor [n, channels, height, width] with n above 0")
    calls: list[Call] = [((part,), {}) for part in images.split(batch)]
    soft = quartdepth_network(network, calls, predicts=predicts, **options)  # type: ignore[arg-type]
    bits = {k: options.get(k, 4) for k in ("w_bits", "a_bits")}
    return soft.export("quartdepth", f"W{bits['w_bits']}A{bits['a_bits']}")


def _inputs(
    network: nn.Module,
    path: str,
    calls: Sequence[Call],
    layer: nn.Module,
    seed: int,
    soft: SoftLayer | None = None,
) -> Tensor:
    """Return rows of a layer's input, the same positions in both networks; as they leave its quantiser."""
    data = capture(network, path, calls)
    generator = torch.Generator().manual_seed(seed)
    share = max(1, _ROWS // len(calls))
    parts = []
    with torch.no_grad():
        for args, _ in data.calls:
            x = args[0]
            if soft is not None and soft.act is not None and soft.act_on:
                x = soft.act(x)
            rows = columns_of(layer, x)
            parts.append(rows[torch.randperm(len(rows), generator=generator)[:share]])
    return torch.cat(parts)


def _moment(rows: Tensor, groups: int) -> Tensor:
    """Return A = E[x x^T], `[columns, columns]`, or `[groups, columns, columns]`."""
    x = rows.double()
    if groups == 1:
        return x.T @ x / len(x)
    parts = x.reshape(len(x), groups, -1).transpose(0, 1)
    return parts.transpose(1, 2) @ parts / len(x)


def _retarget(soft: SoftNetwork, path: str, old: SoftLayer, layer: nn.Module, target: Tensor) -> SoftLayer:
    """Put a soft layer for the repaired weight, with a range of its own, in the place of the old one."""
    from actlas.core.network_blocks import put

    new = SoftLayer(layer, old.spec, split=old.split, act=old.act, target=target, where=path)
    new.act_on = old.act_on
    put(soft.network, {path: new})
    return new
