"""Bits for each layer by gradient: QuantNAS's search with one operation and several widths.

    edit = bit_search(model, corpus, bits=(2, 3, 4), mean_bits=3.0)          # actlas fit bit-search ...

Every linear layer of the blocks gets a logit for each width; its weight is the mixture
`core.bit_mixture.mix_bits`, where noise of the size of each width's rounding stands for rounding. With frozen
weights the logits learn, on text,

    L = next-token loss + entropy * w1(t) w2(t) mean H(p) + penalty * max(0, mean bits - target)

w1 rises linearly, w2 is 0 for the first quarter and then rises like a logarithm, so that a choice is first
explored and then made. Afterwards widths are taken greedily by their probabilities so that the mean (by
weights) keeps the target, and the layers are rounded to nearest. Bit operations with activations of a fixed
width are proportional to the mean bits.

Source: Shvetsov et al. 2024, "QuantNAS for super resolution"; here for language models and without
    operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.bit_mixture import Imitation, mix_bits
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.layout import weight_matrix
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.numbers import QuantSpec
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.measure.linear_layers import LinearLayer
from actlas.measure.quant_price import quant_prices
from actlas.training.qat import check_language_model, quantizing, split_documents, tune_quantized


class MixedBitsLinear(nn.Module):
    """A frozen linear layer under a mixture of widths.

    Args:
        linear: the layer.
        specs: formats, rising in bits.
        how: how a width is imitated.
        generator: of the noise.
        where: the layer's name, for messages.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Module,
        specs: Sequence[QuantSpec],
        how: Imitation = "noise",
        generator: torch.Generator | None = None,
        where: str = "the layer",
    ) -> None:
        super().__init__()
        weight = weight_matrix(linear).detach().float()
        for spec in specs:
            spec.check(weight.shape[1], where)
        self.specs, self.how, self.generator = tuple(specs), how, generator
        self.register_buffer("weight", weight)
        bias = getattr(linear, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.logits = nn.Parameter(torch.zeros(len(specs), device=weight.device))
        self.out_features, self.in_features = weight.shape

    @property
    def probabilities(self) -> Tensor:
        """Of the widths, `[B]`."""
        return self.logits.softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        weight = mix_bits(self.weight, self.specs, self.probabilities, how=self.how, generator=self.generator)
        return F.linear(x, weight, self.bias)

    def mean_bits(self) -> Tensor:
        """Return the expected bits, differentiable."""
        bits = torch.tensor([float(s.bits) for s in self.specs]).to(self.logits)
        return (self.probabilities * bits).sum()

    def entropy(self) -> Tensor:
        """Return the entropy of the choice, nats."""
        log_p = self.logits.log_softmax(0)
        return -(log_p.exp() * log_p).sum()


def entropy_weight(step: int, steps: int) -> float:
    """Return `w1(t) w2(t)`: 0 in the first quarter, then linear times logarithmic, 1 at the end."""
    part = step / max(1, steps - 1)
    if part < 0.25:
        return 0.0
    return part * math.log1p((math.e - 1) * (part - 0.25) / 0.75)


def allocate(probabilities: Mapping[str, Sequence[float]], sizes: Mapping[str, int], bits: Sequence[int],
             mean_bits: float) -> dict[str, int]:  # fmt: skip
    """Return bits for each layer: the likeliest, then steps down (or up) where the log-odds say it costs
    least.

    Args:
        probabilities: of each width, by layer.
        sizes: weights of each layer.
        bits: the widths, rising.
        mean_bits: the mean over weights is at most this, and no single step up would keep it.

    Raises:
        InputError: the least width is above the target.
    """
    if bits[0] > mean_bits:
        raise InputError(f"mean_bits is {mean_bits:g}, below the least of the widths, {bits[0]}")
    at = {path: max(range(len(bits)), key=lambda i, p=p: p[i]) for path, p in probabilities.items()}  # type: ignore[misc]
    total = sum(sizes.values())

    def mean() -> float:
        return sum(sizes[path] * bits[i] for path, i in at.items()) / total

    def odds(path: str, new: int) -> float:
        """Log-probability lost, for each bit of the whole model that is saved or spent."""
        p = probabilities[path]
        lost = math.log(max(p[at[path]], 1e-12)) - math.log(max(p[new], 1e-12))
        return lost / (sizes[path] * abs(bits[new] - bits[at[path]]))

    while mean() > mean_bits + 1e-9:
        path = min((q for q, i in at.items() if i > 0), key=lambda q: odds(q, at[q] - 1))
        at[path] -= 1
    while True:
        room = (mean_bits + 1e-9 - mean()) * total
        up = [q for q, i in at.items() if i + 1 < len(bits) and sizes[q] * (bits[i + 1] - bits[i]) <= room]
        if not up:
            return {path: bits[i] for path, i in at.items()}
        at[min(up, key=lambda q: odds(q, at[q] + 1))] += 1


@method(
    "bit-search",
    room="training",
    returns="Edit",
    data="corpus",
    summary="learn how many bits each layer needs, by gradient through quantization noise (QuantNAS)",
    example="actlas fit bit-search smollm2 prose --bits 2,3,4 --mean-bits 3 --steps 40 -o searched/",
    papers=("quantnas",),
)
def bit_search(
    model: Model,
    data: Any,
    *,
    bits: Sequence[int] | str = (2, 3, 4),
    mean_bits: float = 3.0,
    form: str = "g64",
    how: Imitation = "noise",
    entropy: float = 1e-3,
    penalty: float = 1.0,
    steps: int = 100,
    lr: float = 0.05,
    batch: int = 4,
    context: int = 128,
    held_out: float = 0.1,
    tokens: int = 4096,
    seed: int = 0,
) -> Edit:
    """Search widths for the layers of a model on text, and return the rounded layers as an edit.

    Args:
        model: a causal language model with a layout; it is left as it was.
        data: a corpus; its last part is held out for the numbers.
        bits: the widths, 2 to 8 (`"2,3,4"` on the command line).
        mean_bits: target, mean over weights, codes only.
        form: what follows the bits in the name of the format: `"g64"`, `"channel"`, `"channel-sym"`.
        how: `"noise"`, or `"ste"`: rounding itself.
        entropy, penalty: weights in the loss.
        steps, lr, batch, context: of Adam on the logits.
        held_out, tokens: share of documents, and tokens of them, on which it is measured.
        seed: of the windows and the noise.

    Returns:
        A `QuantEdit`; its measurements are the prices of it and of the widest width that fits the target in
        every layer, and their paired difference.

    Raises:
        InputError, ModelError, NonFiniteError: bad widths, no causal language model, a diverging loss.
    """
    check_language_model(model)
    widths = _widths(bits)
    specs = [QuantSpec.parse(f"int{b}-{form}") for b in widths]
    if penalty < 0 or entropy < 0:
        raise InputError(f"penalty={penalty:g}, entropy={entropy:g}: weights of losses are not negative")
    if mean_bits < widths[0]:
        raise InputError(f"mean_bits is {mean_bits:g}, below the least of the widths, {widths[0]}")
    learn, test = split_documents(data, held_out)
    generator = torch.Generator().manual_seed(seed)
    done = [0]

    def make(layer: LinearLayer, linear: nn.Module) -> nn.Module:
        return MixedBitsLinear(linear, specs, how, generator, layer.path)

    with quantizing(model, make) as layers:
        sizes = {path: m.weight.numel() for path, m in layers.items()}
        total = sum(sizes.values())

        def loss_of(ids: Tensor) -> Tensor:
            loss: Tensor = model.module(input_ids=ids, labels=ids).loss
            mean = sum(m.mean_bits() * (sizes[p] / total) for p, m in layers.items())
            spread = torch.stack([m.entropy() for m in layers.values()]).mean()
            loss = (
                loss + penalty * F.relu(mean - mean_bits) + entropy * entropy_weight(done[0], steps) * spread
            )
            done[0] += 1
            return loss

        tune_quantized(
            model, learn, layers, steps=steps, lr=lr, batch=batch, context=context, loss_of=loss_of,
                seed=seed,
            what="bit-search",
        )  # fmt: skip
        found = {path: m.probabilities.tolist() for path, m in layers.items()}
    chosen = allocate(found, sizes, widths, mean_bits)
    by_width = dict(zip(widths, specs, strict=True))
    edit = _rounded(model, {p: by_width[b] for p, b in chosen.items()}, "bit-search")
    even = by_width[max(b for b in widths if b <= mean_bits)]
    uniform = _rounded(model, dict.fromkeys(chosen, even), f"uniform {even.name}")
    prices = quant_prices(
        model, test, {"bit-search": edit, "uniform": uniform}, pairs=[("bit-search", "uniform")], seed=seed,
        tokens=tokens, context=context,
    )  # fmt: skip
    return edit.bind(model.fingerprint).with_measurements(prices)


def _rounded(model: Model, specs: Mapping[str, QuantSpec], name: str) -> QuantEdit:
    modules: dict[str, nn.Module] = {}
    for path, spec in specs.items():
        layer = model.module.get_submodule(path)
        modules[path] = QuantLinear.of(layer, spec, where=path)
    return QuantEdit(modules, method=name)


def _widths(bits: Sequence[int] | str) -> tuple[int, ...]:
    """Return the widths, rising.

    Raises:
        InputError: none, not whole numbers, twice the same, or outside 2 to 8.
    """
    try:
        found = tuple(
            sorted(int(b) for b in (str(bits).split(",") if isinstance(bits, (str, int)) else bits))
        )
    except ValueError as error:
        raise InputError(f"bits is {bits!r}; give whole numbers, e.g. 2,3,4") from error
    if not found or len(set(found)) < len(found) or found[0] < 2 or found[-1] > 8:
        raise InputError(f"bits are {bits!r}; give different widths from 2 to 8, e.g. 2,3,4")
    return found
