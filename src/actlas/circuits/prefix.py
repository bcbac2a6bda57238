"""Runs that share a prefix: what a patch cannot change is computed once.

A causal model computes each token from that token and earlier ones. A patch at block l and column c
therefore changes nothing before block l, and nothing left of column c. `SharedRun` runs the prompts once,
keeps the stream that enters each block and the keys and values of each block, and then runs any block on,
for any last columns, of any rows, in one batch:

    cost of a rerun / cost of a full run  =  (blocks left / blocks) * (columns left / columns)

and both are exact: the rest is not approximated, it is the same numbers. Of the output head only the
columns that the metric needs are multiplied (`only_columns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import ActivationEdit
from actlas.core.errors import InputError, ModelError
from actlas.core.hooks import attach
from actlas.core.layout import find, forward_parameters, join
from actlas.core.passes import CACHES
from actlas.core.splitting import SplitState, Tail, split_at
from actlas.measure.likelihood import takes_option

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

Write = Callable[[Tensor], Tensor]


class KeysValues:
    """The keys and values of every block for the first columns of some rows.

    Attributes:
        name: the argument by which the model takes a cache.
        layers: (keys, values) `[n, kv_heads, columns, head_dim]` of each block.
    """

    def __init__(self, name: str, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.name, self.layers = name, list(layers)

    @classmethod
    def of(cls, model: Model, cache: Any, columns: int) -> KeysValues | None:
        """Return those of a filled cache, or `None` if it does not hold every column of every block."""
        name = cache_name(model)
        layers = [
            (x.keys, x.values) for x in getattr(cache, "layers", ()) if getattr(x, "keys", None) is not None
        ]
        whole = len(layers) == model.n_blocks and all(k.shape[-2] == columns for k, _ in layers)
        return cls(name, layers) if name and whole else None

    @classmethod
    def run(cls, model: Model, encoded: Mapping[str, Tensor], columns: int) -> KeysValues | None:
        """Run the first columns of some prompts; `None` if there are none, or this cannot be shared."""
        if columns < 1 or cache_name(model) is None or not shareable(model):
            return None
        first = {k: v[:, :columns] for k, v in encoded.items()}
        options = _whole(model)
        with torch.no_grad():
            model._call({**first, **options})
        return cls.of(model, options[cache_name(model) or ""], columns)

    def cache(self, rows: Tensor | None, columns: int) -> Any:
        """Return a cache of these rows' (or all rows') first columns; it is read, never written to."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        class Layer(DynamicLayer):
            def __init__(self, keys: Tensor, values: Tensor) -> None:
                super().__init__()
                self.lazy_initialization(keys, values)
                self.keys, self.values = keys, values

            def update(
                self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
            ) -> tuple[Tensor, Tensor]:
                parts = ((self.keys, keys), (self.values, values))
                some = slice(None) if rows is None else rows
                k, v = (torch.cat([kept[some], new], dim=-2) for kept, new in parts)
                return k, v

        made = DynamicCache()
        made.layers = [Layer(k[:, :, :columns], v[:, :, :columns]) for k, v in self.layers]
        return made

    def arguments(
        self, model: Model, encoded: Mapping[str, Tensor], rows: Tensor | None, start: int
    ) -> dict[str, Any]:
        """Return the arguments that run these rows (or all) from column `start` on, to the last logits."""
        return last_columns(model, encoded, rows, start) | {
            self.name: self.cache(rows, start),
            "use_cache": True,
        }


