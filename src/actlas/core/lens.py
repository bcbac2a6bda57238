"""A Lens is a fitted reader of activations: a probe, a dictionary, a concept bank, a PCA.

    lens.encode(x)            activation -> codes            [..., d] -> [..., k]
    lens.decode(codes)        codes -> reconstruction        [..., k] -> [..., d]
    lens.score(x)             activation -> one number       [..., d] -> [...]
    lens.edit(feature, 4.0)   an Edit that adds 4 times the feature's direction
    lens.substitute()         an Edit that puts decode(encode(x)) in the activation's place
    edit.when(lens)           an Edit behind the lens's score

A new kind of lens is a dataclass over this base. Fields that are tensors are saved as tensors, the
others as JSON; saving, loading, moving and the two edits come with the base:

    @dataclass(kw_only=True, eq=False)
    class Directions(Lens):
        basis: Tensor                                     # [k, d]

        @property
        def channels(self) -> int:
            return self.basis.shape[1]

        def encode(self, x: Tensor) -> Tensor:
            return self.flat(x) @ self.basis.to(x).T

        def decode(self, codes: Tensor) -> Tensor:
            return codes @ self.basis.to(codes)

        def direction(self, feature: int) -> Tensor:
            return self.basis[self.check_feature(feature)]

A saved lens is data: its class is looked up by name among the classes that Actlas's own rooms define,
and is built from declared fields only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import ArtifactError, InputError, NonFiniteError, ShapeError
from actlas.core.fingerprint import Fingerprint
from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from typing_extensions import Self

    from actlas.core.edit import Edit
    from actlas.core.model import Model

LENS_TYPES: dict[str, type[Lens]] = {}


@dataclass(kw_only=True, eq=False)
class Lens:
    """Base of all lenses.

    Attributes:
        site: the site whose activations it reads.
        fingerprint: the model it was fitted on; checked when it is loaded for a model.
        measurements: how good it is, measured when it was fitted, with its controls.
        heads: number of heads, if the site's value is `[batch, pos, heads, head_dim]`.
    """

    site: str
    heads: int | None = None
    fingerprint: Fingerprint | None = None
    measurements: tuple[Measurement, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = LENS_TYPES.setdefault(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(f"two lenses are called {cls.__name__}: {known.__module__} and {cls.__module__}")
        LENS_TYPES[cls.__name__] = cls

    # -- what a kind of lens defines --------------------------------------------------------------

    @property
    def channels(self) -> int:
        """The number of channels d that it reads (heads flattened)."""
        raise NotImplementedError

    @property
    def features(self) -> int:
        """How many features it has, which `edit` can steer along."""
        return 1

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes `[..., k]` of activations `[..., d]`."""
        raise InputError(f"{type(self).__name__} has no codes; use score")

    def decode(self, codes: Tensor) -> Tensor:
        """Return the activations `[..., d]` that codes `[..., k]` stand for."""
        raise InputError(f"{type(self).__name__} does not reconstruct activations")

    def score(self, x: Tensor) -> Tensor:
        """Return one number `[...]` for each activation `[..., d]`."""
        raise InputError(f"{type(self).__name__} gives no single score; use encode")

    def direction(self, feature: int) -> Tensor:
        """Return the direction `[d]` of a feature; `edit` adds `strength` times it."""
        raise InputError(f"{type(self).__name__} has no directions to steer along")

    # -- what every lens can do -------------------------------------------------------------------

    def edit(self, feature: int = 0, strength: float = 1.0) -> Edit:
        """Return the edit that adds `strength` times a feature's direction at the lens's site.

        Raises:
            InputError: there is no such feature, or this kind of lens has no directions.
        """
        from actlas.core.edits import Add

        added = Add(self.site, self._shaped(self.direction(self.check_feature(feature)).detach())) * strength
        return added if self.fingerprint is None else added.bind(self.fingerprint)

    def substitute(self) -> Edit:
        """Return the edit that replaces the activation by `decode(encode(activation))`."""
        from actlas.core.edits import Substitute

        edit = Substitute(self.site, self)
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)

    def flat(self, x: Tensor) -> Tensor:
        """Return activations as `[..., d]`, joining heads and their channels if they are apart.

        Raises:
            ShapeError: the channels are not the lens's.
        """
        d = self.channels
        if x.shape[-1] == d:
            return x
        if x.ndim > 1 and x.shape[-2] * x.shape[-1] == d:
            return x.flatten(-2)
        what = f"{type(self).__name__} at {self.site}"
        raise ShapeError(f"{what} reads {d} channels a token; it was given {list(x.shape)}")

    def check_feature(self, feature: int) -> int:
        """Return the feature's number, or raise InputError."""
        if not 0 <= feature < self.features:
            last = self.features - 1
            raise InputError(f"{type(self).__name__} has no feature {feature}; it has 0 to {last}")
        return feature

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the same lens with its tensors on another device or of another dtype."""
        moved: dict[str, Any] = {n: t.to(device=device, dtype=dtype) for n, t in self._tensors().items()}
        return replace(self, **moved)

    def save(self, path: str | Path, model: Model | None = None) -> Path:
        """Save as a folder of JSON and safetensors.

        Args:
            path: the folder.
            model: the model it is for; needed unless the lens knows it from its fitting.

        Raises:
            InputError: no model is known, or a field is not data.
            FailureError: it could not be written.
        """
        fingerprint = model.fingerprint if model is not None else self.fingerprint
        if fingerprint is None:
            raise InputError("a lens is saved for a model; give it: lens.save(path, model=model)")
        record, tensors = self._record()
        manifest = {"lens": {"type": type(self).__name__, **record}, "fingerprint": fingerprint.to_json()}
        return save_artifact(path, "lens", manifest, tensors)

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None, *, force: bool = False) -> Self:
        """Load a saved lens.

        Args:
            path: the folder.
            model: checked against the fingerprint, if given.
            force: accept another model than the one the lens was fitted on.

        Raises:
            ArtifactError: not a whole, untampered lens, or one of another kind than `cls`.
            FingerprintError: it was fitted on another model.
        """
        manifest, tensors = load_artifact(path, "lens")
        fingerprint = Fingerprint.from_json(manifest.get("fingerprint"), path)
        if model is not None and not force:
            fingerprint.check(model.fingerprint, str(path))
        record = manifest.get("lens")
        if not isinstance(record, dict):
            raise ArtifactError(f"{path} holds no lens; save it again")
        try:
            lens = rebuild_lens(record, tensors)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error
        if not isinstance(lens, cls):
            raise ArtifactError(f"{path} holds a {type(lens).__name__}, not a {cls.__name__}")
        lens.fingerprint = None if force else fingerprint
        return lens

    def _tensors(self) -> dict[str, Tensor]:
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return JSON-able fields and tensors from which `rebuild_lens` makes the same lens."""
        tensors = self._tensors()
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        del record["fingerprint"]
        record["measurements"] = [m.to_json() for m in self.measurements]
        return record, tensors

    def _shaped(self, vector: Tensor) -> Tensor:
        """Return a flat direction in the shape of the site's features, if they are heads."""
        return vector if self.heads is None else vector.reshape(self.heads, -1)


