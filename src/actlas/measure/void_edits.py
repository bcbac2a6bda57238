"""Layer-adaptive computation: call a layer void for a token, and skip it or read around it.

    VoidRule(alpha=0.8, signal="norm")                                   which layers are active
    lac(alpha=0.8, mode="readout" | "skip", *, signal="norm", phase=None) -> Edit
    random_skip(keep, *, seed=0, phase=None) -> Edit                      the control at equal usage
    static_layer_skip(model, profile, budget) -> Edit                     the variant that saves work

A token's residual state grows by `d_l = ||h_l|| - ||h_{l-1}||` at layer l. The layer is *active* iff

    d_l >= alpha * (max_{j<l} d_j - min_{j<l} d_j)          (the first layer: d_1 >= 0)

over the previous layers of the same token, else *void*. Two things may be done with a void layer:

* `"readout"`, what the released code does: nothing is skipped; the last block's output is replaced by the
  state after the token's last active layer.
* `"skip"`: the token keeps its state, `h_l = h_{l-1}`, and later layers start from there. The layer has to
  run to be judged, so its keys and values are in the cache and later tokens attend to them: with and
  without a cache the tokens are the same. Later increments are those of the running, skipped chain.

Neither saves work. `static_layer_skip` does: it takes whole blocks out that a profile calls void for most
tokens; their caches stay empty, which is sound because no token ever reads them.

A signed norm calls a layer void that only turns the state. Two control signals do not:
`"distance"`, `||h_l - h_{l-1}||`, and `"angle"`, `1 - cos(h_l, h_{l-1})`.

Source: Shemiranifar 2025, "Void in Language Models" (arXiv 2505.14467), section 3, and its code (class
`L2AdaptiveComputation`). Norms are computed in float32 or better, and a token's range is its own (the
released code takes the first layer's over the batch).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.edit import ActivationEdit, Edit, Here, compose, register_edit
from actlas.core.errors import InputError
from actlas.core.layout import join
from actlas.core.scope import Phase
from actlas.core.swap import SwapModule, register_module

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

Signal = Literal["norm", "distance", "angle"]
Mode = Literal["readout", "skip"]
SIGNALS = ("norm", "distance", "angle")
STATES = "blocks.*.resid_p*"  # resid_pre and resid_post of every block


def increment(before: Tensor, after: Tensor, signal: Signal) -> Tensor:
    """Return how much a layer changed the state: `[..., d]`, `[..., d]` -> `[...]`, float32 or better."""
    wide = torch.promote_types(after.dtype, torch.float32)
    a, b = before.to(wide), after.to(wide)
    if signal == "norm":
        return b.norm(dim=-1) - a.norm(dim=-1)
    if signal == "distance":
        return (b - a).norm(dim=-1)
    return 1 - torch.cosine_similarity(a, b, dim=-1)


@dataclass(frozen=True)
class VoidRule:
    """Judges the layers of each token in order.

    Attributes:
        alpha: share of the range so far that a layer must add; 0 calls it void iff the norm falls.
        signal: what is compared.
    """

    alpha: float = 0.8
    signal: Signal = "norm"

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise InputError(f"signal must be one of {', '.join(SIGNALS)}, not {self.signal!r}")
        if not math.isfinite(self.alpha):
            raise InputError(f"alpha must be a number, not {self.alpha}")
        if not 0 <= self.alpha <= 1:
            warnings.warn(f"alpha is {self.alpha:g}; the rule is meant for values from 0 to 1", stacklevel=3)

    def judge(self, d: Tensor, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Judge one layer.

        Args:
            d: its increments `[...]`.
            seen: least and greatest increment of the layers before; `None` at the first.

        Returns:
            whether it is active, bool `[...]`, and the range with this layer in it.
        """
        if seen is None:
            return d >= 0, (d, d)
        low, high = seen
        return d >= self.alpha * (high - low), (torch.minimum(low, d), torch.maximum(high, d))

    def active(self, increments: Tensor) -> Tensor:
        """Judge all layers: increments `[..., layers]` -> bool of the same shape."""
        seen, out = None, []
        for d in increments.unbind(-1):
            found, seen = self.judge(d, seen)
            out.append(found)
        return torch.stack(out, -1)


