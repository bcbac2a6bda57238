"""r-sparse: exact columns for large inputs, a low-rank map for the rest, one budget of weights.

Zhang et al. 2025, "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference". At 50% sparsity on
all 210 linear layers of SmolLM2's blocks: columns only (alpha = 1), a quarter of the budget for the low-rank
map, low rank only, and one alpha per kind of layer found by an evolutionary search on calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.sparse_arms import CONTEXT, compared, ratio, reading, rows, texts

ASKED = "0.5"
WORSE = 0.01


def judge(m: Measured) -> list[Check]:
    """Central: on held-out text the searched mix loses no more than 1% perplexity to columns only
    (alpha = 1): the 95% interval (paired bootstrap over documents) of its extra loss lies below 0.01 nats;
    weights touched equal within 0.02. Also: the search keeps alpha above 0.8 for most kinds of layers, as
    the configuration that the authors ship does; a uniform quarter for the low-rank map loses more than
    columns only (expected at this width); and low rank only is worse than both together.
    """
    searched = m.get("extra-loss", rule="searched", over="columns only", asked=ASKED)
    quarter = m.get("extra-loss", rule="alpha 0.75", over="columns only", asked=ASKED)
    only = m.get("extra-loss", rule="low rank only", over="alpha 0.75", asked=ASKED)
    alphas = [x.value for x in m.every("alpha")]
    high = sum(a > 0.8 for a in alphas)
    mostly = Check(
        "the search keeps most budget for columns",
        high > len(alphas) / 2 if alphas else None,
        f"{high} of {len(alphas)} kinds of layers above 0.8",
    )
    return [
        Check.below("the searched mix is no worse than columns only", searched, WORSE, central=True),
        mostly,
        Check.above("a uniform low-rank quarter loses more than columns only", quarter, 0.0),
        Check.above("low rank only is worse than the mix", only, 0.0),
    ]


@reproduction(
    "r-sparse",
    claim="A searched mix of exact columns and a low-rank map is never worse than columns alone at 50% "
    "sparsity.",
    judge=judge,
    quick={"tokens": 1536, "calibration": 1280, "evaluations": 10, "search_tokens": 256},
    full={"tokens": 8192, "calibration": 4096, "evaluations": 80, "search_tokens": 2048},
)
def r_sparse(*, seed: int, tokens: int, calibration: int, evaluations: int, search_tokens: int) -> Findings:
    """Run it.

    Args:
        seed: of texts, samples, the search and the bootstrap.
        tokens: tokens of held-out text.
        calibration: tokens of calibration text.
        evaluations: losses that the search measures.
        search_tokens: tokens of calibration text on which it measures them.
    """
    from actlas.measure.likelihood import nll
    from actlas.models import load
    from actlas.sparsity.input_sparsity import calibrate_inputs
    from actlas.sparsity.r_sparse import RankAware, search

    model = load("smollm2")
    fit, held_out = texts(seed)
    read = calibrate_inputs(model, fit, tokens=calibration, context=CONTEXT, seed=seed)
    rule = RankAware(model, read, float(ASKED))

    def loss(alphas: Mapping[str, float]) -> float:
        with model.edit(rule.edit(alphas)):
            found = nll(model, fit, tokens=search_tokens, context=CONTEXT, per_document=128)
        return float(found.nll.sum() / found.tokens.sum())

    best, _ = search(loss, rule.kinds, evaluations=evaluations, seed=seed)
    base = nll(model, held_out, **reading(tokens))
    measured = compared(
        model,
        held_out,
        {
            "columns only": rule.edit(1.0),
            "searched": rule.edit(best),
            "alpha 0.75": rule.edit(0.75),
            "low rank only": rule.edit(0.0),
        },
        base=base,
        asked=ASKED,
        tokens=tokens,
        seed=seed,
        pairs=[
            ("searched", "columns only"),
            ("alpha 0.75", "columns only"),
            ("low rank only", "alpha 0.75"),
        ],
    )
    said = ", ".join(
        f"{name} {ratio(measured, name, ASKED):.3f}" for name in ("columns only", "searched", "alpha 0.75")
    )
    measured += [
        Measurement("alpha", value, "fraction", evaluations, seed=seed, group={"kind": kind})
        for kind, value in best.items()
    ]
    kept = [x for x in measured if x.group.get("rule") != "low rank only"]
    plot = Plot(
        "What rank-aware sparsity costs at 50%",
        rows(kept),
        x="weights touched",
        y="perplexity ratio",
        color="rule",
        mark="point",
    )
    return Findings(measured, f"perplexity ratio at 50% sparsity: {said}", NOTE, [plot])


NOTE = (
    "Published: quality of the dense model nearly kept at 50% with Llama 2, Llama 3 and Mistral, with one "
    "alpha per layer from a search of about an hour on a GPU; the shipped configuration has alpha 1 in 86% "
    "of its layers. Official code: with its default setting only the last 10% of a prompt is sparse, and "
    "ranks under grouped queries are counted with hidden-size outputs. Ours: SmolLM2-135M, every token "
    "sparse, true shapes, thresholds from pooled calibration tokens, one alpha per kind of layer (seven "
    "knobs), the search's own text apart from the held-out text. With columns only the rule is WINA's. At "
    "width 576 the rank that a budget pays for carries little of a layer, so low rank costs more here than "
    "in models ten times as wide."
)
