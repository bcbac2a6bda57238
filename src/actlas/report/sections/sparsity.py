"""How many MLP neurons a language model needs for a token: as it is, and at one percent more perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actlas.core.measurement import Measurement
from actlas.report.content import DataUse, Figure, SectionResult, Table, Tile
from actlas.report.plots import lines
from actlas.report.registry import Context, section
from actlas.report.shrink.on_card import frontier_figure

P = 1.0
"""Allowed rise of the perplexity, in percent."""
Points = list[tuple[float, float, float | None, float | None]]


@section("sparsity", title="Activation sparsity", order=50, needs=("causal-lm",), cost=3.2)
def sparsity(context: Context) -> SectionResult:
    """Search the CETT at which perplexity rises by one percent, and compare with a plain rule there."""
    from actlas.data import corpus
    from actlas.measure.activation_sparsity import activation_sparsity
    from actlas.measure.sparsity import ppl_p_sparsity

    model, budget = context.model, context.budget
    tokens = budget.sparsity_tokens
    text = corpus("mixed", seed=context.seed)
    found = ppl_p_sparsity(
        model,
        text,
        p=P,
        seed=context.seed,
        tokens=tokens,
        sample=max(64, tokens // 4),
        per_document=_piece(context),
        evaluations=budget.sparsity_passes,
    )
    rival = _rival(context, text, found)
    natural = activation_sparsity(model, text, seed=context.seed, tokens=tokens, per_document=64)
    overall = [m for m in natural if m.group["layer"] == "all"]
    details = {k: v for k, v in found.details.items() if k not in ("thresholds", "per_layer")}
    headline = replace(found, details=details)
    ratio = float(found.details["ppl_ratio"])
    missed = []
    if found.low is None or found.high is None or not found.low <= found.value <= found.high:
        headline = replace(headline, low=None, high=None, interval="exact")
        missed = [
            f"No interval: the search ended at {100 * (ratio - 1):+.2g}% perplexity instead of {P:+g}%."
        ]
    figures = [_curve(found, rival), _layers(found.details["per_layer"], natural)]
    rise = P if not missed else 100 * (ratio - 1)
    intro = (
        f"Dropping the neurons with the least effect on each MLP's output, {found.value:.0%} of them can go "
        f"while perplexity rises by {rise:.2g}%. One threshold on the relative error of the output (CETT, "
        "cumulative error of tail truncation) is shared by all layers, so layers keep as many neurons as "
        "they need.\n\nAt the same number of active neurons, choosing them by the size of their gate "
        f"instead (top-k of each token) makes the perplexity {rival.value:.3g} times the dense model's."
    )
    notes = [
        *missed,
        "Neurons that are dropped are masked, not skipped: the number says how much could be saved, "
        "not how fast the model becomes.",
        f"The interval comes from {found.n} documents; below about 8,000 tokens it is wide.",
    ]
    tables: list[Table] = []
    if (shrunk := frontier_figure(context.edits)) is not None:
        figure, table, said = shrunk
        figures = [*([figure] if figure is not None else []), *figures]
        tables, intro = [table], f"{said}\n\n{intro}"
    tile = Tile(f"Neurons to spare at {rise:+.2g}% perplexity", headline, rank=30)
    data = DataUse("mixed", found.n, "documents", text.take(min(found.n, len(text))).hash, text.source)
    measurements = [headline, rival, *overall]
    return SectionResult(intro, measurements, figures, tables, notes, [tile], [data])


def _rival(context: Context, text: Any, found: Measurement) -> Measurement:
    """The control: as many neurons, chosen by a plainer rule, on the same tokens."""
    import torch

    from actlas.core.edit import compose
    from actlas.measure.likelihood import nll
    from actlas.measure.paired import perplexity_ratio
    from actlas.measure.sparse_edits import KeepTop
    from actlas.measure.sparsity import evaluate_sparse
    from actlas.measure.sparsity_curve import gate_sites

    options: dict[str, Any] = {"tokens": context.budget.sparsity_tokens, "per_document": _piece(context)}
    sites, function = gate_sites(context.model)
    ratio = float(found.details["activation_ratio"])
    edit = compose(KeepTop(site, torch.ones(1), ratio, function) for site in sites)
    base = nll(context.model, text, **options)
    run = evaluate_sparse(context.model, text, edit, **options)
    rule = {"rule": "gate size, top-k"}
    return perplexity_ratio(
        base, run.losses, seed=context.seed, group=rule, note="as many neurons as CETT keeps"
    )


def _piece(context: Context) -> int | None:
    return 64 if context.budget.quick else None


def _curve(found: Measurement, rival: Measurement) -> Figure:
    curve: Points = [(0.0, 0.0, 0.0, 0.0)]
    for _, ratio, ppl, error in found.details["curve"]:
        rise, half = 100 * (ppl - 1), 196 * ppl * error
        known = math.isfinite(half)
        curve.append((1.0 - ratio, rise, rise - half if known else None, rise + half if known else None))
    x = 1.0 - float(found.details["activation_ratio"])
    low, high = (None if b is None else 100 * (b - 1) for b in (rival.low, rival.high))
    series: dict[str, Points] = {
        "by effect (CETT)": sorted(curve),
        "by gate size (top-k)": [(x, 100 * (rival.value - 1), low, high)],
    }
    text = (
        "Rise of the perplexity at each share of dropped neurons that the search tried, with 95% bands, "
        "and of a plainer rule at the same share; the dashed line is the share that is reported."
    )
    return lines(
        "Perplexity against sparsity",
        text,
        series,
        x="share of neurons dropped",
        y="perplexity rise, %",
        percent_x=True,
        marks=[(found.value, "reported")],
    )


def _layers(per_layer: Mapping[str, float], natural: Sequence[Measurement]) -> Figure:
    at_p = [(_block(site), 1.0 - ratio, None, None) for site, ratio in per_layer.items()]
    series: dict[str, Points] = {f"dropped at +{P:g}%": sorted(at_p)}
    for m in natural:
        layer, level = m.group["layer"], m.group["threshold"]
        if layer != "all" and level == "0.1 rms":
            series.setdefault("small as it comes", []).append((int(layer), m.value, m.low, m.high))
    text = (
        "Share of each layer's MLP neurons that can go at the shared threshold, and share whose "
        "activation is below a tenth of the token's RMS as it comes. Layers differ: one sparsity for "
        "all would waste some."
    )
    return lines("Sparsity by layer", text, series, x="layer", y="share of neurons", percent=True)


def _block(site: str) -> int:
    return next((int(part) for part in site.split(".") if part.isdigit()), 0)
