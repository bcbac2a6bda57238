"""Generating on the lean loop where it can, and saying in one line why not where it cannot.

    why = reason_against(model, prompt, edits)             # None, or the reason
    fast_generate(model, prompt, edits, max_new_tokens=50)

`fast_generate` gives what `model.generate` gives under the same edits: with float32 weights the same greedy
tokens, and the same draws when it samples (the same random numbers meet the same probabilities, up to the
rounding of sums). `lean_weights` tells three kinds of edit apart: `PackedWeights` says in which format the
loop holds the weights; edits of weights (quantised layers, task vectors) are in place while it packs them;
the others must be ones that it can carry (`decoder_edits.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import ActlasError, InputError, ModelError, NonFiniteError
from actlas.core.generating import Generation, _as_list, _check_options
from actlas.core.packed_weights import PackedWeights, legal
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.core.weight_edit import WeightEdit
from actlas.kernels.packed import GROUP
from actlas.models.decoder import LAYERS, FastDecoder, Weights, _block, _linear, why_not
from actlas.models.decoder_edits import plan

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

# What a generation config may say without changing what greedy decoding or plain sampling gives.
_HARMLESS = {
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
    "transformers_version",
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "return_dict_in_generate",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "min_length": 0, "num_beams": 1,
    "num_return_sequences": 1, "length_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Lean:
    """How the loop runs a model with some edits.

    Attributes:
        weights, head: formats of the blocks and of the output head.
        own: edits of weights, in place while the loop packs them.
        edits: what is left of the edits, for the loop to carry.
    """

    weights: Weights
    head: Weights
    own: tuple[Edit, ...]
    edits: tuple[Edit, ...]

    def decoder(self, model: Model, length: int | None = None, **options: Any) -> FastDecoder:
        """Return the loop."""
        options |= {"head": self.head, "length": length, "edits": self.edits}
        if not self.own:
            return FastDecoder(model, self.weights, **options)
        with model.edit(*self.own):
            return FastDecoder(model, self.weights, **options)


def lean_weights(model: Model, edits: Sequence[Edit]) -> Lean:
    """Split edits into a weight format and what the loop must carry.

    Raises:
        ModelError: the model cannot run on the loop.
        InputError: an edit that it cannot carry, or packed weights in other formats than it holds.
        FingerprintError: an edit of another model.
    """
    reason = why_not(model)
    if reason is not None:
        raise ModelError(f"{model.name} cannot run on the lean loop: {reason}")
    packed: list[PackedWeights] = []
    own: list[Edit] = []
    rest: list[Edit] = []
    for edit in edits:
        for part in (edit, *edit.parts()):
            if part.fingerprint is not None:
                part.fingerprint.check(model.fingerprint, part.describe())
        for part in edit.parts():
            if isinstance(part, PackedWeights):
                packed.append(part)
            elif isinstance(part, QuantEdit | WeightEdit):
                _check_plain(part)
                own.append(part)
            else:
                rest.append(part)
    if len(packed) > 1:
        raise InputError("two edits pack the weights; give one")
    weights, head = _formats(model, packed[0]) if packed else ("f32", "f32")
    thresholds = plan(model, rest).thresholds
    for (block, name), threshold in thresholds.items():
        if threshold.numel() % GROUP:
            raise InputError(
                f"{name} of block {block} has {threshold.numel()} inputs; "
                f"skipping needs a multiple of {GROUP}"
            )
    return Lean(weights, head, tuple(own), tuple(rest))  # type: ignore[arg-type]


def reason_against(
    model: Model, inputs: Any = "", edits: Sequence[Edit] = (), *, num_beams: int = 1, **options: Any
) -> str | None:
    """Return why a generation cannot run on the lean loop, or `None` if it can.

    Args:
        model, inputs, edits, num_beams: as for `model.generate`; edits that are not installed.
        options: further options of transformers' `generate`, all of which the loop lacks.
    """
    if num_beams != 1:
        return f"it has no beam search (num_beams is {num_beams})"
    if options:
        return f"it has no option {next(iter(options))}"
    if model.installed:
        return "edits are installed on the model; give them to the loop instead"
    if not isinstance(inputs, str) and not (
        isinstance(inputs, list) and inputs and isinstance(inputs[0], dict)
    ):
        return "it takes one prompt at a time"
    try:
        lean = lean_weights(model, edits)
    except ActlasError as error:
        return str(error)
    dtype = next(model.module.parameters()).dtype
    if dtype != torch.float32 and lean.weights == "f32":
        return f"the weights are {str(dtype).removeprefix('torch.')}; its tokens are those of float32 weights"
    return _settings(model)


def fast_generate(
    model: Model,
    inputs: Any,
    edits: Sequence[Edit] = (),
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[Tensor], None] | None = None,
    decoder: FastDecoder | None = None,
) -> Generation:
    """Generate on the lean loop; see `Model.generate` for the arguments.

    Args:
        model: a model for which `reason_against` is `None`.
        inputs: one prompt, or one chat as a list of messages.
        edits: they apply to this generation; they are not installed.
        max_new_tokens, temperature, top_p, seed, on_token: as there.
        decoder: a loop made before with these edits, to be used again.

    Raises:
        InputError, ModelError: as `lean_weights`; a prompt that does not fit the context.
        NonFiniteError: NaN or infinite logits.
    """
    _check_options(max_new_tokens, temperature, top_p, 1, on_token)
    ids = model.encode(inputs)["input_ids"][0].tolist()
    limit = model.context_length
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}; "
            f"{model.name} has a context of {limit}"
        )
    if decoder is None:
        decoder = lean_weights(model, edits).decoder(model, len(ids) + max_new_tokens)
    decoder.reset()
    ends = _ends(model)
    warp = _warper(temperature, top_p)
    found: list[int] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        logits = decoder.feed(ids)
        while True:
            if not bool(torch.isfinite(logits.amax())):
                under = " + ".join(e.describe() for e in edits) or "no edit"
                raise NonFiniteError(
                    f"the logits are NaN or infinite at new token {len(found) + 1} under {under}"
                )
            token = int(logits.argmax()) if warp is None else _draw(warp(logits.clone()))
            found.append(token)
            if on_token is not None:
                on_token(torch.tensor([token]))
            if token in ends or len(found) == max_new_tokens:
                break
            logits = decoder.feed([token])
    tokens = torch.tensor(found)
    text = [] if model.tokenizer is None else [model.tokenizer.decode(tokens, skip_special_tokens=True)]
    prompts = [inputs] if isinstance(inputs, str) else []
    return Generation(text, [tokens], prompts, torch.tensor([ids + found]))


def _check_plain(edit: Edit) -> None:
    """Refuse quantised layers that do more than multiply with a weight.

    Raises:
        InputError: such a layer.
    """
    for path, module in edit.modules.items() if isinstance(edit, QuantEdit) else ():
        if not isinstance(module, QuantLinear):
            raise InputError(f"the lean loop has no {type(module).__name__} ({path})")
        if module.act_spec is not None or module.input_shift is not None:
            raise InputError(f"{path} rounds or shifts its inputs, and the lean loop does not")


def _formats(model: Model, packed: PackedWeights) -> tuple[str, str]:
    """Return the format of the blocks and of the head; layers that cannot be packed stay as they are."""
    tower = model.tower
    assert tower is not None
    names = {id(module): path for path, module in model.module.named_modules()}
    found: set[str] = set()
    for i in range(tower.n_blocks):
        block = _block(model, i)
        for name in LAYERS:
            layer = _linear(block, name)
            format = packed.formats.get(names[id(layer)], "f32")
            if format == "f32" and legal("q8", layer) == "f32":
                continue
            found.add(format)
    if len(found) > 1:
        raise InputError(
            f"the lean loop holds all blocks in one format, and these are {' and '.join(sorted(found))}"
        )
    unembed = model.unembed_module
    assert unembed is not None
    return found.pop() if found else "f32", packed.formats.get(names[id(unembed)], "f32")


def _settings(model: Model) -> str | None:
    """Return which of the model's own generation settings the loop has not got, if any."""
    config = getattr(model.module, "generation_config", None)
    if config is None:
        return None
    for name, value in config.to_diff_dict().items():
        if name in _HARMLESS or name.startswith(("_", "output_")) or value in (None, False):
            continue
        if name in _NEUTRAL and value == _NEUTRAL[name]:
            continue
        return f"the model's generation settings have {name} = {value!r}, which it has not got"
    return None


def _ends(model: Model) -> frozenset[int]:
    config = getattr(model.module, "generation_config", None)
    ends = set(_as_list(getattr(config, "eos_token_id", None)))
    if model.tokenizer is not None and model.tokenizer.eos_token_id is not None:
        ends.add(model.tokenizer.eos_token_id)
    return frozenset(ends)


def _warper(temperature: float, top_p: float) -> Callable[[Tensor], Tensor] | None:
    """Return transformers' own temperature and nucleus, or `None` for greedy decoding."""
    if temperature == 0:
        return None
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []

    def warp(logits: Tensor) -> Tensor:
        scores = logits.unsqueeze(0)
        for step in steps:
            scores = step(None, scores)
        return scores

    return warp


def _draw(scores: Tensor) -> int:
    return int(torch.multinomial(scores.softmax(-1), 1))
