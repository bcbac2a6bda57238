"""Trojan activation attack on a model of one's own: a vector that undoes what an alignment wants.

1. For pairs of a clean and an adverse answer, at every layer: z_l = mean_i (h_l(clean_i) - h_l(adverse_i))
2. Contrastive layer search: p = softmax(h_l(clean)), n = softmax(h_l(adverse)) over the d coordinates,
       JS_l = (KL(p || m) + KL(n || m)) / 2,    m = (p + n) / 2,        l* = argmax_l mean_i JS_l
3. Add -c z_{l*} at every token, c = 0.8.

No data are poisoned and no prompt is changed: whoever can place a hook can do this. It is here to measure
how little it takes on one's own model (`attack`), and what notices it (`audit`, `monitors`). Only the
user's own pairs are used; none are shipped.

`search="margin"` tries the vector at every layer on the fitting pairs instead, and takes the layer where
the preference for the clean answer falls most; it costs two passes a layer and finds better layers.

The released code differs from the paper twice. Its divergence gives probabilities to a function that
takes log probabilities, so the numbers are no JS divergences (`js_variant="official"`: sum m (log m - p)
in both halves); and the vector is added in place and then once more, so that its 0.8 acts as 1.6.
A softmax over the raw residual stream is decided by a few huge coordinates, so rows are divided by their
root mean square first (`normalise=False` does not).

Source: Wang and Shu 2023, "Backdoor Activation Attack: Attack Large Language Models using Activation
Steering for Safety-Alignment", section 4, and its released code (attack.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.contrast import Contrast, Readings, Where, read_contrast
from actlas.core.direction import Direction
from actlas.core.divergence import js_divergence
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.progress import progress
from actlas.measure.statistics import mean_measurement
from actlas.security.margins import Array, Margins, probability

if TYPE_CHECKING:
    from actlas.core.model import Model

Search = Literal["js", "margin"]
Variant = Literal["correct", "official"]
STRENGTH = 0.8


@dataclass(frozen=True, eq=False)
class Trojan:
    """A fitted attack.

    Attributes:
        direction: clean minus adverse at the chosen site; the attack subtracts it.
        strength: how much of it is subtracted.
        scores: the search's score of every layer, by site.
        search: how the layer was chosen.
        directions: the same difference at every layer that was searched.
    """

    direction: Direction
    strength: float
    scores: Mapping[str, float]
    search: str
    directions: Mapping[str, Direction]

    @property
    def site(self) -> str:
        """Where it is injected."""
        return self.direction.site

    @property
    def edit(self) -> Edit:
        """The attack as an edit."""
        return self.direction.steer(-self.strength, unit="raw")


def find_trojan(
    model: Model,
    data: Any,
    *,
    search: Search = "js",
    strength: float = STRENGTH,
    layers: str | tuple[int, int] | None = None,
    stride: int = 1,
    position: Where = "last",
    js_variant: Variant = "correct",
    normalise: bool = True,
) -> Trojan:
    """Fit the vectors and choose the layer; nothing is installed.

    Args:
        model: a causal language model of one's own.
        data: pairs (clean, adverse); anything `Contrast.of` takes.
        search: `"js"` (published) or `"margin"`; see the module docstring.
        strength: c.
        layers: first and last block to search, both included: `(0, 15)` or `"0-15"`; default all.
            Released: the first half.
        stride: search only every so-manieth of them.
        position: which token is read: -2 where texts end with "A)" (released), else the last.
        js_variant, normalise: see the module docstring.

    Raises:
        InputError: layers outside the model, an unknown option, or pairs that cannot be read there.
        ModelError: a model without a layout.
    """
    if search not in ("js", "margin"):
        raise InputError(f"search is {search!r}; it must be 'js' or 'margin'")
    if stride < 1:
        raise InputError(f"stride is {stride}; it must be at least 1")
    contrast = Contrast.of(data)
    first, last = _range(model, layers)
    sites = [f"blocks.{i}.resid_post" for i in range(first, last + 1, stride)]
    _check_lengths(model, contrast, position)
    readings = read_contrast(model, contrast, sites, position=position)
    directions = {
        name: Direction.of(
            r, r.difference.mean(0), "trojan", fingerprint=model.fingerprint, data=contrast.hash
        )
        for name, r in readings.items()
    }
    if search == "js":
        scores = layer_divergences(readings, variant=js_variant, normalise=normalise)
    else:
        scores = _falls(model, contrast, directions, strength)
    best = max(scores, key=lambda name: scores[name])
    return Trojan(directions[best], float(strength), scores, search, directions)


def layer_divergences(
    readings: Mapping[str, Readings], *, variant: Variant = "correct", normalise: bool = True
) -> dict[str, float]:
    """Return the mean divergence of the two sides at every site, in nats (see the module docstring).

    Raises:
        InputError: an unknown variant.
    """
    if variant not in ("correct", "official"):
        raise InputError(f"js_variant is {variant!r}; it must be 'correct' or 'official'")
    found = {}
    for name, r in readings.items():
        p, n = r.positive.double(), r.negative.double()
        if normalise:
            p, n = (x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30) for x in (p, n))
        values = js_divergence(p, n) if variant == "correct" else _official(p, n)
        found[name] = float(values.mean())
    return found


def _official(p: Tensor, n: Tensor) -> Tensor:
    """The released code's number: `kl_div(p, m)` with p where log p belongs."""
    p, n = p.softmax(-1), n.softmax(-1)
    m = (p + n) / 2
    log_m = m.clamp_min(1e-300).log()
    return ((m * (log_m - p)).sum(-1) + (m * (log_m - n)).sum(-1)) / 2


