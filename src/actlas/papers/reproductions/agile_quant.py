"""agile-quant: powers of two for attention probabilities, and fewer tokens by attention scores.

Shen et al. 2024, "Agile-Quant: Activation-Guided Quantization for Faster Inference of LLMs on the Edge".
SmolLM2-135M. Probabilities in four bits, as powers of two against even steps; prompts that lose tokens in the
last ten blocks by several scores, compared at the last token, which all variants keep; what pruning does to
the largest values that the MLP's last layer reads; and the whole recipe.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

if TYPE_CHECKING:
    from actlas.core.model import Model

CONTEXT = 96
LAST_BLOCKS = 10
MAIN = "0.3"


def judge(m: Measured) -> list[Check]:
    """Central: four-bit powers of two for attention probabilities diverge at most half as much as four-bit
    even steps, the whole 95% interval (paired bootstrap over documents) on that side; and dropping 30% of a
    prompt's tokens in the last ten blocks by the mean of the attention they receive diverges less at the last
    token than dropping random ones, the interval (over prompts) below 0. Also: the released code's score
    (attention paid to the first token, lowest go) is better than random, and better than its reverse; pruning
    lowers the largest inputs of the MLP's last layer; exact zeros of the causal mask stay zero.
    """
    zero = m.get("mask leaks")
    return [
        Check.below(
            "log2 has at most half of the divergence", m.get("kl log2 minus half of even"), 0.0, central=True
        ),
        Check.below(
            "column mean beats random at 30%",
            m.get("extra last-token kl", scores="column_mean", over="random", ratio=MAIN),
            0.0,
            central=True,
        ),
        Check.below(
            "the released score beats random at 30%",
            m.get("extra last-token kl", scores="first_token", over="random", ratio=MAIN),
            0.0,
        ),
        Check.below(
            "the released score beats its reverse at 30%",
            m.get("extra last-token kl", scores="first_token", over="reversed", ratio=MAIN),
            0.0,
        ),
        Check.below("pruning lowers the largest inputs of the last layer", m.get("log largest input"), 0.0),
        Check(
            "what the mask forbids stays forbidden",
            None if zero is None else zero.value == 0,
            "not measured" if zero is None else f"{zero.value:g} of {zero.n} entries",
        ),
    ]


@reproduction(
    "agile-quant",
    claim="Attention probabilities are better held as powers of two than in even steps, and tokens can be "
    "dropped by their attention at a small price, which also lowers the outliers.",
    judge=judge,
    quick={
        "tokens": 576,
        "calibration": 1024,
        "prompts": 16,
        "length": 96,
        "ratios": (0.3,),
        "weights": False,
    },
    full={
        "tokens": 6144,
        "calibration": 4096,
        "prompts": 48,
        "length": 128,
        "ratios": (0.1, 0.2, 0.3),
        "weights": True,
    },
)
def agile_quant(
    *,
    seed: int,
    tokens: int,
    calibration: int,
    prompts: int,
    length: int,
    ratios: Sequence[float],
    weights: bool,
) -> Findings:
    """Run it.

    Args:
        seed: of texts, random scores and the bootstrap.
        tokens: held-out tokens of the first part.
        calibration: tokens of calibration text.
        prompts, length: of the second part, tokens a prompt.
        ratios: shares of tokens that are dropped in the end.
        weights: also the whole recipe, with GPTQ weights.
    """
    from actlas.data import corpus
    from actlas.measure.quant_price import extra, losses_of
    from actlas.measure.samples import mean_measurement
    from actlas.models import load
    from actlas.quantize.agile import fit_agile, probabilities

    model = load("smollm2")
    documents = list(corpus("prose", seed=seed))
    fit, held_out = documents[:48], documents[48:]
    texts = [d.text[: 8 * CONTEXT] for d in fit]
    activations = fit_agile(
        model, texts, weights="none", tokens=calibration, context=CONTEXT, evaluate=0, seed=seed
    )
    variants: dict[str, Edit] = {
        "softmax log2-4": probabilities("log2-4"),
        "softmax int4": probabilities("int4-tensor"),
        "A8, softmax log2-4": activations,
    }
    if weights:
        variants["W4 A8, softmax log2-4"] = fit_agile(
            model, texts, tokens=calibration, context=CONTEXT, evaluate=0, seed=seed
        )
    base, found = losses_of(model, held_out, variants, tokens=tokens, context=CONTEXT, per_document=CONTEXT)
    measured: list[Measurement] = []
    kl = {}
    for name, losses in found.items():
        assert losses.divergence is not None
        kl[name] = losses.divergence / losses.tokens
        group = {"variant": name}
        measured.append(
            mean_measurement(
                "kl-to-base", "nats/token", kl[name], losses.tokens, seed=seed, group=group, better="lower"
            )
        )
    gap = kl["softmax log2-4"] - 0.5 * kl["softmax int4"]
    measured += [
        *extra(
            found["softmax log2-4"],
            found["softmax int4"],
            seed=seed,
            group={"variant": "softmax log2-4", "over": "softmax int4"},
        ),
        mean_measurement(
            "kl log2 minus half of even", "nats/token", gap, base.tokens, seed=seed, better="lower"
        ),
        _leaks(model, held_out[0].text),
    ]
    pruned = _pruning(model, held_out, prompts, length, ratios, seed)
    measured += pruned
    value = {m.group["variant"]: m.value for m in measured if m.name == "kl-to-base"}
    last = {
        m.group["scores"]: m.value for m in pruned if m.name == "last-token kl" and m.group["ratio"] == MAIN
    }
    said = (
        f"KL with probabilities in four bits: log2 {value['softmax log2-4']:.3f}, even steps "
        f"{value['softmax int4']:.3f}; last-token KL without 30% of the tokens: "
        + ", ".join(f"{k} {v:.3f}" for k, v in last.items())
    )
    rows = [
        {"scores": m.group["scores"], "share dropped": float(m.group["ratio"]), "last-token KL": m.value}
        for m in pruned
        if m.name == "last-token kl"
    ]
    plot = Plot(
        "Dropping tokens in the last ten blocks",
        rows,
        "share dropped",
        "last-token KL",
        "scores",
        "point",
        "y",
    )
    return Findings(measured, said, NOTE, [plot])


@torch.no_grad()
def _pruning(
    model: Model, held_out: Sequence[Any], prompts: int, length: int, ratios: Sequence[float], seed: int
) -> list[Measurement]:
    """Measure the divergence at the last token, and the inputs of the MLPs' last layers."""
    from actlas.core.installation import EditHadNoEffect
    from actlas.measure.kv_cache import corpus_prompts
    from actlas.measure.samples import mean_measurement
    from actlas.sparsity.token_pruning import PruneTokens, Scores, spread

    ids = torch.cat(corpus_prompts(model, held_out, prompts, length))
    assert model.n_blocks is not None
    first = model.n_blocks - LAST_BLOCKS - 1
    base, reach = _last_logits(model, ids, first + 1)
    out: list[Measurement] = []
    for ratio in ratios:
        label = f"{ratio:g}"
        kl = {}
        for scores in get_args(Scores):
            edit = PruneTokens(spread(ratio, first, first + LAST_BLOCKS - 1), scores, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EditHadNoEffect)
                with model.edit(edit):
                    logits, pruned = _last_logits(model, ids, first + 1)
            kl[scores] = (base.exp() * (base - logits)).sum(-1).double().numpy()
            group = {"scores": scores, "ratio": label}
            out.append(
                mean_measurement(
                    "last-token kl",
                    "nats",
                    kl[scores],
                    seed=seed,
                    over="prompts",
                    group=group,
                    better="lower",
                )
            )
            if scores == "first_token" and label == MAIN:
                change = np.log(pruned / reach)
                out.append(
                    mean_measurement(
                        "log largest input",
                        "nats",
                        change,
                        seed=seed,
                        over="blocks",
                        better="lower",
                        group=group,
                    )
                )
        for scores, over in (
            ("column_mean", "random"),
            ("first_token", "random"),
            ("first_token", "reversed"),
            ("first_token", "column_mean"),
        ):
            group = {"scores": scores, "over": over, "ratio": label}
            gap = kl[scores] - kl[over]
            out.append(
                mean_measurement("extra last-token kl", "nats", gap, seed=seed, over="prompts", group=group)
            )
    return out


