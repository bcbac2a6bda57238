"""QuEST: train with weights and activations on a few bits, down to one, without the training falling apart.

    edit = quest(model, corpus, w_bits=4, a_bits=4, steps=500)          # actlas fit quest-llm ...

Each linear layer of the blocks computes, for a block Hadamard rotation H that cancels in exact arithmetic,

    y = Q(x H) Q(W H)^T,     s = a_b rms(row),   2^b levels from -s to s without 0 (1 bit: +- 0.798 rms)

a_b is the half range with the least squared error on a Gaussian, which rotated rows resemble: no learned
scale, no maximum. Backward, the *trust* estimator passes the gradient only where rounding moved a value by at
most half a step, i.e. not where it was clipped by more than that, and rotates it back: dx = (M * dy) H. The
embedding, the head and the norms are left as they are. Midpoints make |Q(h) - h| equal half a step up to the
last bit, so the comparison has a slack of 1e-6.

What comes out is a `QuantEdit` of `QuantLinear`s with an online rotation and per-token activations; it
computes what training computed. `grad="ste", rotate=False` is plain straight-through training with the same
scales.

Source: Panferov et al. 2025, "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations", and its
code (IST-DASLab/QuEST). The paper's table of a_b is the numerical optimum up to 5 bits; at 6, 7 and 8 bits it
lies 0.0014, 0.010 and 0.037 below, which costs at most 1e-6 of squared error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.hadamard import largest_block
from actlas.core.layout import weight_matrix
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.numbers import QuantSpec
from actlas.core.quant_edit import QuantEdit
from actlas.measure.linear_layers import LinearLayer
from actlas.measure.quant_price import quant_prices
from actlas.training.qat import (
    Estimator,
    Trained,
    TrainedQuantLinear,
    check_language_model,
    quantizing,
    split_documents,
    tune_quantized,
)

#: The paper's table of a_b, by bits (log2 3 bits are three levels).
PUBLISHED_SCALES = {
    1: 0.79788, 1.585: 1.22401, 2: 1.49353, 3: 2.05107, 4: 2.51393, 5: 2.91609, 6: 3.27660, 7: 3.60105,
    8: 3.88494,
}  # fmt: skip


def gaussian_format(bits: int) -> QuantSpec:
    """Return QuEST's format: centred levels, one Gaussian scale for each row.

    Raises:
        InputError: not 1 to 8 bits.
    """
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(f"QuEST has 1 to 8 bits, not {bits}")
    return QuantSpec(bits, "int", granularity="channel", centred=True, scale_rule="gaussian")


def quest_linear(
    linear: nn.Module,
    w_bits: int,
    a_bits: int,
    *,
    grad: Estimator = "trust",
    rotate: bool = True,
    block: int = 128,
    where: str = "the layer",
) -> TrainedQuantLinear:
    """Return a linear layer in training with QuEST.

    Args:
        linear: where it starts.
        w_bits: 1 to 8.
        a_bits: 1 to 8, or 16 to leave activations alone.
        grad: estimator of both; QuEST's is `"trust"`.
        rotate: whether both operands are rotated, in blocks of the largest power of two up to `block` that
            divides the inputs.
        block: see `rotate`.
        where: the layer's name, for messages.

    Raises:
        InputError: bits outside of their range.
    """
    size = largest_block(weight_matrix(linear).shape[1], block) if rotate else 1
    return TrainedQuantLinear(
        linear,
        gaussian_format(w_bits),
        grad=grad,
        act=None if a_bits == 16 else gaussian_format(a_bits),
        act_grad=grad,
        rotate=size if size > 1 else None,
        where=where,
    )


@method(
    "quest-llm",
    room="training",
    returns="Edit",
    data="corpus",
    summary="train with weights and activations of 1 to 8 bits: rotated, Gaussian scales, trusted gradients",
    example="actlas fit quest-llm smollm2 prose --w-bits 4 --a-bits 4 --steps 50 -o quest/",
    papers=("quest-llm",),
)
def quest(
    model: Model,
    data: Any,
    *,
    w_bits: int = 4,
    a_bits: int = 4,
    grad: Estimator = "trust",
    rotate: bool = True,
    block: int = 128,
    train: Trained = "linear",
    steps: int = 200,
    lr: float = 1e-3,
    decay: float = 0.0,
    batch: int = 8,
    context: int = 128,
    held_out: float = 0.1,
    tokens: int = 4096,
    seed: int = 0,
) -> Edit:
    """Train a model on text with rounded weights and activations, and return the result as an edit.

    Args:
        model: a causal language model with a layout; it is left as it was.
        data: a corpus; its last part is held out for the numbers.
        w_bits, a_bits, grad, rotate, block: see `quest_linear`.
        train: the linear layers, or `"all"` parameters (the paper trains from scratch, so everything).
        steps, lr, decay, batch, context: of AdamW; weight decay acts on the unrotated master weight.
        held_out, tokens: share of documents, and tokens of them, on which it is measured.
        seed: of the windows.

    Returns:
        A `QuantEdit`; its measurements are the prices (`measure.quant_price`) of what was trained and of the
        same rounding without training, and their paired difference.

    Raises:
        InputError, ModelError, NonFiniteError: bad sizes, no causal language model, a diverging loss.
    """
    check_language_model(model)
    gaussian_format(w_bits)
    learn, test = split_documents(data, held_out)

    def make(layer: LinearLayer, linear: nn.Module) -> nn.Module:
        return quest_linear(linear, w_bits, a_bits, grad=grad, rotate=rotate, block=block, where=layer.path)

    parameters: dict[str, Tensor]
    with quantizing(model, make) as layers:
        untrained = QuantEdit({p: m.frozen() for p, m in layers.items()}, method="rounding")
        parameters = tune_quantized(
            model, learn, layers, steps=steps, lr=lr, decay=decay, batch=batch, context=context, train=train,
            seed=seed, what="quest",
        )  # fmt: skip
        trained = {p: m.frozen() for p, m in layers.items()}
    note = f"W{w_bits}A{a_bits}, {grad}" + ("" if rotate else ", not rotated")
    edit = QuantEdit(trained, parameters, method="quest-llm", note=note)
    found = quant_prices(
        model, test, {"quest-llm": edit, "untrained": untrained}, pairs=[("quest-llm", "untrained")],
            seed=seed,
        tokens=tokens, context=context,
    )  # fmt: skip
    return edit.bind(model.fingerprint).with_measurements(found)
