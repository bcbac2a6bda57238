"""Edits: changes to what a model computes, as small values that add, scale, save and uninstall.

    happy = Add("blocks.15.resid_post", vector) * 4
    quiet = Zero("blocks.3.attn.z[head=5]").at(phase="generated")
    with model.edit(happy + quiet):
        model.generate("I think that you are")

This file says what an Edit is: composition, strength, scope (`at`), condition (`when`), saving. The
kinds themselves are in `edits.py`, installation in `installation.py`.

With strength s and full-strength value f(x), an activation edit computes x + s (f(x) - x), and exactly
f(x) at s = 1; outside its scope, and where its gate is closed, x is untouched bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import ArtifactError, InputError, NonFiniteError, ShapeError
from actlas.core.fingerprint import Fingerprint
from actlas.core.layout import ATTENTION_KINDS
from actlas.core.measurement import Measurement
from actlas.core.scope import Condition, Phase, Scope, as_positions

if TYPE_CHECKING:
    from actlas.core.installation import Installation
    from actlas.core.lens import Lens
    from actlas.core.model import Model
    from actlas.core.passes import Pass
    from actlas.core.sites import Site


class Edit:
    """A change to what a model computes. See `actlas.core.edits` for the kinds."""

    #: The model it was made for, if known; checked when it is installed.
    fingerprint: Fingerprint | None = None
    #: What was measured when it was fitted (effect, price, controls); saved with it. An edit that is
    #: scaled, limited or combined is another edit and carries none.
    measurements: tuple[Measurement, ...] = ()

    def parts(self) -> tuple[Edit, ...]:
        """Return the edits this one is composed of, in order; a simple edit is its own only part."""
        return (self,)

    def __add__(self, other: Edit) -> Edit:
        if not isinstance(other, Edit):
            return NotImplemented
        return Composition(self.parts() + other.parts())

    def __mul__(self, factor: float) -> Edit:
        raise NotImplementedError

    def __rmul__(self, factor: float) -> Edit:
        return self * factor

    def __neg__(self) -> Edit:
        return self * -1.0

    def at(
        self,
        *,
        tokens: int | str | Sequence[int | str] | None = None,
        positions: int | range | slice | Sequence[int] | Literal["last"] | None = None,
        phase: Phase | None = None,
        rows: int | Sequence[int] | None = None,
    ) -> Edit:
        """Return the same edit limited to some tokens, positions, a phase or some rows; see `Scope`."""
        raise NotImplementedError

    def when(self, lens: Lens, threshold: float = 0.0, **options: Any) -> Edit:
        """Return the same edit behind a gate that `lens` opens; see `Condition` for the options."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return one line that a person can read."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{self.describe()}>"

    def _attach(self, installation: Installation) -> None:
        """Place this edit's hooks or modules through the installation. Called for each part."""
        raise NotImplementedError

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return JSON-able fields and tensors from which `_rebuild` makes the same edit."""
        raise NotImplementedError

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        raise NotImplementedError

    def bake(self, model: Model) -> Model:
        """Fold the edit into the model's weights, where that is exact; see `actlas.core.baking`."""
        from actlas.core.baking import bake

        return bake(self, model)

    def save(self, path: str | Path, model: Model | None = None) -> Path:
        """Save as a folder of JSON and safetensors.

        Args:
            path: the folder.
            model: the model it is for; needed unless the edit was fitted on or loaded for one.

        Raises:
            InputError: no model is known, or an edit holds something that is not data.
            FailureError: it could not be written.
        """
        fingerprint = model.fingerprint if model is not None else self.fingerprint
        if fingerprint is None:
            raise InputError("an edit is saved for a model; give it: edit.save(path, model=model)")
        records: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for i, part in enumerate(self.parts()):
            record, held = part._record()
            records.append({"type": type(part).__name__, **record})
            tensors |= {f"{i}.{name}": t for name, t in held.items()}
        manifest: dict[str, Any] = {
            "edits": records,
            "fingerprint": fingerprint.to_json(),
            "about": self.describe(),
        }
        if self.measurements:
            manifest["measurements"] = [m.to_json() for m in self.measurements]
        return save_artifact(path, "edit", manifest, tensors)

    @staticmethod
    def load(path: str | Path, model: Model | None = None, *, force: bool = False) -> Edit:
        """Load a saved edit.

        Args:
            path: the folder.
            model: checked at once against the fingerprint; without it the check waits until the edit
                is installed.
            force: accept another model than the one the edit was made for.

        Raises:
            ArtifactError: not a whole, untampered edit.
            FingerprintError: it was made for another model.
        """
        manifest, tensors = load_artifact(path, "edit")
        fingerprint = Fingerprint.from_json(manifest.get("fingerprint"), path)
        if model is not None and not force:
            fingerprint.check(model.fingerprint, str(path))
        parts = []
        records = manifest.get("edits")
        if not isinstance(records, list) or not records:
            raise ArtifactError(f"{path} holds no edits; save it again")
        for i, record in enumerate(records):
            cls = _edit_type(str(record.get("type", "")))
            if cls is None:
                raise ArtifactError(
                    f"{path} holds an edit of unknown type {record.get('type')!r}; upgrade Actlas"
                )
            held = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.split(".", 1)[0] == str(i)}
            try:
                parts.append(cls._rebuild(record, held))
            except (KeyError, TypeError, ValueError) as error:
                raise ArtifactError(
                    f"{path} holds an incomplete {record['type']} ({error}); save it again"
                ) from error
        edit = parts[0] if len(parts) == 1 else Composition(tuple(parts))
        try:
            found = tuple(Measurement.from_json(m) for m in manifest.get("measurements", ()))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} holds unreadable measurements ({error}); save it again") from error
        edit = edit.with_measurements(found) if found else edit
        return edit if force else edit.bind(fingerprint)

    def with_measurements(self, measurements: Iterable[Measurement]) -> Edit:
        """Return the same edit with what was measured about it."""
        import copy

        made = copy.copy(self)
        object.__setattr__(made, "measurements", tuple(measurements))
        return made

    def bind(self, fingerprint: Fingerprint) -> Edit:
        """Return the same edit, marked as made for a model; installing it elsewhere is refused."""
        import copy

        bound = copy.copy(self)
        object.__setattr__(bound, "fingerprint", fingerprint)
        return bound


