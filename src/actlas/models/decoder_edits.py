"""Which edits the lean decoding loop can carry, and how.

Two kinds go in. `SkipInputs` becomes a threshold for each input of a layer, |x_i| >= t / c_i, which the
native code tests itself. Activation edits at block boundaries (`embed`, `resid_pre`, `resid_post`) are
applied between the blocks, with what they may know about the pass (positions, phase, gates at boundaries).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import ActivationEdit, Edit, Here
from actlas.core.errors import InputError
from actlas.core.installation import Installation
from actlas.core.passes import Generation, Pass
from actlas.core.scope import Scope
from actlas.core.sites import Site
from actlas.core.skip_inputs import SkipInputs

if TYPE_CHECKING:
    from actlas.core.model import Model

LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
_READERS = {"attn_norm": ("q", "k", "v"), "attn.z": ("o",), "mlp_norm": ("gate", "up"), "mlp.act": ("down",)}
_MODULES = {f"{n}_proj": n for n in LAYERS}
_BOUNDARIES = ("embed", "resid_pre", "resid_post")


@dataclass
class Step:
    """One edit at one boundary.

    Attributes:
        boundary: blocks that have run before it.
        edit, site, ids, key: what `ActivationEdit.apply` needs.
    """

    boundary: int
    edit: ActivationEdit
    site: Site
    ids: tuple[int, ...] | None
    key: object


@dataclass
class Plan:
    """What the loop does for a set of edits.

    Attributes:
        thresholds: by block and layer name, float32 `[columns]`.
        skip_prompt: whether inputs are skipped in the prompt too.
        steps: edits at boundaries, in order.
        gates: reads for gates: (boundary, key).
    """

    thresholds: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    skip_prompt: bool = True
    steps: list[Step] = field(default_factory=list)
    gates: list[tuple[int, object]] = field(default_factory=list)

    def boundaries(self, n_blocks: int) -> list[int]:
        """Return where the blocks must be interrupted, 0 to n_blocks, ending with n_blocks."""
        stops = {s.boundary for s in self.steps} | {b for b, _ in self.gates} | {n_blocks}
        return sorted(stops)

    def apply(self, x: Tensor, boundary: int, run: Pass, installation: Installation) -> Tensor:
        """Return the stream `[1, tokens, d]` with the edits of a boundary."""
        for at, key in self.gates:
            if at == boundary:
                run.values[key] = x.clone()  # the blocks go on in the same memory
        for step in self.steps:
            if step.boundary == boundary:
                x = step.edit.apply(x, Here(step.site, run, installation), step.ids, step.key)
        return x


def plan(model: Model, edits: Iterable[Edit]) -> Plan:
    """Return what the loop does for these edits.

    Raises:
        InputError: an edit that the loop cannot carry, with the reason.
    """
    found = Plan()
    phases: set[str | None] = set()
    roots = tuple(edits)
    installation = Installation(model, roots)
    for edit in installation.edits:
        if isinstance(edit, SkipInputs):
            if edit.strength == 0:
                continue
            phases.add(edit.scope.phase)
            _skip(model, edit, found)
        elif isinstance(edit, ActivationEdit):
            installation._check(edit)
            if edit.strength != 0:
                _boundary(model, edit, installation, found)
        else:
            raise _refusal(edit, "it swaps a module")
    if len(phases) > 1:
        raise InputError(
            "some layers skip inputs everywhere and others in one phase only; give all the same phase"
        )
    found.skip_prompt = phases != {"generated"}
    return found


def new_generation(prompt: int) -> Generation:
    """Return the state of a generation of one sequence whose prompt has `prompt` tokens."""
    return Generation(1, torch.ones(1, prompt, dtype=torch.bool))


def new_pass(ids: list[int], past: int, state: Generation) -> Pass:
    """Return the pass of some tokens of one sequence."""
    return Pass(1, len(ids), torch.tensor([ids]), None, past, None, state)


def _skip(model: Model, edit: SkipInputs, found: Plan) -> None:
    if edit.keep is not None or edit.activation:
        raise _refusal(edit, "it chooses the top of each token, or by another value; the loop has thresholds")
    if (
        edit.condition is not None
        or edit.scope not in (Scope(), Scope(phase="generated"))
        or edit.strength != 1
    ):
        raise _refusal(edit, "skipping is for all tokens, or for all generated ones, and whole")
    for site in model.resolve(edit.site):
        for block, layer, columns in _targets(model, site, edit):
            key = (block, layer)
            given = _threshold(edit, columns)
            before = found.thresholds.get(key)
            found.thresholds[key] = given if before is None else torch.maximum(before, given)


def _targets(model: Model, site: Site, edit: Edit) -> list[tuple[int, str, int]]:
    tower = model.tower
    assert tower is not None
    width = {"o": tower.heads * tower.head_dim, "down": tower.d_mlp}
    if site.kind in _READERS and site.block is not None and site.selector is None:
        return [(site.block, n, width.get(n) or tower.d_model) for n in _READERS[site.kind]]
    parts = site.name.removeprefix("module:").split(".")
    prefix = f"module:{tower.blocks}."
    if site.name.startswith(prefix) and parts[-1] == "input" and parts[-2] in _MODULES:
        block = site.name.removeprefix(prefix).split(".")[0]
        if block.isdigit():
            layer = _MODULES[parts[-2]]
            return [(int(block), layer, width.get(layer) or tower.d_model)]
    raise _refusal(edit, f"{site.name} is not the input of a linear layer that the loop runs")


def _threshold(edit: SkipInputs, columns: int) -> Tensor:
    if edit.frozen is not None:
        kept = edit.frozen.flatten().expand(columns)
        return torch.where(kept, 0.0, torch.inf).float().contiguous()
    threshold = torch.as_tensor(edit.threshold, dtype=torch.float32).flatten().expand(columns)
    factor = torch.as_tensor(edit.factor, dtype=torch.float32).flatten().expand(columns)
    never = torch.where(threshold > 0, torch.inf, 0.0)
    return torch.where(factor > 0, threshold / factor.clamp_min(1e-30), never).contiguous()


def _boundary(model: Model, edit: ActivationEdit, installation: Installation, found: Plan) -> None:
    key = object()
    if edit.condition is not None:
        reader = model.resolve(edit.condition.lens.site)[0]
        found.gates.append((_place(reader, edit, "its gate reads"), key))
    for site in model.resolve(edit.site):
        place = _place(site, edit, "it edits")
        found.steps.append(Step(place, edit, site, installation._token_ids(edit), key))


def _place(site: Site, edit: Edit, what: str) -> int:
    if site.kind not in _BOUNDARIES or site.selector is not None:
        raise _refusal(edit, f"{what} {site.name}, which is not between two blocks")
    return 0 if site.block is None else site.block + (site.kind == "resid_post")


def _refusal(edit: Any, why: str) -> InputError:
    return InputError(
        f"the lean loop cannot carry {edit.describe()}: {why}; use model.edit and model.generate"
    )