class SharedRun:
    """Prompts that were run once, from which any later part can be run again.

    Args:
        model: a causal language model.
        encoded: its arguments, padded on the left.
        sites: what to read as well.

    Attributes:
        values: activations `[n, columns, ...]` at `sites`, by name.
        logits: `[n, vocab]` after each prompt, float32.
    """

    def __init__(self, model: Model, encoded: Mapping[str, Tensor], sites: Iterable[Site] = ()) -> None:
        self.model, self.encoded = model, dict(encoded)
        self.n, self.width = encoded["input_ids"].shape
        self.blocks = model.n_blocks or 0
        self._tails: dict[int, Tail] = {}
        self._stream_names = [f"{_tower(model)}blocks.{i}.resid_post" for i in range(self.blocks)]
        streams = model.resolve(self._stream_names)
        first = find(model.module, join(model.tower.blocks, "0")) if model.tower else None
        if first is None:
            raise ModelError(f"{model.name} has no layout, so it has no blocks to run on from")
        kept: list[Any] = []
        handle = first.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            trace = model.trace({**self.encoded, **_whole(model)}, [*streams, *sites], stop=False)
        finally:
            handle.remove()
        self._returned = kept[0] if isinstance(kept[0], tuple) else None
        self.streams = [trace[s.name] for s in streams]
        self.values = {s.name: trace[s.name] for s in sites}
        self.logits: Tensor = trace.logits[:, -1].float()
        self.shares = shareable(model)
        found = next((c for n in CACHES if (c := getattr(trace.output, n, None)) is not None), None)
        self._kept = KeysValues.of(model, found, self.width) if self.shares else None

    def first_column(self, column: int) -> int:
        """Return where a rerun that must contain a column starts."""
        return column if self._kept is not None else 0

    def rerun(
        self,
        rows: Tensor,
        *,
        block: int,
        width: int,
        entering: Tensor | None = None,
        writes: Sequence[tuple[Site, Write]] = (),
        columns: Tensor | None = None,
    ) -> Tensor:
        """Run blocks from `block` on, for the last `width` columns of some rows.

        Args:
            rows: int64 `[B]`; repeats are fine (one prompt under several patches).
            block: the first block that is run; the number of blocks runs the output head only.
            width: columns that are run; those before are as they were.
            entering: `[B, width, d]`, the stream that enters the block; `None`: as it was.
            writes: (site, function from its value to the new one), at sites of blocks that are run.
            columns: token ids `[B, k]` whose logits are wanted; `None`: all.

        Returns:
            Logits after each prompt, float32 `[B, k]` or `[B, vocab]`.
        """
        encoded = self.arguments(rows, width)
        with ExitStack() as stack:
            for site, write in writes:
                stack.callback(attach(self.model.module, site, write, batch=lambda: len(rows)).remove)
            narrow = stack.enter_context(only_columns(self.model, columns))
            stack.enter_context(torch.no_grad())
            if block == 0:
                output = self.model._call(encoded)
            else:
                stream = self.streams[block - 1][rows, -width:] if entering is None else entering
                site = self.model.resolve(self._stream_names[block - 1])[0]
                returned = (stream, *self._returned[1:]) if self._returned is not None else stream
                state = SplitState(site, stream, encoded, stream, returned, block)
                output = self._tail(block)(state, stream)
        logits: Tensor = (output.logits if hasattr(output, "logits") else output)[:, -1].float()
        return logits if narrow or columns is None else logits.gather(1, columns)

    def arguments(
        self, rows: Tensor | None, width: int, encoded: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Return the arguments that run the last columns of some rows (or all).

        Args:
            rows: which, int64 `[B]`.
            width: how many columns.
            encoded: other prompts, which agree with these in the columns before; `None`: these.
        """
        start, given = self.width - width, encoded or self.encoded
        if start == 0:
            found = last_columns(self.model, given, rows, 0)
            return {**found, "use_cache": False} if cache_name(self.model) else found
        if self._kept is None:
            raise InputError(f"width={width}: this run kept no keys and values, so all {self.width} are run")
        return self._kept.arguments(self.model, given, rows, start)

    def _tail(self, block: int) -> Tail:
        if block not in self._tails:
            self._tails[block] = split_at(self.model, self._stream_names[block - 1])[1]
        return self._tails[block]


def last_columns(
    model: Model, encoded: Mapping[str, Tensor], rows: Tensor | None, start: int
) -> dict[str, Any]:
    """Return the arguments of some rows (or all) from a column on, with the mask of every column."""
    some = slice(None) if rows is None else rows
    found: dict[str, Any] = {k: v[some, start:] for k, v in encoded.items() if k != "attention_mask"}
    found["attention_mask"] = encoded["attention_mask"][some]
    if takes_option(model, "logits_to_keep"):
        found["logits_to_keep"] = 1
    return found


def padded(x: Tensor, width: int) -> Tensor:
    """Return activations of the last columns as if all `width` had been run, with zeros for the others."""
    missing = width - x.shape[1]
    return x if not missing else torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), x], 1)


def shareable(model: Model) -> bool:
    """Return whether a run may start in the middle.

    Not under activation edits, which may look at whole sequences, and would apply twice at a seam.
    """
    return not any(isinstance(p, ActivationEdit) for e in model.installed for p in e.parts())


def cache_name(model: Model) -> str | None:
    """Return the argument by which the model takes a key-value cache, if it does."""
    known = forward_parameters(model.module)
    return next((n for n in CACHES if n in known), None) if "use_cache" in known else None


def _whole(model: Model) -> dict[str, Any]:
    """Return the arguments of a run that keeps all keys and values, and only the last logits."""
    options: dict[str, Any] = {"logits_to_keep": 1} if takes_option(model, "logits_to_keep") else {}
    name = cache_name(model)
    if name is not None:
        from transformers import DynamicCache

        options |= {name: DynamicCache(), "use_cache": True}
    return options


def _tower(model: Model) -> str:
    return f"{model.tower.name}." if model.tower is not None and model.tower.name else ""


@contextmanager
def only_columns(model: Model, ids: Tensor | None) -> Iterator[bool]:
    """Let the output head compute the logits of tokens `[batch, k]` only; yield whether it does.

    It does where the head is a plain linear map that nobody reads or edits.
    """
    head = model.unembed_module
    watched = head is not None and (
        head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__
    )
    if ids is None or type(head) is not nn.Linear or watched:
        yield False
        return
    weight, bias = head.weight[ids], None if head.bias is None else head.bias[ids].unsqueeze(1)

    def forward(x: Tensor) -> Tensor:
        y = x @ weight.transpose(1, 2)
        return y if bias is None else y + bias

    head.__dict__["forward"] = forward
    try:
        yield True
    finally:
        del head.__dict__["forward"]
