"""Binary coding: a weight as a sum of scaled signs, for products by look-up (LUT-GEMM).

    w ~ sum_i alpha_i s_i,   s_i = -1 or +1, alpha_i for each row, group of inputs and bit

Greedy: the rest r = w gives s_i = sign(r), alpha_i = mean |r|, r <- r - alpha_i s_i. Refined, in turns, a few
rounds: the alphas by least squares for fixed signs (`(S S' + 1e-6 I) alpha = S w`; a ridge, because two signs
may coincide), and each weight's signs as the nearest of the 2^bits sums. Optional weights of importance for
inputs enter both means. Greedy alone is worse than rounding to evenly spaced integers at 3 bits; a dozen
rounds are better. Evenly spaced integers that a method has chosen become signs without loss (`to_bcq`).

Source: Park et al., ICLR 2024, Sections 3.1 and 3.2 and naver-aics/lut-gemm (`examples/bcq.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.numbers.tables import code_signs, greedy_signs
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.kernels.binary_coded import BinaryCoded
from actlas.quantize.bcq_linear import BCQLinear
from actlas.quantize.layers import Texts, WeightFormat, finish, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model

RIDGE = 1e-6


def fit_signs(
    weight: Tensor,
    *,
    bits: int = 3,
    group_size: int = 64,
    rounds: int = 15,
    importance: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> BinaryCoded:
    """Return the binary coding of a weight `[rows, columns]`.

    Args:
        weight: finite floats.
        bits: signs of a weight, 1 to 8.
        group_size: inputs that share alphas: a multiple of 8 that divides the columns.
        rounds: of refinement after the greedy fit; 0: greedy alone.
        importance: of each input `[columns]`, not negative (for example its mean square); `None`: all equal.
        dtype: of the alphas as stored.

    Raises:
        InputError: bits or groups that do not fit, NaN or infinity in the weight.
    """
    rows, columns = weight.shape
    if not 1 <= bits <= 8:
        raise InputError(f"binary coding takes 1 to 8 bits, not {bits}")
    if group_size < 8 or group_size % 8 or columns % group_size:
        fits = [g for g in range(8, columns + 1, 8) if columns % g == 0]
        raise InputError(
            f"groups of {group_size} do not fit {columns} inputs; a multiple of 8 that divides them does: "
            f"{', '.join(map(str, fits)) or 'there is none'}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise InputError("the weight holds NaN or infinity; all must be finite")
    groups = weight.detach().float().view(rows, -1, group_size)
    care: Tensor | None = None
    if importance is not None:
        if importance.shape != (columns,) or not bool((importance >= 0).all()):
            raise InputError(f"importance must be [{columns}] and not negative")
        shares = importance.float().view(-1, group_size)
        care = (shares / shares.mean(-1, keepdim=True).clamp_min(1e-30)).expand(rows, -1, -1)
    alpha, codes = greedy_signs(groups, bits)
    signs = _signs(codes, bits)  # [rows, groups, bits, entries]
    for _ in range(rounds):
        alpha = least_squares(groups, signs, care)
        signs = _signs(code_signs(groups, alpha), bits)
    if rounds:
        alpha = alpha.to(dtype).float()
        signs = _signs(code_signs(groups, alpha), bits)
    return BinaryCoded.of(
        signs.permute(2, 0, 1, 3).reshape(bits, rows, columns), alpha.permute(2, 0, 1).to(dtype).contiguous()
    )


def least_squares(groups: Tensor, signs: Tensor, care: Tensor | None = None) -> Tensor:
    """Return the alphas `[rows, groups, bits]` of fixed signs, none negative, the largest first.

    Args:
        groups: weights `[rows, groups, entries]`.
        signs: -1 and +1, `[rows, groups, bits, entries]`.
        care: importance of the entries, of the shape of `groups`.
    """
    weighted = signs if care is None else signs * care.unsqueeze(-2)
    normal = weighted @ signs.transpose(-1, -2)
    normal = normal + RIDGE * groups.shape[-1] * torch.eye(signs.shape[-2], device=signs.device)
    right = weighted @ groups.unsqueeze(-1)
    alpha = torch.linalg.solve(normal.double(), right.double()).squeeze(-1).float()
    return alpha.abs().sort(-1, descending=True).values


def _signs(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, groups, entries]` -> -1 and +1, `[rows, groups, bits, entries]`."""
    shifts = torch.arange(bits, device=codes.device).view(-1, 1)
    return 2.0 * (codes.unsqueeze(-2).int() >> shifts & 1) - 1


