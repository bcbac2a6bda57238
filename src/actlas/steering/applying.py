"""How a direction is applied: what the edit computes, and at which tokens.

    add       x + s v                            v: the fitted displacement (norm kept if asked)
    rotate    x turned towards v by s * 10 degrees, norm kept
    set       the projection on v moved by the share s to where the positive side lies
    remove    the projection on v taken out by the share s

All scale with the strength s, so that the strength of any of them can be searched. `phase` and `positions`
limit the tokens as `edit.at` does. One number a head is `actlas.HeadScale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from actlas.core.direction import Direction, Unit
from actlas.core.edit import Edit, compose
from actlas.core.edits import Clamp, ProjectOut
from actlas.core.errors import InputError

Apply = Literal["add", "rotate", "set", "remove"]
_KINDS = ("add", "rotate", "set", "remove")
DEGREES = 10.0


@dataclass(frozen=True)
class Application:
    """From directions to edits.

    Attributes:
        apply: see the module docstring.
        keep_norm: rescale what `"add"` gives to the length that the activation had.
        phase: `"prompt"`, `"generated"` or `None` for both.
        positions: as for `edit.at`.
    """

    apply: Apply = "add"
    keep_norm: bool = False
    phase: Literal["prompt", "generated"] | None = None
    positions: Any = None

    def __post_init__(self) -> None:
        if self.apply not in _KINDS:
            raise InputError(f"apply is {self.apply!r}; it must be one of {', '.join(_KINDS)}")
        if self.keep_norm and self.apply != "add":
            raise InputError(f"keep_norm goes with apply='add'; {self.apply!r} has a norm of its own")

    def __call__(self, direction: Direction) -> Edit:
        """Return the edit of strength 1."""
        edit = self._whole(direction)
        if direction.fingerprint is not None:
            edit = edit.bind(direction.fingerprint)
        if self.phase is None and self.positions is None:
            return edit
        return edit.at(phase=self.phase, positions=self.positions)

    def _whole(self, direction: Direction) -> Edit:
        if self.apply == "add":
            return direction.steer(1.0, unit="raw", keep_norm=self.keep_norm)
        if self.apply == "rotate":
            return direction.rotate(DEGREES)
        if direction.heads is not None:
            raise InputError(
                f"apply={self.apply!r} needs a site without heads, not {direction.site}; use 'add'"
            )
        if self.apply == "set":
            goal = direction.midpoint + direction.norm / 2
            return Clamp(direction.site, low=goal, high=goal, direction=direction.unit)
        return ProjectOut(direction.site, direction.unit)

    def everywhere(self) -> Application:
        """Return the same without limits that mean nothing in a given text, where no token is generated.

        Under `generate`, `phase="generated"` and `positions="last"` are the tokens that are read for the
        next one; a text that is scored has such tokens throughout.
        """
        positions = None if self.positions == "last" else self.positions
        return replace(self, phase=None, positions=positions)

    def at(self, direction: Direction, strength: float) -> Edit:
        """Return the edit whose strength 1 is `strength`; an added vector takes it into its length."""
        if self.apply == "add" and strength > 0:
            return self(replace(direction, vector=direction.vector * strength))
        return self(direction) * strength

    def raw(self, direction: Direction, strength: float, unit: Unit) -> float:
        """Return a strength in multiples of the displacement from one in multiples of the median norm."""
        if unit not in ("resid", "raw"):
            raise InputError(f"unit is {unit!r}; it must be 'resid' or 'raw'")
        if unit == "resid" and self.apply == "add":
            return strength * direction.reference / direction.norm
        return strength


def layer_weights(
    weights: str | float | Sequence[float] | Mapping[str, float], directions: Mapping[str, Direction]
) -> dict[str, float]:
    """Return a weight for each site.

    Args:
        weights: `"equal"` (1 each), one number a site in the sites' order, or `{site: number}`; sites that
            a mapping leaves out get none.
        directions: by site.

    Raises:
        InputError: another form, a wrong number of weights, an unknown site, or weights that are all 0.
    """
    names = list(directions)
    if weights == "equal":
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, (int, float)) and not isinstance(weights, bool):
        weights = [weights]
    if isinstance(weights, Mapping):
        unknown = next((name for name in weights if name not in directions), None)
        if unknown is not None:
            raise InputError(f"weights name the site {unknown!r}, which has no direction; use {names[0]} ...")
        found = {name: weights[name] for name in names if name in weights}
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        if len(weights) != len(names):
            raise InputError(f"{len(names)} sites need {len(names)} weights, not {len(weights)}")
        found = dict(zip(names, weights, strict=True))
    else:
        raise InputError(f"weights is {weights!r}; give 'equal', a list of numbers, or numbers by site")
    try:
        numbers = {name: float(w) for name, w in found.items()}
    except (TypeError, ValueError):
        raise InputError(f"weights hold {weights!r}; each must be a number") from None
    if not any(numbers.values()) or not all(abs(w) < float("inf") for w in numbers.values()):
        raise InputError(f"weights are {list(numbers.values())}; they must be finite, and not all 0")
    return {name: w for name, w in numbers.items() if w}


def several(
    application: Application, directions: Mapping[str, Direction], weights: Mapping[str, float]
) -> Edit:
    """Return one edit for several sites: each site's displacement times its weight.

    Added vectors count in units of each site's median norm, over the square root of the number of sites,
    so that strengths stay of the size they have for one site.
    """
    share = len(weights) ** -0.5
    parts = []
    for name, weight in weights.items():
        direction = directions[name]
        if application.apply == "add":
            vector = direction.unit * (direction.reference * weight * share)
            parts.append(application(replace(direction, vector=vector)))
        else:
            parts.append(application(direction) * weight)
    return compose(parts)
