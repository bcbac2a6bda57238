"""How sparse a language model's MLP activations may become: PPL-p% sparsity by CETT.

    ppl_p_sparsity(model, corpus, *, p=1.0, seed=0, tokens=8192, ...) -> SparsityMeasurement (.to_edit())
    evaluate_sparse(model, corpus, edit, base, ...) -> SparseRun

Beside it: `cett_thresholds`, `sample_neurons` (cett), `MaskBelow`, `KeepTop` (sparse_edits), `sparsity_curve`
(sparsity_curve: the paper's baselines), `activation_sparsity` (activation_sparsity: sparsity as it is) and
`fit_activation_law` (activation_law).

*PPL-p% sparsity* asks for an effect, not for a threshold: the largest share of neurons that can be dropped,
by one CETT value shared by all layers, before perplexity on real text rises by p percent. It works for any
activation function, and with p = 1 it is the default sparsity number of a card.

The search stops at noise: perplexities are compared on the same tokens, with the paired standard error
over documents, and a bracket whose ends do not differ by more than that is not divided further. The
interval of the sparsity is that of the perplexity increase, carried over to sparsity along the curve.

Source: Luo et al. 2024, "Sparsing Law" (arXiv 2411.02335), section 4.1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.installation import EditHadNoEffect
from actlas.core.measurement import Measurement
from actlas.measure.activation_law import ActivationLaw, fit_activation_law
from actlas.measure.cett import Neurons, cett_thresholds, mlp_sites, sample_neurons
from actlas.measure.likelihood import Losses, nll
from actlas.measure.paired import loss_rise
from actlas.measure.registry import measure
from actlas.measure.sparse_edits import Active, KeepTop, MaskBelow, count_active

if TYPE_CHECKING:
    from actlas.core.model import Model

__all__ = [
    "ActivationLaw",
    "KeepTop",
    "MaskBelow",
    "SparsityMeasurement",
    "cett_thresholds",
    "fit_activation_law",
    "evaluate_sparse",
    "ppl_p_sparsity",
    "sample_neurons",
]


_FIRST = 0.05  # CETT of the first sparse pass
_NEAR = 0.25  # the search ends this many standard errors from the target
_RESOLUTION = 2e-4  # activation ratios closer than this are one answer


@dataclass(frozen=True)
class SparsityMeasurement(Measurement):
    """A sparsity with the rule that reaches it.

    Attributes:
        activation_ratio: share of entries that stay active on the evaluated tokens, mean over layers.
        cett: the shared CETT.
        thresholds: site -> threshold of the neuron-output norm.
        per_layer: site -> activation ratio.
    """

    activation_ratio: float = math.nan
    cett: float = math.nan
    thresholds: Mapping[str, float] = field(default_factory=dict, repr=False)
    per_layer: Mapping[str, float] = field(default_factory=dict, repr=False)
    edit: Edit | None = field(default=None, compare=False, repr=False)

    def to_edit(self) -> Edit:
        """Return the edit that drops these neurons; save it, compose it, limit it with `at`."""
        if self.edit is None:
            raise InputError("this sparsity was not measured in this process; its edit was not kept")
        return self.edit


class _Point(NamedTuple):
    """One evaluation of an edit: rise of the loss in nats per token, its paired standard error, activity."""

    cett: float
    rise: float
    error: float
    active: Active
    thresholds: dict[str, float]


class SparseRun(NamedTuple):
    """What a dropping rule did: the losses under it, and which entries stayed active."""

    losses: Losses
    active: Active


def evaluate_sparse(
    model: Model, corpus: Iterable[Any], edit: Edit, *, skip_first: int = 0, **options: Any
) -> SparseRun:
    """Score text under an edit that drops MLP activations, and count what stayed.

    Args:
        model, corpus: as in `likelihood.nll`, which takes the `options`.
        edit: the rule.
        skip_first: first tokens of each window that are not counted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditHadNoEffect)
        with model.edit(edit), count_active(model, mlp_sites(model), skip_first=skip_first) as active:
            losses = nll(model, corpus, **options)
    return SparseRun(losses, active)


