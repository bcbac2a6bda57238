"""Block-by-block calibration with two input streams: full precision, and edited so far.

Methods that change a model block by block (quantization, pruning, sparsity budgets) need, at block i,
what its linear maps receive in the original model and what they receive once all earlier blocks have
been changed. Running the whole model for every block would cost n_blocks^2 / 2 block passes; here each
stream's hidden states are kept and pushed through one block at a time:

    A_0 = B_0 = embeddings
    edits_i   = visit(block i with inputs A_i, B_i)
    A_{i+1}   = block_i(A_i)                    without any of the visitor's edits
    B_{i+1}   = block_i(B_i)                    with all edits installed so far

so A_i is the plain model's `blocks.i.resid_pre` and B_i that of the model under the edits of blocks
before i. In memory are the hidden states of the calibration tokens, twice, and one batch at work. What
else a block receives (attention mask, rotary embeddings, ...) is captured once from a plain pass.

    def visit(block: BlockView) -> list[Edit]:
        solvers = {name: Solver(linear) for name, linear in block.linears.items()}
        for batch in block.batches():
            for name, solver in solvers.items():
                solver.add(batch.full[name], batch.edited[name])
        return [SwapModule(block.paths[name], solver.solve()) for name, solver in solvers.items()]

    edits = two_stream(model, corpus, visit, max_tokens=16_384)

GPTQ (Frantar et al. 2022) uses the edited stream, AdaRound and its successors both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import ActivationEdit, Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.installation import EditHadNoEffect, Installation
from actlas.core.layout import Tower, find, join
from actlas.core.passes import CACHES, Pass
from actlas.core.progress import progress
from actlas.core.swap import SwapModule

if TYPE_CHECKING:
    from actlas.core.model import Model

Visit = Callable[["BlockView"], "Edit | Sequence[Edit] | None"]
_CACHES = (*CACHES, "past_key_value", "layer_past")


@dataclass
class BlockBatch:
    """What one batch of tokens looks like at one block; padding is left out of all rows.

    Attributes:
        full: linear's name -> its inputs in the plain model, `[rows, d_in]`.
        edited: the same in the model edited so far.
        outputs: the block's outputs in the plain model, `[rows, d_model]`.
        edited_outputs: the block's outputs in the model edited so far.
    """

    full: dict[str, Tensor]
    edited: dict[str, Tensor]
    outputs: Tensor
    edited_outputs: Tensor


@dataclass
class _Item:
    """One batch of tokens: both streams' hidden states and what the blocks are called with."""

    full: Tensor
    edited: Tensor
    mask: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    runs: tuple[Pass, Pass]


