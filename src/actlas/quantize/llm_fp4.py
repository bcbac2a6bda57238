"""LLM-FP4: weights and activations in four-bit floats, with a power of two for each activation channel.

Each linear layer of the blocks gets a format and ranges of its own from `fp_search`, on inputs of the model
as it is. Weights have one scale a row. Inputs have one static scale for the layer, and with `preshift` a
power of two for each channel, which costs nothing: in a floating-point weight it is another exponent bias of
the column.

    edit = fit_llm_fp4(model, corpus)                     # W4A4
    edit = fit_llm_fp4(model, corpus, act_formats=())     # weights only

Source: Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (arXiv 2310.16836).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from actlas.core.calibration import Calibration, calibrate
from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, did_you_mean
from actlas.core.methods import method
from actlas.core.numbers import QuantParams, QuantSpec, quantize
from actlas.core.progress import progress
from actlas.core.quant_activations import QuantizeActivations, per_block
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.quantize.fp_search import (
    FORMATS,
    FloatChoice,
    Variant,
    channel_shifts,
    fp_search,
    parse_format,
    range_scale,
    shifted_scale,
)
from actlas.quantize.layers import Target, WeightFormat, finish, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "llm-fp4",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights and activations in 4-bit floats: formats and ranges by search, a power of two a channel",
    example="actlas fit llm-fp4 smollm2 prose --steps 12 --rounds 1 -o fp4/",
    papers=("llm-fp4",),
)
def fit_llm_fp4(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    formats: str | Sequence[str] = FORMATS,
    act_formats: str | Sequence[str] | None = None,
    preshift: bool = True,
    steps: int = 100,
    rounds: int = 3,
    rows: int = 128,
    variant: Variant = "range",
    embedding: str = "",
    skip: Sequence[str] = (),
    blocks: int | Sequence[int] | None = None,
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that runs the linear layers of the blocks in small floats.

    Args:
        model: a model with a tokenizer.
        data: calibration text; what follows the calibrated part is used to measure. Default: the bundled
            prose.
        formats: tried for weights; `"e2m1"` fixes one, `"e2m1,e1m2"` or a list gives several.
        act_formats: tried for inputs; default the same; `()` or `""` leaves inputs alone.
        preshift, steps, rounds, variant: see `fp_search`.
        rows: tokens on which a layer's error is measured.
        embedding: also the embedding table, one scale a row, in this format (`"e2m1"`); a head that is tied
            to it keeps its numbers.
        skip: layers that keep their numbers; see `layers.targets`.
        blocks: only these blocks; default all.
        tokens, context: calibration text, in windows; seed: of the text's order and the bootstrap.
        evaluate: tokens of held-out text to measure on; 0: none.

    Raises:
        InputError: formats, blocks or options that do not exist. NonFiniteError: NaN or infinities.
    """
    formats = _names(formats)
    act_formats = None if act_formats is None else _names(act_formats)
    blocks = [blocks] if isinstance(blocks, int) else blocks
    for name in [*formats, *(act_formats or ()), *([embedding] if embedding else [])]:
        parse_format(name)
    if not formats:
        raise InputError("no formats were given; e.g. formats=('e3m0', 'e2m1', 'e1m2')")
    chosen = in_blocks(model, targets(model, WeightFormat(8, 0), tuple(skip)), blocks)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    seen = layer_inputs(
        model, chosen, texts.fit, rows=rows, tokens=texts.tokens, context=texts.context, seed=seed
    )
    modules, errors = search_layers(
        chosen,
        seen,
        formats=formats,
        act_formats=act_formats,
        preshift=preshift,
        steps=steps,
        rounds=rounds,
        variant=variant,
    )
    parameters = rounded_embedding(model, embedding) if embedding else {}
    note = "formats " + ", ".join(f"{n} {f}" for f, n in sorted(_counts(modules).items()))
    return finish(
        model,
        chosen,
        modules,
        method="llm-fp4",
        texts=texts,
        parameters=parameters,
        errors=errors,
        note=note,
        evaluate=evaluate,
        seed=seed,
    )


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(n for n in given.split(",") if n) if isinstance(given, str) else tuple(given)


