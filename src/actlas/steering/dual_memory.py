"""A second memory beside an MLP's output matrix, and the router that decides who answers.

The output matrix W of one MLP (`mlp.act` -> `mlp.out`) stays as it is. Beside it lie m side memories
W'_i = W + D_i with thresholds eps_i. For a row (a prompt) with MLP activations a_t, f the model's
activation function and y = W a + b:

    D_i(x) = mean_t || f(y_t) - f(y_t + D_i a_t) ||_2         over the real tokens of the prompt
    the memory with the largest D_i(x) above its own eps_i answers; if there is none, W does

A row is judged by itself, and padding does not count. While generating, the prompt is judged once and its
memory is held for every token that follows. A row that keeps W is untouched, bit for bit.

Source: Wang et al. 2024, "WISE", section 2.3. The released code judges a whole batch at once, and takes the
maximum over tokens instead of the mean for prompts of more than 100 tokens (`long_max=100`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.activation_function import activation_function
from actlas.core.edit import ActivationEdit, Edit, Here, check_tensor, register_edit
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.hooks import attach
from actlas.core.layout import find, join, weight_matrix

if TYPE_CHECKING:
    from actlas.core.installation import Installation
    from actlas.core.lens import Lens
    from actlas.core.model import Model
    from actlas.core.passes import Pass
    from actlas.core.sites import Site

MAIN = -1  # the number of the memory that is W itself


def output_matrix(model: Model, block: int) -> str:
    """Return the path of the linear map from `mlp.act` to `mlp.out` in a block.

    Raises:
        ModelError: the model has no layout, no such block, or no dense MLP there.
    """
    tower, root = model.tower, model.block(block)
    path = tower.down_proj if tower is not None else ""
    if tower is None or not path or find(root, path) is None:
        raise ModelError(f"block {block} of {model.name} has no dense MLP with one output matrix")
    return join(tower.blocks, str(block % tower.n_blocks), path)


def reaction(main: Tensor, side: Tensor, activation: str) -> Tensor:
    """Return `|| f(main) - f(side) ||` of each token, `[...]` of `[..., d]`, in float32."""
    f = activation_function(activation)
    return (f(main.float()) - f(side.float())).norm(dim=-1)


def over_tokens(reactions: Tensor, real: Tensor, long_max: int | None = None) -> Tensor:
    """Return one reaction for each row: the mean over its real tokens, or the maximum for long rows.

    Args:
        reactions: `[rows, tokens]`.
        real: bool `[rows, tokens]`, False at padding.
        long_max: rows with more tokens than this take the maximum; `None`: never.
    """
    count = real.sum(1)
    mean = (reactions * real).sum(1) / count.clamp_min(1)
    if long_max is None:
        return mean
    return torch.where(count > long_max, reactions.masked_fill(~real, 0.0).amax(1), mean)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class DualMemory(ActivationEdit):
    """Side memories beside the output matrix of one MLP; see the module docstring.

    Attributes:
        site: output of the matrix, `"module:<path>"`.
        reads: its input, e.g. `"blocks.25.mlp.act"`.
        deltas: `[memories, out, in]`, what each side memory adds to W.
        thresholds: `[memories]`, above which it answers.
        activation: transformers name of f.
        route: `False` lets the (only) memory answer everything, a control without the router.
        long_max: see `over_tokens`.
        strength: the side memory that answers is W + strength * D; the router looks at D itself.
    """

    reads: str
    deltas: Tensor
    thresholds: Tensor
    activation: str = ""
    route: bool = field(default=True, kw_only=True)
    long_max: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.deltas.ndim != 3 or self.thresholds.shape != self.deltas.shape[:1] or not len(self.deltas):
            raise ShapeError(
                f"deltas are [memories, out, in] and thresholds [memories], "
                f"not {list(self.deltas.shape)} and {list(self.thresholds.shape)}"
            )
        if not self.route and len(self.deltas) != 1:
            raise InputError(f"without a router there can be one memory, not {len(self.deltas)}")
        check_tensor(self.deltas, "DualMemory.deltas")
        check_tensor(self.thresholds, "DualMemory.thresholds")

    def when(self, lens: Lens, threshold: float = 0.0, **options: Any) -> Edit:
        raise InputError(f"{self.describe()} has a router of its own; it takes no condition")

    def describe(self) -> str:
        n = len(self.deltas)
        said = f"DualMemory at {self.reads} ({n} side {'memory' if n == 1 else 'memories'}"
        said += ")" if self.route else ", no router)"
        said += f" x {self.strength:g}" if self.strength != 1.0 else ""
        limits = self.scope.describe()
        return f"{said} ({limits})" if limits else said

    def check(self, site: Site) -> None:
        activation_function(self.activation)

    def _attach(self, installation: Installation) -> None:
        if self.strength == 0.0:
            return
        model = installation.model
        target, source = model.resolve(self.site)[0], model.resolve(self.reads)[0]
        linear = find(model.module, target.module)
        shape = tuple(weight_matrix(linear).shape) if linear is not None else ()
        if shape != tuple(self.deltas.shape[1:]):
            raise ShapeError(
                f"DualMemory.deltas are {list(self.deltas.shape)}; {target.module} is {list(shape)}"
            )
        ids = installation._token_ids(self)
        batch = lambda: installation.watcher.of(target).batch  # noqa: E731

        def read(a: Tensor) -> Tensor:
            installation.watcher.of(target).values[self] = a
            return a

        def write(y: Tensor) -> Tensor:
            return self.apply(y, Here(target, installation.watcher.of(target), installation), ids, self)

        installation.keep(attach(model.module, source, read, batch=batch))
        installation.keep(attach(model.module, target, write, batch=batch))

    def value(self, x: Tensor, here: Here) -> Tensor:
        a = here.run.values[self]
        chosen = self.choose(a, x, here.run)
        new = x
        for memory in chosen[chosen != MAIN].unique().tolist():
            delta = self.deltas[memory].to(x)
            rows = (chosen == memory).view(-1, *[1] * (x.ndim - 1))
            new = torch.where(rows, x + a @ delta.T, new)
        return new

    def change(self, x: Tensor, here: Here) -> Tensor:
        new = self.value(x, here)
        return new if new is x or self.strength == 1.0 else x + self.strength * (new - x)

    def choose(self, a: Tensor, y: Tensor, run: Pass) -> Tensor:
        """Return the memory that answers each row, int64 `[rows]`; `MAIN` for W.

        Raises:
            InputError: the pass starts from a cache and nothing has seen the prompt.
        """
        if not self.route:
            return torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
        state = run.generation
        if state is not None and self in state.memory:
            return state.memory[self].to(y.device).repeat_interleave(run.repeats, dim=0)
        if run.past:
            raise InputError(
                f"{self.describe()} must see the prompt; start from the prompt, not from a cache"
            )
        real = run.prompt_mask(y.device)
        n = real.shape[1] if run.length is not None else y.shape[1]
        found = self.reactions(a[:, :n], y[:, :n], real if run.length is not None else None)
        above = found.where(found > self.thresholds.to(found), torch.full_like(found, -torch.inf))
        best, memory = above.max(1)
        chosen = torch.where(best.isfinite(), memory, torch.full_like(memory, MAIN))
        if state is not None:
            state.memory[self] = chosen[:: run.repeats]
        return chosen

    def reactions(self, a: Tensor, y: Tensor, real: Tensor | None = None) -> Tensor:
        """Return `D_i(x)` of each row and memory, float32 `[rows, memories]`.

        Args:
            a: input of the matrix, `[rows, tokens, in]`.
            y: its output, `[rows, tokens, out]`.
            real: bool `[rows, tokens]`; `None`: every token counts.
        """
        with torch.no_grad():
            if real is None:
                real = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
            each = [
                over_tokens(reaction(y, y + a @ d.to(a).T, self.activation), real, self.long_max)
                for d in self.deltas
            ]
        return torch.stack(each, 1)

    def routes(self, model: Model, prompts: list[str]) -> Tensor:
        """Return the reactions of prompts, `[prompts, memories]`; above `thresholds` a memory answers."""
        path = self.site.removeprefix("module:")
        with model.without_edits():
            trace = model.trace(prompts, [self.reads, f"module:{path}"])
        return self.reactions(trace[self.reads], trace[f"module:{path}"], trace.mask)
