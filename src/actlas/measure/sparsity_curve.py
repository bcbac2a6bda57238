"""Perplexity against activation ratio for several rules that drop MLP neurons.

    sparsity_curve(model, corpus, *, cetts=(0.1, 0.2, 0.3, 0.4), methods=METHODS, ...) -> list[Measurement]

CETT against the baselines of Sparsing Law (section 4.1) and one that the paper does not test. All rules are
compared at the activation ratio that CETT *achieved* on the evaluated tokens, and each says its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.cett import Neurons, mlp_sites, sample_neurons
from actlas.measure.likelihood import nll
from actlas.measure.paired import perplexity_ratio
from actlas.measure.reading import read
from actlas.measure.sparse_edits import KeepTop, MaskBelow, activation_function
from actlas.measure.sparsity import evaluate_sparse, leave_first

if TYPE_CHECKING:
    from actlas.core.model import Model

METHODS = ("cett", "topk", "fat", "topk-output")


def sparsity_curve(
    model: Model,
    corpus: Iterable[Any],
    *,
    seed: int = 0,
    cetts: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
    methods: Sequence[str] = METHODS,
    tokens: int = 8192,
    sample: int = 1024,
    context: int = 512,
    per_document: int | None = None,
    skip_first: int = 0,
    joint: bool = False,
) -> list[Measurement]:
    """Measure the perplexity ratio of several dropping rules at equal activation ratios.

    Args:
        model, corpus, seed, tokens, sample, context, per_document, skip_first: as in `ppl_p_sparsity`.
        cetts: CETT values; the activation ratio that each reaches is what the other rules get.
        methods: `"cett"`; `"topk"`, per token by gate magnitude `|s_i|`; `"fat"`, one global threshold on
            `|s_i|`; `"topk-output"`, per token by neuron-output norm, a stronger baseline that the paper
            does not test.
        joint: let `"topk"` choose over all tokens of a batch together, as the released code does.

    Returns:
        one `perplexity-ratio` per method and CETT, grouped by `method` and `cett`; the ratio achieved and
        the paired standard error of the loss are in `details`.

    Raises:
        InputError: an unknown method.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise InputError(f"unknown method {unknown[0]!r}: one of {', '.join(METHODS)}")
    corpus = list(corpus)
    options: dict[str, Any] = {"tokens": tokens, "context": context, "per_document": per_document}
    neurons = sample_neurons(model, corpus, sample=sample, skip_first=skip_first, seed=seed, **options)
    gates = _gates(model, corpus, seed, sample, options) if "fat" in methods else None
    base = nll(model, corpus, **options)
    out = []
    for cett in cetts:
        thresholds = neurons.thresholds(cett, tolerance=0.002)
        reached = neurons.ratio(thresholds)
        for method in ("cett", *(m for m in methods if m != "cett")):
            edit = _rule(model, neurons, gates, method, thresholds, reached, joint)
            edit = leave_first(edit, skip_first, context)
            run = evaluate_sparse(model, corpus, edit, skip_first=skip_first, **options)
            if method == "cett":
                reached = run.active.ratio  # what CETT achieved is what the others get
            if method in methods:
                group = {"method": method, "cett": f"{cett:g}"}
                details = {"activation_ratio": run.active.ratio, "per_layer": run.active.per_site}
                out.append(perplexity_ratio(base, run.losses, seed=seed, group=group, details=details))
    return out


def gate_sites(model: Model) -> tuple[list[str], str]:
    """Return the sites whose `|f(x)|` is the neuron's gate, and the name of f.

    The gate's pre-activation with the model's activation function for gated MLPs; `mlp.act` itself, with
    the identity, where there is no gate.
    """
    acts = mlp_sites(model)
    present = {s.name for s in model.sites() if s.absent is None}
    gates = [s.name.replace("mlp.act", "mlp.gate") for s in acts]
    if not all(g in present for g in gates):
        return [s.name for s in acts], ""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return gates, value
    raise InputError(f"the activation function of {model.name} is not named in its configuration")


def _gates(
    model: Model, corpus: list[Any], seed: int, sample: int, options: Mapping[str, Any]
) -> torch.Tensor:
    """Return a sorted sample of gate magnitudes of all layers together."""
    sites, function = gate_sites(model)
    values = []
    budget = min(sample, options["tokens"] or sample)
    for trace in read(model, corpus, sites, tokens=budget, context=options["context"], per_document=128):
        for site in sites:
            rows = activation_function(function, trace.rows(site).float()).abs()
            values.append(rows.flatten()[:: max(1, rows.numel() // 4096)])
    return torch.cat(values).sort().values


def _rule(
    model: Model,
    neurons: Neurons,
    gates: torch.Tensor | None,
    method: str,
    thresholds: Mapping[str, float],
    ratio: float,
    joint: bool,
) -> Edit:
    if method == "cett":
        return neurons.to_edit(thresholds)
    if method == "topk-output":
        return compose(KeepTop(site, layer.columns, ratio) for site, layer in neurons.layers.items())
    sites, function = gate_sites(model)
    if method == "topk":
        return compose(KeepTop(site, torch.ones(1), ratio, function, joint) for site in sites)
    assert gates is not None
    bound = gates[min(len(gates) - 1, int((1 - ratio) * len(gates)))]
    return compose(MaskBelow(site, bound.reshape(1), function) for site in sites)