def layer_inputs(
    model: Model,
    chosen: Sequence[Target],
    texts: Iterable[Any],
    *,
    rows: int = 128,
    tokens: int | None = None,
    context: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Return the largest magnitudes and a sample of the inputs of layers, as `search_layers` reads them."""
    return calibrate(
        model,
        texts,
        [f"module:{t.path}.input" for t in chosen],
        ("absmax", "rows"),
        context=context,
        max_tokens=tokens,
        rows=rows,
        seed=seed,
    )


def search_layers(
    chosen: Sequence[Target], seen: Calibration, **options: Any
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Search formats and ranges of layers, one by one.

    Args:
        chosen: the layers.
        seen: of `layer_inputs`.
        **options: of `fp_search`.

    Returns:
        path -> replacement, and path -> relative error of its output on the sample.
    """
    modules: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    with progress("searching 4-bit floats", len(chosen), "layers") as advance:
        for target in chosen:
            found = seen[f"module:{target.path}.input"]
            choice = fp_search(target.weight, found.rows, absmax=found.absmax, **options)
            modules[target.path] = float_layer(target, choice)
            errors[target.path] = choice.error**0.5
            advance()
    return modules, errors


def float_layer(target: Target, choice: FloatChoice) -> QuantLinear:
    """Return one layer as a search has found it."""
    act = None
    if choice.act_scale is not None:
        act = ActQuant(choice.act_spec(), QuantParams(choice.act_scale.reshape(1, -1)))
    return QuantLinear.of(
        target.module,
        choice.weight_spec(),
        params=QuantParams(choice.weight_scale),
        act=act,
        where=target.path,
    )


def in_blocks(model: Model, chosen: Sequence[Target], blocks: Sequence[int] | None) -> list[Target]:
    """Return the layers that lie in some blocks.

    Raises:
        InputError: a block that does not exist.
    """
    if blocks is None:
        return list(chosen)
    wrong = [i for i in blocks if not 0 <= i < (model.n_blocks or 0)]
    if wrong or not blocks or model.tower is None:
        said = wrong[0] if wrong else "none"
        raise InputError(f"{model.name} has blocks 0 to {(model.n_blocks or 0) - 1}; asked for {said}")
    roots = tuple(f"{model.tower.blocks}.{i}." for i in blocks)
    return [t for t in chosen if t.path.startswith(roots)]


def rounded_embedding(model: Model, name: str) -> dict[str, Tensor]:
    """Return the embedding table in a small float format, one scale a row, by its parameter's name."""
    e, m = parse_format(name)
    getter: Any = getattr(model.module, "get_input_embeddings", None)
    table = getter() if getter is not None else None
    if table is None:
        raise InputError(f"{model.name} has no embedding table")
    key = next(n for n, p in model.module.named_parameters(remove_duplicate=False) if p is table.weight)
    spec = QuantSpec(1 + e + m, "float", granularity="channel", exp_bits=e)
    return {key: quantize(table.weight.detach(), spec, where=key)}


#: Sites that the linear layers of a Llama-like block read.
INPUT_KINDS = ("attn_norm", "attn.z", "mlp_norm", "mlp.act")


def float_inputs(
    model: Model,
    seen: Calibration,
    name: str = "e2m1",
    *,
    kinds: Sequence[str] = INPUT_KINDS,
    preshift: bool = True,
) -> Edit:
    """Return the edit that rounds activations alone to a small float, with static ranges.

    Args:
        model: a model with a layout.
        seen: a calibration of `blocks.*.KIND` with `"absmax"`.
        name: the format.
        kinds: of sites.
        preshift: a power of two for each channel; without it one scale for the whole site.
    """
    e, m = parse_format(name)
    spec = QuantSpec(1 + e + m, "float", granularity="channel" if preshift else "tensor", exp_bits=e)
    parts: list[Edit] = []
    for kind in kinds:
        places = []
        for site in model.resolve(f"blocks.*.{kind}"):
            if site.name not in seen:
                raise InputError(f"{site.name} was not calibrated{did_you_mean(site.name, list(seen))}")
            most = seen[site.name].absmax.float()
            scale = range_scale(most.max(), e, m)
            static = shifted_scale(scale, channel_shifts(most, e, m)) if preshift else scale.reshape(1)
            places.append(QuantizeActivations(site.name, spec, static))
        parts.append(per_block(kind, places))
    return compose(parts)


def _counts(modules: dict[str, nn.Module]) -> dict[str, int]:
    out: dict[str, int] = {}
    for module in modules.values():
        assert isinstance(module, QuantLinear)
        act = f" x {module.act_spec.name}" if module.act_spec is not None else ""
        key = module.spec.name.removesuffix("-channel") + act
        out[key] = out.get(key, 0) + 1
    return out


__all__ = [
    "INPUT_KINDS",
    "fit_llm_fp4",
    "float_inputs",
    "float_layer",
    "in_blocks",
    "layer_inputs",
    "rounded_embedding",
    "search_layers",
]
