"""AdaRound for models of text: for each weight, up or down, learned on a little text.

    edit = fit_adaround(model, corpus, bits=3, group_size=64)                # each layer by itself, quick
    edit = fit_adaround(model, corpus, bits=3, by="block")                   # whole blocks, slower

By layer the objective is tr(D A D^T) with A the second moment of what reaches the layer once all blocks
before it are quantised: the mean squared error of the layer's output, without running it. By block it is the
squared error of the block's output, with inputs from the quantised and targets from the original model. The
engine and its equations are in `adaround.py`.

Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"; by block: Li et al.
2021, BRECQ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find
from actlas.core.methods import method
from actlas.core.network_blocks import put
from actlas.core.numbers import decode
from actlas.core.swap import SwapModule
from actlas.core.two_stream import BlockView, two_stream
from actlas.quantize.adaround import kfac_losses, learn_rounding
from actlas.quantize.gptq import solve_blocks
from actlas.quantize.gptq_solver import Solved
from actlas.quantize.layers import Target, Texts, WeightFormat, finish, split_text, targets
from actlas.quantize.soft_layers import SoftLayer

if TYPE_CHECKING:
    from actlas.core.model import Model


@method(
    "adaround",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="weights rounded up or down by what that does to the output of their layer or block",
    example="actlas fit adaround smollm2 prose --bits 3 --group-size 64 -o adaround3/",
    papers=("q-diffusion", "quartdepth"),
)
def fit_adaround(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    format: str = "",
    formats: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    by: Literal["layer", "block"] = "layer",
    iterations: int = 80,
    lr: float = 2e-2,
    search: bool = True,
    damp: float = 0.01,
    tokens: int = 2048,
    context: int = 256,
    evaluate: int = 1024,
    seed: int = 0,
) -> Edit:
    """Return the edit that quantises a model's weights with learned rounding.

    Args:
        model: a model of text.
        data: calibration text; what follows the calibrated part is used to measure. Default: the bundled
            prose.
        bits: 2 to 8.
        group_size, symmetric, format, formats, skip: see `layers.WeightFormat` and `layers.targets`.
        by: what is held: the output of each layer, or of each block (which costs a forward and a backward
            pass of the block for each iteration).
        iterations, lr: of Adam, for each layer or block.
        search: start from the range with the least L_2.4 error instead of the whole range.
        damp: added to A's diagonal, over its mean.
        tokens, context: calibration text, in windows.
        evaluate: tokens of held-out text on which perplexity ratio and divergence are measured; 0: none.
        seed: of the text's order, the batches and the bootstrap.

    Raises:
        InputError: options that do not exist or fit; a format without even steps.
        NonFiniteError: NaN or infinities in weights or activations.
    """
    if by not in ("layer", "block"):
        raise InputError(f"rounding is learned by layer or by block, not by {by!r}")
    chosen = targets(model, WeightFormat(bits, group_size, symmetric, format, formats), skip)
    texts = split_text(model, data, tokens=tokens, context=context, seed=seed)
    modules: Mapping[str, nn.Module]
    if by == "layer":

        def solver(weight: Tensor, gram: Tensor, group: Sequence[Target]) -> Solved:
            return round_layer(
                weight, gram, group, iterations=iterations, lr=lr, search=search, damp=damp, seed=seed
            )

        modules, errors = solve_blocks(model, chosen, texts, solver)
    else:
        if model.layout is None or len(model.layout.towers) != 1:
            raise ModelError(f"{model.name} has no single tower of blocks; use by='layer'")
        modules, errors = _by_block(model, chosen, texts, iterations, lr, search, seed)
    return finish(
        model, chosen, modules, method="adaround", texts=texts, errors=errors, evaluate=evaluate, seed=seed
    )


def round_layer(
    weight: Tensor,
    gram: Tensor,
    group: Sequence[Target],
    *,
    iterations: int = 150,
    lr: float = 1e-2,
    search: bool = True,
    damp: float = 0.01,
    seed: int = 0,
) -> Solved:
    """Round the stacked weights of layers that share an input.

    Args:
        weight: `[out, in]`.
        gram: X X^T (any multiple of it), `[in, in]`.
        group: the layers; their format is the first one's.
        iterations, lr, search, damp, seed: see `fit_adaround`.
    """
    where = group[0].path
    soft = SoftLayer(group[0].module, group[0].spec, target=weight, search=search, where=where)
    mean = gram.diagonal().mean().clamp_min(1e-12)
    a = gram + damp * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    loss, exact = kfac_losses(soft, a / mean)
    learn_rounding(
        {where: soft}, loss, exact, iterations=iterations, lr=lr, relative=True, seed=seed, where=where
    )
    with torch.no_grad():
        codes = soft.codes((soft.v >= 0).to(soft.v)).to(torch.uint8)
        value = decode(codes, soft.spec, soft.params[0])
        d = (value - weight).double()
        g = gram.double()
        power = ((weight.double() @ g) * weight).sum(1).clamp_min(1e-30)
        error = ((d @ g) * d).sum(1) / power
    return Solved(codes, soft.params[0], value, None, error)


def _by_block(
    model: Model,
    chosen: Sequence[Target],
    texts: Texts,
    iterations: int,
    lr: float,
    search: bool,
    seed: int,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    by_path = {t.path: t for t in chosen}
    modules: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}

    def visit(block: BlockView) -> list[Edit]:
        own = {name: by_path[path] for name, path in block.paths.items() if path in by_path}
        if not own:
            return []
        soft = {n: SoftLayer(t.module, t.spec, search=search, where=t.path) for n, t in own.items()}
        n = block.n_batches
        with torch.no_grad():
            wanted = [block.forward(block.hidden(i)[0], i)[block.mask(i)] for i in range(n)]

        def error(i: int) -> Tensor:
            found = block.forward(block.hidden(i)[1], i)[block.mask(i)]
            return (found - wanted[i]).square().sum(-1).mean()

        def on_all() -> float:
            with torch.no_grad():
                return sum(float(error(i)) for i in range(n)) / n

        before = {name: find(block.module, name) for name in soft}
        put(block.module, soft)
        try:
            found = learn_rounding(
                soft,
                lambda g: error(int(torch.randint(n, (), generator=g))),
                on_all,
                iterations=iterations,
                lr=lr,
                relative=True,
                seed=seed + block.index,
                where=block.name,
            )
        finally:
            put(block.module, {name: module for name, module in before.items() if module is not None})
        power = sum(float(w.square().sum(-1).mean()) for w in wanted) / n
        made: list[Edit] = []
        for name, layer in soft.items():
            path = block.paths[name]
            modules[path] = layer.export()
            errors[path] = (found.learned if found.kept else found.nearest) / max(power, 1e-30)
            made.append(SwapModule(path, modules[path]))
        return made

    two_stream(
        model, texts.fit, visit, context=texts.context, max_tokens=texts.tokens, batch_tokens=texts.context
    )
    return modules, errors
