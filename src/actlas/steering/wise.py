"""WISE: write facts into a side copy of an MLP's output matrix, and send only them there.

For a fact (x, y) with irrelevant texts x_i, side memory W' = W + D, and the router's reaction R(x)
(`dual_memory`):

    loss = CE(y | x; W') + relu(R(x_i) - alpha) + relu(beta - R(x)) + relu(gamma - (R(x) - R(x_i)))

Stochastic gradient descent on D, the gradient multiplied by a random binary mask of density rho that belongs
to the shard; D is clamped to +-`clamp`. After `save_freq` facts the shard is put aside and D starts from 0
with another mask. Shards are merged by TIES into one memory (`mode="merge"`), or every `merge_freq` facts
make one memory and the one that reacts most answers (`mode="retrieve"`). A memory answers above
`act_ratio * min_x R(x)` over the facts in it.

    edit = fit_wise(model, requests, shards=2)
    with model.edit(edit): ...

Source: Wang et al. 2024, "WISE", sections 2.2 to 2.4; learning rates, ratios and contexts from the released
code. Margins there are 5 / 20 / 10 for Llama-2; `margins="auto"` takes 0.05 / 0.2 / 0.1 of the median
||f(a W^T)||, because R scales with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from actlas.core.activation_function import activation_function, activation_name
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.ties import ties
from actlas.data.edit_requests import EditRequest, as_requests
from actlas.steering.dual_memory import DualMemory, over_tokens, reaction
from actlas.steering.edit_rows import (
    AtMatrix,
    Matrix,
    frozen,
    in_contexts,
    measured,
    sampled_texts,
    write_rows,
)

Mode = Literal["merge", "retrieve"]
DEPTH = 0.85  # the published block, 27 of 32


@dataclass(frozen=True)
class WiseSettings:
    """Sizes of a WISE editor; see the module docstring.

    Attributes:
        rho: density of the gradient mask. save_freq, merge_freq: facts in a shard, in a memory.
        margins: `"auto"` or (alpha, beta, gamma). act_ratio: of the threshold.
        lr, steps, stop: of the descent; a fact is done when its cross-entropy is at most `stop` and it
            reacts above beta, and by gamma more than every irrelevant text.
        contexts: texts sampled from the model in which the prompt is rehearsed.
        density: of TIES. clamp: limit of every entry of D.
        replay: earlier facts of the shard whose reaction is kept above beta while a new one is written.
        long_max: see `dual_memory.over_tokens`.
    """

    rho: float = 0.2
    save_freq: int = 10
    merge_freq: int | None = None
    mode: Mode = "merge"
    margins: Literal["auto"] | tuple[float, float, float] = "auto"
    act_ratio: float = 0.88
    lr: float = 1.0
    steps: int = 30
    stop: float = 0.05
    contexts: int = 3
    density: float = 0.53
    clamp: float = 1.0
    replay: int = 0
    long_max: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("merge", "retrieve"):
            raise InputError(f"mode is {self.mode!r}; it must be 'merge' or 'retrieve'")
        for name in ("rho", "act_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name):g}; it must be above 0 and at most 1")
        for name in ("lr", "clamp"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name):g}; it must be a positive number")
        for name in ("save_freq", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        merge = self.merge_freq
        if merge is not None and (merge < 1 or merge % self.save_freq):
            raise InputError(f"merge_freq is {merge}; it must be a multiple of save_freq, {self.save_freq}")
        if self.margins != "auto":
            alpha, beta, gamma = self.margins
            if not 0 <= alpha < beta or gamma < 0:
                raise InputError(f"margins are {self.margins}; they are alpha < beta and gamma, not negative")


@dataclass
class _Shard:
    """A mask, the change it allows, and what its facts look like at the matrix."""

    mask: Tensor
    delta: Tensor
    facts: list[AtMatrix] = field(default_factory=list)


class WiseEditor:
    """Writes facts one after the other; `edit()` gives the edit that holds them so far.

    Args:
        model: a causal language model with dense MLPs.
        site: a block or a site in it; default the block at 85% of the depth (published: 27 of 32).
        irrelevant: texts that the side memory must not react to; default ten sampled from the model.
        settings: sizes.
    """

    def __init__(
        self,
        model: Model,
        site: str | int | None = None,
        *,
        irrelevant: Sequence[str] = (),
        settings: WiseSettings | None = None,
    ) -> None:
        self.model, self.settings = model, settings or WiseSettings()
        self.matrix = Matrix.of(model, site, DEPTH)
        self.activation = activation_name(model)
        seed = self.settings.seed
        self.contexts = sampled_texts(model, self.settings.contexts, seed=seed)
        texts = list(irrelevant) or sampled_texts(model, 10, tokens=12, seed=seed + 1, skip=3)
        self.irrelevant = self.matrix.activations(texts)
        self.margins = self._margins()
        self.shards: list[_Shard] = []
        self.count = 0
        self._texts = set(texts)

    def add(self, request: EditRequest) -> int:
        """Write one more fact; return how many steps it took.

        Raises:
            InputError: its prompt is among the irrelevant texts.
        """
        if request.prompt in self._texts:
            raise InputError(f"{request.prompt!r} is edited and is an irrelevant text; take it out of one")
        if self.count % self.settings.save_freq == 0:
            self.shards.append(self._new_shard())
        shard = self.shards[-1]
        rows = write_rows(self.matrix, in_contexts(request.prompt, self.contexts), request.target)
        irrelevant = [self.irrelevant]
        if request.irrelevant:
            irrelevant.append(self.matrix.activations(request.irrelevant))
        old = shard.facts[-self.settings.replay :] if self.settings.replay else []
        delta = shard.delta.clone().requires_grad_()
        optimiser = torch.optim.SGD([delta], lr=self.settings.lr)
        taken = 0
        with frozen(self.model.module):
            for step in range(self.settings.steps):
                taken = step + 1
                entropy = rows.loss(delta)
                inside = self._react(delta, rows.prompts)
                outside = torch.cat([self._react(delta, read) for read in irrelevant])
                if float(entropy.detach()) <= self.settings.stop and self._apart(inside, outside):
                    break
                margin = self._margin_loss(inside, outside)
                if old:
                    kept = torch.cat([self._react(delta, read) for read in old])
                    margin = margin + (self.margins[1] - kept).relu().mean()
                optimiser.zero_grad()
                (entropy + margin).backward()
                assert delta.grad is not None
                delta.grad *= shard.mask
                optimiser.step()
                with torch.no_grad():
                    delta.clamp_(-self.settings.clamp, self.settings.clamp)
        shard.delta = delta.detach()
        first = rows.prompts
        keep = first.real[:1]
        shard.facts.append(
            AtMatrix(first.a[:1][keep].unsqueeze(0), first.y[:1][keep].unsqueeze(0), keep[keep][None])
        )
        self.count += 1
        return taken

    def edit(self) -> DualMemory:
        """Return the edit with all facts so far, unfinished shards included.

        Raises:
            InputError: no fact has been written.
        """
        if not self.shards:
            raise InputError("no fact has been written yet; add at least one")
        size = len(self.shards)
        if self.settings.mode == "retrieve":
            size = (self.settings.merge_freq or self.settings.save_freq) // self.settings.save_freq
        groups = [self.shards[i : i + size] for i in range(0, len(self.shards), size)]
        deltas = [self._merged(group) for group in groups]
        limits = [
            self.settings.act_ratio * min(float(self._react(d, f)[0]) for s in group for f in s.facts)
            for d, group in zip(deltas, groups, strict=True)
        ]
        made = DualMemory(
            self.matrix.writes,
            self.matrix.reads,
            torch.stack(deltas),
            torch.tensor(limits),
            self.activation,
            long_max=self.settings.long_max,
        )
        bound = made.bind(self.model.fingerprint)
        assert isinstance(bound, DualMemory)
        return bound

    def _merged(self, group: Sequence[_Shard]) -> Tensor:
        if len(group) == 1:
            return group[0].delta
        return ties([{"delta": s.delta} for s in group], density=self.settings.density)["delta"]

    def _new_shard(self) -> _Shard:
        shape = self.matrix.weight.shape
        generator = torch.Generator().manual_seed(1000 * self.settings.seed + len(self.shards))
        mask = (
            (torch.rand(shape, generator=generator) < self.settings.rho).float().to(self.matrix.weight.device)
        )
        return _Shard(mask, torch.zeros_like(mask))

    def _react(self, delta: Tensor, read: AtMatrix) -> Tensor:
        """Return the reaction of each row, `[rows]`."""
        reactions = reaction(read.y, read.y + read.a @ delta.T, self.activation)
        return over_tokens(reactions, read.real, self.settings.long_max)

    def _margin_loss(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Return the three margin terms for reactions of the fact's prompts and of irrelevant texts."""
        alpha, beta, gamma = self.margins
        gap = inside.unsqueeze(0) - outside.unsqueeze(1)
        return (outside - alpha).relu().mean() + (beta - inside).relu().mean() + (gamma - gap).relu().mean()

    def _apart(self, inside: Tensor, outside: Tensor) -> bool:
        """Say whether the fact reacts above beta, and by gamma more than every irrelevant text."""
        least, most = float(inside.detach().min()), float(outside.detach().max())
        return least >= self.margins[1] and least - most >= self.margins[2]

    def _margins(self) -> tuple[float, float, float]:
        if self.settings.margins != "auto":
            return self.settings.margins
        f = activation_function(self.activation)
        size = float(f(self.irrelevant.y[self.irrelevant.real]).norm(dim=-1).median())
        return 0.05 * size, 0.2 * size, 0.1 * size


