"""Run every block again outside the hooked model, and look at what was added to it.

One pass of the model as it is records what enters and leaves every part of the chain

    embeddings -> block 0 -> ... -> block L-1 -> final norm -> output head

Then each part runs again on the recorded input, stripped of hooks and swapped methods. For real tokens t

    delta_t = (what left the part, or entered the next) - (what the bare part makes of the same input)

is 0 for an honest model. If not, one number says whether it is a steering vector:

    constant share = |mean_t delta_t|^2 / mean_t |delta_t|^2          1: the same vector at every token

The vector found is returned, so its direction can be compared with known ones, and subtracted.
Weights that were changed look honest here: `fingerprint` is for those. An attack that waits for a trigger
(a token, a generated position) is seen only by texts that contain it.

Source: the countermeasure "model checker" of Wang and Shu 2023, "Backdoor Activation Attack"; the test for
a constant vector is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_internals

from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find, join, plain_module
from actlas.core.model import _takes_cache
from actlas.security.inventory import GLOBAL_HOOKS, Finding, shadowing

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

TOLERANCE = 1e-5  # of a token's norm: below it a difference is rounding
CONSTANT = 0.999  # constant share from which a difference counts as one vector
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Change:
    """What was added after one part of a model.

    Attributes:
        site: where, as a canonical site where there is one.
        vector: mean difference over the tokens that changed, float32 `[d]`.
        constant: constant share among the tokens that changed.
        share: how many of the tokens changed.
        relative: root mean square of the differences, in units of the clean tokens' median norm.
        aligned: share of the difference that lies along the activation itself (a rescaling).
    """

    site: str
    vector: Tensor
    constant: float
    share: float
    relative: float
    aligned: float

    @property
    def is_vector(self) -> bool:
        """Whether one constant vector was added."""
        return self.constant >= CONSTANT

    def undo(self) -> Edit:
        """Return the edit that subtracts the vector at the site.

        Raises:
            InputError: the change is not one vector at every token.
        """
        if not self.is_vector or self.share < 1:
            raise InputError(
                f"the change at {self.site} is not one vector at every token; it cannot be subtracted"
            )
        return Add(self.site, -self.vector)

    def finding(self) -> Finding:
        """Return it in words."""
        tokens = "every token" if self.share == 1 else f"{self.share:.0%} of the tokens"
        if self.is_vector:
            said = f"the same vector is added at {tokens}, {self.relative:.2g} of the median norm"
        elif self.aligned >= CONSTANT:
            said = f"{tokens} rescaled, by {self.relative:.2g} of the median norm"
        else:
            said = f"{tokens} changed by {self.relative:.2g} of the median norm, not by one vector"
        details = {
            "constant share": self.constant,
            "changed share": self.share,
            "relative size": self.relative,
            "aligned share": self.aligned,
            "norm": float(self.vector.norm()),
        }
        return Finding("added vector" if self.is_vector else "change", self.site, said, details)


@dataclass
class _Part:
    """One part of the chain: where it is, what it was called with, what left it and entered the next."""

    path: str
    site: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    left: Tensor | None = None


def reexecute(model: Model, inputs: Any) -> list[Change]:
    """Return what was added after each part of the model; empty for an honest one.

    Args:
        model: any model with a layout; edits and hooks are left as they are.
        inputs: anything `encode` takes.

    Raises:
        ModelError: the model has no layout, so that its parts are not known.
    """
    if model.layout is None:
        raise ModelError(f"{model.name} has no layout, so its blocks cannot be run again one by one")
    encoded = model.encode(inputs)
    mask = encoded.get("attention_mask")
    found: list[Change] = []
    for tower in model.layout.towers:
        parts = _parts(model, tower)
        _record(model, encoded, parts)
        bare = [_Part(p.path, p.site, p.module) for p in parts]
        with stripped(model):
            _record(model, encoded, bare)
            clean = [_run(p) for p in parts]
        rows = mask if tower is model.layout.towers[-1] or len(model.layout.towers) == 1 else None
        prefix = f"{tower.name}." if tower.name else ""
        entered = (_entering(parts[0]), _entering(bare[0])) if parts else (None, None)
        found += _compare(f"{prefix}embed", *entered, rows)
        for i, part in enumerate(parts):
            if part.left is None:
                continue
            found += _compare(part.site, part.left, clean[i], rows)
            following = parts[i + 1] if i + 1 < len(parts) else None
            honest = bare[i].left
            if following is None or honest is None:
                continue
            now, plain = _entering(following), _entering(bare[i + 1])
            if now is None or plain is None or now.shape != part.left.shape or not torch.equal(plain, honest):
                continue  # honest code changes the stream between these parts
            found += _compare(part.site, now, part.left, rows)
    return found


@contextmanager
def stripped(model: Model) -> Iterator[None]:
    """Take all hooks and swapped methods off a model for the length of a `with` block."""
    saved: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = []
    with ExitStack() as stack:
        for child in plain_module(model.module).modules():
            held = {n: child.__dict__[n] for n in _HOOKS if child.__dict__.get(n)}
            swapped = shadowing(child)
            if held or swapped:
                saved.append((child.__dict__, {**held, **swapped}, list(swapped)))
            for name in held:
                child.__dict__[name] = type(held[name])()
            for name in swapped:
                del child.__dict__[name]
        for name in GLOBAL_HOOKS:
            hooks = getattr(module_internals, name)
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        try:
            yield
        finally:
            for target, values, _ in saved:
                target.update(values)


def _parts(model: Model, tower: Any) -> list[_Part]:
    prefix = f"{tower.name}." if tower.name else ""
    paths = [(join(tower.blocks, str(i)), f"{prefix}blocks.{i}.resid_post") for i in range(tower.n_blocks)]
    if tower.norm:
        paths.append((tower.norm, f"{prefix}final_norm"))
    if tower.unembed:
        paths.append((tower.unembed, "logits"))
    found = []
    for path, site in paths:
        module = find(model.module, path)
        if module is not None:
            found.append(_Part(path, site, module))
    return found


def _record(model: Model, encoded: dict[str, Any], parts: Sequence[_Part]) -> None:
    """Run the model as it is; hooks of ours come after all others, so they see what goes on."""
    with ExitStack() as stack:
        for part in parts:

            def entering(m: nn.Module, args: Any, kwargs: Any, part: _Part = part) -> None:
                part.args, part.kwargs = args, dict(kwargs)

            def leaving(m: nn.Module, args: Any, output: Any, part: _Part = part) -> None:
                part.left = _tensor(output)

            stack.callback(part.module.register_forward_pre_hook(entering, with_kwargs=True).remove)
            stack.callback(part.module.register_forward_hook(leaving).remove)
        stack.enter_context(torch.no_grad())
        options = {"use_cache": False} if _takes_cache(model.module) and "use_cache" not in encoded else {}
        model._call(encoded, **options)


def _run(part: _Part) -> Tensor | None:
    if part.left is None:
        return None
    with torch.no_grad():
        return _tensor(part.module(*part.args, **part.kwargs))


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def _entering(part: _Part) -> Tensor | None:
    if part.args and isinstance(part.args[0], Tensor):
        return part.args[0]
    return next((v for v in part.kwargs.values() if isinstance(v, Tensor)), None)


def _compare(site: str, now: Tensor | None, clean: Tensor | None, mask: Any) -> list[Change]:
    """Return the change between two values of a stream `[batch, pos, d]`, if there is one."""
    if now is None or clean is None or now.shape != clean.shape or now.ndim < 2:
        return []
    if isinstance(mask, Tensor) and mask.shape == now.shape[:2]:
        now, clean = now[mask.bool()], clean[mask.bool()]
    now, clean = now.reshape(-1, now.shape[-1]).double(), clean.reshape(-1, clean.shape[-1]).double()
    delta = now - clean
    size, norm = delta.norm(dim=1), clean.norm(dim=1)
    changed = ~(size <= TOLERANCE * norm)  # NaN counts as changed
    if not bool(changed.any()):
        return []
    rows, base = delta[changed], clean[changed]
    energy = rows.square().sum(1).mean().clamp_min(1e-300)
    mean = rows.mean(0)
    along = (rows * base).sum(1) / base.norm(dim=1).clamp_min(1e-300)
    return [
        Change(
            site,
            mean.float(),
            float(mean.square().sum() / energy),
            float(changed.double().mean()),
            float(energy.sqrt() / norm.median().clamp_min(1e-300)),
            float(along.square().mean() / energy),
        )
    ]
