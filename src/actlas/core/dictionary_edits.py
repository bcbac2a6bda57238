"""The two edits that a dictionary makes: change some features, or substitute the reconstruction.

    FeatureEdit            x + sum_j (new z_j - z_j) d_j            the error stays in x
    DictionarySubstitute   decode(z), with the error dropped, kept, or one part of it kept

Rows above the dictionary's `skip_above` (massive activations) pass untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.edit import ActivationEdit, Edit, Here, check_tensor, register_edit
from actlas.core.errors import ArtifactError, ShapeError
from actlas.core.lens import Lens, rebuild_lens
from actlas.core.sites import Site


@dataclass(frozen=True, eq=False, repr=False)
class _ThroughDictionary(ActivationEdit):
    lens: Dictionary

    def rows(self, x: Tensor, codes: Codes) -> Tensor:
        """Return the new activations of rows `[n, d]` that are not massive."""
        raise NotImplementedError

    def value(self, x: Tensor, here: Here) -> Tensor:
        flat = self.lens.flat(x)
        rows = flat.reshape(-1, flat.shape[-1])
        massive = self.lens.massive(rows)
        new = self.rows(rows, self.lens.encode(rows)).to(x.dtype)
        if bool(massive.any()):
            new = torch.where(massive.unsqueeze(-1), rows, new)
        return new.reshape(x.shape)

    def check(self, site: Site) -> None:
        features = site.features
        if features is not None and _product(features) != self.lens.channels:
            raise ShapeError(
                f"{type(self.lens).__name__} reads {self.lens.channels} channels, but {site.name} is "
                f"[{site.shape}]"
            )

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record, tensors = super()._record()
        lens_record, lens_tensors = self.lens._record()
        record["lens"] = {"type": type(self.lens).__name__, **lens_record}
        return record, tensors | {f"own.{n}": t for n, t in lens_tensors.items()}

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        own = {n.removeprefix("own."): t for n, t in tensors.items() if n.startswith("own.")}
        lens: Lens = rebuild_lens(record["lens"], own)
        if not isinstance(lens, Dictionary):
            raise ArtifactError(f"a {cls.__name__} holds a {type(lens).__name__}, which is no dictionary")
        rest = {n: t for n, t in tensors.items() if not n.startswith("own.")}
        return super()._rebuild({**record, "lens": lens}, rest)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class FeatureEdit(_ThroughDictionary):
    """Change the codes of some features and leave everything else in the activation.

    Attributes:
        operations: feature -> `("set", value)`, `("scale", factor)` or `("add", value)`.
    """

    operations: Mapping[int, tuple[str, float]] = field(default_factory=dict)

    def rows(self, x: Tensor, codes: Codes) -> Tensor:
        features = list(self.operations)
        old = torch.stack([codes.of(f) for f in features], dim=-1)
        new = torch.stack([operate(old[:, i], *self.operations[f]) for i, f in enumerate(features)], dim=-1)
        atoms = self.lens.atoms[torch.tensor(features, device=self.lens.atoms.device)]
        return x + ((new - old).to(atoms.dtype) @ atoms).to(x.dtype)

    def describe(self) -> str:
        verbs = {"set": "=", "scale": "*", "add": "+"}
        said = ", ".join(f"{f} {verbs[kind]} {value:g}" for f, (kind, value) in self.operations.items())
        return super().describe().replace("FeatureEdit", f"FeatureEdit({said})", 1)

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record, tensors = super()._record()
        return record | {"operations": {str(f): list(o) for f, o in self.operations.items()}}, tensors

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        operations = {int(f): (str(o[0]), float(o[1])) for f, o in record["operations"].items()}
        return super()._rebuild({**record, "operations": operations}, tensors)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class DictionarySubstitute(_ThroughDictionary):
    """Put the reconstruction in the activation's place; see `Dictionary.substitute`."""

    error: str = "drop"
    error_map: Tensor | None = None
    only: tuple[int, ...] | None = None
    without: tuple[int, ...] = ()
    feature_fields: ClassVar[tuple[str, ...]] = ()

    def rows(self, x: Tensor, codes: Codes) -> Tensor:
        kept = codes if self.only is None else codes.only(self.only)
        kept = kept.without(self.without) if self.without else kept
        if self.error == "keep":
            if kept is codes:
                return x
            return x + (self.lens.decode(kept) - self.lens.decode(codes)).to(x.dtype)
        new = self.lens.decode(kept)
        if self.error_map is not None:
            wide = x.to(new.dtype)
            linear = wide @ self.error_map.to(new)
            whole = self.lens.decode(codes) if kept is not codes else new
            new = new + (linear if self.error == "linear" else wide - whole - linear)
        return new

    def check(self, site: Site) -> None:
        super().check(site)
        if self.error_map is not None:
            check_tensor(self.error_map, "DictionarySubstitute.error_map")
            d = self.lens.channels
            if self.error_map.shape != (d, d):
                raise ShapeError(f"error_map has shape {list(self.error_map.shape)}; it must be [{d}, {d}]")

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        given = dict(record)
        for name in ("only", "without"):
            given[name] = tuple(given[name]) if given.get(name) is not None else None
        given["without"] = given["without"] or ()
        return super()._rebuild(given, tensors)


def operate(value: Tensor, kind: str, number: float) -> Tensor:
    """Return a feature's values after an operation."""
    if kind == "set":
        return torch.full_like(value, number)
    return value * number if kind == "scale" else value + number


def _product(sizes: tuple[int, ...]) -> int:
    n = 1
    for s in sizes:
        n *= s
    return n
