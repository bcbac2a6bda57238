"""void: layers that barely grow the hidden state, and what becomes of a model that skips them.

Shemiranifar 2025, "Void in Language Models". Two claims are tested apart on SmolLM2. Descriptive: prompt and
response use different layers. Causal: void layers are not needed. The released code skips nothing, it only
reads the state after a token's last active layer ("readout"); here true skipping stands beside it, and
beside that the control, as many layers skipped at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actlas.core.measurement import Measurement, format_number
from actlas.core.progress import progress
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

if TYPE_CHECKING:
    from actlas.core.model import Model

KEPT = 1.1  # a perplexity ratio up to which quality counts as kept


def judge(m: Measured) -> list[Check]:
    """Central: the usage profiles of prompt and response lie further apart than those of two random halves
    of the prompts (lower end against upper end; failed if no further apart than the mean of the halves);
    and truly skipping void layers raises the loss less than skipping as many layers at random, by paired
    intervals above 0 at every alpha (failed if at none, open if at some). Also: true skipping, and reading
    out after the last active layer, each keep the perplexity ratio at or below 1.1 at some alpha; and the
    accuracy under true skipping at the greatest alpha is not below the full model's.
    """
    distance = m["profile-distance"]
    base = distance.baseline
    assert base is not None and base.high is not None and distance.low is not None
    said = f"{distance}; halves {base.value:.3f} [{base.low:.3f}, {base.high:.3f}]"
    differs = True if distance.low > base.high else False if distance.value <= base.value else None
    checks = [Check("prompt and response use different layers", differs, said, central=True)]
    gaps = m.every("extra loss of random skipping over true skipping")
    above = [g.low is not None and g.low > 0 for g in gaps]
    said = "; ".join(f"alpha {g.group['alpha']}: {g.value:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for g in gaps)
    passed = True if above and all(above) else None if any(above) or not above else False
    checks.append(Check("true skipping beats random skipping", passed, said or "not measured", central=True))
    for mode, question in (("skip", "true skipping keeps quality"), ("readout", "readout keeps quality")):
        found = m.every("void-perplexity", mode=mode)
        said = "; ".join(
            f"alpha {x.group['alpha']}: x{x.value:.2f} at {x.details['usage']:.0%} usage" for x in found
        )
        checks.append(Check(question, any(x.value <= KEPT for x in found), said))
    change = m.get("change of accuracy", mode="skip")
    if change is None or change.high is None:
        checks.append(Check("true skipping keeps accuracy", None, "not measured in this run"))
    else:
        checks.append(Check("true skipping keeps accuracy", change.high >= 0, f"{change}"))
    return checks


@reproduction(
    "void",
    claim="Prompt and response use different layers, and layers that barely grow a token's state are not "
    "needed for it.",
    judge=judge,
    quick={
        "questions": 40,
        "answer_tokens": 24,
        "alphas": (0.1, 0.8),
        "tokens": 1536,
        "items": 48,
        "signals": ("norm",),
    },
    full={
        "questions": 80,
        "answer_tokens": 50,
        "alphas": (0.1, 0.3, 0.5, 0.8),
        "tokens": 8192,
        "items": 200,
        "signals": ("norm", "distance", "angle"),
    },
)
def void(
    *,
    seed: int,
    questions: int,
    answer_tokens: int,
    alphas: Sequence[float],
    tokens: int,
    items: int,
    signals: Sequence[Any],
) -> Findings:
    """Run it.

    Args:
        seed: seed of sampling, skips and bootstraps.
        questions: template questions whose prompt and answer are traced.
        answer_tokens: tokens generated for each, at temperature 0.6 and top-p 0.9 as in the paper.
        alphas: thresholds of the rule; the last is used for usage profiles and accuracy (released: 0.8).
        tokens: tokens of text on which quality is measured.
        items: questions with one right answer, for accuracy.
        signals: what the rule compares; the first is used for quality.
    """
    from actlas.data import corpus
    from actlas.measure.void_quality import void_perplexity
    from actlas.models import load

    model = load("smollm2")
    measured, plot = profiles(model, seed, questions, answer_tokens, alphas[-1], signals)
    with progress("void layers: perplexity under skipping"):
        quality = void_perplexity(
            model, corpus("mixed", seed=seed), alphas=alphas, signal=signals[0], tokens=tokens, seed=seed
        )
    quality = [replace(x, note=_used(x)) for x in quality]
    measured += quality
    measured += [_skip_against_random(quality, alpha, seed) for alpha in alphas]
    if items:
        measured += accuracy(model, seed, items, alphas[-1], quality)
    rows = [
        {"layer usage": x.details["usage"], "perplexity ratio": x.value, "mode": x.group["mode"]}
        for x in quality
    ]
    last = {x.group["mode"]: x for x in quality if x.group["alpha"] == f"{alphas[-1]:g}"}
    said = ", ".join(f"{k} x{format_number(v.value)} at {v.details['usage']:.0%}" for k, v in last.items())
    return Findings(
        measured,
        headline=f"perplexity at alpha {alphas[-1]:g}: {said} of the layers",
        note=NOTE,
        plots=[
            plot,
            Plot(
                "Perplexity against layers used",
                rows,
                x="layer usage",
                y="perplexity ratio",
                color="mode",
                log="y",
            ),
        ],
    )


NOTE = (
    "Published: MMLU of Qwen2.5-7B 69.24 to 71.29 with 30% of the layers, and other gains, for models of "
    "7 billion parameters. Official code: every layer runs, and only the last block's output is replaced "
    "by the state after the token's last active layer; its 'layer usage' is no saving. The mean last "
    "active layer shows how little the readout moves. Ours: both modes, a token's own range for the first"
    " layer (the code takes it over the batch), norms in float32, tokens with massive activations apart. "
    "In a causal model a token's states do not depend on whether it was read or generated, so that a "
    "difference between prompt and response is one between two kinds of text, not between two ways of "
    "running."
)


def profiles(
    model: Model, seed: int, questions: int, answer_tokens: int, alpha: float, signals: Sequence[Any]
) -> tuple[list[Measurement], Plot]:
    """Compare usage profiles of prompts and answers, with two halves of the prompts as the control."""
    from actlas.measure.voids import profile_distance, void_trace

    out: list[Measurement] = []
    rows: list[dict[str, Any]] = []
    with progress("void layers: prompts and answers", len(signals), "signals") as advance:
        for signal in signals:
            trace = void_trace(
                model,
                _questions(questions, seed),
                alpha=alpha,
                signal=signal,
                max_new_tokens=answer_tokens,
                seed=seed,
            )
            distance = profile_distance(trace, seed=seed)
            for phase in ("prompt", "response"):
                usage = trace.usage(phase, seed=seed)
                out.append(usage[0].with_group(signal=signal))
                if signal == signals[0]:
                    rows += [
                        {"layer": int(x.group["layer"]), "active": x.value, "phase": phase} for x in usage[1:]
                    ]
            if signal == signals[0]:
                out.append(distance)
                if trace.massive.any():
                    out.append(trace.usage(massive=True, seed=seed)[0])
            else:
                other = replace(distance, name="profile-distance, another signal")
                out.append(other.with_group(signal=signal))
            advance()
    return out, Plot("Tokens for which a layer is active", rows, x="layer", y="active", color="phase")


def _questions(n: int, seed: int) -> list[str]:
    from actlas.data import task

    parts = [task(name, n=(n + 1) // 2, seed=seed).items for name in ("capitals", "arithmetic")]
    return [item.prompt for pair in zip(*parts, strict=False) for item in pair][:n]


def _used(x: Measurement) -> str:
    used, last, layers = (x.details[k] for k in ("usage", "last_active", "layers"))
    verb = "called active" if x.group["mode"] == "readout" else "used"
    return f"{used:.0%} of the layers {verb}, last one {last:.1f} of {layers} on average"


def _skip_against_random(quality: list[Measurement], alpha: float, seed: int) -> Measurement:
    from actlas.measure.statistics import paired_difference

    at = {x.group["mode"]: x for x in quality if x.group["alpha"] == f"{alpha:g}"}
    skip, random = at["skip"], at["random"]
    assert skip.samples is not None and random.samples is not None
    found = paired_difference(skip.samples, random.samples, skip.weights, seed=seed)
    usage = f"{skip.details['usage']:.1%} and {random.details['usage']:.1%}"
    return Measurement(
        "extra loss of random skipping over true skipping",
        found.value,
        "nats/token",
        found.n,
        found.low,
        found.high,
        "paired bootstrap over documents",
        seed,
        group={"alpha": f"{alpha:g}"},
        note=f"layers used: {usage}",
    )


def accuracy(
    model: Model, seed: int, items: int, alpha: float, quality: list[Measurement]
) -> list[Measurement]:
    """Compare the accuracy on country capitals under the three modes with the full model's."""
    import warnings

    import numpy as np

    from actlas.core.installation import EditHadNoEffect
    from actlas.data import task
    from actlas.measure.statistics import paired_difference, rate_measurement
    from actlas.measure.tasks import answer
    from actlas.measure.void_edits import lac, random_skip

    questions = task("capitals", model.tokenizer, n=items, seed=seed)
    skip = next(x for x in quality if x.group == {"alpha": f"{alpha:g}", "mode": "skip"})
    keep = float(skip.details["usage"]) * float(skip.details["layers"])
    edits = {"readout": lac(alpha), "skip": lac(alpha, "skip"), "random": random_skip(keep, seed=seed)}
    hits = {"full model": np.asarray(answer(model, questions).correct)}
    with progress("void layers: accuracy", len(edits), "modes") as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditHadNoEffect)
        for mode, edit in edits.items():
            with model.edit(edit):
                hits[mode] = np.asarray(answer(model, questions).correct)
            advance()
    out = [
        rate_measurement(
            "accuracy on capitals", h, seed=seed, better="higher", group={"mode": k}, note=f"alpha {alpha:g}"
        )
        for k, h in hits.items()
    ]
    for mode in edits:
        found = paired_difference(hits["full model"].astype(float), hits[mode].astype(float), seed=seed)
        out.append(
            Measurement(
                "change of accuracy",
                found.value,
                "fraction",
                found.n,
                found.low,
                found.high,
                "paired bootstrap over questions",
                seed,
                group={"mode": mode},
            )
        )
    return out
