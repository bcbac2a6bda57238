"""A key-value cache in few bits (KIVI): an Edit that `generate` takes.

    with model.edit(QuantizeCache(key_bits=2, value_bits=2)):
        model.generate(long_prompt)

The cache of a long text is larger than the weights. `kv_layer` says how it is stored. A prompt is read with
its own exact keys and values; what is generated reads the stored ones. Passes without a cache are left alone.

Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv 2402.02750).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from actlas.core.edit import Edit, WholeEdit, register_edit
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find, join
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.quantize.kv_layer import Axis, QuantizedKV, group_of

if TYPE_CHECKING:
    from actlas.core.installation import Installation


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class QuantizeCache(WholeEdit):
    """Store keys and values in few bits.

    Attributes:
        key_bits, value_bits: 2 to 8, or 16 to leave them as they are.
        group: what shares a scale: tokens of a channel (keys), channels of a token (values); multiple of 8.
        window: last tokens that stay as they are, at least.
        sinks: first tokens that do.
        key_axis, value_axis: what a scale belongs to, `"channel"` or `"token"`.
    """

    whole: ClassVar[str] = "a cache is stored in one way for every token"

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32
    window: int = 32
    sinks: int = 0
    key_axis: Axis = "channel"
    value_axis: Axis = "token"

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or not (2 <= bits <= 8 or bits == 16):
                raise InputError(f"{name} is {bits!r}; it must be 2 to 8, or 16 to leave it as it is")
        if not isinstance(self.group, int) or self.group < 8 or self.group % 8:
            raise InputError(f"group is {self.group!r}; it must be a multiple of 8, so that codes fill bytes")
        for name in ("window", "sinks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 0"
                )
        for name in ("key_axis", "value_axis"):
            if getattr(self, name) not in get_args(Axis):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be 'channel' or 'token'")

    def describe(self) -> str:
        kept = f", {self.sinks} sinks" if self.sinks else ""
        return (
            f"QuantizeCache of {self.key_bits}-bit keys per {self.key_axis} and {self.value_bits}-bit "
            f"values per {self.value_axis} (groups of {self.group}, window {self.window}{kept})"
        )

    def layer(self) -> QuantizedKV:
        """Return an empty layer of such a cache."""
        return QuantizedKV(**asdict(self))

    def _attach(self, installation: Installation) -> None:
        model = installation.model
        tower = model.tower
        if model.kind != "causal-lm" or tower is None or not tower.attention:
            raise ModelError(
                f"{model.name} ({model.kind}) has no cache of keys and values to store in few bits"
            )
        others = (*installation.edits, *model.installed)
        if any(isinstance(e, QuantizeCache) and e is not self for e in others):
            raise InputError(f"{self.describe()}: one way to store the cache at a time; leave the other out")
        config = model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if "token" in (self.key_axis, self.value_axis):
            group_of(int(width), self.group)
        for i in range(tower.n_blocks):
            block = find(model.module, join(tower.blocks, str(i)))
            assert block is not None
            installation.keep(block.register_forward_pre_hook(self._before(i), with_kwargs=True))

    def _before(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
            if cache is None:
                return
            if not isinstance(cache, DynamicCache):
                raise ModelError(
                    f"the cache is a {type(cache).__name__}; only a plain growing cache can be stored in "
                    f"few bits"
                )
            if len(cache.layers) <= i:
                cache.layers += [DynamicLayer() for _ in range(i + 1 - len(cache.layers))]
            layer = cache.layers[i]
            if isinstance(layer, QuantizedKV) or layer.get_seq_length():
                return  # stored so already, or filled before the edit was installed
            if type(layer) is not DynamicLayer:
                raise ModelError(
                    f"cache layer {i} is a {type(layer).__name__}; only plain growing layers can be stored "
                    "in few bits (a policy that drops keys cannot be combined with it)"
                )
            cache.layers[i] = self.layer()

        return hook

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return asdict(self), {}

    @classmethod
    def _rebuild(cls, record: Any, tensors: Any) -> Edit:
        return cls(**{k: v for k, v in record.items() if k != "type"})


def cache_bits(edit: QuantizeCache, channels: int) -> float:
    """Return bits per stored number of coded tokens, scales and minima counted, mean of keys and values."""
    total = 0.0
    for bits, axis in ((edit.key_bits, edit.key_axis), (edit.value_bits, edit.value_axis)):
        group = edit.group if axis == "channel" else group_of(channels, edit.group)
        total += bits if bits == 16 else bits + 32 / group
    return total / 2


@method(
    "kv-quant",
    room="quantize",
    returns="Edit",
    data="corpus",
    summary="store the key-value cache in few bits: keys per channel, values per token (KIVI)",
    example="actlas fit kv-quant smollm2 prose --key-bits 2 --value-bits 2 -o kv2/",
)
def fit_kv_quant(
    model: Model,
    data: Any,
    *,
    key_bits: int = 4,
    value_bits: int = 4,
    group: int = 32,
    window: int = 32,
    sinks: int = 0,
    key_axis: Axis = "channel",
    value_axis: Axis = "token",
    prompts: int = 4,
    tokens: int = 192,
    seed: int = 0,
) -> Edit:
    """Return the edit, with its size and its price on text. Nothing is fitted.

    Args:
        model: a causal language model.
        data: text; `prompts` documents of `tokens` tokens are read, the last quarter of each against the
            cache.
        key_bits, value_bits, group, window, sinks, key_axis, value_axis: see `QuantizeCache`.
        prompts, tokens, seed: of the measurements.

    Raises:
        InputError: sizes that do not exist. ModelError: no cache.
    """
    from actlas.measure.cache_price import cache_price

    edit = QuantizeCache(key_bits, value_bits, group, window, sinks, key_axis, value_axis)
    found = cache_price(model, data, {"quantised": edit}, prompts=prompts, tokens=tokens, seed=seed)
    return edit.bind(model.fingerprint).with_measurements(found)


def decoded_cache(layer: QuantizedKV, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return all keys and values as a later pass reads them, `[batch, heads, tokens, channels]`."""
    assert layer.keys is not None and layer.values is not None
    keys, values = (
        torch.cat([*layer._coded_part(i, dtype), x.to(dtype)], 2)
        for i, x in enumerate((layer.keys, layer.values))
    )
    return keys, values
