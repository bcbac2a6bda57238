"""SmoothQuant: move the difficulty of activations into the weights, then round both.

    s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha),      y = Q(W diag(s)) Q(x / s)

over the layers that share an input; alpha 0.5 halves the difficulty on a logarithmic scale, recent recipes
take 0.8. Weights have a scale for each output channel, activations one for each token. The division is folded
into the norm (or linear map) before; where it cannot be, it is done at run time.

    fit_smoothquant(model, corpus)                                       W8A8
    fit_smoothquant(model, corpus, bits=4, act_bits=4, alpha=0.5)        W4A4

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models" (arXiv 2211.10438), equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.numbers import QuantSpec
from actlas.core.quant_linear import ActQuant
from actlas.core.two_stream import BlockView, two_stream
from actlas.quantize.block_inputs import shared_inputs
from actlas.quantize.channel_scales import BlockScales, Place, known_slots
from actlas.quantize.gptq_solver import output_error
from actlas.quantize.layers import BATCH_TOKENS, WeightFormat, finish, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "smoothquant",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights and activations rounded after scales move outliers from activations to weights",
    example="actlas fit smoothquant smollm2 prose --bits 8 --act-bits 8 -o w8a8/",
    papers=("outliertune", "ostquant", "edge-asr"),
)
def fit_smoothquant(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 8,
    act_bits: int = 8,
    group_size: int | None = 0,
    alpha: float = 0.5,
    symmetric: bool = True,
    act_symmetric: bool = True,
    everywhere: bool = False,
    skip: tuple[str, ...] = (),
    fold: bool = True,
    tokens: int = 512,
    context: int = 128,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that rounds weights and activations after smoothing.

    Args:
        model: a model with one tower of blocks and a tokenizer.
        data: calibration text; what follows it is used to measure. Default: the bundled prose.
        bits, act_bits: of weights and activations.
        group_size: of the weights; 0: a whole output channel.
        alpha: share of the difficulty that moves to the weights, in [0, 1].
        symmetric, act_symmetric: no zero points in weights, activations.
        everywhere: smooth all inputs; else only those that come from norms, as in the paper.
        skip: layers that keep their numbers.
        fold: move the division into the producer of the input; `False`: layers divide at run time.
        tokens, context: calibration text; seed: of the text's order and the bootstrap.
        evaluate: tokens of held-out text on which perplexity ratio and divergence are measured; 0: none.

    Raises:
        InputError: alpha or bits out of range; text of fewer than 64 tokens.
        NonFiniteError: NaN or infinities in weights or activations.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha lies in [0, 1], not {alpha}")
    chosen = targets(model, WeightFormat(bits, group_size, symmetric), skip)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    act = ActQuant(QuantSpec(act_bits, symmetric=act_symmetric, granularity="channel"))
    by_path = {target.path: target for target in chosen}
    known = known_slots(model)
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, Tensor] = {}
    errors: dict[str, float] = {}

    def visit(block: BlockView) -> None:
        scales = BlockScales(model, known if fold else None)
        inputs = shared_inputs(block, [n for n, p in block.paths.items() if p in by_path])
        for x in inputs:
            paths = [block.paths[name] for name in x.names]
            place = Place(paths, len(x.largest), known)
            if not everywhere and (place.slot is None or place.slot.norm is None):
                continue
            if not fold:
                place = Place(paths, len(x.largest), None)
            weight = torch.cat([by_path[p].weight for p in paths]).abs().amax(0)
            scales.add(place, smoothing(place.largest(x.largest), place.largest(weight), alpha))
        for x in inputs:
            for name in x.names:
                target = by_path[block.paths[name]]
                layer = scales.layer(target, act=act)
                modules[target.path] = layer
                s = scales.columns.get(target.path)
                moments = x.gram if s is None else x.gram / s.outer(s).to(x.gram)
                errors[target.path] = float(
                    output_error(scales.weight(target), layer.dequantized(), moments).mean()
                )
        parameters.update(scales.parameters(modules))

    two_stream(
        model, texts.fit, visit, context=texts.context, max_tokens=texts.tokens, batch_tokens=BATCH_TOKENS
    )
    return finish(
        model,
        chosen,
        {path: modules[path] for path in by_path if path in modules},
        method="smoothquant",
        texts=texts,
        parameters=parameters,
        errors=errors,
        note=f"alpha {alpha:g}, inputs in {act.spec.name}",
        evaluate=evaluate,
        seed=seed,
    )


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return `inputs^alpha / weights^(1 - alpha)`, 1 where either is 0.

    Args:
        inputs, weights: largest magnitude of each channel in activations and weights.
        alpha: in [0, 1].
    """
    s = inputs.double().pow(alpha) / weights.double().pow(1 - alpha)
    usable = (inputs > 0) & (weights > 0) & torch.isfinite(s) & (s > 0)
    return torch.where(usable, s, torch.ones_like(s))
