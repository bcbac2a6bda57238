"""EdgeQAT: quantization-aware training guided by attention, for small language models.

    edit = edgeqat(model, corpus, w_bits=4, a_bits=8, steps=500)          # actlas fit edgeqat ...

Weights get learned steps (LSQ; one for each tensor, or each output channel), what the linear layers read and
attention's queries, keys, values and softmax map learned steps and zero points, one for each place. Training
follows

    L = distillation + w_sim L_sim + w_ent L_ent

(`edgeqat_losses`), the teacher being the model as it was, and further ones if given. With
`token_adaptive=True` the activations are rounded token by token instead (`token_bits`). The result is a
`QuantEdit` and a `RoundAt` for each place inside attention.

Source: Shen et al. 2024, "EdgeQAT", and its code. There queries and keys are rounded after the rotary
embedding; here where they are read, before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.edit import ActivationEdit, Edit, Here, compose, register_edit
from actlas.core.errors import InputError
from actlas.core.hooks import attach
from actlas.core.installation import PassWatcher
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.numbers import FakeQuant, QuantParams, QuantSpec
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import round_static
from actlas.measure.linear_layers import LinearLayer
from actlas.measure.quant_price import quant_prices
from actlas.training.edgeqat_losses import attention_entropy, attention_similarity, distillation
from actlas.training.qat import (
    TrainedQuantLinear,
    check_language_model,
    learned_rounding,
    quantizing,
    split_documents,
    step_groups,
    tune_quantized,
)
from actlas.training.token_bits import TokenBits, calibrate_thresholds

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.pattern")


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class RoundAt(ActivationEdit):
    """Round an activation to a fixed grid with one scale.

    Attributes:
        spec: the format, by name.
        scale: one number.
        zero: one number, or 0 for symmetric formats.
    """

    spec: str
    scale: Tensor
    zero: Tensor

    def value(self, x: Tensor, here: Here) -> Tensor:
        """Return x on the grid."""
        form = QuantSpec.parse(self.spec)
        zero = None if form.symmetric else self.zero.to(x.device).reshape(1, 1)
        return round_static(x, form, QuantParams(self.scale.to(x.device).reshape(1, 1), zero))


class AttentionReader:
    """Reads, and on request rounds, what attention of every block computes in a pass.

    Args:
        model: a model with a layout.
        bits: of queries, keys, values and pattern; `None`: they are only read.

    Attributes:
        seen: by kind, one tensor a block, of the last pass.
        quantizers: by site, what rounds there.
    """

    def __init__(self, model: Model, bits: int | None = None) -> None:
        self.model = model
        self.seen: dict[str, dict[int, Tensor]] = {}
        self.quantizers: dict[str, FakeQuant] = {}
        if bits is not None:
            for kind in ATTENTION:
                for site in model.resolve(f"blocks.*.{kind}"):
                    self.quantizers[site.name] = FakeQuant(QuantSpec(bits, granularity="tensor"), "lsq")

    def layers(self, kind: str) -> list[Tensor]:
        """Return what the last pass had at a kind of site, by block."""
        found = self.seen.get(kind, {})
        return [found[b] for b in sorted(found)]

    @contextmanager
    def reading(self, kinds: Sequence[str]) -> Iterator[AttentionReader]:
        """Read these kinds of sites (and round where there are quantizers) while the block runs."""
        watcher = PassWatcher(self.model)
        wanted = [*kinds, *(k for k in ATTENTION if self.quantizers and k not in kinds)]
        with ExitStack() as stack:
            stack.callback(watcher.stop)
            watcher.start()
            for kind in wanted:
                for site in self.model.resolve(f"blocks.*.{kind}"):
                    assert site.block is not None
                    function = self._at(kind, site.block, self.quantizers.get(site.name), kind in kinds)
                    handle = attach(
                        self.model.module,
                        site,
                        function,
                        batch=lambda s=site: watcher.of(s).batch or 1,  # type: ignore[misc]
                    )
                    stack.callback(handle.remove)
            yield self
        self.seen = {}

    def _at(
        self, kind: str, block: int, quantizer: FakeQuant | None, keep: bool
    ) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            new = x if quantizer is None else learned_rounding(quantizer, x)
            if keep:
                self.seen.setdefault(kind, {})[block] = new
            return new

        return function

    def frozen(self) -> list[Edit]:
        """Return the quantizers as edits."""
        edits: list[Edit] = []
        for site, q in self.quantizers.items():
            params = q.params
            assert params is not None
            zero = torch.zeros(1) if params.zero is None else params.zero.detach().flatten()
            edits.append(RoundAt(site, q.spec.name, params.scale.detach().flatten().clone(), zero.clone()))
        return edits


@method(
    "edgeqat",
    room="training",
    returns="Edit",
    data="corpus",
    summary="quantization-aware training guided by attention's entropy and maps, with distillation",
    example="actlas fit edgeqat smollm2 prose --w-bits 4 --a-bits 8 --steps 30 -o edgeqat/",
    papers=("edgeqat",),
)
def edgeqat(
    model: Model,
    data: Any,
    *,
    w_bits: int = 4,
    a_bits: int = 8,
    granularity: Literal["tensor", "channel"] = "tensor",
    distil: float = 0.5,
    temperature: float = 2.0,
    similarity: float = 1.0,
    entropy: float = 1.0,
    official: bool = False,
    token_adaptive: bool = False,
    low_bits: int = 4,
    teachers: Sequence[Model] = (),
    steps: int = 200,
    lr: float = 5e-4,
    lr_steps: float = 2e-5,
    batch: int = 8,
    context: int = 128,
    held_out: float = 0.1,
    tokens: int = 4096,
    seed: int = 0,
) -> Edit:
    """Train a model's quantised weights and activations on text, and return the result as an edit.

    Args:
        model: a causal language model with a layout; it is left as it was, and is the first teacher.
        data: a corpus; its last part is held out for the numbers.
        w_bits, a_bits: of weights, and of activations (learned, one range a place).
        granularity: of the weights' steps.
        distil, temperature: share of the divergence from the teachers, and its temperature.
        similarity, entropy: weights of the two losses; 0 leaves one out.
        official: the released forms of both.
        token_adaptive: round activations token by token to `low_bits` or `a_bits` instead.
        low_bits: see there.
        teachers: more models with the same vocabulary.
        steps, lr, batch, context: of AdamW.
        lr_steps: rate of learned steps and zero points.
        held_out, tokens: share of documents, and tokens of them, on which it is measured.
        seed: of the windows.

    Returns:
        The edit; its measurements are the prices of it and of the same grids before training, and their
        paired difference.

    Raises:
        InputError, ModelError, NonFiniteError: bad sizes, no causal language model, a diverging loss.
    """
    check_language_model(model)
    if min(similarity, entropy) < 0:
        raise InputError(
            f"similarity={similarity:g}, entropy={entropy:g}: weights of losses are not negative"
        )
    weight_form = QuantSpec.parse(f"int{w_bits}-{granularity}-sym")
    act_form = None if token_adaptive else QuantSpec(a_bits, granularity="tensor")
    learn, test = split_documents(data, held_out)
    teacher = Model(
        copy.deepcopy(model.module), model.tokenizer, name=f"{model.name} (teacher)", kind=model.kind
    )
    teacher.module.requires_grad_(False)
    bits = None
    if token_adaptive:
        limits = calibrate_thresholds(model, learn, 0.5, tokens=tokens, context=context)
        bits = TokenBits(limits, low_bits, a_bits)

    def make(layer: LinearLayer, linear: nn.Module) -> nn.Module:
        return TrainedQuantLinear(
            linear, weight_form, grad="lsq", act=act_form, act_grad="lsq", where=layer.path
        )

    reader = AttentionReader(model, None if token_adaptive else a_bits)
    guide = AttentionReader(teacher)
    kinds = (["attn.q", "attn.k"] if entropy else []) + (["attn.scores"] if similarity else [])

    def loss_of(ids: Tensor) -> Tensor:
        wanted = []
        if distil or kinds:
            with torch.no_grad():
                wanted = [
                    teacher.module(input_ids=ids).logits,
                    *(t.module(input_ids=ids).logits for t in teachers),
                ]
        logits = model.module(input_ids=ids).logits
        total = distillation(logits, wanted, ids, temperature=temperature, share=distil)
        if similarity:
            maps = reader.layers("attn.scores"), guide.layers("attn.scores")
            total = total + similarity * attention_similarity(*maps, official=official)
        if entropy:
            own = reader.layers("attn.q"), reader.layers("attn.k")
            theirs = None if official else (guide.layers("attn.q"), guide.layers("attn.k"))
            total = total + entropy * attention_entropy(*own, reference=theirs, official=official)
        return total

    with quantizing(model, make) as layers, ExitStack() as stack:
        if bits is not None:
            stack.enter_context(model.edit(bits))
        stack.enter_context(reader.reading(kinds))
        stack.enter_context(guide.reading(kinds))
        _start(model, learn, context)
        before = _collect(layers, reader, bits, "rounding")
        tune_quantized(
            model, learn, layers, steps=steps, lr=lr, batch=batch, context=context, loss_of=loss_of,
                seed=seed,
            groups=step_groups(layers, lr, lr_steps, reader.quantizers.values()), what="edgeqat",
        )  # fmt: skip
        edit = _collect(layers, reader, bits, "edgeqat")
    found = quant_prices(
        model, test, {"edgeqat": edit, "untrained": before}, pairs=[("edgeqat", "untrained")], seed=seed,
        tokens=tokens, context=context,
    )  # fmt: skip
    return edit.bind(model.fingerprint).with_measurements(found)


@torch.no_grad()
def _start(model: Model, documents: Any, context: int) -> None:
    """Run one window, from which learned steps take their first value."""
    from actlas.training.language_loop import corpus_tokens

    ids = corpus_tokens(model, documents, context)[:context]
    model.module(input_ids=ids[None].to(model.device))


def _collect(layers: dict[str, Any], reader: AttentionReader, bits: TokenBits | None, name: str) -> Edit:
    edit: Edit = QuantEdit({path: layer.frozen() for path, layer in layers.items()}, method=name)
    return compose([edit, *reader.frozen(), *([bits] if bits is not None else [])])
