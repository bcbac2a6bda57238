"""Which layer to steer at: how differently a contrast's two sides are written there.

    rows = layer_search(read_contrast(model, contrast, "blocks.*.resid_post"))
    rows[0].site                              # the best by Jensen-Shannon divergence

Three scores for a site, from readings that exist already (no further pass):

    js           mean_i JS(softmax(p_i), softmax(n_i)), softmax over the d coordinates (contrastive layer
                 search, Backdoor Activation Attack); each row is first divided by its root mean square,
                 because the softmax of a raw residual is decided by a few huge coordinates
    consistency  mean cosine between the differences p_i - n_i and p_j - n_j of two pairs
    accuracy     share of pairs whose difference points along the mean difference of the *other* pairs

None of them says what an edit there does to the output; `auto` measures that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from actlas.core.divergence import js_divergence
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.statistics import mean_measurement, rate_measurement

if TYPE_CHECKING:
    from actlas.core.contrast import Readings

Score = Literal["js", "consistency", "accuracy"]


@dataclass(frozen=True)
class LayerScore:
    """What one site's readings say; measurements over pairs, `group["site"]` names the site."""

    site: str
    js: Measurement
    consistency: Measurement
    accuracy: Measurement


def layer_search(
    readings: Mapping[str, Readings], *, by: Score = "js", normalise: bool = True, seed: int = 0
) -> list[LayerScore]:
    """Return the sites' scores, the best first.

    Args:
        readings: of one contrast at each site, as `read_contrast` gives them.
        by: the score to sort by.
        normalise: divide each row by its root mean square before the softmax of `js`.
        seed: of the bootstrap over pairs.

    Raises:
        InputError: no sites, an unknown score, or fewer than two pairs.
    """
    if by not in ("js", "consistency", "accuracy"):
        raise InputError(f"layers are searched by {by!r}; it must be 'js', 'consistency' or 'accuracy'")
    if not readings:
        raise InputError("there are no readings to search; give at least one site")
    rows = [_score(r, normalise, seed) for r in readings.values()]
    return sorted(rows, key=lambda row: -getattr(row, by).value)


def js_of_rows(positive: Tensor, negative: Tensor, *, normalise: bool = True) -> Tensor:
    """Return the Jensen-Shannon divergence of each pair of rows `[n, d]`, float64 `[n]`, in nats."""
    if normalise:
        positive, negative = (x / x.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
                              for x in (positive, negative))  # fmt: skip
    return js_divergence(positive, negative)


def consistency_of(difference: Tensor) -> Tensor:
    """Return each row's mean cosine with the other rows of `[n, d]`, float64 `[n]`; zero rows give 0."""
    unit = _unit(difference)
    return ((unit @ unit.sum(0)) - (unit * unit).sum(-1)) / (len(unit) - 1)


def agreement_of(difference: Tensor) -> Tensor:
    """Return whether each row points along the mean of the other rows, bool `[n]`."""
    wide = difference.double()
    others = (wide.sum(0) - wide) / (len(wide) - 1)
    return (wide * others).sum(-1) > 0


def _score(r: Readings, normalise: bool, seed: int) -> LayerScore:
    if len(r.positive) < 2:
        raise InputError(f"a layer search needs at least 2 pairs, not {len(r.positive)}")
    group = {"site": r.site}
    js = js_of_rows(r.positive, r.negative, normalise=normalise).numpy()
    same = consistency_of(r.difference).numpy()
    return LayerScore(
        r.site,
        mean_measurement("layer-js", "nats", js, seed=seed, over="pairs", group=group),
        mean_measurement("layer-consistency", "cosine", same, seed=seed, over="pairs", group=group),
        rate_measurement("layer-accuracy", agreement_of(r.difference).numpy(), seed=seed, group=group),
    )


def _unit(x: Tensor) -> Tensor:
    wide = x.double()
    return torch.where(wide.norm(dim=-1, keepdim=True) > 0, torch.nn.functional.normalize(wide, dim=-1), 0.0)
