"""A lean loop for generating text on a CPU, for models of the llama kind.

    fast = FastDecoder(model, weights="q4")
    fast.generate("The capital of France is", max_new_tokens=64).texts[0]

Decoding reads every weight once for each token, so what counts is how many bytes they take and that nothing
else costs time. The blocks run in native code (`kernels/native/decoder.cpp`) on a static key-value cache,
with float32 weights (the model's own memory), packed ones (`kernels/packed.py`), or the codes of quantised
layers that are installed while the loop is made (`packed_codes.py`). With float32 weights the tokens are
those of transformers' greedy decoding on the same weights, up to the rounding of sums.

Edits at `blocks.{i}.resid_post`, `blocks.{i}.resid_pre` and `embed` apply between the blocks, and layers that
skip inputs (`SkipInputs`) read only the columns of the others; see `decoder_edits.py`. Other edits, other
architectures and machines without native code are refused with the reason (`why_not`); the caller then uses
`model.generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.installation import Installation
from actlas.core.layout import find, join
from actlas.kernels.columns import PackedColumns, pack_columns
from actlas.kernels.loading import native
from actlas.kernels.packed import GROUP, Format, Packed, pack
from actlas.models.decoder_edits import LAYERS, new_generation, new_pass, plan
from actlas.models.packed_codes import column_codes, packed_codes

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

Weights = Literal["f32", "q8", "q4"]
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
    "relu2": 4,
}
_AT_ONCE = 8


def why_not(model: Model) -> str | None:
    """Return why a model cannot run on the lean loop, or `None` if it can."""
    config = model.config
    kind = getattr(config, "model_type", None)
    if native() is None:
        return "the native kernels are not installed"
    if kind not in MODEL_TYPES or model.tower is None or model.kind != "causal-lm":
        return (
            f"its architecture is {kind or type(model.module).__name__}, and the lean loop runs "
            + ", ".join(MODEL_TYPES)
        )
    if model.device.type != "cpu":
        return f"it is on {model.device}, and the lean loop runs on the CPU"
    if getattr(config, "hidden_act", "") not in _ACTIVATIONS:
        return f"its activation is {config.hidden_act!r}, and the lean loop has {', '.join(_ACTIVATIONS)}"
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if window and used and window < (model.context_length or 0):
        return f"it attends to a sliding window of {window} tokens"
    return None


@dataclass(frozen=True, eq=False)
class Layers:
    """The packed layers of a model, which several decoders may share."""

    blocks: list[dict[str, Packed]]
    head: Packed

    @property
    def bytes(self) -> int:
        """Memory of all weights that one token reads."""
        return self.head.bytes + sum(p.bytes for block in self.blocks for p in block.values())


class FastDecoder:
    """One model's native decoder.

    Args:
        model: a model for which `why_not` is `None`.
        weights: format of the blocks' weights.
        head: format of the output head; default: `"f32"` with float32 weights, else `"q8"`.
        length: the most tokens, prompt included; default: the model's context, at most 2048.
        threads: default: torch's, at most two.
        edits: edits that apply to everything that this decoder runs.
        two_bytes: round activations to two bytes for packed weights, else to one (llama.cpp's way).

    Raises:
        ModelError: the model cannot run here, with the reason.
        InputError: an edit that the loop cannot carry.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights = "f32",
        *,
        head: Weights | None = None,
        length: int | None = None,
        threads: int | None = None,
        two_bytes: bool = True,
        edits: Sequence[Edit] = (),
    ) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ModelError(f"{model.name} cannot run on the lean loop: {reason}")
        from actlas.kernels.loading import threads as most_threads

        self.model, self.weights = model, weights
        self._plan = plan(model, edits)
        self._installation = Installation(model, ())
        self._stops = self._plan.boundaries(model.n_blocks or 0)
        limit = model.context_length or 2048
        self.length = min(length or 2048, limit)
        tower = model.tower
        assert tower is not None
        self._n, self._d = tower.n_blocks, tower.d_model
        self.layers = pack_layers(model, weights, head or ("f32" if weights == "f32" else "q8"))
        cosines, sines = _rotary(model, self.length)
        module = native()
        assert module is not None
        config = model.config
        self._kept: list[Any] = []
        first = _block(model, 0)
        self._native = module.Decoder.make(
            tower.d_model, tower.heads, tower.kv_heads, tower.head_dim, self.layers.blocks[0]["gate"].rows,
            self.length, float(config.rms_norm_eps), float(first.self_attn.scaling),
            _ACTIVATIONS[config.hidden_act], two_bytes, cosines, sines, threads or most_threads(), "best",
        )  # fmt: skip
        for i, packed in enumerate(self.layers.blocks):
            block = _block(model, i)
            handles = {name: packed[name].handle() for name in LAYERS}
            for name, handle in handles.items():
                threshold = self._plan.thresholds.get((i, name))
                if threshold is not None and packed[name].columns % GROUP == 0:
                    columns = _columns(_linear(block, name), packed[name].format)
                    handle.set_sparse(columns.format, columns.data, threshold, columns.group)
                elif threshold is not None:
                    raise ModelError(
                        f"{name} of block {i} has {packed[name].columns} inputs; "
                        f"skipping needs a multiple of {GROUP}"
                    )
            self._native.add(
                *handles.values(),
                _gain(block.input_layernorm), _gain(block.post_attention_layernorm),
                *(_gain(getattr(block.self_attn, name, None)) for name in ("q_norm", "k_norm")),
            )  # fmt: skip
        norm = model.final_norm_module
        assert norm is not None
        self._native.head(self.layers.head.handle(), _gain(norm))
        self._logits = torch.empty(self.layers.head.rows)
        self.position = 0
        self._generation = new_generation(0)

    @property
    def skipped(self) -> float:
        """Share of the inputs of sparse layers that were skipped so far (one token at a time), or NaN."""
        read, skipped = self._native.inputs_read, self._native.inputs_skipped
        return skipped / (read + skipped) if read + skipped else float("nan")

    # -- steps --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the cache."""
        self.position = 0

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Take the next tokens into the cache and return the logits after the last, `[vocabulary]`.

        The first tokens after a `reset` are the prompt.

        Raises:
            InputError: no tokens, or more than the cache holds.
        """
        if not ids:
            raise InputError("there are no tokens to feed; give at least one")
        if self.position + len(ids) > self.length:
            raise InputError(
                f"{self.position} + {len(ids)} tokens do not fit a cache of {self.length}; give it more"
            )
        module: Any = self.model.module
        table = module.get_input_embeddings().weight
        if self.position == 0:
            self._generation, skip = new_generation(len(ids)), self._plan.skip_prompt
        else:
            skip = True
        x = table[torch.tensor(list(ids))].detach().float().contiguous()
        x = self._blocks(x, list(ids), skip)
        self.position += len(ids)
        self._native.logits(x[-1].contiguous(), self._logits, self.layers.head.rows)
        return self._logits

    def _blocks(self, x: Tensor, ids: list[int], skip: bool) -> Tensor:
        """Run all blocks on the rows of x, a few at a time, and the edits between blocks on all of them."""
        run = new_pass(ids, self.position, self._generation) if self._plan.steps else None
        begin = 0
        for stop in self._stops:
            for start in range(0, len(ids), _AT_ONCE):
                self._native.run(x[start : start + _AT_ONCE], self.position + start, begin, stop, skip)
            if run is not None:
                x = self._plan.apply(x.unsqueeze(0), stop, run, self._installation)[0].contiguous()
            begin = stop
        return x

    def greedy(self, ids: Sequence[int], n: int, ends: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield up to `n` greedy tokens after a prompt; an end token is yielded and ends it."""
        self.reset()
        logits = self.feed(ids)
        for i in range(n):
            token = int(logits.argmax())
            yield token
            if token in ends or i + 1 == n:
                return
            logits = self.feed([token])


