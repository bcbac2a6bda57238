"""The ways to fit a direction, by name: `FITS`, and the decorator that adds one.

A fit is a function from activations to one vector, the displacement that strength 1 stands for:

    @direction_fit("mean_diff", data="pairs", summary="...")
    def mean_diff(positive, negative): return positive.mean(0) - negative.mean(0)

* `data="pairs"`: `fit(positive [n, d], negative [n, d], **options)`, row i of both from one pair;
* `data="numbers"`: `fit(x [n, d], y [n], **options)`, a number for each row;
* `data="texts"`: `fit(model, contrast, sites, **options)`, which reads for itself and returns directions.

All are float64. Keyword arguments are the fit's options; `fit_direction` refuses others by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from actlas.core.errors import InputError, did_you_mean

Fit = Callable[..., Any]
Data = Literal["pairs", "numbers", "texts"]
_OWN = ("means", "principal", "supervised", "whitening", "weighted", "features", "token_ablation")


@dataclass(frozen=True)
class FitInfo:
    """One way to fit a direction.

    Attributes:
        name: what a user asks for.
        function: activations -> vector `[d]`.
        data: `"pairs"`, or `"numbers"` for texts with a number each (pairs then count 1 and 0); `"texts"`
            for a fit that runs the model itself.
        summary: one line for a person who chooses.
        options: name -> default (`...` for a required one).
        aligned: whether it needs to know which texts are pairs.
    """

    name: str
    function: Fit = field(repr=False)
    data: Data
    summary: str
    options: Mapping[str, Any]
    aligned: bool = False


_FITS: dict[str, FitInfo] = {}


def direction_fit(name: str, *, data: Data, summary: str, aligned: bool = False) -> Callable[[Fit], Fit]:
    """Register a fit of a direction; the function stays directly callable."""

    def register(function: Fit) -> Fit:
        options = {
            p.name: ... if p.default is p.empty else p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        _FITS[name] = FitInfo(name, function, data, summary, options, aligned)
        return function

    return register


def fits() -> dict[str, FitInfo]:
    """Return every way to fit a direction, by name."""
    import importlib

    for module in _OWN:
        importlib.import_module(f"actlas.steering.{module}")
    return dict(_FITS)


def find_fit(name: str, options: Mapping[str, Any]) -> FitInfo:
    """Return one fit, after a look at its options.

    Raises:
        InputError: there is none of that name, it has not got such an option, or lacks a required one.
    """
    known = fits()
    if name not in known:
        hint = did_you_mean(str(name), known) or f"; it is one of {', '.join(known)}"
        raise InputError(f"there is no direction fit {name!r}{hint}")
    info = known[name]
    for option in options:
        if option not in info.options:
            has = ", ".join(info.options) or "none"
            hint = did_you_mean(option, info.options)
            raise InputError(f"the fit {name!r} has no option {option!r}{hint} (it has {has})")
    for option, default in info.options.items():
        if default is ... and option not in options:
            raise InputError(f"the fit {name!r} needs the option {option!r}")
    return info


def along(weight: Tensor, difference: Tensor) -> Tensor:
    """Return the displacement along `weight` that covers what `difference` has of it, `[d]`.

    It is the projection `w (w . m) / |w|^2`: at strength 1 the score `w . x` moves as far as from the
    negative mean to the positive one.

    Raises:
        InputError: the two have nothing in common, so that there is no displacement.
    """
    moved = weight * (weight @ difference) / (weight @ weight).clamp_min(1e-300)
    return check_length(moved, difference)


def check_length(vector: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the vector, or raise InputError if its length is nothing beside `scale`'s."""
    least = 0.0 if scale is None else 1e-9 * float(scale.norm())
    if not float(vector.norm()) > max(least, 1e-30):
        raise InputError(
            "the direction has length 0: both sides have the same activations here; take another position "
            "or site, or texts that differ where they are read"
        )
    return vector


def as_float64(*given: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in float64 on the CPU, in which every fit computes."""
    return tuple(x.detach().to("cpu", torch.float64) for x in given)