class WholeEdit(Edit):
    """An edit that is in or out: it has no strength, scope or condition. `whole` says why."""

    whole: ClassVar[str] = "it is in or out"

    def __mul__(self, factor: float) -> Edit:
        if factor == 1.0:
            return self
        raise InputError(f"{self.describe()}: {self.whole}; it has no strength ({factor:g})")

    def at(
        self,
        *,
        tokens: int | str | Sequence[int | str] | None = None,
        positions: int | range | slice | Sequence[int] | Literal["last"] | None = None,
        phase: Phase | None = None,
        rows: int | Sequence[int] | None = None,
    ) -> Edit:
        raise InputError(f"{self.describe()}: {self.whole}; it has no scope (use an activation edit)")

    def when(self, lens: Lens, threshold: float = 0.0, **options: Any) -> Edit:
        raise InputError(f"{self.describe()}: {self.whole}; it has no condition (use an activation edit)")


EDIT_TYPES: dict[str, type[Edit]] = {}


def _edit_type(name: str) -> type[Edit] | None:
    """Return a kind of edit by name, looking in the rooms of this installation when it is new."""
    if name not in EDIT_TYPES:
        from actlas.core.methods import import_rooms

        import_rooms()
    return EDIT_TYPES.get(name)


def register_edit(cls: type[Edit]) -> type[Edit]:
    """Make a kind of edit loadable by its class name."""
    EDIT_TYPES[cls.__name__] = cls
    return cls


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Edit):
    """Several edits that apply in order; `at`, `when` and strength go to each of them."""

    edits: tuple[Edit, ...] = ()

    def parts(self) -> tuple[Edit, ...]:
        return tuple(p for e in self.edits for p in e.parts())

    def __mul__(self, factor: float) -> Edit:
        return self._each(lambda e: e * factor)

    def at(self, **scope: Any) -> Edit:
        return self._each(lambda e: e.at(**scope))

    def when(self, lens: Lens, threshold: float = 0.0, **options: Any) -> Edit:
        return self._each(lambda e: e.when(lens, threshold, **options))

    def describe(self) -> str:
        return " + ".join(p.describe() for p in self.parts())

    def _each(self, change: Any) -> Edit:
        changed = Composition(tuple(change(e) for e in self.parts()))
        return changed if self.fingerprint is None else changed.bind(self.fingerprint)