def _last_logits(model: Model, ids: Tensor, first: int) -> tuple[Tensor, np.ndarray]:
    """Return log-probabilities behind each prompt, and the largest MLP activation of each later block.

    The first token, which always stays and holds the largest values of all, is left out.
    """
    from actlas.core.hooks import attach

    assert model.n_blocks is not None
    reach: list[float] = []

    def read(x: Tensor) -> Tensor:
        reach.append(float(x[:, 1:].abs().max()))
        return x

    handles = [
        attach(model.module, site, read)
        for site in model.resolve([f"blocks.{i}.mlp.act" for i in range(first, model.n_blocks)])
    ]
    try:
        out = model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[:, -1].float().log_softmax(-1), np.asarray(reach)


@torch.no_grad()
def _leaks(model: Model, text: str) -> Measurement:
    """Count entries above the diagonal that are not exactly 0 after rounding."""
    from actlas.quantize.agile import probabilities

    leaks, n = 0, 0
    with model.edit(probabilities("log2-4")):
        trace = model.trace(text[:200], ["blocks.0.attn.pattern", "blocks.15.attn.pattern"])
        for site in ("blocks.0.attn.pattern", "blocks.15.attn.pattern"):
            pattern = trace[site]
            above = torch.ones(pattern.shape[-2:]).triu(1).bool()
            leaks += int((pattern[..., above] != 0).sum())
            n += pattern[..., above].numel()
    return Measurement("mask leaks", float(leaks), "entries", n, better="lower")


NOTE = (
    "Published: LLaMA, OPT and BLOOM with 4-bit weights and 8- or 4-bit activations at the quality of "
    "weight-only methods, up to 2.55 times faster on a phone; no speed is measured here. Official code: the "
    "score is the attention that a token pays to the first one, the lowest go; its released ratios are all "
    "0, and dropped positions leave the loss. Ours: SmolLM2-135M, whose first token is an attention sink, "
    "so that a high score marks a token that attends to nothing in particular; all scores are compared at "
    "the last token. Pruning is spread evenly over the last ten blocks but one. The largest inputs are "
    "those over all tokens but the first, per block; with fewer tokens a maximum can only fall or rise "
    "through what pruning changes. SmolLM2's weights lie on a 4-bit grid of groups of 32, and groups of 96 "
    "are used for GPTQ."
)
