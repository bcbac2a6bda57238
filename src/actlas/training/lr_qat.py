"""LR-QAT: quantization-aware training of low-rank matrices that end up in the integers.

    edit = lr_qat(model, corpus, spec="int3-channel-sym", rank=32, steps=500)       # actlas fit lr-qat ...

Every linear layer of the blocks becomes a `LowRankQuantLinear` (see there for the equation) and learns on
text by the next-token loss. Only U, D (rate `lr_ab`) and the scales (rate `lr_scale`) are trained, so that
gradients and optimiser state are small. The result is merged into packed integers: nothing is added at
inference. Embedding, norms and head are left as they are.

Source: Bondarenko, Del Chiaro and Nagel 2024, "Low-Rank Quantization-Aware Training for LLMs" (there: rank
32, alpha 1, rates 1e-3 and 1e-5, 10,000 steps of 32,768 tokens, linear decay).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from actlas.core.edit import Edit
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.numbers import QuantSpec
from actlas.core.quant_edit import QuantEdit
from actlas.measure.linear_layers import LinearLayer
from actlas.measure.quant_price import quant_prices
from actlas.training.lr_qat_linear import Downcast, LowRankQuantLinear, Start
from actlas.training.qat import check_language_model, quantizing, split_documents, tune_quantized


@method(
    "lr-qat",
    room="training",
    returns="Edit",
    data="corpus",
    summary="train low-rank matrices inside the rounding of 2 to 7 bit weights; they end up in the integers",
    example="actlas fit lr-qat smollm2 prose --spec int3-channel-sym --rank 16 --steps 50 -o lr-qat/",
    papers=("lr-qat",),
)
def lr_qat(
    model: Model,
    data: Any,
    *,
    spec: str | QuantSpec = "int3-channel-sym",
    rank: int = 32,
    alpha: float = 1.0,
    downcast: Downcast = "fixed8",
    start: Start = "zero",
    act: str | None = None,
    recompute: bool = True,
    steps: int = 200,
    lr_ab: float = 1e-3,
    lr_scale: float = 1e-5,
    batch: int = 8,
    context: int = 128,
    held_out: float = 0.1,
    tokens: int = 4096,
    seed: int = 0,
) -> Edit:
    """Train a model's quantised weights on text, and return them as an edit.

    Args:
        model: a causal language model with a layout; it is left as it was.
        data: a corpus; its last part is held out for the numbers.
        spec: format of the weights, symmetric integers.
        rank, alpha, downcast, start, recompute: see `LowRankQuantLinear`.
        act: format of the inputs (`"int8-token"`), dynamic; `None`: 16 bits and more, as they are.
        steps, batch, context: of AdamW, with a warm-up of a tenth and a linear decay.
        lr_ab, lr_scale: rates of the low-rank matrices and of the scales.
        held_out, tokens: share of documents, and tokens of them, on which it is measured.
        seed: of the windows and of D.

    Returns:
        A `QuantEdit` of plain `QuantLinear`s; its measurements are the prices of it and of rounding to
        nearest with the same scales, and their paired difference.

    Raises:
        InputError, ModelError, NonFiniteError: bad sizes, no causal language model, a diverging loss.
    """
    check_language_model(model)
    form, inputs = QuantSpec.parse(spec), None if act is None else QuantSpec.parse(act)
    learn, test = split_documents(data, held_out)

    def make(layer: LinearLayer, linear: nn.Module) -> nn.Module:
        return LowRankQuantLinear(
            linear, form, rank=rank, alpha=alpha, downcast=downcast, start=start, act=inputs,
            recompute=recompute, tries=20, seed=seed, where=layer.path,
        )  # fmt: skip

    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm), 1.0)

    with quantizing(model, make) as layers:
        rounded = QuantEdit({p: m.merge() for p, m in layers.items()}, method="rtn")
        groups = [
            {"params": [t for m in layers.values() for t in (m.up, m.down)], "lr": lr_ab},
            {"params": [m.scale for m in layers.values()], "lr": lr_scale},
        ]
        tune_quantized(
            model, learn, layers, steps=steps, lr=lr_ab, groups=groups, batch=batch, context=context,
                seed=seed,
            rate=rate, what="lr-qat",
        )  # fmt: skip
        edit = QuantEdit(
            {p: m.merge() for p, m in layers.items()},
            method="lr-qat",
            note=f"{form.name}, rank {rank}, {downcast}",
        )
    found = quant_prices(
        model, test, {"lr-qat": edit, "rtn": rounded}, pairs=[("lr-qat", "rtn")], seed=seed, tokens=tokens,
        context=context,
    )  # fmt: skip
    return edit.bind(model.fingerprint).with_measurements(found)