@method(
    "wise",
    room="steering",
    returns="Edit",
    data="requests",
    summary="write facts into a side memory of one MLP, with a router that sends only them there",
    example="actlas fit wise smollm2 edits.jsonl --shards 2 -o memory/",
    papers=("wise",),
)
def fit_wise(
    model: Model,
    data: Any,
    site: str | int | None = None,
    *,
    shards: int = 2,
    mode: Mode = "merge",
    irrelevant: Sequence[str] = (),
    seed: int = 0,
    **settings: Any,
) -> Edit:
    """Write facts into side memories, and measure what became of them.

    Args:
        model: a causal language model with dense MLPs.
        data: edit requests (`actlas.data.edit_requests`), in the order in which they are written.
        site: a block or a site in it; default the block at 85% of the depth.
        shards: into how many shards the facts are dealt, in order; `save_freq` says it otherwise.
        mode: `"merge"` or `"retrieve"`.
        irrelevant: texts that must not be affected, used in fitting.
        seed: of masks and contexts.
        settings: further fields of `WiseSettings`.

    Returns:
        The edit; its measurements are reliability, generality, locality and the router's decisions.

    Raises:
        InputError: unusable requests or settings. ModelError: no causal language model with dense MLPs.
    """
    requests = as_requests(data)
    if shards < 1:
        raise InputError(f"shards is {shards}; it must be at least 1")
    settings.setdefault("save_freq", math.ceil(len(requests) / shards))
    if isinstance(settings.get("margins"), list):
        settings["margins"] = tuple(settings["margins"])
    try:
        chosen = WiseSettings(mode=mode, seed=seed, **settings)
    except TypeError as error:
        raise InputError(f"wise has no such option: {error}") from error
    editor = WiseEditor(model, site, irrelevant=irrelevant, settings=chosen)
    return measured(model, editor, requests, "wise", seed)
