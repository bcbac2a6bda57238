"""Direction: one vector at one site, as a lens that reads along it and an edit that moves along it.

    d = Direction.of(readings, vector, method="mean_diff")
    d.score(x)                         # where an activation lies along it, in units of the site's norm
    d.steer(0.1)                       # the edit that adds a tenth of the median residual norm along it
    d.random(seed=1), d.flipped()      # the controls that no effect is reported without

Strength in units of the site's median norm ("resid") means the same in every layer and model; "raw" means
multiples of the fitted displacement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.edits import Add, Rotate
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens, check_finite

if TYPE_CHECKING:
    from actlas.core.contrast import Readings
    from actlas.core.edit import Edit

Unit = Literal["resid", "raw"]


@dataclass(kw_only=True, eq=False)
class Direction(Lens):
    """A direction at a site.

    Attributes:
        vector: float32 `[d]`, the displacement that it was fitted as (never zero).
        method: how it was fitted, e.g. `"mean_diff"`.
        reference: median norm of the ordinary rows at the site, the unit of `steer`.
        midpoint: projection on the unit vector at which `score` is 0 (half way between the two sides).
        data: SHA-256 of the texts it was fitted on, or empty.
        n: rows it was fitted on.
    """

    vector: Tensor
    method: str = ""
    reference: float = 1.0
    midpoint: float = 0.0
    data: str = ""
    n: int = 0

    def __post_init__(self) -> None:
        if self.vector.ndim != 1:
            raise ShapeError(f"a direction is one vector [d], not {list(self.vector.shape)}")
        check_finite("Direction", vector=self.vector)
        if not float(self.vector.norm()) > 0:
            raise InputError(
                f"the {self.method or 'fitted'} direction at {self.site} is zero: the two sides have the "
                "same activations there; read at another position or site"
            )
        if not self.reference > 0:
            raise InputError(f"the reference norm of a direction is {self.reference}; it must be above 0")

    @classmethod
    def of(cls, readings: Readings, vector: Tensor, method: str, **fields: Any) -> Direction:
        """Return the direction of a vector that was fitted on readings, with its midpoint."""
        vector = vector.detach().float().cpu()
        unit = vector / vector.norm().clamp_min(1e-30)
        middle = (float((readings.positive @ unit).mean()) + float((readings.negative @ unit).mean())) / 2
        given: dict[str, Any] = {
            "site": readings.site,
            "vector": vector,
            "method": method,
            "reference": readings.reference,
            "midpoint": middle,
            "heads": readings.heads,
            "n": len(readings.positive),
            **fields,
        }
        return cls(**given)

    @property
    def channels(self) -> int:
        return self.vector.shape[0]

    @property
    def norm(self) -> float:
        """Length of the displacement."""
        return float(self.vector.norm())

    @property
    def unit(self) -> Tensor:
        """The unit vector, float32 `[d]`."""
        unit: Tensor = self.vector / self.vector.norm()
        return unit

    def score(self, x: Tensor) -> Tensor:
        """Return `(x . unit - midpoint) / reference`, `[...]` for activations `[..., d]`: above 0 is the
        positive side."""
        flat = self.flat(x)
        along: Tensor = flat @ self.unit.to(flat)
        return (along - self.midpoint) / self.reference

    def direction(self, feature: int) -> Tensor:
        self.check_feature(feature)
        return self.vector

    def steer(self, alpha: float = 0.1, *, unit: Unit = "resid", keep_norm: bool = False) -> Edit:
        """Return the edit `x + alpha * (reference * unit vector, or the displacement itself)`.

        Args:
            alpha: how far; negative is the other way.
            unit: `"resid"` for multiples of the site's median norm, `"raw"` for multiples of the vector.
            keep_norm: rescale the result to the length that the activation had.

        Raises:
            InputError: an unknown unit.
        """
        if unit not in ("resid", "raw"):
            raise InputError(f"unit is {unit!r}; it must be 'resid' or 'raw'")
        whole = self.unit * self.reference if unit == "resid" else self.vector
        return self._made(Add(self.site, self._shaped(whole), keep_norm=keep_norm)) * alpha

    def rotate(self, degrees: float) -> Edit:
        """Return the edit that turns activations towards the direction by an angle, norms kept."""
        return self._made(Rotate(self.site, self._shaped(self.unit), degrees=float(degrees)))

    def random(self, seed: int = 0) -> Direction:
        """Return a direction of equal length that points anywhere (Gaussian), the control for effects."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.channels, generator=generator)
        return replace(
            self, vector=drawn / drawn.norm() * self.norm, method="random", midpoint=0.0, measurements=()
        )

    def flipped(self) -> Direction:
        """Return the direction that points the other way."""
        return replace(self, vector=-self.vector, midpoint=-self.midpoint, measurements=())

    def cosine(self, other: Direction | Tensor) -> float:
        """Return the cosine with another direction or vector."""
        vector = other.vector if isinstance(other, Direction) else other
        return float(torch.nn.functional.cosine_similarity(self.vector, vector.to(self.vector), dim=0))

    def describe(self) -> str:
        """Return e.g. `"mean_diff direction at blocks.15.resid_post (12.3, 0.07 of the median norm)"`."""
        return (
            f"{self.method or 'a'} direction at {self.site} (length {self.norm:.3g}, "
            f"{self.norm / self.reference:.2g} of the median norm)"
        )

    def _made(self, edit: Edit) -> Edit:
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)
