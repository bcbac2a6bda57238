"""How much the loss minds: gradients at every linear layer, from one backward pass over some text.

With g_t = dL/dy_t at a layer's output and an error dy_t of that output, the loss rises to second order by

    1/2 E_t[(g_t . dy_t)^2]                 (empirical Fisher; labels are drawn from the model itself)

`loss_rises` evaluates it for errors that skipped inputs make, at several shares: the measured sensitivity
that budgets are allocated by. `input_gradients` keeps, for every input i of a layer,

    f_i = sqrt(E_t[(g_t . W[:, i])^2])

so that |x_i| f_i estimates what skipping that one input costs, in the same unit for every layer. WINA's
column norm is the special case in which the loss minds all outputs alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import NonFiniteError
from actlas.measure.likelihood import _pad, select
from actlas.measure.linear_layers import LinearLayer

if TYPE_CHECKING:
    from actlas.core.model import Model

Take = Callable[[LinearLayer, Tensor, Tensor], None]


def each_gradient(
    model: Model,
    corpus: Any,
    layers: Sequence[LinearLayer],
    take: Take,
    *,
    tokens: int = 1024,
    context: int = 128,
    seed: int = 0,
) -> int:
    """Call `take(layer, x [n, columns], g [n, rows])` for every layer and batch; returns the token count.

    Args:
        model: a causal language model.
        corpus: text.
        layers: which layers.
        take: gets the inputs and the gradients of the summed loss, detached, for real tokens.
        tokens, context: how much text.
        seed: of the labels, which are drawn from the model's own predictions.

    Raises:
        NonFiniteError: NaN or infinity in the logits.
    """
    chosen = select(model, corpus, tokens=tokens, context=context)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for start in range(0, len(chosen.windows), 4):
        inputs = _pad(model, list(chosen.windows[start : start + 4]))
        mask = inputs["attention_mask"].bool()
        count += int(mask.sum())
        with ExitStack() as stack:
            for layer in layers:
                handle = layer.module(model).register_forward_hook(_reader(layer, mask, take))
                stack.callback(handle.remove)
            with torch.enable_grad():
                network: Any = model.module
                embedded = network.get_input_embeddings()(inputs["input_ids"])
                embedded = embedded.detach().requires_grad_()
                logits = network(
                    inputs_embeds=embedded, attention_mask=inputs["attention_mask"], use_cache=False
                ).logits
                p = logits.detach().float().softmax(-1).flatten(0, 1).cpu()
                if not bool(torch.isfinite(p[mask.flatten().cpu()]).all()):
                    raise NonFiniteError(
                        f"the logits of {model.name} hold NaN or infinity; check the weights"
                    )
                drawn = torch.multinomial(p, 1, generator=generator).squeeze(1).to(logits.device)
                losses = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), drawn, reduction="none"
                )
                torch.autograd.grad((losses * mask.flatten()).sum(), embedded)
    return count


def _reader(layer: LinearLayer, mask: Tensor, take: Take) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda g: take(layer, x[mask].float(), g.detach()[mask].float()))

    return hook


def input_gradients(
    model: Model, corpus: Any, layers: Sequence[LinearLayer], **options: Any
) -> dict[str, Tensor]:
    """Return f by layer path, float32 `[columns]`; `options` are those of `each_gradient`."""
    squares: dict[str, Tensor] = {}
    weights = {layer.path: layer.weight(model) for layer in layers}

    def take(layer: LinearLayer, x: Tensor, g: Tensor) -> None:
        found = (g @ weights[layer.path]).double().square().sum(0)
        squares[layer.path] = squares.get(layer.path, 0) + found

    count = each_gradient(model, corpus, layers, take, **options)
    return {path: (s / max(count, 1)).sqrt().float() for path, s in squares.items()}


def loss_rises(
    model: Model,
    corpus: Any,
    layers: Sequence[LinearLayer],
    factor: Mapping[str, Tensor | float],
    levels: Sequence[float],
    **options: Any,
) -> dict[str, list[float]]:
    """Return, by layer path, the expected rise of the loss (nats a token) at each share of skipped inputs.

    Args:
        model, corpus, layers: as in `each_gradient`, which takes the `options`.
        factor: path -> c of the score that chooses which inputs of a token are skipped.
        levels: shares in [0, 1).
    """
    sums = {layer.path: [0.0] * len(levels) for layer in layers}
    weights = {layer.path: layer.weight(model) for layer in layers}

    def take(layer: LinearLayer, x: Tensor, g: Tensor) -> None:
        c = factor[layer.path]
        score = x.abs() * (c.to(x) if isinstance(c, Tensor) else c)
        parts = x * (g @ weights[layer.path])  # [n, columns]: what each input adds to the loss
        order = score.argsort(dim=1, stable=True)
        running = parts.gather(1, order).cumsum(1)
        for i, level in enumerate(levels):
            k = round(level * x.shape[1])
            if k:
                sums[layer.path][i] += float(running[:, k - 1].double().square().sum())

    count = each_gradient(model, corpus, layers, take, **options)
    return {path: [s / (2 * max(count, 1)) for s in row] for path, row in sums.items()}
