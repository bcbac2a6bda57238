"""Key-value cache policies: an Edit that decides which keys and values of a prompt stay in the cache.

    with model.edit(SnapKV(capacity=256)):
        model.generate(long_prompt)

A policy acts on the cache that transformers passes to a forward pass; passes without a cache are left alone.
The prompt is read with full attention. As soon as a layer has finished, its keys and values are cut to
`capacity` positions per key-value head, so that never more than one layer is whole. A rolling policy
(streaming window, H2O) cuts again after every generated token.

Positions stay true. Keys keep the rotation of the place at which they were written, and `KeptLayer` goes on
counting the tokens that were seen, not those that are stored: the next token gets the position after the last
one, edits that ask for positions get the true ones, and the causal mask is offset by what was dropped.

The first token of the answer comes from the full prompt (as in SnapKV); the cut cache serves all later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from actlas.core.edit import EDIT_TYPES, Edit, WholeEdit, compose
from actlas.core.errors import ArtifactError, InputError, ModelError
from actlas.core.model import Model

if TYPE_CHECKING:
    from actlas.core.installation import Installation


class KeptLayer(DynamicLayer):
    """A cache layer from which positions were dropped.

    Attributes:
        index: which block it serves.
        seen: tokens that went through it, dropped ones included.
        positions: where the stored keys come from, int64 `[batch, kv_heads, stored]`.
        mass: attention that they received so far, for rolling policies, or `None`.
        shift: tokens that never went through it, because the prompt was compressed.
    """

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.keys: Tensor | None
        self.values: Tensor | None
        self.index = index
        self.seen = 0
        self.shift = 0
        self.positions: Tensor = torch.empty(0, dtype=torch.long)
        self.mass: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch, heads, new, _ = key_states.shape
        columns = torch.arange(self.seen, self.seen + new, device=key_states.device).expand(batch, heads, new)
        self.positions = columns.clone() if self.seen == 0 else torch.cat([self.positions, columns], -1)
        self.seen += new
        keys, values = super().update(key_states, value_states)
        return keys, values

    def keep(self, columns: Tensor) -> None:
        """Keep only these stored columns, int64 `[batch, kv_heads, kept]`."""
        assert self.keys is not None and self.values is not None
        wide = columns.unsqueeze(-1)
        self.keys = self.keys.gather(2, wide.expand(*columns.shape, self.keys.shape[-1]))
        self.values = self.values.gather(2, wide.expand(*columns.shape, self.values.shape[-1]))
        self.positions = self.positions.gather(2, columns)
        if self.mass is not None:
            self.mass = self.mass.gather(2, columns)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self.keys.shape[-2] if self.keys is not None and self.keys.numel() else 0
        return stored + query_length, self.seen - stored

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.positions.shape[0]).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._rows(rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InputError(
                "a cache from which positions were dropped cannot be rolled back; use no assistant"
            )

    def reset(self) -> None:
        super().reset()
        self.seen, self.shift, self.mass = 0, 0, None

    def _rows(self, rows: Tensor) -> None:
        self.positions = self.positions[rows.to(self.positions.device)]
        if self.mass is not None:
            self.mass = self.mass[rows.to(self.mass.device)]


@dataclass(frozen=True, eq=False, repr=False)
class KVPolicy(WholeEdit):
    """What stays in the cache. Subclasses say which attention rows they read and what they choose.

    Attributes:
        capacity: positions that stay per key-value head.
    """

    whole: ClassVar[str] = "a cache policy serves the whole prompt"

    capacity: int = 256

    #: Whether the cache is cut again after each generated token.
    rolling: ClassVar[bool] = False
    #: A prompt that fits the capacity is left alone, and that is not worth a warning.
    may_do_nothing: ClassVar[bool] = True

    def rows(self, length: int, ahead: int) -> int:
        """Return how many of the last attention rows `choose` needs; 0 for none.

        Args:
            length: tokens of the prompt.
            ahead: tokens of a draft behind it.
        """
        raise NotImplementedError

    def choose(self, layer: KeptLayer, pattern: Tensor | None, length: int) -> Tensor:
        """Return the stored columns that stay, sorted, int64 `[batch, kv_heads, kept]`.

        Args:
            layer: what is stored.
            pattern: attention `[batch, kv_heads, group, rows, stored]`, or `None` if none was asked for.
            length: leading columns that may stay (what follows is a draft's).
        """
        raise NotImplementedError

    def lookahead(self, draft: Model | None, ids: Tensor) -> Tensor | None:
        """Return tokens to read behind the prompt, int64 `[batch, ahead]`, or `None`."""
        return None

    def select(self, draft: Model | None, ids: Tensor, ahead: Tensor | None) -> Tensor | None:
        """Return which tokens of the prompt are read at all, sorted int64 `[kept]`, or `None` for all."""
        return None

    def limit(self, length: int) -> int:
        """Return the length up to which a prompt is left alone."""
        return self.capacity

    @property
    def evicts(self) -> bool:
        """Whether keys are dropped from the cache."""
        return True

    def describe(self) -> str:
        return f"{type(self).__name__} of {self.capacity} positions"

    def _attach(self, installation: Installation) -> None:
        from actlas.sparsity.kv_running import PolicyRun

        if any(isinstance(e, KVPolicy) and e is not self for e in installation.edits) or any(
            isinstance(e, KVPolicy) for e in installation.model.installed
        ):
            raise InputError(f"{self.describe()}: one cache policy at a time; leave the other out")
        PolicyRun(self, installation).attach()

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Model):
                raise InputError(
                    f"{self.describe()} holds the draft {value.name}, which cannot be saved inside an edit; "
                    "give the draft as an edit of the target"
                )
            if isinstance(value, Edit):
                record[f.name] = []
                for i, part in enumerate(value.parts()):
                    inner, held = part._record()
                    record[f.name].append({"type": type(part).__name__, **inner})
                    tensors |= {f"{f.name}.{i}.{name}": t for name, t in held.items()}
            else:
                record[f.name] = value
        return record, tensors

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        given = {k: v for k, v in record.items() if k != "type"}
        if given.get("draft") is not None:
            parts = []
            for i, inner in enumerate(given["draft"]):
                kind = EDIT_TYPES.get(inner["type"])
                if kind is None:
                    raise ArtifactError(f"the draft holds an edit of unknown type {inner['type']!r}")
                start = f"draft.{i}."
                held = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
                parts.append(kind._rebuild(inner, held))
            given["draft"] = compose(parts)
        return cls(**given)


def check_sizes(**sizes: int) -> None:
    """Raise unless every size is a whole number of at least 1 (`sinks`, `skip_layers`: 0)."""
    for name, value in sizes.items():
        least = 0 if name in ("sinks", "skip_layers", "seed") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def plain_cache(kwargs: Mapping[str, Any], blocks: int) -> DynamicCache | None:
    """Return the cache of a forward pass, or `None`; refuse caches that bound themselves.

    Raises:
        ModelError: a static, sliding-window or other cache that is not a plain growing one.
    """
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    if cache is None:
        return None
    layers = getattr(cache, "layers", None)
    fine = isinstance(cache, DynamicCache) and all(type(x) in (DynamicLayer, KeptLayer) for x in layers or ())
    if not fine or len(layers or ()) not in (0, blocks):
        raise ModelError(
            f"a cache policy needs a plain growing cache in every layer; this is a {type(cache).__name__} "
            "with other layers (sliding-window and static caches are bounded already)"
        )
    return cache
