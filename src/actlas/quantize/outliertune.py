"""OutlierTune: one scale for each activation channel, paid for in the weights.

A static scale for each input channel defeats channels that are large, but cannot be taken out of an integer
product. So it is multiplied into the weights beforehand (pre-executed dequantisation), after each channel was
shifted to a symmetric range (symmetrisation), so that lopsided channels do not widen the weights:

    z_j = mean over windows of (max_j + min_j) / 2      norm's bias - z,   reader's bias + W z
    s_j = max |x_j - z_j| / (2^(b-1) - 1)               norm's weight and bias / s,   W' = W diag(s)
    y   = Q(W') clip(round(x / s), -2^(b-1), 2^(b-1) - 1) + bias

The norm then emits numbers that only need rounding, and after the integer product there is one scale a row,
that of the weight. Layers that read no norm (attention's output, the MLP's last) get activations rounded with
one dynamic scale a token. All weights have one scale a row; groups may be asked for.

An RMSNorm has no bias to take the shift: `symmetrise="auto"` shifts LayerNorms only, `True` gives RMSNorms
one. `core.integer_product.integer_forward` is the integer arithmetic, bit for bit.

Source: Wang et al. 2024, "OutlierTune" (arXiv 2406.18832) and its code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.layout import weight_matrix
from actlas.core.methods import method
from actlas.core.numbers import QuantParams, QuantSpec, params_of
from actlas.core.quant_activations import QuantizeActivations
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.transforms import Fold, Folding, Slot, slots
from actlas.quantize.activation_price import priced
from actlas.quantize.channel_ranges import ChannelRange, Middle, channel_ranges
from actlas.quantize.clipping import clipped_inputs
from actlas.quantize.layers import Target, WeightFormat, grid_note, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model

Symmetrise = bool | Literal["auto"]


@dataclass
class ChannelFold:
    """Shifts and scales of the outputs of norms, folded.

    Attributes:
        fold: exact replacement parameters.
        scales: by norm's path, s.
        shifts: by norm's path, z, of those that were shifted.
        readers: by linear map's path, the norm that it reads.
    """

    fold: Fold
    scales: dict[str, Tensor] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)


def norm_slots(model: Model, paths: Iterable[str]) -> list[Slot]:
    """Return the norm slots whose readers are all among the layers at `paths`."""
    wanted = set(paths)
    return [s for s in slots(model).of("norm") if wanted.issuperset(s.readers)]


def observe_norms(
    model: Model,
    found: Sequence[Slot],
    texts: Iterable[Any],
    *,
    tokens: int | None = None,
    context: int | None = None,
) -> dict[str, ChannelRange]:
    """Return the ranges of the outputs of norms, by the norm's path."""
    seen = channel_ranges(
        model, texts, [f"module:{s.producer}.output" for s in found], max_tokens=tokens, context=context
    )
    byname = {model.resolve(f"module:{s.producer}.output")[0].name: s.producer for s in found}
    return {byname[name]: value for name, value in seen.items()}


def fold_channels(
    model: Model,
    found: Sequence[Slot],
    ranges: dict[str, ChannelRange],
    *,
    bits: int,
    symmetrise: Symmetrise = "auto",
    clip_ratio: float = 1.0,
    middle: Middle = "windows",
    floor: float = 1e-5,
) -> ChannelFold:
    """Fold a shift and a scale for each channel of norms' outputs into norms and readers.

    Args:
        model: the model.
        found: norm slots.
        ranges: of `observe_norms`.
        bits: of the activations.
        symmetrise: shift LayerNorms only (`"auto"`), all norms or none.
        clip_ratio: channels are clipped to this part of the largest value at the site (0.8 in the released
            code for Llama).
        middle: of a range; see `channel_ranges`.
        floor: silent channels get at least this part of the median scale.

    Raises:
        InputError: a clip ratio outside (0, 1], bits below 2. NonFiniteError, InputError: of the folds.
    """
    if not 0 < clip_ratio <= 1:
        raise InputError(f"clip_ratio is {clip_ratio:g}; it must lie in (0, 1], 1 clips nothing")
    if symmetrise not in ("auto", True, False):
        raise InputError(f"symmetrise is {symmetrise!r}; it must be 'auto', True or False")
    QuantSpec(bits, symmetric=True)
    folding, out = Folding(model), ChannelFold(Fold({}))
    for slot in found:
        seen = ranges[slot.producer]
        assert slot.norm is not None
        if symmetrise is True or (symmetrise == "auto" and slot.norm.bias):
            z = seen.middle(middle)
            folding.shift(slot, z, add_bias=symmetrise is True)
            seen = seen.shifted(z)
            out.shifts[slot.producer] = z
        reach = seen.absmax
        reach = reach.clamp_max(clip_ratio * float(reach.max())) if clip_ratio < 1 else reach
        reach = reach.clamp_min(max(floor * float(reach.median()), 1e-12))
        scale = reach / (2 ** (bits - 1) - 1)
        folding.scale(slot, scale)
        out.scales[slot.producer] = scale
        out.readers |= dict.fromkeys(slot.readers, slot.producer)
    out.fold = folding.fold()
    return out


