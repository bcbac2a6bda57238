"""Monitors: lenses, calibrated on clean text, that raise an alarm when activations look wrong.

Read at one site; massive rows (first tokens) are left out. Of a text with ordinary token rows x_1 .. x_n:

    norm        s = | mean_t log|x_t|  -  mu | / sigma
    direction   s^2 = sum_j c_j^2 / l_j  +  |r|^2 / l_rest        c = V (m - mean),  m = mean_t x_t
                the Mahalanobis distance of the text's mean, V and l the leading principal components
                and variances of clean tokens, r what they leave over
    known       s = | (m - mean) . u | / sd                        u a direction one has fitted oneself

A steering vector moves the mean of every text by itself, while what the texts say averages out; so the
mean is where to look. The threshold is the clean texts' conformal quantile: of n calibration texts and a
false-alarm rate a, the ceil((n + 1)(1 - a))-th smallest score, so that a new clean text of the same kind
raises an alarm with probability at most a. Text of another kind than the calibration's may raise more.

    monitor = fit_monitor(model, texts, "blocks.20.resid_post", kind="direction", false_alarms=0.05)
    monitor.alarms(model, prompts)          # bool, one a prompt
    edit.when(monitor, monitor.threshold)   # a lens like any other: gate on it

Source: conformal threshold of Vovk, Gammerman and Shafer 2005 (split conformal prediction); the distance
is that of Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples", applied
to a text's mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.direction import Direction
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens, check_finite
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.measure.statistics import rate_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

Kind = Literal["norm", "direction", "known"]
_BATCH = 16
_LEAST = 20


@dataclass(kw_only=True, eq=False)
class Monitor(Lens):
    """A calibrated monitor of one site.

    Attributes:
        mean: float32 `[d]`, mean clean token.
        components: float32 `[k, d]`, orthonormal; the known direction for `"known"`, empty for `"norm"`.
        variance: float32 `[k]`, variance of clean tokens along each.
        rest: mean variance of the other channels; 0 leaves them out.
        centre, spread: mean and standard deviation of a clean token's log norm.
        kind: `"norm"`, `"direction"` or `"known"`.
        threshold: a text with a larger score raises an alarm.
        false_alarms: the rate that the threshold was set for.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    rest: float = 0.0
    centre: float = 0.0
    spread: float = 1.0
    kind: str = "direction"
    threshold: float = math.inf
    false_alarms: float = 0.05

    def __post_init__(self) -> None:
        if self.components.ndim != 2 or self.components.shape[1] != len(self.mean):
            raise ShapeError(f"components must be [k, {len(self.mean)}], not {list(self.components.shape)}")
        check_finite("Monitor", mean=self.mean, components=self.components, variance=self.variance)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def score(self, x: Tensor) -> Tensor:
        """Return the score `[...]` of activations `[..., d]`, each taken as a text of its own."""
        x = self.flat(x).float()
        if self.kind == "norm":
            return (x.norm(dim=-1).clamp_min(1e-30).log() - self.centre).abs() / self.spread
        centred = x - self.mean.to(x)
        codes = centred @ self.components.to(x).T
        squared = (codes.square() / self.variance.to(x)).sum(-1)
        if self.rest > 0:
            left = (centred.square().sum(-1) - codes.square().sum(-1)).clamp_min(0)
            squared = squared + left / self.rest
        return squared.sqrt()

    def text_scores(self, model: Model, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return one score for each text, `[n]`, under whatever is installed on the model."""
        return self.of_rows(token_rows(model, texts, self.site))

    def of_rows(self, rows: Sequence[Tensor]) -> NDArray[np.float64]:
        """Return one score for each text from its ordinary token rows, each `[tokens, d]`."""
        found = []
        for x in rows:
            if self.kind == "norm":
                level = float(x.float().norm(dim=1).clamp_min(1e-30).log().mean())
                found.append(abs(level - self.centre) / self.spread)
            else:
                found.append(float(self.score(x.float().mean(0))))
        return np.array(found)

    def alarms(self, model: Model, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return which texts raise an alarm, `[n]`."""
        result: NDArray[np.bool_] = self.text_scores(model, texts) > self.threshold
        return result

    def rate(self, name: str, alarms: Any, **group: str) -> Measurement:
        """Return the share of alarms with Wilson's interval."""
        about = {"monitor": self.kind, "site": self.site, **group}
        return rate_measurement(name, np.asarray(alarms, dtype=bool), group=about)


@method(
    "monitor",
    room="security",
    returns="Lens",
    summary="an alarm for activations that are pushed away from where clean text has them",
    example="actlas fit monitor smollm2 mixed --site blocks.20.resid_post --kind direction -o monitor/",
    papers=("trojan-activation",),
)
def fit_monitor(
    model: Model,
    data: Any,
    site: str,
    *,
    kind: Kind = "direction",
    direction: Direction | Tensor | None = None,
    false_alarms: float = 0.05,
    components: int = 64,
    texts: int = 200,
    tokens: int | None = 32,
    held_out: float = 0.5,
    seed: int = 0,
) -> Monitor:
    """Calibrate a monitor on clean text.

    Args:
        model: the model in a state that is known to be good.
        data: texts (strings or documents) of the kind that will be monitored, at least 40.
        site: one site with channels; after the places that an attacker may use.
        kind: see the module docstring.
        direction: for `"known"`, the direction to watch.
        false_alarms: rate at which clean texts may raise an alarm.
        components: leading principal components for `"direction"`.
        texts: how many texts to use.
        tokens: first tokens of a document to use; `None` for all. Monitored texts should be as long.
        held_out: share of the texts that sets the threshold; the rest fits the mean and components.
        seed: of the split.

    Returns:
        The monitor; `measurements` hold its false-alarm rate, as set.

    Raises:
        InputError: too few texts for the rate, an unknown kind, or `"known"` without a direction.
    """
    if kind not in ("norm", "direction", "known"):
        raise InputError(f"kind is {kind!r}; it must be 'norm', 'direction' or 'known'")
    if (kind == "known") != (direction is not None):
        raise InputError("kind='known' needs a direction, and only it takes one")
    rows = token_rows(model, clean_texts(model, data, texts, tokens), site)
    name = model.resolve(site)[0].name
    monitor = calibrated(rows, name, kind, direction, false_alarms, components, held_out, seed)
    monitor.fingerprint = model.fingerprint
    return monitor


def calibrated(
    rows: Sequence[Tensor],
    site: str,
    kind: Kind = "direction",
    direction: Direction | Tensor | None = None,
    false_alarms: float = 0.05,
    components: int = 64,
    held_out: float = 0.5,
    seed: int = 0,
) -> Monitor:
    """Return a monitor from the ordinary token rows of clean texts; see `fit_monitor`."""
    if not 0 < false_alarms < 1 or not 0 < held_out < 1:
        raise InputError(f"false_alarms is {false_alarms} and held_out {held_out}; both lie between 0 and 1")
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = len(rows) - max(1, round(held_out * len(rows)))
    least = max(math.ceil(1 / false_alarms) - 1, _LEAST)
    if cut < _LEAST or len(rows) - cut < least:
        raise InputError(
            f"{len(rows)} texts are too few: {_LEAST} to fit and {least} to set a false-alarm rate of "
            f"{false_alarms:g} are needed"
        )
    monitor = monitor_of([rows[i] for i in order[:cut]], site, kind, direction, components)
    clean = monitor.of_rows([rows[i] for i in order[cut:]])
    monitor.false_alarms, monitor.threshold = false_alarms, conformal(clean, false_alarms)
    monitor.measurements = (monitor.rate("false alarms, as calibrated", clean > monitor.threshold),)
    return monitor


def monitor_of(
    rows: Sequence[Tensor], site: str, kind: Kind, direction: Any = None, components: int = 64
) -> Monitor:
    """Return a monitor without a threshold from the ordinary token rows of clean texts."""
    x = torch.cat([r.double() for r in rows])
    mean, logs = x.mean(0), x.norm(dim=1).clamp_min(1e-30).log()
    centred = x - mean
    if kind == "known":
        vector = direction.vector if isinstance(direction, Direction) else torch.as_tensor(direction)
        vector = vector.flatten().double()
        if vector.shape != mean.shape:
            raise ShapeError(f"the direction has {len(vector)} channels; {site} has {len(mean)}")
        basis = (vector / vector.norm().clamp_min(1e-30)).unsqueeze(0)
        variance, rest = (centred @ basis.T).square().mean(0), 0.0
    elif kind == "direction":
        k = min(components, x.shape[1] - 1, len(x) - 1)
        size, right = torch.linalg.eigh(centred.T @ centred / len(x))
        basis, variance = right[:, -k:].T.flip(0), size[-k:].flip(0)
        rest = float(size[:-k].mean().clamp_min(1e-12))
    else:
        basis, variance, rest = x.new_zeros(0, x.shape[1]), x.new_zeros(0), 0.0
    return Monitor(
        site=site,
        mean=mean.float(),
        components=basis.float().contiguous(),
        variance=variance.clamp_min(1e-12).float(),
        rest=rest,
        centre=float(logs.mean()),
        spread=float(logs.std().clamp_min(1e-12)),
        kind=kind,
    )


def conformal(clean: NDArray[np.float64], false_alarms: float) -> float:
    """Return the threshold that a new clean score exceeds with probability at most `false_alarms`."""
    n = len(clean)
    rank = math.ceil((n + 1) * (1 - false_alarms))
    return math.inf if rank > n else float(np.sort(clean)[rank - 1])


def token_rows(model: Model, texts: Sequence[str], site: str) -> list[Tensor]:
    """Return the ordinary token rows of each text at a site, float32 `[tokens, d]`.

    Raises:
        InputError: no texts, or a pattern that names several sites.
    """
    where = model.resolve(site)
    if len(where) != 1 or not texts:
        raise InputError(
            f"{site!r} names {len(where)} sites for {len(texts)} texts; a monitor reads one site"
        )
    name = where[0].name
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for at in range(0, len(order), _BATCH):
        batch = order[at : at + _BATCH]
        trace = model.trace([texts[i] for i in batch], name)
        mask = trace.mask
        for row, i in enumerate(batch):
            x = trace[name][row].flatten(1)
            x = x[mask[row].to(x.device)] if mask is not None else x
            massive = massive_rows(x.float())
            found[i] = (x if bool(massive.all()) else x[~massive]).float().cpu()
    return found


def clean_texts(model: Model, data: Any, most: int, tokens: int | None) -> list[str]:
    """Return up to `most` texts, each its first `tokens` tokens."""
    found: list[str] = []
    for item in [data] if isinstance(data, str) else data:
        text = item if isinstance(item, str) else getattr(item, "text", "")
        if not text.strip():
            continue
        if tokens is not None and model.tokenizer is not None:
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            text = model.tokenizer.decode(ids[:tokens]) if len(ids) > tokens else text
        if text.strip():
            found.append(text)
        if len(found) == most:
            break
    return found
