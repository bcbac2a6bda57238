"""GPTQ: second-order rounding, block by block, each block on what the blocks before it now give.

Block i is calibrated on the hidden states of the model whose blocks before i are quantised already
(`core.two_stream`), so later layers also repair what earlier ones lost. The solver for one matrix, with its
equations, is `gptq_solver.py`; layers that read the same tensor are solved together, since they share H.

    edit = fit_gptq(model, corpus, bits=3, group_size=64)

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.calibration import calibrate
from actlas.core.edit import Edit
from actlas.core.methods import method
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.swap import SwapModule
from actlas.core.two_stream import BlockView, two_stream
from actlas.measure.memory import trim_heap
from actlas.quantize.block_inputs import shared_inputs
from actlas.quantize.gptq_solver import Order, Solved, solve
from actlas.quantize.layers import BATCH_TOKENS, Target, Texts, WeightFormat, finish, split_text, targets

if TYPE_CHECKING:
    from actlas.core.model import Model

Solver = Callable[[Tensor, Tensor, Sequence[Target]], Solved]


@method(
    "gptq",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights rounded column by column, each error repaired in the columns to come",
    example="actlas fit gptq smollm2 prose --bits 3 --group-size 64 -o gptq3/",
    papers=("comprehensive-evaluation", "agile-quant", "edge-asr"),
)
def fit_gptq(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    format: str = "",
    formats: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    damp: float = 0.1,
    order: Order = "none",
    sequential: bool = False,
    search: bool = True,
    cap: float | None = 10.0,
    act_format: str = "",
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that quantises a model's weights with GPTQ.

    Args:
        model: a model with a tokenizer; without one tower of blocks (encoder-decoders), all layers are
            calibrated on the model as it is.
        data: calibration text; what follows the calibrated part is used to measure. Default: the bundled
            prose.
        bits: 2 to 8.
        group_size: inputs that share a scale; default: the legal size nearest to 64; 0: a whole channel.
        symmetric: no zero points.
        format, formats, skip: see `layers.WeightFormat` and `layers.targets`.
        damp: added to the Hessian's diagonal, over its mean. The paper takes 0.01, for a hundred times as
        much
            text.
        order: `"activation"`: columns with large inputs first (scales of groups are then static).
        sequential: within a block, calibrate o_proj after q, k and v are rounded, and so on; four times the
            passes.
        search: shrink each group's range to where its weighted rounding error is least.
        cap: a token counts at most as so many median ones (`block_inputs.shared_inputs`); `None`: no limit.
        act_format: format of the layers' inputs, e.g. `"int8-channel-sym"` (a scale for each token).
        tokens, context: calibration text, in windows; seed: of the text's order and the bootstrap.
        evaluate: tokens of held-out text on which perplexity ratio and divergence are measured; 0: none.

    Raises:
        InputError: options that do not exist or fit; text of fewer than 64 tokens.
        NonFiniteError: NaN or infinities in weights or activations.
    """
    chosen = targets(model, WeightFormat(bits, group_size, symmetric, format, formats), skip)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)

    def solver(weight: Tensor, gram: Tensor, group: Sequence[Target]) -> Solved:
        spec = group[0].spec
        return solve(weight, gram, spec, damp=damp, order=order, search=search, where=group[0].path)

    modules, errors = solve_blocks(
        model, chosen, texts, solver, sequential=sequential, cap=cap, act=act_of(act_format)
    )
    return finish(
        model, chosen, modules, method="gptq", texts=texts, errors=errors, evaluate=evaluate, seed=seed
    )


def act_of(name: str) -> ActQuant | None:
    """Return the format of a layer's inputs by name; `None` for an empty one."""
    from actlas.core.numbers import QuantSpec

    return ActQuant(QuantSpec.parse(name)) if name else None


