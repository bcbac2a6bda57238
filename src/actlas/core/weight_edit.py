"""WeightEdit: a change of parameters that is put in, taken out, scaled and saved like any other edit.

    W <- W + strength * delta                 for every named parameter

    edit = WeightEdit({"model.layers.25.mlp.down_proj.weight": delta})
    with model.edit(edit * 0.5): ...          # afterwards every weight has its old bits again

Fine-tunes (as the difference from where they began, a task vector: Ilharco et al. 2023), rank-one edits and
merges are all this. `WeightEdit.between(base, tuned)` takes the difference of two models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit, check_tensor, register_edit, replace_edit
from actlas.core.errors import InputError, ShapeError, did_you_mean
from actlas.core.layout import plain_module
from actlas.core.scope import Phase

if TYPE_CHECKING:
    from actlas.core.installation import Installation
    from actlas.core.lens import Lens
    from actlas.core.model import Model


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class WeightEdit(Edit):
    """Add to parameters.

    Attributes:
        deltas: by parameter name, what is added at strength 1; of the parameter's shape.
        strength: 0 changes nothing, -1 is the opposite change.
        note: what made it, for people.
    """

    deltas: Mapping[str, Tensor]
    strength: float = field(default=1.0, kw_only=True)
    note: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not self.deltas:
            raise InputError("a weight edit needs at least one parameter to change; there is none")
        for name, delta in self.deltas.items():
            check_tensor(delta, f"the change of {name}")

    @classmethod
    def between(cls, base: Model, tuned: Model, *, note: str = "") -> WeightEdit:
        """Return the edit that turns `base` into `tuned` (a task vector); equal parameters are left out.

        Raises:
            InputError: the models have other parameters or shapes (named), or do not differ at all.
        """
        old, new = (dict(plain_module(m.module).named_parameters()) for m in (base, tuned))
        check_alike(old, new, base.name, tuned.name)
        with torch.no_grad():
            deltas = {n: new[n].float().to(p.device) - p.float() for n, p in old.items()}
        changed = {n: d for n, d in deltas.items() if bool(d.any())}
        if not changed:
            raise InputError(f"{tuned.name} has the same weights as {base.name}; there is no difference")
        return cls(changed, note=note or f"{tuned.name} - {base.name}")

    @property
    def norm(self) -> float:
        """Length of the whole change at its strength."""
        total = sum(float(d.double().square().sum()) for d in self.deltas.values())
        return float(abs(self.strength) * total**0.5)

    def __mul__(self, factor: float) -> Edit:
        return replace_edit(self, strength=self.strength * float(factor))

    def at(
        self,
        *,
        tokens: int | str | Sequence[int | str] | None = None,
        positions: int | range | slice | Sequence[int] | Literal["last"] | None = None,
        phase: Phase | None = None,
        rows: int | Sequence[int] | None = None,
    ) -> Edit:
        raise InputError(f"{self.describe()}: weights are the same for every token; use an activation edit")

    def when(self, lens: Lens, threshold: float = 0.0, **options: Any) -> Edit:
        raise InputError(f"{self.describe()}: a weight edit has no condition; use an activation edit")

    def describe(self) -> str:
        first = next(iter(self.deltas))
        where = first if len(self.deltas) == 1 else f"{first} and {len(self.deltas) - 1} more"
        said = f"WeightEdit of {where}"
        said += f" x {self.strength:g}" if self.strength != 1.0 else ""
        return f"{said} ({self.note})" if self.note else said

    def _attach(self, installation: Installation) -> None:
        if self.strength == 0.0:
            return
        for name, parameter in self._parameters(installation.model).items():
            installation.keep(_Restore(parameter))
            with torch.no_grad():
                parameter.copy_(self._changed(name, parameter))

    def bake(self, model: Model) -> Model:
        """Add the change to the model's weights for good, and return the model.

        Raises:
            InputError: a parameter that the model has not got. ShapeError: another shape.
        """
        if self.fingerprint is not None:
            self.fingerprint.check(model.fingerprint, self.describe())
        parameters = self._parameters(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self._changed(name, parameter))
        return model

    def _changed(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return `W + s * delta`, added in float32 or better and rounded once."""
        wide = torch.promote_types(parameter.dtype, torch.float32)
        delta = self.deltas[name].to(device=parameter.device, dtype=wide)
        return parameter.detach().to(wide) + self.strength * delta

    def _parameters(self, model: Model) -> dict[str, nn.Parameter]:
        root = plain_module(model.module)
        known = dict(root.named_parameters(remove_duplicate=False))
        found: dict[str, nn.Parameter] = {}
        for name, delta in self.deltas.items():
            if name not in known:
                raise InputError(f"{model.name} has no parameter {name!r}{did_you_mean(name, known)}")
            if known[name].shape != delta.shape:
                raise ShapeError(
                    f"the change of {name} has shape {list(delta.shape)}; "
                    f"the parameter is {list(known[name].shape)}"
                )
            found[name] = known[name]
        return found

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"strength": self.strength, "note": self.note}, dict(self.deltas)

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        return cls(dict(tensors), strength=record["strength"], note=record["note"])


class _Restore:
    """Puts a parameter's own bits back."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._before = parameter, parameter.detach().clone()

    def remove(self) -> None:
        with torch.no_grad():
            self._parameter.copy_(self._before)


def check_alike(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], old_name: str = "one", new_name: str = "the other"
) -> None:
    """Raise unless two sets of weights have the same names and shapes.

    Raises:
        InputError: names that only one of them has. ShapeError: a tensor of another shape.
    """
    if only := sorted(set(old) ^ set(new)):
        has = old_name if only[0] in old else new_name
        raise InputError(
            f"{old_name} and {new_name} differ in {len(only)} parameters, e.g. only {has} has {only[0]!r}"
        )
    for name, tensor in old.items():
        if tensor.shape != new[name].shape:
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)} in {old_name} and "
                f"{list(new[name].shape)} in {new_name}"
            )