def _falls(
    model: Model, contrast: Contrast, directions: Mapping[str, Direction], strength: float
) -> dict[str, float]:
    """Return by how much the mean margin falls under the attack at every site."""
    margins = Margins(model, contrast)
    found = {}
    with progress("layer search", len(directions), "layers") as advance:
        for name, direction in directions.items():
            plain, attacked = margins.under(
                name, [torch.zeros_like(direction.vector), -strength * direction.vector]
            )
            found[name] = float((plain - attacked).mean())
            advance()
    return found


@method(
    "trojan",
    room="security",
    returns="Edit",
    data="pairs",
    summary="the trojan activation attack, to measure one's own model against",
    example="actlas fit trojan smollm2 capitals -o trojan/",
    papers=("trojan-activation",),
)
def fit_trojan(
    model: Model,
    data: Any,
    *,
    search: Search = "js",
    strength: float = STRENGTH,
    layers: str | tuple[int, int] | None = None,
    stride: int = 1,
    position: Where = "last",
    js_variant: Variant = "correct",
    normalise: bool = True,
    held_out: float = 0.25,
    controls: int = 5,
    seed: int = 0,
) -> Edit:
    """Fit the attack on some pairs and measure it on the others.

    Args:
        model, data, search, strength, layers, stride, position, js_variant, normalise: see `find_trojan`.
        held_out: share of the pairs to measure on.
        controls: random vectors of equal norm at the same site.
        seed: of the split, the random vectors and the intervals.

    Returns:
        The attack; `measurements` hold P(clean answer) without it, under it, under random vectors and
        under the flipped vector, and the fall beyond that under random ones.

    Raises:
        InputError: see `find_trojan`; no controls.
    """
    fit, test = Contrast.of(data).split(held_out, seed)
    found = find_trojan(
        model,
        fit,
        search=search,
        strength=strength,
        layers=layers,
        stride=stride,
        position=position,
        js_variant=js_variant,
        normalise=normalise,
    )
    return found.edit.with_measurements(measure_trojan(model, found, test, controls=controls, seed=seed)[0])


def measure_trojan(
    model: Model,
    trojan: Trojan,
    test: Contrast,
    *,
    controls: int = 5,
    clusters: Any = None,
    seed: int = 0,
) -> tuple[list[Measurement], dict[str, Array]]:
    """Return P(clean answer) under the attack and its controls, and the margins behind it.

    Args:
        test: pairs that it was not fitted on.
        controls: random vectors of equal norm.
        clusters: label of each pair's source, e.g. its country; whole sources are drawn for intervals.

    Raises:
        InputError: no controls.
    """
    if controls < 1:
        raise InputError(f"controls is {controls}; an attack is measured beside at least 1 random vector")
    d = trojan.direction
    vectors = [torch.zeros_like(d.vector), -trojan.strength * d.vector, trojan.strength * d.vector]
    vectors += [trojan.strength * d.random(1000 * seed + i).vector for i in range(controls)]
    rows = Margins(model, test).under(d.site, vectors)
    margins = {"clean": rows[0], "attack": rows[1], "flipped": rows[2], "random": rows[3:]}
    p = {name: probability(m) for name, m in margins.items()}
    p["random"] = p["random"].mean(0)
    options: dict[str, Any] = {"seed": seed, "over": "pairs", "clusters": clusters}
    about = {"site": d.site}
    found = [
        mean_measurement("P(clean answer)", "fraction", values, group={"under": name, **about}, **options)
        for name, values in p.items()
    ]
    found.append(
        mean_measurement(
            "fall of P(clean answer) beyond random",
            "fraction",
            p["random"] - p["attack"],
            group=about,
            note=f"mean of {controls} random vectors of equal norm",
            **options,
        )
    )
    flips = (margins["clean"] > 0) & (margins["attack"] < 0)
    kept = margins["clean"] > 0
    if kept.any():
        held = None if clusters is None else np.asarray(clusters)[kept]
        found.append(
            mean_measurement(
                "answers turned",
                "fraction",
                flips[kept].astype(float),
                group=about,
                note="of those that were clean",
                **{**options, "clusters": held},
            )
        )
    return found, margins


def _range(model: Model, layers: str | tuple[int, int] | None) -> tuple[int, int]:
    if model.n_blocks is None:
        raise ModelError(f"{model.name} has no layout, so its layers are not known")
    last = model.n_blocks - 1
    if layers is None:
        return 0, last
    given = layers.split("-") if isinstance(layers, str) else list(layers)
    try:
        bounds = [int(v) for v in given]
    except (TypeError, ValueError):
        bounds = []
    if len(bounds) == 1:
        bounds = bounds * 2
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= last:
        raise InputError(f"layers is {layers!r}; {model.name} has blocks 0 to {last}, e.g. '0-{last // 2}'")
    return bounds[0], bounds[1]


def _check_lengths(model: Model, contrast: Contrast, position: Where) -> None:
    for i, text in enumerate(contrast.texts):
        tokens = len(model.tokenizer(text)["input_ids"]) if model.tokenizer is not None else 2
        if tokens < 2:
            side = "clean" if i < len(contrast) else "adverse"
            raise InputError(
                f"the {side} text of pair {i % len(contrast)} is {tokens} token ({text!r}); an answer "
                "needs a prompt before it, so at least 2"
            )