@method(
    "outliertune",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights and activations in 8 or 6 bits, scales of activation channels folded into the weights",
    example="actlas fit outliertune smollm2 prose --bits 8 -o w8a8/",
    papers=("outliertune",),
)
def fit_outliertune(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    group_size: int = 0,
    symmetrise: Symmetrise = "auto",
    clip_ratio: float = 1.0,
    middle: Middle = "windows",
    attention: Literal["token", "none"] = "token",
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that runs a model's linear layers on integers.

    Args:
        model: a model with norms that linear layers read, and a tokenizer.
        data: calibration text; what follows the calibrated part is used to measure. Default: the bundled
            prose.
        bits: of activations, 2 to 8 (8 and 6 in the paper).
        weight_bits: of weights; default the same.
        group_size: of weights; 0: one scale a row, as integer hardware has it.
        symmetrise, clip_ratio, middle: see `fold_channels`.
        attention: also round queries, keys and values, with one scale a token, for attention's products.
        tokens, context: calibration text, in windows; seed: of the text's order and the bootstrap.
        evaluate: tokens of held-out text to measure on; 0: none.

    Returns:
        A `QuantEdit` (with the rounding of queries, keys and values after it), measured: its price, and the
        share of inputs beyond what calibration saw (`clipped-inputs`).

    Raises:
        InputError: bits or options that do not exist; no norm that linear layers read, with the reason.
    """
    if attention not in ("token", "none"):
        raise InputError(f"attention is {attention!r}; it must be 'token' or 'none'")
    chosen = targets(model, WeightFormat(weight_bits or bits, group_size))
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    found = norm_slots(model, (t.path for t in chosen))
    if not found:
        raise InputError(
            f"{model.name} has no norm whose output is read by linear layers of its blocks alone"
        )
    ranges = observe_norms(model, found, texts.fit, tokens=texts.tokens, context=texts.context)
    folded = fold_channels(
        model, found, ranges, bits=bits, symmetrise=symmetrise, clip_ratio=clip_ratio, middle=middle
    )
    quantised = folded_edit(model, chosen, folded, bits=bits, note=grid_note(model, chosen))
    edit: Edit = quantised
    if attention == "token":
        edit = edit + attention_inputs(model, f"int{bits}-token-sym")
    edit = edit.bind(model.fingerprint)
    if not evaluate or not texts.held_out:
        return edit
    prices = priced(model, texts.held_out, edit, tokens=evaluate, context=texts.context, seed=seed)
    share = clipped_inputs(model, edit, quantised, texts.held_out, tokens=evaluate, context=texts.context)
    return edit.with_measurements([*prices, share])


def folded_edit(
    model: Model, chosen: Sequence[Target], folded: ChannelFold, *, bits: int, note: str = ""
) -> QuantEdit:
    """Return the layers on integers: norm-fed ones with the folded static scale, the others with one a token.

    Args:
        model: the model.
        chosen: layers and formats of their weights.
        folded: of `fold_channels`.
        bits: of activations.
        note: for people.
    """
    one = QuantParams(torch.ones(1, 1))
    static = ActQuant(QuantSpec(bits, symmetric=True, granularity="tensor"), one)
    dynamic = ActQuant(QuantSpec(bits, symmetric=True, granularity="channel"))
    modules: dict[str, nn.Module] = {}
    for target in chosen:
        fed = target.path in folded.readers
        linear = folded.fold.linear(model, target.path) if fed else target.module
        params = params_of(weight_matrix(linear).detach().float(), target.spec, where=target.path)
        modules[target.path] = QuantLinear.of(
            linear,
            target.spec,
            params=short_scales(params),
            act=static if fed else dynamic,
            where=target.path,
        )
    rest = folded.fold.without(modules)
    shifted = sum(isinstance(m, nn.Module) for m in rest.modules.values())
    said = [note] if note else []
    if shifted:
        said.append(f"{shifted} RMSNorms have a bias now")
    return QuantEdit(
        {**modules, **rest.modules}, dict(rest.parameters), method="outliertune", note="; ".join(said)
    )


def short_scales(params: QuantParams, bits: int = 11) -> QuantParams:
    """Return scales with so few significant bits that a scale times a code is exact in float32.

    Half precision has as many; a folded weight may be too small for it, and its scales stay in float32. With
    them the layer's arithmetic in float64 is that of integers, bit for bit.
    """
    mantissa, exponent = torch.frexp(params.scale.float())
    short = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
    return QuantParams(short, params.zero, params.outer)


def attention_inputs(model: Model, spec: str) -> Edit:
    """Return the edit that rounds queries, keys and values where they come out of their linear maps."""
    parts = [QuantizeActivations(f"blocks.*.attn.{name}", spec) for name in ("q", "k", "v")]
    return parts[0] + parts[1] + parts[2]


__all__ = [
    "ChannelFold",
    "attention_inputs",
    "fit_outliertune",
    "fold_channels",
    "folded_edit",
    "norm_slots",
    "observe_norms",
]
