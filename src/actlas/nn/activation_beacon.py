"""Activation Beacon: condense each window of a long text into a few keys and values that stay.

    beacon = ActivationBeacon(model, window=64, ratio=4)
    logits = beacon(ids)                     # [rows, n, vocabulary]; call again with more: the memory goes on
    beacon.memory.save("memory/", model);  beacon.reset()

After a full window of w tokens, k = stride / r beacon tokens are run behind it. All start from one learned
embedding (at first that of end-of-text) and have their own copies of q, k, v and o in every block; norms and
MLPs are the model's, and ordinary tokens pass through the model as it is. The beacons' keys and values join
the memory, those of the first `stride` tokens are dropped.

* Ordinary tokens attend causally to [memory ; window].
* Beacon j = 1..k attends to all memory, to itself, to no other beacon, and to the window's tokens
  1..j r (`"step"`), (j - 1) r + 1..j r (`"segment"`) or all (`"full"`).
* Positions: memory 0..m-1, window m..m+w-1, beacon j at m + j r. Keys are kept before rotation and rotated
  anew in every call, because memory moves together.

With L positions the reach is (L - w) r + w tokens. An unfinished last window has no beacons. In training
gradients flow through the memory; `actlas.training.beacons` does it.

Source: "Soaring from 4K to 400K: Extending LLM's Context with Activation Beacon" (2024, first version).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.fingerprint import Fingerprint
from actlas.core.layout import find, plain_module
from actlas.core.model import Model
from actlas.core.rotary import rotary_of
from actlas.nn.activation_beacon_memory import BeaconMemory

Attention = Literal["step", "segment", "full"]
Ratio = int | Callable[[int], int]
_KINDS = ("llama", "mistral", "qwen2")
_COPIED = ("q_proj", "k_proj", "v_proj", "o_proj")


def beacon_mask(memory: int, window: int, stride: int, ratio: int, attn: Attention = "step") -> Tensor:
    """Return what beacons may attend to, bool `[k, memory + window + k]`: memory, window, beacons.

    Raises:
        InputError: the stride is not divisible by the ratio, or an unknown kind.
    """
    if attn not in ("step", "segment", "full"):
        raise InputError(f"attn is {attn!r}; it must be 'step', 'segment' or 'full'")
    if ratio < 1 or stride % ratio:
        raise InputError(f"the stride {stride} is not divisible by the ratio {ratio}; take a divisor")
    k = stride // ratio
    end = (torch.arange(k) + 1)[:, None] * ratio
    token = torch.arange(window)[None]
    seen = {
        "step": token < end,
        "segment": (token < end) & (token >= end - ratio),
        "full": torch.ones(k, window, dtype=torch.bool),
    }[attn]
    return torch.cat([torch.ones(k, memory, dtype=torch.bool), seen, torch.eye(k, dtype=torch.bool)], 1)


class ActivationBeacon(nn.Module):
    """The parameters of beacons, and a model that is run with them. The model itself is not changed.

    Args:
        model: a llama-like decoder with plain rotary keys.
        window: w, tokens.
        ratio: r, tokens a beacon stands for; can be given anew in every call.
        attn: what a beacon sees of its window.
        stride: tokens that a window goes on by; default the window.

    Attributes:
        memory: the state; `reset()` empties it.

    Raises:
        InputError: sizes that do not fit.
        ModelError: a model of another kind.
    """

    def __init__(
        self,
        model: Model,
        window: int = 1024,
        ratio: int = 8,
        *,
        attn: Attention = "step",
        stride: int | None = None,
    ) -> None:
        super().__init__()
        stride = window if stride is None else stride
        if not 1 <= stride <= window:
            raise InputError(f"stride is {stride}; it must lie between 1 and the window, {window}")
        if model.context_length is not None and window > model.context_length:
            raise InputError(f"window is {window}; {model.name} has a context of {model.context_length}")
        beacon_mask(0, window, stride, ratio, attn)
        self.window, self.stride, self.ratio, self.attn = window, stride, ratio, attn
        self.rotary = rotary_of(model)
        if getattr(model.config, "model_type", "") not in _KINDS or self.rotary.scaling != 1.0:
            raise ModelError(f"beacons are for models of the kinds {', '.join(_KINDS)}, not {model.name}")
        self._model = (model,)  # in a tuple: not a submodule, so its weights are neither saved nor trained
        attention: list[Any] = [b.self_attn for b in self._blocks]
        self.projections = nn.ModuleList(
            nn.ModuleDict({n: copy.deepcopy(getattr(a, n)) for n in _COPIED}) for a in attention
        )
        end = getattr(model.config, "eos_token_id", None)
        end = end[0] if isinstance(end, list) else end
        rows: Tensor = self._embed.weight
        start = rows[end] if end is not None else rows.mean(0)
        self.embedding = nn.Parameter(start.detach().clone())
        for p in self.projections.parameters():
            p.requires_grad_(True)
        self.memory = BeaconMemory()

    @property
    def model(self) -> Model:
        """The model that is run."""
        return self._model[0]

    @property
    def _tower(self) -> Any:
        assert self.model.tower is not None
        return find(plain_module(self.model.module), self.model.tower.blocks.rpartition(".")[0])

    @property
    def _blocks(self) -> Any:
        return self._tower.layers

    @property
    def _embed(self) -> Any:
        return self._tower.embed_tokens

    @property
    def reach(self) -> int | None:
        """Tokens that can be read before the positions run out, at the own ratio; `None` for no limit."""
        limit = self.model.context_length
        return None if limit is None else (limit - self.window) * self.ratio + self.window

    def reset(self) -> None:
        """Forget everything that was read."""
        self.memory = BeaconMemory()

    def forward(self, ids: Tensor, ratio: Ratio | None = None) -> Tensor:
        """Read further tokens; return their logits, `[rows, n, vocabulary]`.

        Args:
            ids: `[rows, n]`; rows share their windows, so all are as long.
            ratio: another one for this call, or a function of the window's number.

        Raises:
            ShapeError: ids of another shape, or other rows than those in the memory.
            InputError: more than the model's positions hold.
        """
        if ids.ndim != 2 or ids.shape[1] < 1 or ids.is_floating_point():
            raise ShapeError(f"tokens must be ids [rows, 1 or more], not {list(ids.shape)}")
        held = self.memory.rows
        if held is not None and held != len(ids):
            raise ShapeError(f"the memory holds {held} rows, not {len(ids)}; reset it first")
        out, place = [], 0
        while place < ids.shape[1]:
            piece = ids[:, place : place + self.window - self.memory.raw_tokens]
            out.append(self._read(piece))
            place += piece.shape[1]
            if self.memory.raw_tokens == self.window:
                self._condense(self._ratio(ratio))
        return torch.cat(out, 1)

    def losses(self, ids: Tensor, ratio: Ratio | None = None) -> Tensor:
        """Return the loss of every token after the first, `[rows, n - 1]`, from an empty memory.

        Labels are shifted before windows are cut, so the last token of a window is scored, too.
        """
        self.reset()
        logits = self(ids, ratio)[:, :-1]
        self.reset()
        flat = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return flat.reshape(len(ids), -1)

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int = 20) -> Tensor:
        """Return the greedy continuation of what was read and `ids`, `[rows, new]`; memory goes on."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        made = [self(ids)[:, -1:].argmax(-1)]
        while len(made) < max_new_tokens:
            made.append(self(made[-1])[:, -1:].argmax(-1))
        return torch.cat(made, 1)

    # -- one window -----------------------------------------------------------------------------

    def _ratio(self, given: Ratio | None) -> int:
        return self.ratio if given is None else given(self.memory.windows) if callable(given) else given

    def _read(self, ids: Tensor) -> Tensor:
        before = self.memory.condensed + self.memory.raw_tokens
        n = ids.shape[1]
        limit = self.model.context_length
        if limit is not None and before + n > limit:
            raise InputError(
                f"{before + n} positions are needed, but {self.model.name} has {limit}; with windows of "
                f"{self.window} and a ratio of {self.ratio} it reaches {self.reach} tokens: raise the ratio"
            )
        mask = torch.ones(n, before + n, dtype=torch.bool, device=ids.device).tril(before)
        positions = torch.arange(before, before + n)
        x = self._embed(ids)
        fresh = []
        for i, block in enumerate(self._blocks):
            own = {name: getattr(block.self_attn, name) for name in _COPIED}
            x, keys, values = self._block(i, x, own, positions, positions, mask)
            fresh.append((keys, values))
        self.memory = self.memory.grown(fresh)
        logits: Tensor = self.model.unembed(x)
        return logits

    def _condense(self, ratio: int) -> None:
        m, w = self.memory.condensed, self.memory.raw_tokens
        mask = beacon_mask(m, w, self.stride, ratio, self.attn).to(self.embedding.device)
        k = len(mask)
        positions = m + (torch.arange(k) + 1) * ratio
        x = self.embedding.expand(self.memory.rows or 1, k, -1)
        made = []
        for i, _ in enumerate(self._blocks):
            copied: Any = self.projections[i]
            x, keys, values = self._block(i, x, copied, positions, positions, mask)
            made.append((keys, values))
        self.memory = self.memory.condense(made, self.stride)

    def _block(
        self, i: int, x: Tensor, own: Any, query_at: Tensor, key_at: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one block over new tokens; return the residual stream, unrotated keys, values."""
        block: Any = self._blocks[i]
        width = 2 * len(self.rotary.frequencies)
        h = block.input_layernorm(x)
        q, k, v = (own[n](h).unflatten(-1, (-1, width)).transpose(1, 2) for n in _COPIED[:3])
        old_k, old_v = self.memory.held(i)
        keys = k if old_k is None else torch.cat([old_k, k], 2)
        values = v if old_v is None else torch.cat([old_v, v], 2)
        places = torch.cat([torch.arange(keys.shape[2] - k.shape[2]), key_at])
        turned = self.rotary(keys, places)
        repeats = q.shape[1] // k.shape[1]
        z = F.scaled_dot_product_attention(
            self.rotary(q, query_at),
            turned.repeat_interleave(repeats, 1),
            values.repeat_interleave(repeats, 1),
            attn_mask=mask,
        )
        x = x + own["o_proj"](z.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.post_attention_layernorm(x))
        return x, k, v

    # -- disk -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Save the beacons' parameters as JSON and safetensors (not the memory, not the model)."""
        about = {
            "window": self.window,
            "stride": self.stride,
            "ratio": self.ratio,
            "attn": self.attn,
            "fingerprint": self.model.fingerprint.to_json(),
        }
        return save_artifact(path, "activation-beacon", about, self.state_dict())

    @classmethod
    def load(cls, path: str | Path, model: Model) -> ActivationBeacon:
        """Load saved beacons for a model.

        Raises:
            ArtifactError: not a whole, untampered artifact.
            FingerprintError: they were made for another model.
        """
        about, tensors = load_artifact(path, "activation-beacon")
        Fingerprint.from_json(about.get("fingerprint"), path).check(model.fingerprint, str(path))
        made = cls(model, about["window"], about["ratio"], attn=about["attn"], stride=about["stride"])
        made.load_state_dict(tensors)
        return made
