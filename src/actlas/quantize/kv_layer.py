"""A layer of a key-value cache that is stored in few bits.

Keys have channels that are large for all tokens, values have not. So the scales of keys belong to a channel,
over groups of neighbouring tokens, and those of values to a token, over groups of channels:

    keys     [batch, heads, channels, tokens]   groups of G tokens   (coded once G tokens are there)
    values   [batch, heads, tokens, channels]   groups of G channels

The last tokens, at least `window` of them, stay as they are, and so do the first `sinks`. What a pass reads
is the decoded rest between them. Source: Liu et al. 2024, "KIVI" (arXiv 2402.02750); there the window of keys
is emptied whole when it is full, here group by group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from actlas.core.errors import InputError
from actlas.core.numbers import QuantParams, QuantSpec, decode, encode, pack, params_of, unpack

Axis = Literal["channel", "token"]


@dataclass
class CodedTokens:
    """Tokens `[batch, heads, n, channels]` as codes and scales; grows at its end.

    Attributes:
        spec: integers with a minimum, in groups.
        axis: `"channel"`: groups are neighbouring tokens of one channel; `"token"`: channels of one token.
        codes: packed, uint8 `[batch, heads, rows, bytes]`.
        scale, zero: `[batch, heads, rows, groups]`.
    """

    spec: QuantSpec
    axis: Axis
    channels: int = 0
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens stored."""
        if self.codes is None:
            return 0
        return self.codes.shape[3] * 8 // self.spec.bits if self.axis == "channel" else self.codes.shape[2]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        held = (self.codes, self.scale, self.zero)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def append(self, x: Tensor) -> None:
        """Code tokens; along channels their number must be whole groups."""
        self.channels = x.shape[-1]
        rows = x.transpose(2, 3).contiguous() if self.axis == "channel" else x.contiguous()
        params = params_of(rows, self.spec, where="the cache").stored(self.spec)
        assert params.zero is not None
        codes = encode(rows, self.spec, params)
        lead = rows.shape[:3]
        packed = pack(codes, self.spec.bits).view(*lead, -1)
        scale, zero = params.scale.view(*lead, -1), params.zero.view(*lead, -1)
        if self.codes is None or self.scale is None or self.zero is None:
            self.codes, self.scale, self.zero = packed, scale, zero
            return
        dim = 3 if self.axis == "channel" else 2
        self.codes = torch.cat([self.codes, packed], dim)
        self.scale, self.zero = torch.cat([self.scale, scale], dim), torch.cat([self.zero, zero], dim)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded tokens."""
        assert self.codes is not None and self.scale is not None and self.zero is not None
        batch, heads, rows, _ = self.codes.shape
        columns = self.length if self.axis == "channel" else self.channels
        codes = unpack(self.codes.flatten(), self.spec.bits, (batch, heads, rows, columns))
        params = QuantParams(self.scale.flatten(0, 2), self.zero.flatten(0, 2))
        x = decode(codes, self.spec, params).to(dtype)
        return x.transpose(2, 3) if self.axis == "channel" else x

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for name in ("codes", "scale", "zero"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, rows.to(value.device)))


class QuantizedKV(DynamicLayer):
    """A cache layer in few bits; `keys` and `values` are the tokens that are not coded (yet).

    Args:
        key_bits, value_bits: 2 to 8; 16: left as they are.
        group: what shares a scale.
        window: last tokens that stay as they are, at least.
        sinks: first tokens that do.
        key_axis, value_axis: see `CodedTokens`.
    """

    is_croppable = True

    def __init__(
        self,
        key_bits: int = 4,
        value_bits: int = 4,
        group: int = 32,
        window: int = 32,
        sinks: int = 0,
        key_axis: Axis = "channel",
        value_axis: Axis = "token",
    ) -> None:
        super().__init__()
        self.keys: Tensor | None
        self.values: Tensor | None
        self.group, self.window, self.sinks = group, window, sinks
        self.bits = (key_bits, value_bits)
        self.axes: tuple[Axis, Axis] = (key_axis, value_axis)
        self.coded: list[CodedTokens] = []
        self.first: list[Tensor] = []
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.coded, self.first = [], []
        for bits, axis, x in zip(self.bits, self.axes, (key_states, value_states), strict=True):
            group = self.group if axis == "channel" else group_of(x.shape[-1], self.group)
            spec = QuantSpec(min(bits, 8), granularity="group", group_size=group, zero_point="float")
            self.coded.append(CodedTokens(spec, axis))
            self.first.append(x[:, :, :0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; return all keys and values, of which coded ones are decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = [self._coded_part(i, key_states.dtype) for i in range(2)]
        super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.seen += key_states.shape[-2]
        whole = tuple(
            torch.cat([*part, x], 2) if part else x
            for part, x in zip(before, (self.keys, self.values), strict=True)
        )
        self._code()
        return whole[0], whole[1]

    def _coded_part(self, i: int, dtype: torch.dtype) -> list[Tensor]:
        parts = [self.first[i]] if self.first[i].shape[2] else []
        return [*parts, self.coded[i].read(dtype)] if self.coded[i].length else parts

    def _code(self) -> None:
        """Move what is older than the window into codes."""
        for i, name in enumerate(("keys", "values")):
            if self.bits[i] >= 16:
                continue
            x: Tensor = getattr(self, name)
            wanted = self.sinks - self.first[i].shape[2]
            if wanted > 0 and x.shape[2] > self.window:
                taken = min(wanted, x.shape[2] - self.window)
                self.first[i] = torch.cat([self.first[i], x[:, :, :taken]], 2)
                x = x[:, :, taken:]
            count = (x.shape[2] - self.window) // self.group * self.group
            if count > 0 and self.first[i].shape[2] >= self.sinks:
                self.coded[i].append(x[:, :, :count])
                x = x[:, :, count:].clone()
            setattr(self, name, x)

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that is kept."""
        if not self.is_initialized or self.keys is None or self.values is None:
            return 0
        plain = (self.keys, self.values, *self.first)
        return sum(t.numel() * t.element_size() for t in plain) + sum(c.stored_bytes for c in self.coded)

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.coded, self.first, self.seen = [], [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, as long as they are not coded yet."""
        count = abs(int(tokens_to_remove))
        if not count or not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        room = min(self.keys.shape[2], self.values.shape[2])
        if count > room:
            raise InputError(
                f"{count} tokens cannot be taken back from a cache whose last {room} are not coded; "
                "use a larger window"
            )
        super().crop(-count)
        self.seen -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized and self.keys is not None:
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if not self.is_initialized or self.keys is None or self.values is None:
            return
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.first = [x.index_select(0, rows) for x in self.first]
        for part in self.coded:
            part.select(rows)


def group_of(channels: int, group: int) -> int:
    """Return the group size along `channels`: the wanted one, or all of them if there are fewer.

    Raises:
        InputError: it does not divide them, with the sizes that do.
    """
    size = min(group, channels)
    if channels % size:
        legal = ", ".join(str(g) for g in range(8, channels + 1, 8) if channels % g == 0)
        raise InputError(f"heads of {channels} channels cannot be cut into groups of {group}; legal: {legal}")
    return size
