"""bf16-or-death: three deployable formats with tuned recipes, and one that was not tuned.

Kurtic et al. 2024, "Give Me BF16 or Give Me Death? Accuracy-Performance Trade-Offs in LLM Quantization". The
presets of `quantize/presets.py` on SmolLM2 (its own weights lie on a 4-bit grid in groups of 32; w4a16 here
has groups of 64): divergence, agreement, recovery on template tasks, ROUGE-L of greedy continuations.
"""

from __future__ import annotations

from typing import Any

from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.quant_arms import kl, less, measured, outside, rows, texts

TASKS = ("capitals", "ioi", "arithmetic", "sentiment", "agreement")
ORDER = ("w8a8-fp", "w8a8-int", "w4a16-int", "w8a8-int-static")
NOTE = (
    "Template tasks stand for the leaderboards, SmolLM2-135M for Llama-3.1, MiniLM is not used for text "
    "similarity in the quick run. Serving speed and cost need GPUs and vLLM and are not measured; "
    "`bench decode` has what 4-bit weights save in traffic on a CPU."
)


def judge(m: Measured) -> list[Check]:
    """Central: e4m3 weights and inputs diverge less than int8 ones (the whole interval of the paired
    difference of KL is below 0), and int8 with a scale for each token diverges less than with one fixed scale
    a layer (what the paper calls untuned). Also: int8 diverges less than 4-bit weights; FP8 and tuned INT8
    recover at least 97% of the accuracy (point estimate); greedy text stays nearest under FP8.
    """
    found = {name: measured(m, "accuracy-recovery", variant=name) for name in ORDER}
    rouge = {name: measured(m, "rouge-l", variant=name).value for name in ORDER}
    return [
        less(m, "FP8 is closer than INT8", "w8a8-fp", "w8a8-int", central=True),
        less(m, "tuned INT8 is closer than a fixed scale", "w8a8-int", "w8a8-int-static", central=True),
        less(m, "INT8 is closer than 4-bit weights", "w8a8-int", "w4a16-int"),
        Check("FP8 recovers 97%", found["w8a8-fp"].value >= 97, str(found["w8a8-fp"])),
        Check("INT8 recovers 97%", found["w8a8-int"].value >= 97, str(found["w8a8-int"])),
        Check("FP8 text is nearest", rouge["w8a8-fp"] >= max(rouge.values()), f"ROUGE-L {rouge}"),
    ]


@reproduction(
    "bf16-or-death",
    claim="FP8 is lossless, INT8 loses little when tuned, and 4-bit weights rival it.",
    judge=judge,
    quick={"step": 2, "calibration": 256, "tokens": 768, "context": 128, "items": 16, "prompts": 5},
    full={"step": 1, "calibration": 2048, "tokens": 4096, "context": 256, "items": 60, "prompts": 40},
)
def bf16_or_death(
    *, seed: int, step: int, calibration: int, tokens: int, context: int, items: int, prompts: int
) -> Findings:
    """Run it.

    Args:
        seed: of texts, items and the bootstrap.
        step: every step-th block is quantised.
        calibration: tokens of calibration text.
        tokens, context: of text that is scored.
        items: of each task. prompts: greedy continuations.
    """
    from actlas.measure.quant_price import extra
    from actlas.measure.quantization_suite import quantization_suite
    from actlas.models import load
    from actlas.quantize.presets import fit_preset

    model = load("smollm2")
    fit, held_out = texts(seed)
    common: dict[str, Any] = {
        "skip": outside(model, step), "evaluate": 0, "seed": seed, "tokens": calibration, "context": context,
    }  # fmt: skip
    variants = {
        name: fit_preset(model, fit, preset=name, group_size=64 if name == "w4a16-int" else None, **common)  # type: ignore[arg-type]
        for name in ORDER
    }
    suite = quantization_suite(
        model, variants, corpus=held_out, tasks=TASKS, items=items, tokens=tokens, context=context,
        prompts=prompts, seed=seed,
    )  # fmt: skip
    results = list(suite.measurements)
    for name, over in (("w8a8-fp", "w8a8-int"), ("w8a8-int", "w8a8-int-static"), ("w8a8-int", "w4a16-int")):
        results += extra(
            suite.losses[name], suite.losses[over], seed=seed, group={"variant": name, "over": over}
        )
    said = ", ".join(f"{name} {kl(results, name):.4f}" for name in ORDER)
    plot = Plot("Divergence of formats", rows(results), x="variant", y="KL to the full model", mark="bar")
    return Findings(results, f"KL: {said}", NOTE, [plot])
