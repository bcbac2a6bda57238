"""A trained controller that reads several sites and says how hard to steer at several others.

With x the activations of the read sites side by side, standardised, and a network of two layers,

    (s, w) = W2 relu(W1 x + b1) + b2               one number s, one number w_l for each steered site
    h_l <- h_l + strength * sigmoid(s) * sigmoid(w_l) * v_l

("Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs"; v_l holds the paper's
alpha and unit direction.) Steered are the last prompt token and every generated one.

* `read="prompt"`: the controller runs once, on the prompt's last token, and what it says holds for the whole
  generation. It must read at or before every steered site, since what it steered cannot be read unsteered.
* `read="previous_step"`: it runs at every token and steers the next one, so it may read later sites than it
  steers. The first token after the prompt has no step before it, so the prompt's own pass is not steered.

`scalar="raw"` uses s itself, as the released code does: prompts that should be left alone then get a push the
other way. With `"sigmoid"` a push below `silent` is exactly none. The released code reads the last four
blocks and steers in the same pass, so only its last block is ever steered; here that is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.edit import ActivationEdit, Edit, Here, check_tensor, register_edit, replace_edit
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.hooks import attach
from actlas.core.scope import Condition, Scope
from actlas.steering.controller_state import Readings

if TYPE_CHECKING:
    from actlas.core.installation import Installation
    from actlas.core.lens import Lens
    from actlas.core.sites import Site

Read = Literal["prompt", "previous_step"]
Scalar = Literal["sigmoid", "raw"]
_PARTS = ("centre", "spread", "w1", "b1", "w2", "b2")


@dataclass(frozen=True, eq=False)
class Controller:
    """The network: activations of `read_sites` in, a scalar and a weight for each of `steer_sites` out.

    Attributes:
        read_sites, steer_sites: names of sites, in order.
        centre, spread: float32 `[R]`, R the channels of all read sites; inputs are `(x - centre) / spread`.
        w1, b1: `[hidden, R]`, `[hidden]`.
        w2, b2: `[1 + L, hidden]`, `[1 + L]`, L the number of steered sites; row 0 is the scalar.
    """

    read_sites: tuple[str, ...]
    steer_sites: tuple[str, ...]
    centre: Tensor
    spread: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __post_init__(self) -> None:
        size, hidden, out = len(self.centre), len(self.b1), 1 + len(self.steer_sites)
        wanted = ((size,), (size,), (hidden, size), (hidden,), (out, hidden), (out,))
        for name, shape in zip(_PARTS, wanted, strict=True):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ShapeError(f"Controller.{name} has shape {list(tensor.shape)}, not {list(shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"Controller.{name} holds NaN or infinity; train it again")
        if not self.read_sites or not self.steer_sites:
            raise InputError("a controller needs at least one site to read and one to steer")

    @property
    def channels(self) -> int:
        """Channels of all read sites together."""
        return len(self.centre)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalar `[...]` and the sites' weights `[..., L]`, both before any sigmoid."""
        if x.shape[-1] != self.channels:
            raise ShapeError(
                f"this controller reads {self.channels} channels at {', '.join(self.read_sites)}; "
                f"it was given {x.shape[-1]}"
            )
        centre, spread, w1, b1, w2, b2 = (getattr(self, n).to(x.device) for n in _PARTS)
        hidden = torch.relu(((x.to(w1.dtype) - centre) / spread) @ w1.T + b1)
        out = hidden @ w2.T + b2
        return out[..., 0], out[..., 1:]

    def pushes(self, x: Tensor, scalar: Scalar = "sigmoid", silent: float = 0.0) -> Tensor:
        """Return how hard to push at each steered site, `[..., L]`: scalar times `sigmoid(weight)`."""
        s, w = self.forward(x)
        if scalar == "sigmoid":
            s = torch.sigmoid(s)
            s = torch.where(s < silent, torch.zeros_like(s), s)
        return s.unsqueeze(-1) * torch.sigmoid(w)

    def steer(self, vectors: Mapping[str, Tensor], **options: Any) -> ControlledSteer:
        """Return the edit that steers along `vectors` (by steered site, `[d]`, at full strength).

        Raises:
            InputError: vectors for other sites than the controller's.
        """
        if set(vectors) != set(self.steer_sites):
            other = sorted(set(vectors) ^ set(self.steer_sites))
            raise InputError(
                f"this controller steers {', '.join(self.steer_sites)}; the directions differ in {other[0]}"
            )
        return ControlledSteer(self, torch.stack([vectors[s].float() for s in self.steer_sites]), **options)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class ControlledSteer(Edit):
    """Steering whose strength and layers a controller decides; see the module's docstring.

    Attributes:
        controller: the controller.
        vectors: float32 `[L, d]`, what a push of 1 adds at each steered site.
        read: `"prompt"` or `"previous_step"`.
        scalar: `"sigmoid"` or `"raw"`.
        silent: with `"sigmoid"`, scalars below it are exactly 0.
        strength: multiplies every push.
        scope, condition: as on any edit; by default the last prompt token and all generated ones.
    """

    controller: Controller
    vectors: Tensor
    read: Read = "prompt"
    scalar: Scalar = "sigmoid"
    silent: float = 0.05
    strength: float = field(default=1.0, kw_only=True)
    scope: Scope = field(default=Scope(positions="last"), kw_only=True)
    condition: Condition | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.read not in ("prompt", "previous_step"):
            raise InputError(f"read is {self.read!r}; it must be 'prompt' or 'previous_step'")
        if self.scalar not in ("sigmoid", "raw"):
            raise InputError(f"scalar is {self.scalar!r}; it must be 'sigmoid' or 'raw'")
        if not 0 <= self.silent < 1:
            raise InputError(f"silent is {self.silent}; it must be at least 0 and below 1")
        check_tensor(self.vectors, "ControlledSteer.vectors")
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.controller.steer_sites):
            raise ShapeError(
                f"vectors has shape {list(self.vectors.shape)}; it must be [L, d] for the "
                f"L = {len(self.controller.steer_sites)} sites that the controller steers"
            )

    def __mul__(self, factor: float) -> Edit:
        return replace_edit(self, strength=self.strength * float(factor))

    def at(self, **given: Any) -> Edit:
        scoped = Push(self.controller.steer_sites[0], scope=self.scope).at(**given)
        assert isinstance(scoped, Push)
        return replace_edit(self, scope=scoped.scope)

    def when(self, lens: Lens, threshold: float = 0.0, **options: Any) -> Edit:
        if self.condition is not None:
            raise InputError("this edit has a condition already; compose lenses instead of conditions")
        return replace_edit(self, condition=Condition(lens, threshold, **options))

    def describe(self) -> str:
        sites = self.controller.steer_sites
        where = sites[0] if len(sites) == 1 else f"{sites[0]} to {sites[-1]}"
        said = f"ControlledSteer at {where}, read at {self.controller.read_sites[-1]} ({self.read})"
        said += f" x {self.strength:g}" if self.strength != 1.0 else ""
        return said if self.condition is None else f"{said} {self.condition.describe()}"

    def _attach(self, installation: Installation) -> None:
        readers = [_one(installation, name) for name in self.controller.read_sites]
        targets = [_one(installation, name) for name in self.controller.steer_sites]
        late = _late(readers, targets)
        if late is not None and self.read == "prompt":
            raise InputError(
                f"the controller reads {late[0].name}, which comes after {late[1].name}, where it steers; "
                "read at or before the first steered site, or use read='previous_step'"
            )
        if self.strength == 0.0:
            return
        readings = Readings(
            lambda x: self.controller.pushes(x, self.scalar, self.silent),
            sites=len(readers),
            steered=len(targets),
            in_pass=late is None,
            stepwise=self.read == "previous_step",
        )
        watcher, module = installation.watcher, installation.model.module
        for i, site in enumerate(readers):

            def read(x: Tensor, i: int = i, site: Site = site) -> Tensor:
                return readings.read(x, i, watcher.of(site))

            installation.keep(
                attach(module, site, read, batch=lambda site=site: watcher.of(site).batch)  # type: ignore[misc]
            )
        for row, site in enumerate(targets):
            push = Push(
                site.name,
                self.vectors[row],
                lambda here, row=row: readings.pushes(here.run)[..., row],
                strength=self.strength,
                scope=self.scope,
                condition=self.condition,
            )
            installation._check(push)
            installation.attach_activation(push)

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        bare = Push("", scope=self.scope, condition=self.condition, strength=self.strength)
        record, tensors = bare._record()
        held: dict[str, Any] = {k: v for k, v in record.items() if k in ("strength", "scope", "condition")}
        held |= {"read": self.read, "scalar": self.scalar, "silent": self.silent}
        held |= {n: list(getattr(self.controller, n)) for n in ("read_sites", "steer_sites")}
        own = {n: t for n, t in tensors.items() if n.startswith("lens.")}
        own |= {f"controller.{n}": getattr(self.controller, n) for n in _PARTS}
        return held, own | {"vectors": self.vectors}

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        shared = {n: record[n] for n in ("strength", "scope", "condition") if n in record}
        lenses = {n: t for n, t in tensors.items() if n.startswith("lens.")}
        bare = Push._rebuild({"site": "", **shared}, lenses)
        assert isinstance(bare, Push)
        controller = Controller(
            tuple(map(str, record["read_sites"])),
            tuple(map(str, record["steer_sites"])),
            *(tensors[f"controller.{n}"] for n in _PARTS),
        )
        return cls(
            controller,
            tensors["vectors"],
            record["read"],
            record["scalar"],
            float(record["silent"]),
            strength=bare.strength,
            scope=bare.scope,
            condition=bare.condition,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Push(ActivationEdit):
    """`x + strength * weight * vector` with a weight that is known only while a pass runs.

    Attributes:
        vector: `[d]`.
        weight: what returns `[batch, 1]` or `[batch, length]`; a weight of 0 leaves a token untouched.
    """

    vector: Tensor | None = None
    weight: Any = None
    #: A controller that stays silent is no mistake.
    may_do_nothing = True
    feature_fields = ("vector",)

    def change(self, x: Tensor, here: Here) -> Tensor:
        assert self.vector is not None
        weight = self.weight(here)
        if not weight.requires_grad and not bool(weight.any()):
            return x
        return x + (self.strength * weight.unsqueeze(-1).to(x.dtype)) * self.vector.to(x)


def _one(installation: Installation, name: str) -> Site:
    found = installation.model.resolve(name)
    if len(found) != 1:
        raise InputError(f"a controller names single sites, and {name!r} means {len(found)}")
    return found[0]


def _late(readers: Sequence[Site], targets: Sequence[Site]) -> tuple[Site, Site] | None:
    """Return a read site and an earlier steered site, if there are such."""
    for reader in readers:
        for target in targets:
            known = reader.kind != "module" and target.kind != "module" and reader.tower == target.tower
            if known and reader.order > target.order:
                return reader, target
    return None