@dataclass(frozen=True)
class Here:
    """Where and in which pass an activation edit is being applied."""

    site: Site
    run: Pass
    installation: Installation


@dataclass(frozen=True, eq=False, repr=False)
class ActivationEdit(Edit):
    """A function of the activation at a site. Subclasses define `value`.

    Attributes:
        site: name or pattern; the edit applies at every site that it names.
        strength: 0 changes nothing, 1 is the full edit; other values interpolate or extrapolate.
        scope: limits in tokens, positions, phase and rows.
        condition: a gate.
    """

    site: str
    strength: float = field(default=1.0, kw_only=True)
    scope: Scope = field(default=Scope(), kw_only=True)
    condition: Condition | None = field(default=None, kw_only=True)

    #: Fields that must broadcast against the site's feature axes, checked when it is installed.
    feature_fields: ClassVar[tuple[str, ...]] = ()
    #: Whether the whole activation is replaced, whatever it was.
    overwrites: ClassVar[bool] = False

    def value(self, x: Tensor, here: Here) -> Tensor:
        """Return the activation under the full edit, of the same shape as `x`."""
        raise NotImplementedError

    def change(self, x: Tensor, here: Here) -> Tensor:
        """Return the activation under the edit at its strength."""
        new = self.value(x, here)
        return new if self.strength == 1.0 else x + self.strength * (new - x)

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
        given: dict[str, Any] = {}
        if tokens is not None:
            given["tokens"] = (tokens,) if isinstance(tokens, (int, str)) else tuple(tokens)
        if positions is not None:
            given["positions"] = as_positions(positions)
        if phase is not None:
            given["phase"] = phase
        if rows is not None:
            given["rows"] = (rows,) if isinstance(rows, int) else tuple(rows)
        return replace_edit(self, scope=replace(self.scope, **given))

    def when(self, lens: Lens, threshold: float = 0.0, **options: Any) -> Edit:
        if self.condition is not None:
            raise InputError("this edit has a condition already; compose lenses instead of conditions")
        return replace_edit(self, condition=Condition(lens, threshold, **options))

    def describe(self) -> str:
        said = f"{type(self).__name__} at {self.site}"
        if self.strength != 1.0:
            said += f" x {self.strength:g}"
        if limits := self.scope.describe():
            said += f" ({limits})"
        if self.condition is not None:
            said += f" {self.condition.describe()}"
        return said

    def check(self, site: Site) -> None:
        """Raise if this edit cannot apply at `site`: wrong sizes, dtypes or values."""
        for name in self.feature_fields:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                check_tensor(value, f"{type(self).__name__}.{name}")
                check_features(value, site, f"{type(self).__name__}.{name}")

    def apply(self, x: Tensor, here: Here, ids: tuple[int, ...] | None, key: Any) -> Tensor:
        """Return `x` edited within scope and gate; `x` itself where nothing applies."""
        weight = self.scope.mask(here.run, ids, x.device)
        if self.condition is not None:
            activation = here.run.values.get(key)
            if activation is None:
                raise InputError(
                    f"the gate of {self.describe()} has read nothing; its site comes later in the pass"
                )
            gate = self.condition.weight(activation, here.run, key)
            weight = (
                gate if weight is None else (gate & weight if gate.dtype == torch.bool else gate * weight)
            )
        if weight is None:
            return self.change(x, here)
        if not bool(weight.any()):
            return x
        new = self.change(x, here)
        axis = _token_axis(here.site)
        shape = [weight.shape[0], *([1] * (x.ndim - 1))]
        if weight.shape[1] != 1:
            if x.ndim <= axis or x.shape[axis] != weight.shape[1]:
                raise InputError(
                    f"{self.describe()}: {here.site.name} has no token axis of length {weight.shape[1]}"
                )
            shape[axis] = weight.shape[1]
        weight = weight.reshape(shape)
        if weight.dtype == torch.bool:
            return torch.where(weight, new, x)
        blended = x + weight.to(x.dtype) * (new - x)
        return torch.where(weight == 0, x, torch.where(weight == 1, new, blended))

    def _attach(self, installation: Installation) -> None:
        installation.attach_activation(self)

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "scope":
                record["scope"] = {g.name: getattr(value, g.name) for g in fields(Scope)}
            elif f.name == "condition":
                if value is not None:
                    lens_record, lens_tensors = value.lens._record()
                    options = {g.name: getattr(value, g.name) for g in fields(Condition) if g.name != "lens"}
                    record["condition"] = {
                        "lens": {"type": type(value.lens).__name__, **lens_record},
                        **options,
                    }
                    tensors |= {f"lens.{n}": t for n, t in lens_tensors.items()}
            elif isinstance(value, Tensor):
                tensors[f.name] = value
            else:
                record[f.name] = value
        return record, tensors

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        given: dict[str, Any] = {k: v for k, v in record.items() if k not in ("type", "scope", "condition")}
        given |= {n: t for n, t in tensors.items() if not n.startswith("lens.")}
        scope: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.get("scope", {}).items()
        }
        condition = None
        if record.get("condition"):
            from actlas.core.lens import rebuild_lens

            options = {k: v for k, v in record["condition"].items() if k != "lens"}
            lens_tensors = {n.removeprefix("lens."): t for n, t in tensors.items() if n.startswith("lens.")}
            condition = Condition(rebuild_lens(record["condition"]["lens"], lens_tensors), **options)
        return cls(**given, scope=Scope(**scope), condition=condition)


