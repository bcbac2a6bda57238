"""`fit_direction`: from texts to a direction at a site, by any of the fits.

    fit_direction(model, pairs, "blocks.15.resid_post")                      # difference of means
    fit_direction(model, pairs, "blocks.15.resid_post", method="lda")
    fit_direction(model, texts, "blocks.15.resid_post", method="cov", y=entropies)
    fit_directions(model, pairs, "blocks.*.resid_post")                      # all layers, one pass

Data are pairs of texts, or texts with a number each. Texts with labels 0 and 1 will do for fits that need
two sides but not which texts are pairs. `fits()` lists the fits with their options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.contrast import Contrast, Readings, Where, read_contrast, read_rows
from actlas.core.direction import Direction
from actlas.core.errors import ActlasError, InputError
from actlas.core.probe_data import parse_items
from actlas.steering.fits import FitInfo, find_fit

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site


def fit_direction(
    model: Model,
    data: Any,
    site: str,
    *,
    method: str = "mean_diff",
    position: Where = "last",
    y: Sequence[float] | None = None,
    **options: Any,
) -> Direction:
    """Fit a direction at one site; see `fit_directions`.

    Raises:
        InputError: as `fit_directions`, or `site` names several sites.
    """
    found = fit_directions(model, data, site, method=method, position=position, y=y, **options)
    if len(found) != 1:
        raise InputError(
            f"a direction lives at one site, and {site!r} names {len(found)}; give one, e.g. "
            f"{next(iter(found))}, or call fit_directions"
        )
    return next(iter(found.values()))


def fit_directions(
    model: Model,
    data: Any,
    sites: str | Site | Iterable[str | Site],
    *,
    method: str = "mean_diff",
    position: Where = "last",
    y: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, Direction]:
    """Fit a direction at every site, from one pass over the texts.

    Args:
        model: whose activations are read.
        data: pairs (anything `Contrast.of` takes), `(text, number)` items, or texts with `y`.
        sites: names or patterns of sites with channels.
        method: a name in `fits()`.
        position: which token stands for a text: `"last"`, `"first"`, a number, `"last3"` or `"mean"`.
        y: the texts' numbers, where `data` is a list of texts; or a number for each pair.
        options: the fit's own, e.g. `centre=True` for `"pca_diff"`.

    Returns:
        Directions by canonical site name.

    Raises:
        InputError: an unknown fit or option, unfit data (a missing side, one class, numbers that are all
            equal), or sides that do not differ.
        SiteError: a site that does not exist or has no channels.
    """
    info = find_fit(method, options)
    given = _Data.of(data, y)
    if info.data == "texts":  # runs the model itself
        if given.contrast is None:
            raise InputError(f"the fit {info.name!r} needs pairs of texts, not single texts with labels")
        made: dict[str, Direction] = info.function(model, given.contrast, sites, **options)
        return made
    return {
        name: _fit(info, rows, model, given, options) for name, rows in given.read(model, sites, position)
    }


def fit_readings(
    readings: Readings, *, method: str = "mean_diff", y: Sequence[float] | None = None, **options: Any
) -> Direction:
    """Fit a direction to activations of pairs that were read already; see `fit_directions`.

    Args:
        readings: the activations.
        method: a name in `fits()`.
        y: a number for each pair.
        options: the fit's own.
    """
    info = find_fit(method, options)
    if info.data == "texts":
        raise InputError(f"the fit {info.name!r} reads texts itself; call fit_directions")
    numbers = None if y is None else torch.tensor(list(y), dtype=torch.float64)
    try:
        vector = _vector(info, readings, numbers, options)
    except ActlasError as error:
        raise type(error)(f"{readings.site}: {error}") from error
    return Direction.of(readings, vector, info.name)


@dataclass(frozen=True)
class _Data:
    """Texts in one of two forms: pairs (`contrast`), or texts with numbers."""

    contrast: Contrast | None
    texts: tuple[str, ...] = ()
    y: tuple[float, ...] = ()

    @classmethod
    def of(cls, data: Any, y: Sequence[float] | None) -> _Data:
        if isinstance(data, Contrast):
            return cls(data if y is None else Contrast(data.positive, data.negative, tuple(y), data.prompt))
        if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
            raise InputError(f"texts to fit on are a sequence of pairs, not {type(data).__name__}")
        items = list(data)
        if items and all(isinstance(item, str) for item in items):
            if y is None or len(y) != len(items):
                said = "none" if y is None else str(len(y))
                raise InputError(
                    f"{len(items)} texts without pairs need a number each in y; there are {said}"
                )
            items = list(zip(items, (float(v) for v in y), strict=True))
            y = None
        labelled = bool(items) and _labelled(items[0])
        if not labelled:
            contrast = Contrast.of(items)
            return cls.of(contrast, y) if y is not None else cls(contrast)
        if y is not None:
            raise InputError("the numbers are given twice: with the texts and in y")
        texts, labels, _, _ = parse_items(items)
        return cls(None, tuple(texts), tuple(labels))

    @property
    def hash(self) -> str:
        if self.contrast is not None:
            return self.contrast.hash
        return hashlib.sha256(json.dumps([self.texts, self.y], ensure_ascii=True).encode()).hexdigest()

    def read(self, model: Model, sites: Any, position: Where) -> Iterable[tuple[str, _Rows]]:
        """Return what was read at each site."""
        if self.contrast is not None:
            found = read_contrast(model, self.contrast, sites, position=position)
            return [(name, _Rows(r, None, None)) for name, r in found.items()]
        rows, references = read_rows(model, self.texts, sites, position=position)
        y = torch.tensor(self.y, dtype=torch.float64)
        return [(name, _Rows(_sides(name, x, y, references[name]), x, y)) for name, x in rows.items()]


@dataclass(frozen=True)
class _Rows:
    """Activations at a site: two sides, and for texts with numbers all rows `x [n, d]` and `y [n]`."""

    readings: Readings
    x: Tensor | None
    y: Tensor | None


def _labelled(item: Any) -> bool:
    if isinstance(item, dict):
        return "text" in item
    return isinstance(item, (tuple, list)) and len(item) == 2 and not isinstance(item[1], str)


def _sides(site: str, x: Tensor, y: Tensor, reference: float) -> Readings:
    """Return the rows of labels 1 and 0, or those above and not above the mean number, as two sides."""
    if len(y.unique()) < 2:
        raise InputError(f"every label is {float(y[0]):g}; a direction needs texts of both kinds")
    above = y > (0.5 if bool(((y == 0) | (y == 1)).all()) else y.mean())
    return Readings(site, x[above], x[~above], reference)


def _fit(info: FitInfo, rows: _Rows, model: Model, data: _Data, options: dict[str, Any]) -> Direction:
    about: dict[str, Any] = {"fingerprint": model.fingerprint, "data": data.hash}
    if data.contrast is not None or rows.x is None or rows.y is None:
        y = None if data.contrast is None else data.contrast.y
        return replace(fit_readings(rows.readings, method=info.name, y=y, **options), **about)
    if info.data == "pairs" and info.aligned:
        raise InputError(f"the fit {info.name!r} needs pairs of texts, not single texts with labels")
    if info.data == "pairs" and not bool(((rows.y == 0) | (rows.y == 1)).all()):
        raise InputError(f"the fit {info.name!r} needs labels 0 and 1; for numbers use 'cov' or 'ridge'")
    vector = _vector(info, rows.readings, rows.y, options, rows.x)
    return Direction.of(rows.readings, vector, info.name, n=len(rows.x), **about)


def _vector(
    info: FitInfo,
    readings: Readings,
    numbers: Tensor | None,
    options: dict[str, Any],
    x: Tensor | None = None,
) -> Tensor:
    if info.data == "pairs":
        return info.function(readings.positive, readings.negative, **options)
    if x is not None and numbers is not None:
        return info.function(x, numbers, **options)
    if numbers is not None:  # a number for each pair weights its difference
        return info.function(readings.difference, numbers, **options)
    sides = readings.positive, readings.negative
    labels = torch.cat([torch.ones(len(sides[0])), torch.zeros(len(sides[1]))])
    return info.function(torch.cat(sides), labels, **options)