def pack_layers(model: Model, weights: Format, head: Format) -> Layers:
    """Pack the linear layers of a model's blocks and its output head."""
    tower = model.tower
    assert tower is not None
    blocks = []
    for i in range(tower.n_blocks):
        block = _block(model, i)
        blocks.append({name: _packed(_linear(block, name), weights) for name in LAYERS})
    unembed = model.unembed_module
    assert unembed is not None
    return Layers(blocks, _packed(unembed, head))


def _packed(layer: nn.Module, format: Format) -> Packed:
    codes = packed_codes(layer)
    if codes is not None:
        return codes
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    if not bool(torch.isfinite(weight.detach().sum(0)).all()):
        shape = list(weight.shape)
        raise NonFiniteError(
            f"a weight {shape} of the model holds NaN or infinity; check the file it is from"
        )
    if weight.shape[1] % GROUP:
        format = "f32"
    return pack(weight.data, format, None if bias is None else bias.data)


def _columns(layer: Any, format: str) -> PackedColumns:
    own = column_codes(layer)
    if own is not None:
        return own
    return pack_columns(layer.weight.data, format if format in ("f32", "q8", "q4") else "f32")  # type: ignore[arg-type]


def _linear(block: Any, name: str) -> Any:
    return getattr(block.self_attn if name in ("q", "k", "v", "o") else block.mlp, f"{name}_proj")


def _block(model: Model, i: int) -> Any:
    tower = model.tower
    assert tower is not None
    return find(model.module, join(tower.blocks, str(i)))


def _gain(norm: nn.Module | None) -> Tensor | None:
    if norm is None:
        return None
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.data.detach().float().contiguous()


def _rotary(model: Model, length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of all positions, float32 `[length, head_dim / 2]`, from the model itself."""
    rotary = next(m for name, m in model.module.named_modules() if name.endswith("rotary_emb"))
    with torch.no_grad():
        cosines, sines = rotary(torch.zeros(1, 1, 1), torch.arange(length).unsqueeze(0))
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()
