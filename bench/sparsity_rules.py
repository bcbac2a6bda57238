"""What rules for skipping inputs cost at equal weights touched: published ones, and this room's own.

On `smollm2`, all linear layers of all blocks, every token sparse, half of the weights touched; the same
held-out prose for all, thresholds from the same calibration text. Nothing is timed: the figure is the rise of
the loss, and the target that the upper end of the 95% interval (paired bootstrap over documents) of
`priced-inputs` minus a published rule lies below 0. CHESS skips gates and inputs of the query and output
projections; its share is the one that comes to half of the weights. R-Sparse spends a tenth of its budget on
a low-rank map: with none it is WINA's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.harness import Figure, report, say

SPARSITY, OWN = 0.5, "priced-inputs"
TOKENS, CALIBRATION, GRADIENTS, CONTEXT = 1024, 1024, 512, 192


def rules(model: Any, text: list[Any], seed: int = 0) -> dict[str, Any]:
    """Return the edits by name, all fitted on the same text to touch half of the weights."""
    from actlas.sparsity.chess import calibrate_gates, fit_chess
    from actlas.sparsity.priced_inputs import fit_priced_inputs
    from actlas.sparsity.r_sparse import fit_r_sparse
    from actlas.sparsity.wina import fit_magnitude, fit_wina

    read = calibrate_gates(model, text, tokens=CALIBRATION, context=CONTEXT, seed=seed)
    top: dict[str, Any] = {"sparsity": SPARSITY, "select": "topk"}  # exactly half, as thresholds are not

    def r_sparse(sparsity: float) -> Any:
        return fit_r_sparse(model, read, alpha=0.9, sparsity=sparsity)

    return {
        "magnitude": fit_magnitude(model, read, **top),
        "WINA": fit_wina(model, read, **top),
        "WINA, released": fit_wina(model, read, norms="released", **top),
        "CHESS": fit_chess(model, read, sparsity=chess_share(model, SPARSITY)),
        "R-Sparse": matched(model, text, r_sparse),
        OWN: fit_priced_inputs(
            model, text, sparsity=SPARSITY, tokens=CALIBRATION, gradient_tokens=GRADIENTS, context=CONTEXT,
            seed=seed,
        ),
    }  # fmt: skip


def matched(model: Any, text: list[Any], fit: Callable[[float], Any]) -> Any:
    """Fit once, see how many weights are touched, and fit again with the miss taken off the sparsity."""
    from actlas.measure.sparsity_price import run_sparse

    touched = run_sparse(model, text, fit(SPARSITY), tokens=256, context=CONTEXT, per_document=64).touched
    return fit(SPARSITY - (1 - SPARSITY - touched.weights))


def chess_share(model: Any, sparsity: float) -> float:
    """Return the share of gates, and of inputs of Q and O, that skips `sparsity` of all weights."""
    from actlas.measure.linear_layers import linear_layers

    layers = linear_layers(model)
    skipping = sum(x.size for x in layers if x.name in ("up_proj", "down_proj", "q_proj", "o_proj"))
    return sparsity * sum(x.size for x in layers) / skipping


def figures(found: list[Any], published: list[str]) -> list[Figure]:
    """Return the table's lines from `compare_rules`' measurements."""
    by = {(m.name, m.group.get("rule"), m.group.get("over")): m for m in found}
    out = []
    for name in (*published, OWN):
        touched, ratio = by["weights-touched", name, None], by["perplexity-ratio", name, None]
        note = f"weights touched {touched.value:.3f}; 95% interval {ratio.low:.3f} to {ratio.high:.3f}"
        out.append(Figure(f"{name}: perplexity over dense", ratio.value, "x", None, note))
    for name in published:
        m = by["extra-loss", OWN, name]
        if m.value != m.value:
            out.append(Figure(f"{OWN} minus {name}, upper end", None, "nats/token", 0.0, m.note))
            continue
        note = f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}], {m.n} documents; {m.note}"
        out.append(Figure(f"{OWN} minus {name}, upper end", m.high, "nats/token", 0.0, note))
    return out


def main(rounds: int) -> bool:
    """Measure once (nothing is timed, so `rounds` does not matter) and report."""
    import actlas
    from actlas.data import corpus
    from actlas.measure.sparsity_price import compare_rules

    model = actlas.load("smollm2")
    documents = list(corpus("prose", seed=0))
    made = rules(model, documents[:40])
    say(f"{len(made)} rules fitted")
    published = [name for name in made if name != OWN]
    found = compare_rules(
        model, documents[40:], made, pairs=[(OWN, name) for name in published], tokens=TOKENS,
        context=CONTEXT, per_document=CONTEXT // 2,
    )  # fmt: skip
    title = f"Rules for skipping inputs, smollm2, {SPARSITY:.0%} of the weights, {TOKENS} tokens of prose"
    return report(
        "sparsity-rules", title, figures(found, published), {"measured": [m.to_json() for m in found]}
    )