def rebuild_lens(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Lens:
    """Build a lens from `_record`'s fields and tensors; `record["type"]` names its class.

    Raises:
        ArtifactError: an unknown class, missing, unknown or unfit fields, or numbers that are not finite.
    """
    cls = _lens_type(str(record.get("type")))
    declared = {f.name: f for f in fields(cls)}
    given: dict[str, Any] = {k: v for k, v in record.items() if k != "type"} | dict(tensors)
    unknown = sorted(set(given) - set(declared))
    if unknown:
        raise ArtifactError(f"{cls.__name__} has no field {unknown[0]!r}; upgrade Actlas")
    required = {n for n, f in declared.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(given)):
        raise ArtifactError(f"this {cls.__name__} lacks {missing[0]!r}; save it again")
    try:
        given["measurements"] = tuple(Measurement.from_json(m) for m in given.get("measurements", ()))
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**plain)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(f"this {cls.__name__} cannot be rebuilt ({error}); save it again") from error


def check_finite(what: str, **tensors: Tensor) -> None:
    """Raise NonFiniteError if any of a lens's tensors holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{what}.{name} holds values that are NaN or infinite; fit it again")


def _lens_type(name: str) -> type[Lens]:
    if name not in LENS_TYPES:
        from actlas.core.methods import import_rooms

        import_rooms()
    if name not in LENS_TYPES:
        raise ArtifactError(f"a lens of unknown type {name!r}; upgrade Actlas")
    return LENS_TYPES[name]