@dataclass
class BlockView:
    """A block as its visitor sees it.

    Attributes:
        index: the block's number.
        name: `"blocks.3"`, to which the kinds of sites are appended.
        path: path of the block's module, e.g. `"model.layers.3"`.
        module: the block.
        linears: the linear maps in it by relative name, e.g. `"self_attn.q_proj"`, in module order.
    """

    index: int
    name: str
    path: str
    module: nn.Module
    linears: dict[str, nn.Module]
    _streams: _Streams = field(repr=False)

    @property
    def paths(self) -> dict[str, str]:
        """The linear maps' full paths by relative name, for `SwapModule`."""
        return {name: join(self.path, name) for name in self.linears}

    @property
    def n_batches(self) -> int:
        """How many batches `batches` yields."""
        return len(self._streams.items)

    def batches(self, *names: str) -> Iterator[BlockBatch]:
        """Yield the calibration tokens batch by batch, in both streams; each call runs the block anew.

        Args:
            names: linears whose inputs are wanted; default all of them.

        Raises:
            InputError: a name that is not a linear of this block.
        """
        for name in names:
            if name not in self.linears:
                raise InputError(f"{self.name} has no linear {name!r}; it has {', '.join(self.linears)}")
        wanted = names or tuple(self.linears)
        for item in self._streams.items:
            with self._streams.paused(self.index):
                full, outputs = self._read(item, wanted, edited=False)
            edited, edited_outputs = self._read(item, wanted, edited=True)
            yield BlockBatch(full, edited, outputs, edited_outputs)

    def hidden(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return a batch's block inputs `[batch, pos, d_model]` in both streams (not to be changed)."""
        item = self._streams.items[batch]
        return item.full, item.edited

    def mask(self, batch: int) -> Tensor:
        """Return which tokens of a batch are real, bool `[batch, pos]`."""
        return self._streams.items[batch].mask

    def forward(self, hidden: Tensor, batch: int) -> Tensor:
        """Run the block on hidden states of a batch, with gradients if they are enabled.

        Args:
            hidden: `[batch, pos, d_model]`.
            batch: whose attention mask and positions to use.
        """
        return self._streams.run(self.index, self._streams.items[batch], hidden, edited=True)

    def install(self, *edits: Edit) -> None:
        """Install edits at once, so that later reads of the edited stream see them.

        For methods that go through a block in steps (q, k, v; then the output projection; ...). Edits
        installed so are part of `two_stream`'s result and need not be returned.
        """
        self._streams.install(edits)

    def _read(self, item: _Item, names: Sequence[str], *, edited: bool) -> tuple[dict[str, Tensor], Tensor]:
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for name in names:
                module = find(self.module, name)
                assert module is not None
                handle = module.register_forward_pre_hook(_keep_input(seen, name, item.mask))
                stack.callback(handle.remove)
            hidden = item.edited if edited else item.full
            out = self._streams.run(self.index, item, hidden, edited=edited)
        return seen, out[item.mask]


def two_stream(
    model: Model,
    corpus: Iterable[Any],
    visit: Visit,
    *,
    blocks: Iterable[int] | None = None,
    batch_tokens: int = 2048,
    context: int | None = None,
    max_tokens: int | None = None,
) -> list[Edit]:
    """Visit a model's blocks in order, each with its inputs in the plain and in the edited model.

    Args:
        model: a model with a layout and one tower of blocks. Edits that are installed already are part
            of the plain model.
        corpus: calibration text; anything `model.stream` takes. All its tokens' hidden states are held
            twice, so give a sample, or `max_tokens`.
        visit: called for each block; returns the edits for it (or one, or `None`), which are installed
            before the next block is computed.
        blocks: which blocks to visit; default all.
        batch_tokens, context, max_tokens: see `Model.stream`.

    Returns:
        All edits in the order in which they were made; none of them is installed any more.

    Raises:
        ModelError: a model without a layout, or an encoder-decoder.
        InputError: a block number that does not exist, or an empty corpus.
        NonFiniteError: a stream became NaN or infinite; the message names the block.
    """
    tower = _tower(model)
    chosen = set(range(tower.n_blocks)) if blocks is None else {int(i) for i in blocks}
    wrong = sorted(i for i in chosen if not 0 <= i < tower.n_blocks)
    if wrong or not chosen:
        said = wrong[0] if wrong else "none"
        raise InputError(f"{model.name} has blocks 0 to {tower.n_blocks - 1}; asked for {said}")
    last = max(chosen)
    items = _capture(model, tower, corpus, batch_tokens, context, max_tokens)
    streams = _Streams(model, tower, items)
    with streams, progress("two-stream calibration", last + 1, "blocks") as advance:
        for index in range(last + 1):
            if index in chosen:
                made = visit(streams.view(index))
                streams.install((made,) if isinstance(made, Edit) else tuple(made or ()))
            if index < last:
                streams.advance(index)
            advance()
    return streams.edits


class _Streams:
    """Both streams of all batches, and the edits made so far; a context manager that takes them back."""

    def __init__(self, model: Model, tower: Tower, items: list[_Item]) -> None:
        self.model, self.tower, self.items = model, tower, items
        self.edits: list[Edit] = []
        self._installed: list[tuple[Installation, int]] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *exception: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditHadNoEffect)
            self._stack.close()

    def view(self, index: int) -> BlockView:
        """Return what a visitor sees of a block."""
        path = join(self.tower.blocks, str(index))
        module = find(self.model.module, path)
        assert module is not None
        linears = {n: m for n, m in module.named_modules() if n and _is_linear(m)}
        return BlockView(index, join(self.tower.name, f"blocks.{index}"), path, module, linears, self)

    def install(self, edits: Sequence[Edit]) -> None:
        """Install edits until the end."""
        if not edits:
            return
        installation = self.model.edit(*edits)
        self._stack.enter_context(installation)
        self._installed.append((installation, self._reach(edits)))
        self.edits += edits

    @contextmanager
    def paused(self, index: int) -> Iterator[None]:
        """Take out, for a moment, the edits that touch this block or a later one."""
        held = [i for i, reach in self._installed if reach >= index]
        for installation in reversed(held):
            installation.uninstall()
        try:
            yield
        finally:
            for installation in held:
                installation.install()

    def run(self, index: int, item: _Item, hidden: Tensor, *, edited: bool) -> Tensor:
        """Run one block on hidden states, with what it was called with in the captured pass."""
        for installation in self.model._installations:
            installation.watcher.current[self.tower.name] = item.runs[edited]
        args, kwargs = item.calls[index]
        out = self.model.block(index, self.tower.name)(hidden.clone(), *args, **kwargs)
        result = out[0] if isinstance(out, (tuple, list)) else out
        assert isinstance(result, Tensor)
        return result

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace both streams' hidden states by the block's outputs."""
        together = not self.edits
        with self.paused(index):
            outputs = [self.run(index, item, item.full, edited=False) for item in self.items]
        for item, full in zip(self.items, outputs, strict=True):
            edited = full if together else self.run(index, item, item.edited, edited=True)
            for stream, x in (("plain", full), ("edited", edited)):
                if not bool(torch.isfinite(x[item.mask]).all()):
                    raise NonFiniteError(
                        f"blocks.{index}: the {stream} stream holds NaN or infinity after it"
                    )
            item.full, item.edited = full, edited

    def _reach(self, edits: Sequence[Edit]) -> int:
        """Return the last block that any of the edits touches; beyond all blocks if that is unknown."""
        reach = -1
        for part in (p for e in edits for p in e.parts()):
            places: list[str] = []
            if isinstance(part, SwapModule):
                places = [part.path.removeprefix("module:")]
            elif isinstance(part, ActivationEdit):
                places = [site.module for site in self.model.resolve(part.site)]
            else:
                return self.tower.n_blocks
            for place in places:
                number = place.removeprefix(self.tower.blocks + ".").split(".")[0]
                inside = place.startswith(self.tower.blocks + ".") and number.isdigit()
                reach = max(reach, int(number) if inside else self.tower.n_blocks)
        return reach


def _capture(
    model: Model,
    tower: Tower,
    corpus: Iterable[Any],
    batch_tokens: int,
    context: int | None,
    max_tokens: int | None,
) -> list[_Item]:
    """Run the plain model once; keep block 0's input and every block's other arguments."""
    items: list[_Item] = []
    first: list[Tensor] = []
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {k: None if k in _CACHES else v for k, v in kwargs.items()}
            hidden = args[0] if args else others.pop("hidden_states")
            assert isinstance(hidden, Tensor)
            calls[index] = (tuple(args[1:]), others)
            if index == 0:
                first.append(hidden.detach().clone())

        return hook

    with ExitStack() as stack:
        for index in range(tower.n_blocks):
            # First in line, so that an edit of the block's input is applied when the block runs, not now.
            block = model.block(index, tower.name)
            handle = block.register_forward_pre_hook(keep(index), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        site = join(tower.name, f"blocks.{tower.n_blocks - 1}.resid_pre")
        stream = model.stream(corpus, site, batch_tokens=batch_tokens, context=context, max_tokens=max_tokens)
        for trace in stream:
            assert trace.mask is not None and trace.tokens is not None
            mask = trace.mask.to(first[0].device)
            runs = tuple(Pass(len(mask), mask.shape[1], trace.tokens, mask, 0, mask, None) for _ in range(2))
            hidden = first.pop()
            items.append(
                _Item(hidden, hidden, mask, [calls[i] for i in range(tower.n_blocks)], (runs[0], runs[1]))
            )
            calls.clear()
    return items


def _tower(model: Model) -> Tower:
    if model.layout is None or model.tower is None:
        raise ModelError(f"{model.name} has no layout, so its blocks are not known; two_stream needs them")
    if len(model.layout.towers) > 1:
        names = " and ".join(t.name for t in model.layout.towers)
        raise ModelError(f"{model.name} has two towers ({names}); two_stream takes models with one")
    return model.tower


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    known = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return known and isinstance(weight, Tensor) and weight.ndim == 2


def _keep_input(seen: dict[str, Tensor], name: str, mask: Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        if x.shape[:-1] == mask.shape:
            rows = x[mask]
        else:
            flat = x.reshape(-1, x.shape[-1])
            rows = flat[mask.reshape(-1)] if len(flat) == mask.numel() else flat
        seen[name] = torch.cat([seen[name], rows]) if name in seen else rows

    return hook