@measure(
    "ppl-p-sparsity",
    summary="share of MLP neurons that can be dropped before perplexity rises by p percent (CETT)",
    unit="fraction",
    needs=("causal-lm",),
    quick={"tokens": 1024, "sample": 256, "evaluations": 5},
    source="Luo et al. 2024, Sparsing Law, section 4.1",
)
def ppl_p_sparsity(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    p: float = 1.0,
    tokens: int = 8192,
    sample: int = 1024,
    context: int = 512,
    per_document: int | None = None,
    skip_first: int = 0,
    evaluations: int = 12,
    tolerance: float = 1e-6,
) -> SparsityMeasurement:
    """Measure CETT-PPL-p% sparsity: drop as many neurons as a perplexity rise of p percent allows.

    Args:
        model: a causal language model; the base is the model as it is, with its installed edits.
        corpus: documents or strings; the same tokens serve calibration and evaluation, as in the paper.
        seed: of the calibration sample.
        p: allowed rise of the perplexity in percent; `PPL_sparse / PPL_dense = 1 + p / 100`.
        tokens: evaluated tokens; below about 8,000 the interval is wide.
        sample: tokens on which CETT is computed.
        context, per_document: window length, and tokens of one document; see `likelihood.nll`.
        skip_first: first tokens of each window that stay dense and count nowhere.
        evaluations: sparse passes at most.
        tolerance: width of the CETT bracket at which the search ends.

    Returns:
        The sparsity (1 - activation ratio, achieved on the evaluated tokens, mean over layers).

    Raises:
        InputError: a `p` that is not positive.
        ModelError: no causal language model or no MLP activations.
    """
    if not p > 0:
        raise InputError(f"p is the allowed rise of perplexity in percent and must be positive, not {p}")
    corpus = list(corpus)
    options: dict[str, Any] = {"tokens": tokens, "context": context, "per_document": per_document}
    neurons = sample_neurons(model, corpus, sample=sample, skip_first=skip_first, seed=seed, **options)
    base = nll(model, corpus, **options)
    target = math.log1p(p / 100)
    points: list[_Point] = []

    def evaluate(cett: float) -> _Point:
        bounds = neurons.thresholds(cett, tolerance=0.002)
        edit = leave_first(neurons.to_edit(bounds), skip_first, context)
        run = evaluate_sparse(model, corpus, edit, skip_first=skip_first, **options)
        points.append(_Point(cett, *loss_rise(base, run.losses), run.active, bounds))
        return points[-1]

    best = _search(evaluate, points, target, evaluations, tolerance)
    value = 1 - best.active.ratio
    low, high = _sparsity_interval(neurons, points, best, target)
    return SparsityMeasurement(
        name="ppl-p-sparsity",
        value=value,
        unit="fraction",
        n=len(base.tokens),
        low=low,
        high=high,
        interval="paired standard error of the loss over documents, carried along the curve",
        seed=seed,
        better="higher",
        note=f"p = {p:g}%, {base.note}; "
        + (f"first {skip_first} tokens dense" if skip_first else "every token sparse")
        + ("" if low is not None else f"; the search ended at {100 * math.expm1(best.rise):+.2g}% instead"),
        details={
            "p": p,
            "activation_ratio": best.active.ratio,
            "cett": best.cett,
            "ppl_ratio": math.exp(best.rise),
            "ppl_ratio_error": math.exp(best.rise) * best.error,
            "per_layer": best.active.per_site,
            "thresholds": best.thresholds,
            "curve": [[q.cett, q.active.ratio, math.exp(q.rise), q.error] for q in sorted(points)],
            "calibration_tokens": neurons.tokens,
        },
        activation_ratio=best.active.ratio,
        cett=best.cett,
        thresholds=best.thresholds,
        per_layer=best.active.per_site,
        edit=leave_first(neurons.to_edit(best.thresholds), skip_first, context),
    )


