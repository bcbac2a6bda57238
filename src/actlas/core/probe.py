"""Linear probes: a direction in activation space that tells a label, with its held-out quality.

With standardised activations z = (x - m) / s, a probe is

    score(x) = w . x + b      a logit for "means" and "logistic", a predicted number for "ridge"

* `"means"`: w along the difference of the class means of z, threshold half-way between them (the
  nearest-centroid rule); scaled to the log-odds of two Gaussians of equal spread along that direction,
  as in linear discriminant analysis with a diagonal covariance.
* `"logistic"`: L2-regularised logistic regression (Alain and Bengio 2016 use it for every layer).
* `"ridge"`: least squares with an L2 penalty, for labels that are numbers.

The difference of means is the direction that steers best in practice (Marks and Tegmark 2023), while a
logistic probe reads best; `edit` steers along either. A probe is refitted on shuffled labels by default,
and its `measurements` show both numbers and their difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.reading import check_row_sites
from actlas.core.errors import InputError, ShapeError
from actlas.core.layout import HEAD_KINDS
from actlas.core.lens import Lens, check_finite
from actlas.core.methods import method
from actlas.core.probe_data import Examples, Position, gather_examples
from actlas.core.probe_quality import Scorer, judge, split

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

Array = NDArray[np.float64]
ProbeMethod = Literal["means", "logistic", "ridge"]


@dataclass(kw_only=True, eq=False)
class Probe(Lens):
    """A fitted linear probe.

    Attributes:
        weight: float32 `[d]`, in units of score per unit of activation.
        bias: float32 `[]`.
        steer: float32 `[d]`; adding it moves an activation from the negative class mean to the positive
            one along the probe's direction (one standard deviation of the label for `"ridge"`).
        kind: how it was fitted.
        position: which token stood for a text when it was fitted.
        threshold: score above which the label is taken to be true (0, the point of equal odds).
    """

    weight: Tensor
    bias: Tensor
    steer: Tensor
    kind: str = "logistic"
    position: str | int = "last"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or self.steer.shape != self.weight.shape or self.bias.numel() != 1:
            raise ShapeError(
                f"a probe needs weight and steer [d] and one bias, not {list(self.weight.shape)}, "
                f"{list(self.steer.shape)} and {list(self.bias.shape)}"
            )
        check_finite("Probe", weight=self.weight, bias=self.bias, steer=self.steer)

    @property
    def channels(self) -> int:
        return len(self.weight)

    def score(self, x: Tensor) -> Tensor:
        """Return the logit (or the predicted number), `[...]` for activations `[..., d]`."""
        weight = self.weight.to(x.device)
        return self.flat(x).to(weight.dtype) @ weight + self.bias.to(weight).reshape(())

    def encode(self, x: Tensor) -> Tensor:
        """Return the score as one code, `[..., 1]`."""
        return self.score(x).unsqueeze(-1)

    def direction(self, feature: int = 0) -> Tensor:
        return self.steer


@method(
    "probe",
    room="core",
    returns="Lens",
    data="labelled",
    summary="a linear probe for a label, with held-out quality beside shuffled labels",
    example="actlas fit probe smollm2 pairs.jsonl --site blocks.15.resid_post -o probe/",
)
def fit_probe(
    model: Model | None,
    data: Any,
    site: str,
    *,
    method: ProbeMethod = "logistic",
    position: Position = "last",
    standardise: bool = True,
    regularisation: float | None = None,
    held_out: float = 0.3,
    controls: int = 5,
    seed: int = 0,
) -> Probe:
    """Fit a linear probe at a site and measure it on texts that it was not fitted on.

    Args:
        model: whose activations are read; may be `None` if `data` holds activations.
        data: `(text, label)` items, `(positive, negative)` pairs, records or objects with those fields,
            or arrays `(x [n, d], y [n])`; see `actlas.core.probe_data`.
        site: one site with rows of channels.
        method: `"means"`, `"logistic"` or `"ridge"`.
        position: which token stands for a text: `"last"`, `"first"`, `"mean"` or a number.
        standardise: divide each channel by its standard deviation first, so that large channels do not
            decide alone.
        regularisation: L2 penalty on the standardised weights; default 1 for `"logistic"` (scikit-learn's
            `C = 1`), and d for `"ridge"`, the Bayes choice for weights of variance 1/d and unit noise.
        held_out: fraction of the texts that is kept for testing.
        controls: fits to shuffled labels; 0 skips the control.
        seed: of the split, the shuffles and the bootstrap.

    Returns:
        The probe fitted on the rest; `probe.measurements` holds its held-out accuracy and AUC (or R^2),
        the control and the difference.

    Raises:
        InputError: an unknown method, unfit data, labels that do not go with the method.
        SiteError: a site that does not exist, is not one site, or has no rows of channels.
    """
    if method not in ("means", "logistic", "ridge"):
        raise InputError(f"method is {method!r}; it must be 'means', 'logistic' or 'ridge'")
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 0:
        raise InputError(f"controls is {controls!r}; it must be a whole number, 0 or more")
    where = None if model is None else _one_site(model, site)
    examples = gather_examples(model, data, where, position)
    _check_labels(examples, method)
    penalty = _penalty(regularisation, method, examples.x.shape[1])
    parts = split(examples, held_out, seed)
    fitted: list[_Linear] = []

    def fit(chosen: Examples) -> Scorer:
        linear = _fit(chosen, method, standardise, penalty)
        fitted.append(linear)
        return linear.score

    name = site if where is None else where.name
    _, measurements = judge(
        fit,
        examples,
        parts,
        classify=method != "ridge",
        controls=controls,
        seed=seed,
        about={
            "method": method,
            "position": position,
            "fitted on": len(parts[0]),
            "regularisation": penalty,
            "positive share": float(examples.y.mean()) if examples.binary else None,
        },
        group={"site": name},
    )
    linear = fitted[0]
    return Probe(
        site=name,
        heads=_heads(where),
        fingerprint=None if model is None else model.fingerprint,
        measurements=measurements,
        weight=torch.tensor(linear.weight, dtype=torch.float32),
        bias=torch.tensor(linear.bias, dtype=torch.float32),
        steer=torch.tensor(_steer(examples.at(parts[0]), linear, method), dtype=torch.float32),
        kind=method,
        position=position,
    )


@dataclass(frozen=True)
class _Linear:
    weight: Array
    bias: float

    def score(self, x: Array) -> Array:
        scores: Array = x @ self.weight + self.bias
        return scores


def _fit(examples: Examples, method: str, standardise: bool, penalty: float) -> _Linear:
    """Fit on standardised activations and fold the standardisation into weight and bias."""
    centre = examples.x.mean(0)
    scale = examples.x.std(0) if standardise else np.ones_like(centre)
    scale = np.where(scale > 1e-12 * max(float(np.abs(examples.x).max()), 1e-30), scale, 1.0)
    z = (examples.x - centre) / scale
    fits: dict[str, Callable[[Array, Array, float], tuple[Array, float]]] = {
        "means": _fit_means,
        "logistic": _fit_logistic,
        "ridge": _fit_ridge,
    }
    weight, bias = fits[method](z, examples.y, penalty)
    raw = weight / scale
    return _Linear(raw, bias - float(centre @ raw))


def _fit_means(z: Array, y: Array, penalty: float) -> tuple[Array, float]:
    positive, negative = z[y > 0.5], z[y <= 0.5]
    difference = positive.mean(0) - negative.mean(0)
    along, across = positive @ difference, negative @ difference
    gap = float(along.mean() - across.mean())
    spread = float(((along - along.mean()) ** 2).sum() + ((across - across.mean()) ** 2).sum()) / len(y)
    slope = gap / max(spread, 1e-6 * gap * gap, 1e-30)
    return slope * difference, -slope * float(along.mean() + across.mean()) / 2


def _fit_logistic(z: Array, y: Array, penalty: float) -> tuple[Array, float]:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1 / penalty, max_iter=2000).fit(z, y > 0.5)
    return fitted.coef_[0], float(fitted.intercept_[0])


def _fit_ridge(z: Array, y: Array, penalty: float) -> tuple[Array, float]:
    from sklearn.linear_model import Ridge

    fitted = Ridge(alpha=penalty).fit(z, y)
    return fitted.coef_, float(fitted.intercept_)


def _steer(examples: Examples, linear: _Linear, method: str) -> Array:
    """Return the displacement that strength 1 stands for; see `Probe.steer`."""
    length = float(linear.weight @ linear.weight)
    if method == "ridge":
        return linear.weight * float(examples.y.std()) / max(length, 1e-30)
    difference: Array = examples.x[examples.y > 0.5].mean(0) - examples.x[examples.y <= 0.5].mean(0)
    if method == "means":
        return difference
    return linear.weight * float(linear.weight @ difference) / max(length, 1e-30)


def _check_labels(examples: Examples, method: str) -> None:
    values = np.unique(examples.y)
    if len(values) < 2:
        raise InputError(f"every label is {values[0]:g}; a probe needs examples of both kinds")
    if method != "ridge" and not examples.binary:
        shown = ", ".join(f"{v:g}" for v in values[:4])
        raise InputError(f"{method} needs labels 0 and 1, not {shown}; for numbers use method='ridge'")


def _penalty(given: float | None, method: str, d: int) -> float:
    if given is None:
        return float(d) if method == "ridge" else 1.0
    if not isinstance(given, (int, float)) or not given > 0:
        raise InputError(f"regularisation is {given!r}; it must be a number above 0")
    return float(given)


def _one_site(model: Model, site: str) -> Site:
    found = check_row_sites(model.resolve(site))
    if len(found) != 1:
        raise InputError(
            f"a probe reads one site, and {site!r} names {len(found)}; give one, e.g. {found[0].name}"
        )
    return found[0]


def _heads(site: Site | None) -> int | None:
    """Return the number of heads of a site whose value has a head axis."""
    if site is None or site.features is None or site.kind not in HEAD_KINDS:
        return None
    return site.features[0] if len(site.features) == 2 else None
