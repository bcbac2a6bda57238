"""KVBlock: the keys and values of a text, computed once, checked, moved and joined.

    block = KVBlock.build(model, "The keys are in the kitchen drawer. ")
    logits, cache = block.extend(model, "Where are the keys?")     # runs only the question
    block.save("keys/");  block = KVBlock.load("keys/", model)

A block carries what makes a cache valid: the model's fingerprint and a digest of its weights, the dtype, the
rotary settings, the edits that were installed, the token ids and their positions. Everything is compared
before use. `cache()` hands out a copy, so generation never changes what is stored.

Moving. Keys are stored with their rotation, k_p = R(p) k. `shift(o)` multiplies with R(o), which gives the
keys at p + o exactly (values carry no position). Joining block B to A (a before, b tokens):

* `"none"`: B keeps its positions, so both begin at A's start;
* `"shift"`: B's keys are moved behind A's;
* `"shift+drop_first"`: B loses its first token, on which attention in B rests as a sink, and is moved;
* `"recompute"`: B's tokens are run again behind A: the true cache, at the price of a prefill.

Only the last is exact: in the others B's tokens have not seen A's.

Source: "MemOS: An Operating System for Memory-Augmented Generation" (2025), its activation memory; the
checks answer faults that users of the official code have reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import ArtifactError, FingerprintError, InputError, ModelError
from actlas.core.fingerprint import Fingerprint
from actlas.core.rotary import Rotary
from actlas.store.identity import weights_digest
from actlas.store.memory.running import (
    check_context,
    installed_edits,
    more_ids,
    one_row,
    rotation,
    run,
    stack,
)

if TYPE_CHECKING:
    from actlas.core.model import Model

Fix = Literal["none", "shift", "shift+drop_first", "recompute"]
FIXES = ("none", "shift", "shift+drop_first", "recompute")


@dataclass(frozen=True, eq=False)
class KVBlock:
    """Keys and values of some tokens in all blocks of a model.

    Attributes:
        keys, values: `[layers, kv heads, tokens, head width]`, in the model's dtype; keys are rotated.
        ids: the tokens.
        positions: where each token stands.
        fingerprint: the model.
        weights: digest of its weights.
        rotary: the rotation in the keys; `None` for a model without one (which cannot be moved).
        under: descriptions of the edits that were installed.
        exact: whether this is what a prefill of `ids` computes (False after an inexact join).
    """

    keys: Tensor
    values: Tensor
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    fingerprint: Fingerprint
    weights: str
    rotary: Rotary | None
    under: tuple[str, ...] = ()
    exact: bool = True

    @classmethod
    def build(cls, model: Model, text: str | Sequence[int] | Sequence[Any], *, start: int = 0) -> KVBlock:
        """Run a text once and keep its keys and values.

        Args:
            model: a decoder; edits that are installed are part of what is cached.
            text: a text, a chat or token ids.
            start: position of the first token.

        Raises:
            InputError: more than one text, or positions beyond the model's context.
            ModelError: the model does not hand out keys and values of all tokens.
        """
        ids = one_row(model, text)
        if start < 0:
            raise InputError(f"start is {start}; positions begin at 0")
        positions = tuple(range(start, start + len(ids)))
        check_context(model, positions[-1] + 1)
        with torch.no_grad():
            _, cache = run(model, ids, positions, None)
        keys, values = stack(model, cache, len(ids))
        return cls(
            keys,
            values,
            ids,
            positions,
            model.fingerprint,
            weights_digest(model),
            rotation(model),
            installed_edits(model),
            exact=start == 0,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def next_position(self) -> int:
        """Where the next token stands: behind all of them, and not before the number of tokens."""
        return max(max(self.positions) + 1, len(self.ids))

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def check(self, model: Model) -> None:
        """Raise unless this block is what `model`, as it is now, would compute.

        Raises:
            FingerprintError: another model, other weights, dtype, rotary settings or installed edits.
        """
        self.fingerprint.check(model.fingerprint, "this KV block")
        if model.dtype != self.keys.dtype:
            raise FingerprintError(f"this KV block is {self.keys.dtype}, but {model.name} is {model.dtype}")
        if rotation(model) != self.rotary:
            raise FingerprintError(f"this KV block was made with other rotary settings than {model.name} has")
        if weights_digest(model) != self.weights:
            raise FingerprintError(
                f"this KV block was made with other weights than {model.name} has; build it again"
            )
        if installed_edits(model) != self.under:
            had, now = " + ".join(self.under) or "none", " + ".join(installed_edits(model)) or "none"
            raise FingerprintError(f"this KV block was made under the edits {had}; installed now: {now}")

    def cache(self, rows: int = 1) -> Any:
        """Return a transformers cache with a copy of keys and values, for `rows` equal rows."""
        from transformers import DynamicCache

        made = DynamicCache()
        for i, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            made.update(k.expand(rows, *k.shape).clone(), v.expand(rows, *v.shape).clone(), i)
        return made

    # -- use ------------------------------------------------------------------------------------

    def extend(self, model: Model, more: str | Sequence[int]) -> tuple[Tensor, Any]:
        """Run further tokens behind this block.

        Args:
            model: the one that it was built with.
            more: text (without special tokens) or ids.

        Returns:
            Logits of the new tokens `[new, vocabulary]`, and the cache of block and new tokens.

        Raises:
            FingerprintError: see `check`.
            InputError: no tokens, or more than the context holds.
        """
        self.check(model)
        ids = more_ids(model, more)
        positions = range(self.next_position, self.next_position + len(ids))
        check_context(model, positions[-1] + 1)
        with torch.no_grad():
            return run(model, ids, positions, self.cache())

    def prefill(self, model: Model, inputs: str | Sequence[int] | Sequence[Any]) -> tuple[Tensor, Any]:
        """Run a whole prompt that begins with this block, computing only what comes after it.

        Args:
            model: the one that it was built with.
            inputs: the whole text, chat or ids.

        Returns:
            Logits of the last token `[vocabulary]`, and the cache of the whole prompt.

        Raises:
            InputError: the prompt does not begin with the block's tokens (the first that differs is named).
        """
        ids = one_row(model, inputs)
        kept = min(len(self), len(ids) - 1)
        for i in range(min(len(self), len(ids))):
            if ids[i] != self.ids[i]:
                here, there = model.token_strings([self.ids[i], ids[i]]) if model.tokenizer else ("", "")
                raise InputError(
                    f"the prompt leaves the block at token {i}: {there!r} ({ids[i]}) instead of {here!r} "
                    f"({self.ids[i]}); text and chat boundaries must match token by token"
                )
        if len(ids) < len(self):
            raise InputError(f"the prompt has {len(ids)} tokens, fewer than the block's {len(self)}")
        if self.positions != tuple(range(len(self))):
            raise InputError("this block does not stand at positions 0, 1, ...; use extend")
        logits, cache = self.take(kept).extend(model, ids[kept:])
        return logits[-1], cache

    def generate(self, model: Model, query: str | Sequence[int], max_new_tokens: int = 20) -> list[int]:
        """Return the greedy continuation of this block and a query, as ids."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        ids = more_ids(model, query)
        place = self.next_position + len(ids)
        check_context(model, place + max_new_tokens - 1)
        logits, cache = self.extend(model, ids)
        end = getattr(model.tokenizer, "eos_token_id", None)
        made = [int(logits[-1].argmax())]
        while len(made) < max_new_tokens and made[-1] != end:
            with torch.no_grad():
                logits, cache = run(model, made[-1:], [place + len(made) - 1], cache)
            made.append(int(logits[-1].argmax()))
        return made

    # -- change ---------------------------------------------------------------------------------

    def take(self, n: int) -> KVBlock:
        """Return the first `n` tokens' block (a prefix of a cache is the cache of the prefix)."""
        if not 0 <= n <= len(self):
            raise InputError(f"the block has {len(self)} tokens; it cannot give {n}")
        return self._rows(slice(0, n), exact=self.exact)

    def drop_first(self, n: int = 1) -> KVBlock:
        """Return the block without its first `n` tokens; the others keep what they have seen."""
        if not 0 < n < len(self):
            raise InputError(f"the block has {len(self)} tokens; it cannot lose {n} and keep one")
        return self._rows(slice(n, None), exact=False)

    def _rows(self, which: slice, exact: bool) -> KVBlock:
        return replace(
            self,
            keys=self.keys[:, :, which],
            values=self.values[:, :, which],
            ids=self.ids[which],
            positions=self.positions[which],
            exact=exact,
        )

    def shift(self, offset: int) -> KVBlock:
        """Return the block with all tokens `offset` positions further on.

        Raises:
            ModelError: the keys carry no rotation that could be changed.
            InputError: positions below 0.
        """
        if offset == 0:
            return self
        if self.rotary is None:
            raise ModelError("this block's keys carry no plain rotation, so they cannot be moved")
        if min(self.positions) + offset < 0:
            raise InputError(f"offset {offset} would move the first token to {min(self.positions) + offset}")
        return replace(
            self,
            keys=self.rotary(self.keys, offset),
            positions=tuple(p + offset for p in self.positions),
            exact=False,
        )

    def join(self, other: KVBlock, fix: Fix = "shift", *, model: Model | None = None) -> KVBlock:
        """Return this block followed by another one; see the module docstring for `fix`.

        Args:
            other: a block of the same model.
            fix: what is done about positions and about what `other` has not seen.
            model: needed for `"recompute"`.

        Raises:
            FingerprintError: blocks of different models, weights, dtypes, rotations or edits.
            InputError: an unknown fix, or `"recompute"` without a model.
        """
        if fix not in FIXES:
            raise InputError(f"fix is {fix!r}; it must be one of {', '.join(FIXES)}")
        self.fingerprint.check(other.fingerprint, "the first block")
        for name in ("weights", "rotary", "under"):
            if getattr(self, name) != getattr(other, name):
                raise FingerprintError(f"the two blocks differ in {name}; build both with one model")
        if self.keys.dtype != other.keys.dtype:
            raise FingerprintError(f"the two blocks are {self.keys.dtype} and {other.keys.dtype}")
        if fix == "recompute":
            if model is None:
                raise InputError("fix='recompute' runs the second block again; give model=")
            _, cache = self.extend(model, other.ids)
            keys, values = stack(model, cache, len(self) + len(other))
            places = range(self.next_position, self.next_position + len(other))
            whole = self.ids + other.ids
            return replace(
                self, keys=keys, values=values, ids=whole, positions=self.positions + tuple(places)
            )
        if fix == "shift+drop_first":
            other = other.drop_first()
        if fix != "none":
            other = other.shift(self.next_position - other.positions[0])
        return replace(
            self,
            keys=torch.cat([self.keys, other.keys], 2),
            values=torch.cat([self.values, other.values], 2),
            ids=self.ids + other.ids,
            positions=self.positions + other.positions,
            exact=False,
        )

    # -- disk -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Save as a folder of JSON and safetensors."""
        record, tensors = self.record()
        return save_artifact(path, "kv-block", record, tensors)

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> KVBlock:
        """Load a saved block, checked against `model` if one is given.

        Raises:
            ArtifactError: not a whole, untampered block.
            FingerprintError: it does not fit the model.
        """
        block = cls.from_record(*load_artifact(path, "kv-block"), path)
        if model is not None:
            block.check(model)
        return block

    def record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return JSON-able fields and tensors."""
        record = {
            "ids": list(self.ids),
            "positions": list(self.positions),
            "fingerprint": self.fingerprint.to_json(),
            "weights": self.weights,
            "dtype": str(self.keys.dtype).removeprefix("torch."),
            "rotary": self.rotary.to_json() if self.rotary else None,
            "under": list(self.under),
            "exact": self.exact,
        }
        return record, {"keys": self.keys, "values": self.values}

    @classmethod
    def from_record(cls, record: dict[str, Any], tensors: dict[str, Tensor], path: Any = "it") -> KVBlock:
        """Rebuild from `record`.

        Raises:
            ArtifactError: fields that are missing or do not fit each other.
        """
        try:
            block = cls(
                tensors["keys"],
                tensors["values"],
                tuple(int(i) for i in record["ids"]),
                tuple(int(p) for p in record["positions"]),
                Fingerprint.from_json(record["fingerprint"], path),
                str(record["weights"]),
                Rotary.from_json(record["rotary"]) if record["rotary"] else None,
                tuple(record["under"]),
                bool(record["exact"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is an incomplete KV block ({error}); build it again") from error
        n = len(block.ids)
        fits = block.keys.ndim == 4 and block.keys.shape == block.values.shape and block.keys.shape[2] == n
        if not fits or len(block.positions) != n or str(block.keys.dtype) != f"torch.{record['dtype']}":
            raise ArtifactError(f"{path} is a KV block whose parts do not fit each other; build it again")
        return block