@dataclass(frozen=True, eq=False, repr=False)
class _LayerGate(ActivationEdit):
    """Base of edits that see each block's input and output in one pass; subclasses define `after_block`."""

    def check(self, site: Site) -> None:
        if site.kind not in ("resid_pre", "resid_post"):
            raise InputError(f"a layer gate works on residual states ({STATES}), not on {site.name}")

    def value(self, x: Tensor, here: Here) -> Tensor:
        held = here.run.values
        if here.site.kind == "resid_pre":
            held[self, "before"] = x
            if here.site.block == 0:
                self.begin(x, here)
            return x
        new = self.after_block(held[self, "before"], x, here)
        return new

    def begin(self, x: Tensor, here: Here) -> None:
        """Called with the first block's input."""

    def after_block(self, before: Tensor, after: Tensor, here: Here) -> Tensor:
        """Return the state that leaves a block."""
        raise NotImplementedError


def _last(here: Here) -> int:
    tower = here.installation.model.layout
    found = None if tower is None else tower.tower(here.site.tower)
    assert found is not None
    return found.n_blocks - 1


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class LAC(_LayerGate):
    """Layer-adaptive computation; see `lac` and the module's text.

    Attributes:
        alpha, signal: the rule.
        mode: `"readout"` or `"skip"`.
    """

    alpha: float = 0.8
    mode: str = "readout"
    signal: str = "norm"

    def __post_init__(self) -> None:
        if self.mode not in ("readout", "skip"):
            raise InputError(f'mode must be "readout" or "skip", not {self.mode!r}')
        VoidRule(self.alpha, self.signal)  # type: ignore[arg-type]

    def begin(self, x: Tensor, here: Here) -> None:
        held = here.run.values
        held.pop((self, "low"), None)
        held[self, "state"] = x

    def after_block(self, before: Tensor, after: Tensor, here: Here) -> Tensor:
        held, rule = here.run.values, VoidRule(self.alpha, self.signal)  # type: ignore[arg-type]
        seen = (held[self, "low"], held[self, "high"]) if (self, "low") in held else None
        active, (low, high) = rule.judge(increment(before, after, rule.signal), seen)
        held[self, "low"], held[self, "high"] = low, high
        chosen = active.unsqueeze(-1)
        if self.mode == "skip":
            return torch.where(chosen, after, before)
        held[self, "state"] = torch.where(chosen, after, held[self, "state"])
        return held[self, "state"] if here.site.block == _last(here) else after

    def describe(self) -> str:
        return super().describe().replace("LAC", f"LAC {self.mode} alpha={self.alpha:g}", 1)


def lac(
    alpha: float = 0.8, mode: Mode = "readout", *, signal: Signal = "norm", phase: Phase | None = None
) -> Edit:
    """Return layer-adaptive computation as an edit.

    Args:
        alpha: threshold, in (0, 1]; the released default is 0.8. Outside [0, 1] a warning is given.
        mode: `"readout"` (as released: every layer runs, only the readout changes) or `"skip"`.
        signal: `"norm"`, or the controls `"distance"` and `"angle"`.
        phase: only prompt tokens or only generated ones. Leave the sink out with
            `.at(positions=range(1, ...))`.
    """
    edit = LAC(STATES, alpha, mode, signal)
    return edit if phase is None else edit.at(phase=phase)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class RandomSkip(_LayerGate):
    """Each token skips layers at random, `keep` of them stay on average; see `random_skip`.

    Attributes:
        keep: layers that stay, of all; a fraction is decided by a coin for each token.
        seed: which layers depends on (seed, token id, position) alone, so a cache changes nothing.
    """

    keep: float = 0.0
    seed: int = 0

    def begin(self, x: Tensor, here: Here) -> None:
        layers = _last(here) + 1
        run = here.run
        position = run.positions(x.device).clamp_min(0)
        token = torch.zeros_like(position) if run.tokens is None else run.tokens.to(x.device)
        key = (position * 1_000_003 + token) * 7_919 + self.seed * 104_729
        scores = _scramble(key.unsqueeze(-1) * (layers + 1) + torch.arange(layers + 1, device=x.device))
        coin = scores[..., -1].double() / 2**31
        count = math.floor(self.keep) + (coin < self.keep - math.floor(self.keep)).long()
        rank = scores[..., :-1].argsort(-1).argsort(-1)
        here.run.values[self, "stay"] = rank < count.unsqueeze(-1)

    def after_block(self, before: Tensor, after: Tensor, here: Here) -> Tensor:
        assert here.site.block is not None
        stay = here.run.values[self, "stay"][..., here.site.block]
        return torch.where(stay.unsqueeze(-1), after, before)