def solve_blocks(
    model: Model,
    chosen: Sequence[Target],
    texts: Texts,
    solver: Solver,
    *,
    sequential: bool = False,
    cap: float | None = 10.0,
    act: ActQuant | None = None,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Solve all layers, block by block in the edited stream.

    Args:
        model, chosen, texts: as made by `layers`.
        solver: (weights of layers that share an input, one under the other; gram; those layers) -> solved.
        sequential, cap: see `fit_gptq`.
        act: how the layers' inputs are rounded.

    Returns:
        path -> replacement, and path -> relative error of its output on the calibration text.
    """
    by_path = {target.path: target for target in chosen}
    modules: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    if model.layout is None or len(model.layout.towers) != 1:
        return _solve_plain(model, chosen, texts, solver, act)

    def settle(paths: Sequence[str], gram: Tensor) -> list[Edit]:
        """Solve layers that share an input; the ones of a format together."""
        made: list[Edit] = []
        for group in _by_format([by_path[path] for path in paths if path in by_path]):
            solved = solver(torch.cat([t.weight for t in group]), gram, group)
            trim_heap()  # what is stored would otherwise pin the heap that the solver grew
            for target, layer, error in split_rows(group, solved, act):
                layer.keep_dense = True
                modules[target.path], errors[target.path] = layer, error
                made.append(SwapModule(target.path, layer))
        return made

    def visit(block: BlockView) -> list[Edit]:
        _drop_dense(modules)  # of the blocks that are done
        trim_heap()
        inputs = shared_inputs(block, cap=cap)
        paths = block.paths
        if not sequential:
            return [e for x in inputs for e in settle([paths[n] for n in x.names], x.gram)]
        for step, x in enumerate(inputs):
            again = x if step == 0 else shared_inputs(block, x.names, cap=cap)[0]
            block.install(*settle([paths[n] for n in x.names], again.gram))
        return []

    two_stream(
        model, texts.fit, visit, context=texts.context, max_tokens=texts.tokens, batch_tokens=BATCH_TOKENS
    )
    _drop_dense(modules)
    return {t.path: modules[t.path] for t in chosen if t.path in modules}, errors


def _drop_dense(modules: Mapping[str, nn.Module]) -> None:
    for layer in modules.values():
        if isinstance(layer, QuantLinear):
            layer.keep_dense = False
            layer.drop()


def _by_format(group: Sequence[Target]) -> list[list[Target]]:
    out: dict[str, list[Target]] = {}
    for target in group:
        out.setdefault(target.spec.name, []).append(target)
    return list(out.values())


def split_rows(
    group: Sequence[Target], solved: Solved, act: ActQuant | None = None
) -> list[tuple[Target, QuantLinear, float]]:
    """Cut a solved stack of layers into its layers, with the relative error of each."""
    out, at = [], 0
    for target in group:
        n = len(target.weight)
        rows = slice(at, at + n)
        params = solved.params
        if params.scale.shape[0] > 1:
            zero = None if params.zero is None else params.zero[rows]
            params = type(params)(params.scale[rows], zero, params.outer)
        layer = QuantLinear.of(
            target.module,
            target.spec,
            params=params,
            codes=solved.codes[rows],
            act=act,
            outliers=None if solved.outliers is None else solved.outliers[rows],
            where=target.path,
        )
        out.append((target, layer, float(solved.error[rows].mean())))
        at += n
    return out


def _solve_plain(
    model: Model, chosen: Sequence[Target], texts: Texts, solver: Solver, act: ActQuant | None
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Solve every layer on the inputs that it has in the plain model, a few layers at a time."""
    modules: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    for start in range(0, len(chosen), 12):
        some = chosen[start : start + 12]
        sites = [f"module:{t.path}.input" for t in some]
        found = calibrate(
            model,
            texts.fit,
            sites,
            ("hessian",),
            max_tokens=texts.tokens,
            context=texts.context,
            keep_massive=True,
        )
        for target, site in zip(some, sites, strict=True):
            solved = solver(target.weight, found[site].hessian, [target])
            for _, layer, error in split_rows([target], solved, act):
                modules[target.path], errors[target.path] = layer, error
    return modules, errors
