"""Mixed precision by sharpness (Q-BERT): blocks where the loss is sharp get more bits.

    Omega_i = |mean_j lambda_ij| + std_j lambda_ij

with lambda_ij the top eigenvalue of the Hessian of the loss with respect to the linear weights of block i on
shard j of the text (`measure.hessian`). Bits follow Omega under a budget of the mean (`bit_allocation`),
and the weights are then rounded, to nearest or by GPTQ.

Source: Shen et al. 2020, "Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT" (arXiv 1909.05840),
section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import weight_matrix
from actlas.core.methods import method
from actlas.core.numbers import nearest_group
from actlas.core.quant_edit import QuantEdit
from actlas.measure.hessian import Loss, Sharpness, layer_sharpness, twice_differentiable
from actlas.measure.linear_layers import linear_layers
from actlas.measure.quant_price import fit_measurements
from actlas.quantize.bit_allocation import allocate_bits
from actlas.quantize.gptq import fit_gptq
from actlas.quantize.layers import names_of, split_text
from actlas.quantize.rtn import fit_rtn

if TYPE_CHECKING:
    from actlas.core.model import Model

Base = Literal["rtn", "gptq"]


@method(
    "hessian-bits",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="more bits for the blocks along which the loss is sharpest, fewer for the others",
    example="actlas fit hessian-bits smollm2 prose --choices 2,4 --budget 3 -o mixed/",
    papers=("q-bert",),
)
def fit_hessian_bits(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    choices: Sequence[int] | str = (2, 3, 4),
    budget: float = 3.0,
    group_size: int | None = None,
    base: Base = "rtn",
    shards: int = 2,
    shard_tokens: int = 64,
    iterations: int = 8,
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit with bits by the sharpness of the loss, one number of bits a block.

    Each product with the Hessian costs about five passes of the shard, so this takes blocks * shards *
    iterations * 5 passes.

    Args:
        model: a causal language model with a layout.
        data: text for the sharpness and calibration; what follows is used to measure. Default: the bundled
            prose.
        choices: bits that there are.
        budget: mean bits of a code.
        group_size: inputs that share a scale; default: the legal size nearest to 64; 0: a whole channel.
        base: how weights are rounded.
        shards, shard_tokens: windows of text on which the sharpness is computed, and their length.
        iterations: of the power iteration.
        tokens, context: calibration text of GPTQ; seed: of text, vectors and the bootstrap.
        evaluate: tokens of held-out text on which perplexity ratio and divergence are measured; 0: none.

    Raises:
        InputError: choices, a budget or a base that do not exist; too little text.
        ModelError: not a causal language model.
    """
    if base not in get_args(Base):
        raise InputError(f"base is {base!r}; it must be one of {', '.join(get_args(Base))}")
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is a model of kind {model.kind}; a causal-lm is needed")
    try:
        choices = tuple(int(c) for c in (names_of(choices) if isinstance(choices, str) else choices))
    except (TypeError, ValueError):
        raise InputError(f"choices is {choices!r}; it must be numbers of bits, e.g. 2,3,4") from None
    texts = split_text(model, data, tokens=max(tokens, 64), context=context, seed=seed)
    layers = linear_layers(model)
    sizes = {str(b): sum(x.size for x in layers if x.block == b) for b in {x.block for x in layers}}
    allocate_bits(
        dict.fromkeys(sizes, 1.0), choices, budget, sizes
    )  # wrong options are refused before the work
    found = block_sharpness(
        model, texts.fit, shards=shards, shard_tokens=shard_tokens, iterations=iterations, seed=seed
    )
    bits = allocate_bits({name: s.omega for name, s in found.items()}, choices, budget, sizes)
    formats = {}
    for x in layers:
        size = nearest_group(x.columns, 64) if group_size is None else group_size
        formats[x.path] = f"int{bits[str(x.block)]}-" + (
            f"g{size}" if size and size != x.columns else "channel"
        )
    common: dict[str, Any] = {"formats": formats, "evaluate": 0, "seed": seed}
    if base == "rtn":
        edit = fit_rtn(model, **common)
    else:
        edit = fit_gptq(model, texts.fit, tokens=tokens, context=context, **common)
    assert isinstance(edit, QuantEdit)
    said = "bits by block: " + " ".join(str(n) for n in bits.values())
    note = "; ".join(part for part in (said, edit.note) if part)
    edit = replace(edit, method="hessian-bits", note=note).bind(model.fingerprint)
    if not evaluate:
        return edit
    return edit.with_measurements(
        fit_measurements(model, texts.held_out, edit, tokens=evaluate, context=context, seed=seed)
    )


def block_sharpness(
    model: Model,
    texts: Iterable[str],
    *,
    shards: int = 2,
    shard_tokens: int = 64,
    iterations: int = 8,
    seed: int = 0,
) -> dict[str, Sharpness]:
    """Return the sharpness of the language model loss along the linear weights of each block, by its number.

    Args:
        model, shards, shard_tokens, iterations, seed: as in `fit_hessian_bits`.
        texts: one shard is read from each.

    Raises:
        InputError: fewer texts than shards.
    """
    windows: list[Tensor] = []
    for text in texts:
        ids = model.encode([text])["input_ids"][:, :shard_tokens]
        if ids.shape[1] > 1:
            windows.append(ids)
        if len(windows) == shards:
            break
    if shards < 1 or len(windows) < shards:
        raise InputError(
            f"there is text for {len(windows)} shards of at least two tokens; {shards} were asked for"
        )
    module = model.module

    def loss_on(ids: Tensor) -> Loss:
        def loss() -> Tensor:
            logits = module(input_ids=ids).logits
            value: Tensor = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
            return value

        return loss

    groups: dict[str, list[Tensor]] = {}
    for layer in linear_layers(model):
        groups.setdefault(str(layer.block), []).append(weight_matrix(layer.module(model)))
    frozen = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        with twice_differentiable(module):
            return layer_sharpness([loss_on(w) for w in windows], groups, iterations=iterations, seed=seed)
    finally:
        for p in frozen:
            p.requires_grad_(True)