def random_skip(keep: float, *, seed: int = 0, phase: Phase | None = None) -> Edit:
    """Return the control of `lac(mode="skip")`: the same number of layers, chosen at random.

    Args:
        keep: how many layers of each token stay, on average.
        seed: of the choice.
        phase: only prompt tokens or only generated ones.
    """
    if not keep >= 0:
        raise InputError(f"keep is a number of layers and must not be negative, not {keep}")
    edit = RandomSkip(STATES, keep, seed)
    return edit if phase is None else edit.at(phase=phase)


def _scramble(x: Tensor) -> Tensor:
    """Return well-mixed int64 in [0, 2^31) for any int64 (multiply and xorshift rounds)."""
    x = x % (2**31)
    for factor in (2_654_435_761, 2_246_822_519, 3_266_489_917):
        x = (x * factor) % (2**31)
        x = x ^ (x >> 15)
    return x


@register_module
class PassThrough(nn.Module):
    """Stands in for a block and returns its input.

    Args:
        tuple_output: return it as the first element of a tuple, as older blocks do.
    """

    def __init__(self, tuple_output: bool = False) -> None:
        super().__init__()
        self.tuple_output = tuple_output

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {"tuple_output": self.tuple_output}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PassThrough:
        """Build one."""
        return cls(**config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Return `hidden_states`."""
        return (hidden_states,) if self.tuple_output else hidden_states


def static_layer_skip(model: Model, profile: Sequence[float] | Tensor, budget: float) -> Edit:
    """Return the edit that takes the least used blocks out of the model, for every token.

    Args:
        model: what it is for.
        profile: usage of each block, e.g. `VoidTrace.profile()`; the lowest go first.
        budget: how many blocks to take out, or the share of all blocks if below 1.

    Raises:
        InputError: a profile of another length, or more blocks than may be taken out. The first block
            of each kind of attention stays: a cache tells the length of the past from it.
    """
    n = model.n_blocks or 0
    usage = [float(u) for u in profile]
    if len(usage) != n:
        raise InputError(f"the profile has {len(usage)} entries for the {n} blocks of {model.name}")
    count = round(budget * n) if budget < 1 else round(budget)
    fixed = _first_of_each_kind(model)
    free = [i for i in range(n) if i not in fixed]
    if not 1 <= count <= len(free):
        raise InputError(f"a budget of {budget:g} means {count} blocks; 1 to {len(free)} can be taken out")
    order = sorted(free, key=lambda i: (usage[i], i))
    tuples = _returns_tuple(model)
    tower = model.tower
    assert tower is not None
    swaps = [SwapModule(join(tower.blocks, str(i)), PassThrough(tuples)) for i in sorted(order[:count])]
    return compose(swaps).bind(model.fingerprint)


def _first_of_each_kind(model: Model) -> set[int]:
    config = getattr(model.config, "text_config", None) or model.config
    kinds = getattr(config, "layer_types", None) or ["full"]
    return {list(kinds).index(kind) for kind in dict.fromkeys(kinds)}


def _returns_tuple(model: Model) -> bool:
    """Run two tokens to see what a block returns."""
    seen: list[bool] = []
    block = model.block(0)
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(isinstance(out, tuple)))
    try:
        with torch.no_grad():
            model.forward({"input_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device)})
    finally:
        handle.remove()
    return bool(seen and seen[0])
