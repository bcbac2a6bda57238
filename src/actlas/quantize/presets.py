"""Deployable formats as recipes: the three of "Give Me BF16 or Give Me Death?" (Kurtic et al. 2024).

    w8a8-fp     e4m3 weights by output channel, e4m3 inputs by token, rounded to nearest, no calibration
    w8a8-int    symmetric int8 weights by output channel with GPTQ, int8 inputs by token
    w4a16-int   symmetric int4 weights in groups with GPTQ, each group's range shrunk to the least error

    edit = fit_preset(model, corpus, preset="w8a8-int")

All of them are exported as compressed-tensors. Activations of `w8a8-int-static` have one fixed scale a layer,
the untuned variant that the paper warns of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.numbers import QuantParams, QuantSpec
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.quantize.gptq import fit_gptq
from actlas.quantize.layers import Target, Texts, WeightFormat, finish, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model

Preset = Literal["w8a8-fp", "w8a8-int", "w4a16-int", "w8a8-int-static"]


@method(
    "preset",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="a deployable format with its usual recipe: w8a8-fp, w8a8-int or w4a16-int",
    example="actlas fit preset smollm2 prose --preset w8a8-int -o w8a8/",
    papers=("bf16-or-death",),
)
def fit_preset(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    preset: Preset = "w4a16-int",
    group_size: int | None = None,
    skip: tuple[str, ...] = (),
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit of a preset.

    Args:
        model: a causal language model with a tokenizer.
        data: calibration text (not for `w8a8-fp`); what follows is used to measure. Default: bundled prose.
        preset: see the module's text.
        group_size: of `w4a16-int`; default: the legal size nearest to 64. 128 is usual where it divides.
        skip: layers that keep their numbers.
        tokens, context: calibration text. evaluate: tokens of held-out text to measure on; 0: none.
        seed: of the text's order and the bootstrap.

    Raises:
        InputError: a preset that does not exist, and what `fit_gptq` raises.
    """
    if preset not in get_args(Preset):
        raise InputError(f"there is no preset {preset!r}; there are {', '.join(get_args(Preset))}")
    common: dict[str, Any] = {
        "skip": skip,
        "tokens": tokens,
        "context": context,
        "evaluate": evaluate,
        "seed": seed,
    }
    if preset == "w4a16-int":
        return fit_gptq(model, data, bits=4, group_size=group_size, symmetric=True, search=True, **common)
    if preset == "w8a8-int":
        return fit_gptq(
            model, data, bits=8, group_size=0, symmetric=True, act_format="int8-token-sym", **common
        )
    form = WeightFormat(format="fp8-e4m3-channel" if preset == "w8a8-fp" else "int8-channel-sym")
    chosen = targets(model, form, skip)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    acts = (
        dict.fromkeys((t.path for t in chosen), ActQuant(QuantSpec.parse("fp8-e4m3-token")))
        if preset == "w8a8-fp"
        else _static(model, chosen, texts)
    )
    modules: dict[str, nn.Module] = {
        t.path: QuantLinear.of(t.module, t.spec, act=acts[t.path], where=t.path) for t in chosen
    }
    return finish(model, chosen, modules, method=preset, texts=texts, evaluate=evaluate, seed=seed)


def _static(model: Model, chosen: list[Target], texts: Texts) -> dict[str, ActQuant]:
    """Return one fixed scale for the inputs of every layer, from their largest value on the text."""
    spec = QuantSpec.parse("int8-tensor-sym")
    most: dict[str, float] = {}
    handles = []

    def reader(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            most[path] = max(most.get(path, 0.0), float(args[0].detach().abs().max()))

        return hook

    for target in chosen:
        handles.append(target.module.register_forward_pre_hook(reader(target.path)))
    try:
        seen = 0
        for text in texts.fit:
            inputs = model.encode([text], truncate=True)
            model.forward(inputs)
            seen += int(inputs["input_ids"].shape[-1])
            if seen >= texts.tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
    import torch

    return {
        path: ActQuant(spec, QuantParams(torch.tensor([[max(value, 1e-8) / 127]])))
        for path, value in most.items()
    }