def to_bcq(edit: QuantEdit) -> QuantEdit:
    """Write the layers of a `QuantEdit` whose weights are evenly spaced integers as signs, without loss.

    Raises:
        InputError: a layer of another grid, or one with parts that a `BCQLinear` does not have.
    """
    modules: dict[str, Any] = {}
    for path, module in edit.modules.items():
        if not isinstance(module, QuantLinear) or module.spec.grid != "int":
            raise InputError(
                f"{path} does not hold integers; only evenly spaced integers become signs exactly"
            )
        for name in ("act_spec", "rotate", "input_scale", "input_shift", "up", "outlier_index"):
            if getattr(module, name) is not None:
                raise InputError(f"{path} has {name}, which binary coding cannot hold")
        modules[path] = BCQLinear(_signs_of(module), module.bias)
    made = QuantEdit(
        modules, edit.parameters, method=edit.method, note="as signs", errors=dict(edit.errors)
    ).with_measurements(edit.measurements)
    made = made if edit.fingerprint is None else made.bind(edit.fingerprint)
    assert isinstance(made, QuantEdit)
    return made


def _signs_of(layer: QuantLinear) -> BinaryCoded:
    bits, group = layer.spec.bits, layer.in_features // layer.scale.shape[1]
    scale = layer.scale.float()
    steps = (layer.weight / scale.clamp_min(1e-30).repeat_interleave(group, 1)).double()
    if layer.zero is not None and layer.spec.zero_point == "int":
        zero = layer.zero.float()
    else:  # symmetric, or a float minimum: the lowest code is wherever the lowest weight is
        zero = -steps.view(len(scale), -1, group).amin(-1).float()
    codes = (steps + zero.double().repeat_interleave(group, 1)).round().clamp(0, 2**bits - 1)
    return BinaryCoded.from_integers(codes.long(), scale, zero, bits)


@method(
    "bcq",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights as scaled sums of signs, for products by look-up",
    example="actlas fit bcq smollm2 prose --bits 3 --group-size 64 -o signs3/",
    papers=("lut-gemm",),
)
def fit_bcq(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 3,
    group_size: int | None = None,
    rounds: int = 15,
    formats: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    evaluate: int = 1024,
    context: int = 256,
    seed: int = 0,
) -> Edit:
    """Return the edit that writes a model's weights as sums of signs.

    Args:
        model: any model with linear layers.
        data: text for the price; default: the bundled prose.
        bits: signs of a weight.
        group_size: inputs that share alphas; default: for each layer the legal size nearest to 64.
        rounds: see `fit_signs`.
        formats, skip: see `layers.targets`.
        evaluate: tokens of text on which perplexity ratio and divergence are measured; 0: none.
        context: window length.
        seed: of the text's order and the bootstrap.

    Raises:
        InputError: bits or group sizes that do not fit (legal ones are listed).
    """
    chosen = targets(model, WeightFormat(bits, group_size, formats=formats), skip)
    modules: dict[str, Any] = {}
    for target in chosen:
        group = target.spec.group_size or target.weight.shape[1]
        coded = fit_signs(target.weight, bits=target.spec.bits, group_size=group, rounds=rounds)
        modules[target.path] = BCQLinear(coded, getattr(target.module, "bias", None))
    texts: Texts | None = None
    if evaluate and model.kind == "causal-lm":
        texts = split_text(model, data, tokens=64, context=context, seed=seed)
    return finish(model, chosen, modules, method="bcq", texts=texts, evaluate=evaluate, seed=seed)
