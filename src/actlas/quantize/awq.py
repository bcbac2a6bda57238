"""AWQ: scale up the input channels that see large activations before rounding.

Rounding W diag(s) and dividing the input by s leaves an error of about (step'/step) / s in a scaled channel,
and the step hardly changes while the channel is not its group's largest. For layers that share an input x:

    a = mean over tokens of |x|                          per input channel
    s(r) = max(a^r, 1e-4) / sqrt(max a^r * min a^r)      r = 0, 1/20, ..., 19/20;  r = 0 is round to nearest
    r* = argmin || f(Q(W s) / s) - f(W) ||^2             f: the smallest module that holds all of the layers
    w -> clip(w, -m, m),  m = (1 - i/20) max|w|, i < 10  per group: least error of its partial products

f is the whole attention for q, k and v, the whole MLP for gate and up, and the layer itself for o and down.
The activations are those of the model before anything is rounded. q and k are not clipped.

Controls: `statistic="weight"` takes the mean |w| of the columns for a, `"permuted"` shuffles s at the end.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
(arXiv 2306.00978), and its released code (auto_scale, auto_clip). There v -> o is left out with grouped-query
attention; here one scale serves all query heads of a key-value head, which folds exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.two_stream import BlockView, two_stream
from actlas.measure.memory import trim_heap
from actlas.quantize.awq_search import QUERY_AND_KEY, Search, Statistic, clip_range, scale_for
from actlas.quantize.channel_scales import BlockScales, Place, known_slots
from actlas.quantize.gptq_solver import output_error
from actlas.quantize.inspected import inspect
from actlas.quantize.layers import BATCH_TOKENS, WeightFormat, finish, names_of, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "awq",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights rounded after scaling up the input channels that see large activations",
    example="actlas fit awq smollm2 prose --bits 3 --group-size 64 -o awq3/",
    papers=("awq", "comprehensive-evaluation", "edge-asr"),
)
def fit_awq(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    format: str = "",
    formats: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    ratios: int = 20,
    scale: bool = True,
    clip: bool = True,
    fold: bool = True,
    cap: float | None = None,
    statistic: Statistic = "activation",
    no_clip: tuple[str, ...] = QUERY_AND_KEY,
    tokens: int = 512,
    context: int = 128,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that quantises a model's weights with AWQ.

    Args:
        model: a model with one tower of blocks and a tokenizer.
        data: calibration text; what follows the calibrated part is used to measure. Default: the bundled
            prose.
        bits: 2 to 8.
        group_size: inputs that share a scale; default: the legal size nearest to 64; 0: a whole channel.
        symmetric: no zero points.
        format, formats, skip: see `layers.WeightFormat` and `layers.targets`.
        ratios: how many exponents r are tried; 1: only r = 0.
        scale, clip: do only one of the two searches.
        fold: move the division into the producer of the input; `False`: layers divide at run time.
        cap: a token counts at most as so many median ones in both searches; default: no limit.
        statistic: `"activation"`, or a control.
        no_clip: last parts of the paths of layers without a clip search.
        tokens, context: calibration text, in windows; seed: of the text's order and the bootstrap.
        evaluate: tokens of held-out text on which perplexity ratio and divergence are measured; 0: none.

    Raises:
        InputError: options that do not exist or fit; text of fewer than 64 tokens.
        ModelError: an encoder-decoder, or a model whose blocks are not known.
        NonFiniteError: NaN or infinities in weights, activations or errors of the search (with the layer).
    """
    if statistic not in get_args(Statistic):
        raise InputError(f"statistic is {statistic!r}; it must be one of {', '.join(get_args(Statistic))}")
    if ratios < 1:
        raise InputError(f"at least one ratio must be tried, not {ratios}")
    chosen = targets(model, WeightFormat(bits, group_size, symmetric, format, formats), skip)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    unclipped = names_of(no_clip)
    search = Search(ratios, cap, statistic, seed)
    known = known_slots(model) if fold and scale else None
    by_path = {target.path: target for target in chosen}
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    late: set[str] = set()

    def visit(block: BlockView) -> None:
        trim_heap()
        names = [name for name, path in block.paths.items() if path in by_path]
        parts, scales = inspect(block, names), BlockScales(model, known)
        for part in parts:
            chosen_here = {name: by_path[block.paths[name]] for name in part.names}
            if scale:
                place = Place([t.path for t in chosen_here.values()], part.rows.shape[1], known)
                scales.add(place, scale_for(part, chosen_here, place, search))
        for part in parts:
            gram = part.gram(cap)
            for name in part.names:
                target = by_path[block.paths[name]]
                s = scales.columns.get(target.path)
                moments = gram if s is None else gram / s.outer(s).to(gram)
                weight = scales.weight(target)
                params = None
                if clip and name.rpartition(".")[2] not in unclipped:
                    params = clip_range(weight, moments, target.spec)
                layer = scales.layer(target, params)
                modules[target.path] = layer
                errors[target.path] = float(output_error(weight, layer.dequantized(), moments).mean())
        parameters.update(scales.parameters(modules))
        late.update(scales.runtime)

    two_stream(
        model, texts.fit, visit, context=texts.context, max_tokens=texts.tokens, batch_tokens=BATCH_TOKENS
    )
    note = f"{len(late)} layers divide their inputs at run time" if late and fold else ""
    return finish(
        model,
        chosen,
        {path: modules[path] for path in by_path if path in modules},
        method="awq",
        texts=texts,
        parameters=parameters,
        errors=errors,
        note=note,
        evaluate=evaluate,
        seed=seed,
    )
