"""comprehensive-evaluation: how knowledge and behaviour fall with bits, and whether perplexity tells.

Jin et al. 2024, "A Comprehensive Evaluation of Quantization Strategies for Large Language Models". Nine
variants of SmolLM2 from 8 to 2 bits (round-to-nearest, GPTQ, AWQ, SpQR) on tasks made from templates. Its own
weights lie on a 4-bit grid in groups of 32, which flatters formats near that; none of them is among the nine.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.quant_arms import measured, outside, rows, texts

TASKS = ("capitals", "ioi", "arithmetic", "sentiment", "agreement")
NOTE = (
    "Tasks from templates stand for the ten benchmarks, SmolLM2-135M for Qwen-Chat 7B to 72B. The quick run "
    "quantises every second block with 256 calibration tokens. That a larger quantised model beats a smaller "
    "full one at equal bytes is not tested: it needs two sizes of one family."
)


def judge(m: Measured) -> list[Check]:
    """Central: over the variants, the rank correlation of log perplexity with mean task accuracy is -0.7 or
    lower, and recovery at 8 bits has 100% in its 95% interval. Also: KL ranks the variants as well; at 2 bits
    accuracy is below the full model's beyond the interval; SpQR diverges less than GPTQ at the same bits; a
    layer that dequantises on the fly is no faster than float32 at batch 128.
    """
    proxy = measured(m, "proxy-agreement", proxy="log-perplexity")
    kl = measured(m, "proxy-agreement", proxy="kl")
    eight = measured(m, "accuracy-recovery", variant="w8")
    two = measured(m, "accuracy-recovery", variant="w2-g32")
    slow = measured(m, "time-ratio", batch="128")
    holds_eight = eight.low is not None and eight.high is not None and eight.low <= 100 <= eight.high
    return [
        Check("perplexity ranks the variants as the tasks do", proxy.value <= -0.7, str(proxy), central=True),
        Check("8 bits keep the accuracy", holds_eight, str(eight), central=True),
        Check("KL ranks the variants as the tasks do", kl.value <= -0.7, str(kl)),
        Check("2 bits lose accuracy", two.high is not None and two.high < 100, str(two)),
        Check.below("SpQR diverges less than GPTQ", m.get("extra-kl", variant="spqr3", over="gptq3"), 0.0),
        Check("dequantising on the fly is no faster at batch 128", slow.value >= 1.0, str(slow)),
    ]


@reproduction(
    "comprehensive-evaluation",
    claim="Four bits keep a model's abilities, two lose them, and perplexity is a proxy for most benchmarks.",
    judge=judge,
    quick={"step": 2, "calibration": 256, "tokens": 512, "context": 128, "items": 16, "ratios": 5},
    full={"step": 1, "calibration": 2048, "tokens": 4096, "context": 256, "items": 60, "ratios": 20},
)
def comprehensive_evaluation(
    *, seed: int, step: int, calibration: int, tokens: int, context: int, items: int, ratios: int
) -> Findings:
    """Run it.

    Args:
        seed: of texts, items and the bootstrap.
        step: every step-th block is quantised.
        calibration: tokens of calibration text.
        tokens, context: of text that is scored.
        items: of each task.
        ratios: exponents that AWQ tries.
    """
    from actlas.measure.quant_price import extra
    from actlas.measure.quantization_suite import BASE, proxy_agreement, quantization_suite
    from actlas.models import load
    from actlas.quantize.awq import fit_awq
    from actlas.quantize.gptq import fit_gptq
    from actlas.quantize.rtn import fit_rtn
    from actlas.quantize.spqr import fit_spqr

    model = load("smollm2")
    fit, held_out = texts(seed)
    common: dict[str, Any] = {"skip": outside(model, step), "evaluate": 0, "seed": seed}
    reading: dict[str, Any] = {"tokens": calibration, "context": context}
    variants = {
        "w8": fit_rtn(model, bits=8, group_size=0, symmetric=True, **common),
        "w4-channel": fit_rtn(model, bits=4, group_size=0, **common),
        "w4-g64": fit_rtn(model, bits=4, group_size=64, **common),
        "w3-g64": fit_rtn(model, bits=3, group_size=64, **common),
        "gptq3": fit_gptq(model, fit, bits=3, group_size=64, **reading, **common),
        "awq3": fit_awq(model, fit, bits=3, group_size=64, ratios=ratios, **reading, **common),
        "spqr3": fit_spqr(model, fit, bits=3, group_size=64, **reading, **common),
        "w2-g32": fit_rtn(model, bits=2, group_size=32, **common),
    }
    suite = quantization_suite(
        model, variants, corpus=held_out, tasks=TASKS, items=items, tokens=tokens, context=context,
        prompts=0, seed=seed,
    )  # fmt: skip
    found = [*suite.measurements, *proxy_agreement(suite, seed=seed)]
    found += extra(
        suite.losses["spqr3"], suite.losses["gptq3"], seed=seed, group={"variant": "spqr3", "over": "gptq3"}
    )
    layer = model.module.get_submodule("model.layers.0.mlp.up_proj")
    found += [_time_ratio(layer, batch) for batch in (1, 128)]
    said = ", ".join(
        f"{name} {suite.get('accuracy-recovery', variant=name).value:.0f}%"
        for name in variants
        if name != BASE
    )
    proxy = next(m for m in found if m.name == "proxy-agreement" and m.group["proxy"] == "log-perplexity")
    plot = Plot(
        "Divergence against bits", rows(found), x="bits a weight", y="KL to the full model", mark="point"
    )
    return Findings(
        found, f"recovery {said}; Spearman of log perplexity and accuracy {proxy.value:.2f}", NOTE, [plot]
    )


def _time_ratio(layer: nn.Module, batch: int, repeats: int = 9) -> Measurement:
    """Return the time of a 4-bit layer that dequantises at every call over that of the float32 layer."""
    from actlas.core.quant_linear import QuantLinear

    quant = QuantLinear.of(layer, "int4-g64")
    x = torch.randn(batch, quant.in_features, generator=torch.Generator().manual_seed(0))
    ratios = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            took = []
            for module in (quant, layer):
                start = time.perf_counter()
                for _ in range(3):
                    module(x)
                took.append(time.perf_counter() - start)
            ratios.append(took[0] / took[1])
    value = statistics.median(ratios[1:])
    return Measurement(
        "time-ratio",
        value,
        "times float32",
        repeats,
        min(ratios[1:]),
        max(ratios[1:]),
        "range of interleaved repeats",
        group={"batch": str(batch)},
    )