def leave_first(edit: Edit, skip_first: int, context: int) -> Edit:
    """Return the edit limited to the tokens after the first `skip_first` of a window."""
    return edit.at(positions=range(skip_first, context)) if skip_first else edit


def _search(
    evaluate: Callable[[float], _Point],
    points: list[_Point],
    target: float,
    evaluations: int,
    tolerance: float,
) -> _Point:
    """Find the CETT at which the loss rises by `target`; returns the evaluated point nearest to it.

    The rise goes roughly with the square of CETT, which guides the first steps; later ones interpolate in
    the bracket on logarithmic axes. Ends at noise, at a narrow bracket, or when the passes are used up.
    """
    low: _Point | None = None
    high: _Point | None = None
    cett = _FIRST
    for _ in range(max(1, evaluations)):
        here = evaluate(cett)
        if here.rise < target:
            low = here if low is None or here.cett > low.cett else low
        else:
            high = here if high is None or here.cett < high.cett else high
        if low is not None and high is not None and low.cett >= high.cett:
            break  # not monotone: noise
        if abs(here.rise - target) <= _NEAR * (0.0 if math.isnan(here.error) else here.error):
            break
        if low is not None and high is not None:
            width, gap = high.cett - low.cett, high.rise - low.rise
            if width <= tolerance or gap <= 2 * _NEAR * max(low.error, high.error, 0.0):
                break
            if abs(high.active.ratio - low.active.ratio) < _RESOLUTION:
                break  # the loss jumps here
            cett = _between(low, high, target)
        else:
            factor = math.sqrt(target / max(here.rise, target / 9))
            if high is None and here.cett >= 1:
                break
            cett = min(1.0, here.cett * (max(factor, 1.25) if high is None else min(factor, 0.8)))
    return min(points, key=lambda q: abs(q.rise - target))


def _between(low: _Point, high: _Point, target: float) -> float:
    width = high.cett - low.cett
    if low.rise > 0:
        share = math.log(target / low.rise) / math.log(high.rise / low.rise)
        found = low.cett * (high.cett / low.cett) ** share
    else:
        found = high.cett * math.sqrt(target / high.rise)
    return min(high.cett - 0.1 * width, max(low.cett + 0.1 * width, found))


def _sparsity_interval(
    neurons: Neurons, points: Sequence[_Point], best: _Point, target: float
) -> tuple[float | None, float | None]:
    """Carry `target -+ 1.96 standard errors` of the loss over to sparsity.

    The rise is taken as `k cett^g` through the best point, `g` fitted to the evaluated points (2 if there
    is one only); sparsity at a CETT is read from the calibration sample, shifted to agree at the best point.
    """
    if math.isnan(best.error) or best.rise <= 0:
        return None, None
    usable = [(math.log(q.cett), math.log(q.rise)) for q in points if q.rise > 0]
    spread = len(usable) > 1 and max(u[0] for u in usable) - min(u[0] for u in usable) > 1e-3
    power = float(np.polyfit([u[0] for u in usable], [u[1] for u in usable], 1)[0]) if spread else 2.0
    power = min(4.0, max(1.0, power))
    shift = best.active.ratio - neurons.ratio(best.thresholds)
    bounds = []
    for sign in (-1.0, 1.0):
        rise = target + sign * 1.96 * best.error
        cett = 0.0 if rise <= 0 else min(1.0, best.cett * (rise / best.rise) ** (1 / power))
        ratio = neurons.ratio(neurons.thresholds(cett, tolerance=0.01)) + shift
        bounds.append(min(1.0, max(0.0, 1 - ratio)))
    low, high = min(bounds), max(bounds)
    return (low, high) if low <= 1 - best.active.ratio <= high else (None, None)
