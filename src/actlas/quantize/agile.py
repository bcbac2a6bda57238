"""Agile-Quant: GPTQ weights, and a format for each activation by what it looks like.

    weights                          4-bit GPTQ, asymmetric, groups near 128, large inputs first, sequential
    both norms' outputs; q, k, v     8-bit integers, static (q and k before rotary positions)
    attention's output, MLP's last   8-bit integers, static
    attention probabilities          4-bit powers of two: c = clip(round(-log2 p), 0, 15), p_hat = 2^-c

Probabilities lie mostly near 0, where even steps have one level for all; an entry whose exponent would be 16
or more becomes exactly 0, so that what the causal mask forbids stays forbidden. Static ranges are of the
model with its quantised weights.

The paper also drops unimportant tokens, which leaves fewer outliers to round:
`sparsity.token_pruning.PruneTokens` is an edit of its own, to be added. A static scale for each channel
cannot be taken out of an integer product (that is what OutlierTune's fold is for), so `acts="int8-tensor"` is
what simple integer hardware runs; the released code simulates `"int8-channel"`. `core.integer_product` holds
the integer arithmetic with 4-bit halves.

Source: Shen et al. 2024, "Agile-Quant" (arXiv 2312.05693) and its code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.numbers import QuantSpec, nearest_group
from actlas.core.quant_activations import QuantizeActivations, per_block, static_quantizer
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.activation_price import priced
from actlas.quantize.channel_ranges import channel_ranges
from actlas.quantize.gptq import solve_blocks
from actlas.quantize.gptq_solver import Solved, solve
from actlas.quantize.layers import Target, WeightFormat, grid_note, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model

#: What is rounded besides probabilities, by kind of site.
ACT_KINDS = ("attn_norm", "mlp_norm", "attn.q", "attn.k", "attn.v", "attn.z", "mlp.act")
_GROUP = 128


@method(
    "agile-quant",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="4-bit GPTQ weights, static 8-bit activations, powers of two for attention probabilities",
    example="actlas fit agile-quant smollm2 prose -o agile/",
    papers=("agile-quant",),
)
def fit_agile(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    weights: Literal["gptq", "none"] = "gptq",
    weight_bits: int = 4,
    group_size: int | None = None,
    acts: str = "int8-channel",
    softmax: str = "log2-4",
    sequential: bool = True,
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that rounds weights and activations.

    Args:
        model: a language model with a layout and a tokenizer.
        data: calibration text; what follows the calibrated part is used to measure. Default: the bundled
            prose.
        weights: GPTQ, or leave them as they are.
        weight_bits: 2 to 8.
        group_size: of weights; default: for each layer the legal size nearest to 128; 0: a whole row.
        acts: format of activations, static: one scale (`"int8-tensor"`) or one a channel; `""`: none.
        softmax: format of attention probabilities: `"log2-4"`, or even steps (`"int4-tensor"`); `""`: none.
        sequential: within a block, calibrate later layers on rounded earlier ones; four times the passes.
        tokens, context: calibration text, in windows; seed: of the text's order and the bootstrap.
        evaluate: tokens of held-out text to measure on; 0: none.

    Raises:
        InputError: options or formats that do not exist, or nothing to do. NonFiniteError: NaN or infinities.
    """
    if weights not in ("gptq", "none"):
        raise InputError(f"weights is {weights!r}; it must be 'gptq' or 'none'")
    if weights == "none" and not acts and not softmax:
        raise InputError("nothing is to be rounded: weights='none', acts='' and softmax='' were asked for")
    for name in (acts, softmax):
        if name:
            QuantSpec.parse(name)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    parts: list[Edit] = []
    if weights == "gptq":
        chosen = targets(model, _formats(model, weight_bits, group_size))

        def solver(weight: Tensor, gram: Tensor, group: Any) -> Solved:
            return solve(weight, gram, group[0].spec, order="activation", where=group[0].path)

        modules, errors = solve_blocks(model, chosen, texts, solver, sequential=sequential)
        parts.append(
            QuantEdit(modules, {}, method="agile-quant", note=grid_note(model, chosen), errors=errors)
        )
    if acts:
        with model.edit(*parts):
            parts += static_acts(model, texts.fit, acts, max_tokens=texts.tokens, context=texts.context)
    if softmax:
        parts.append(probabilities(softmax))
    edit = compose(parts).bind(model.fingerprint)
    return edit.with_measurements(
        priced(model, texts.held_out, edit, tokens=evaluate, context=texts.context, seed=seed)
    )


def _formats(model: Model, bits: int, group_size: int | None) -> WeightFormat:
    if group_size is not None:
        return WeightFormat(bits, group_size)
    plain: list[Target] = targets(model, WeightFormat(bits, 0))
    named: Mapping[str, str] = {
        t.path: QuantSpec(bits, group_size=nearest_group(t.weight.shape[1], _GROUP)).name for t in plain
    }
    return WeightFormat(bits, 0, formats=named)


def static_acts(
    model: Model,
    texts: Iterable[Any],
    acts: str | Mapping[str, str] = "int8-channel",
    *,
    max_tokens: int | None = None,
    context: int | None = None,
) -> list[QuantizeActivations]:
    """Return static quantisers for activations, with the ranges that text gives. Installed edits apply.

    Args:
        model: a model with a layout; kinds of sites that it has not got are left out.
        texts: calibration text.
        acts: one format for all of `ACT_KINDS`, or formats by kind.
        max_tokens, context: how much is read.

    Raises:
        InputError: no such format or site.
    """
    formats = dict.fromkeys(ACT_KINDS, acts) if isinstance(acts, str) else dict(acts)
    kinds = {site.kind for site in model.sites() if site.absent is None}
    if not isinstance(acts, str) and (unknown := [k for k in formats if k not in kinds]):
        raise InputError(f"{model.name} has no blocks.*.{unknown[0]}; there are {', '.join(sorted(kinds))}")
    formats = {kind: spec for kind, spec in formats.items() if kind in kinds}
    if not formats:
        raise InputError(f"{model.name} has none of the sites {', '.join(ACT_KINDS)}")
    places = {kind: [site.name for site in model.resolve(f"blocks.*.{kind}")] for kind in formats}
    names = [name for found in places.values() for name in found]
    seen = channel_ranges(model, texts, names, max_tokens=max_tokens, context=context)
    return [
        per_block(kind, [static_quantizer(n, spec, seen[n].low, seen[n].high) for n in places[kind]])
        for kind, spec in formats.items()
    ]


def probabilities(spec: str = "log2-4", sites: str = "blocks.*.attn.pattern") -> QuantizeActivations:
    """Return the edit that rounds attention probabilities.

    Args:
        spec: powers of two (`"log2-4"`), or even steps from 0 to 1 (`"int4-tensor"`, the baseline).
        sites: which attention.
    """
    form = QuantSpec.parse(spec)
    if form.grid == "log2":
        return QuantizeActivations(sites, spec)
    if form.grid == "int" and form.granularity == "tensor" and not form.symmetric:
        return QuantizeActivations(sites, spec, torch.tensor([1 / (2**form.bits - 1)]), torch.zeros(1))
    raise InputError(f"attention probabilities take log2-4 or int4-tensor (or other bits), not {spec}")


__all__ = ["ACT_KINDS", "fit_agile", "probabilities", "static_acts"]