def replace_edit(edit: Any, **changes: Any) -> Edit:
    """Like `dataclasses.replace`, keeping the fingerprint."""
    new = cast("Edit", replace(edit, **changes))
    return new if edit.fingerprint is None else new.bind(edit.fingerprint)


def check_tensor(value: Tensor, name: str) -> None:
    """Raise unless `value` is a floating-point tensor of finite numbers."""
    if not value.is_floating_point():
        raise ShapeError(f"{name} has dtype {value.dtype}; it must be floating point")
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise NonFiniteError(f"{name} holds {bad} values that are NaN or infinite; all must be finite")


def check_features(value: Tensor, site: Site, name: str) -> None:
    """Raise unless the last axes of `value` broadcast against the site's feature axes."""
    if site.features is None:
        return
    shape = tuple(value.shape)[-len(site.features) :] if value.ndim >= 1 else ()
    for have, want in zip(reversed(shape), reversed(site.features), strict=False):
        if have not in (1, want):
            raise ShapeError(f"{name} has shape {list(value.shape)}, but {site.name} is [{site.shape}]")


def _token_axis(site: Site) -> int:
    if site.kind not in ATTENTION_KINDS:
        return 1
    return 1 if site.selector is not None and site.selector.single else 2


def compose(edits: Iterable[Edit]) -> Edit:
    """Return one edit that applies all of them in order.

    Raises:
        InputError: there is none.
    """
    parts = tuple(p for e in edits for p in e.parts())
    if not parts:
        raise InputError("no edit was given")
    return parts[0] if len(parts) == 1 else Composition(parts)


register_edit(Composition)
