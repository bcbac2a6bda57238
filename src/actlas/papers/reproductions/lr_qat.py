"""lr-qat: low-rank matrices inside the rounding, against full training, against rounding after training.

Bondarenko, Del Chiaro and Nagel 2024. A byte-level Llama is rounded to 2-bit weights, one scale for each
output channel: to nearest, by GPTQ, by training all weights through the rounding, by LR-QAT at two ranks, and
by LoRA on the float model that is merged and rounded again. All see the same text and score the same held-out
documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import rounded_bytes as lab
from actlas.papers.reproductions.lr_qat_arms import flips, made_by_all


def judge(m: Measured) -> list[Check]:
    """Central: merging changes no logit, bit for bit; LR-QAT at the higher rank loses less than GPTQ and than
    rounding to nearest (paired intervals over documents), and lies at most half of the way from full training
    to GPTQ; its optimiser state is smaller by out*in / (r (out + in)) within a tenth, and the bytes of a
    training step are fewer than in full training. Beside it: the higher rank loses no more than the lower;
    the low-rank route that is rounded after training (LoRA, merged, rounded) loses more than LR-QAT; keeping
    W_hat instead of rounding again in the backward pass costs memory; with the integer phi and an unscaled
    start nothing moves in the first step, while fixed point does flip roundings. Falsified if LR-QAT lies
    more than half of the way from full training to GPTQ.
    """
    part = m["share of the way from full training to GPTQ"]
    state = m["optimiser state over the count's prediction"]
    flips = {k: m.get("integers that the first steps flip", downcast=k) for k in ("fixed8", "int")}
    assert flips["fixed8"] is not None and flips["int"] is not None
    return [
        Check("merged logits are the training graph's", m["logits that merging changes"].value == 0,
              str(m["logits that merging changes"]), central=True),
        Check.below("less loss than GPTQ", m.get("extra loss of LR-QAT", over="gptq"), 0.0, central=True),
        Check.below("less loss than rounding", m.get("extra loss of LR-QAT", over="rtn"), 0.0, central=True),
        Check.below("at most half of the way to GPTQ", part, 0.5, central=True),
        Check("optimiser state as counted", abs(state.value - 1) < 0.1, str(state), central=True),
        Check.below("fewer bytes than full training", m["training bytes over full training"], 1.0,
            central=True),
        Check.below("a higher rank loses no more", m.get("extra loss of LR-QAT", over="lower rank"), 0.0),
        Check.below("less loss than LoRA, then rounding", m.get("extra loss of LR-QAT", over="lora"), 0.0),
        Check.below("rounding again saves memory", m["saved bytes over keeping the rounded weight"], 1.0),
        Check(
            "fixed point flips roundings, integers stall",
            flips["fixed8"].value > 0 and flips["int"].value == 0,
            f"{flips['fixed8'].value:.0f} and {flips['int'].value:.0f} flipped",
        ),
    ]  # fmt: skip


@reproduction(
    "lr-qat",
    claim="Training low-rank matrices inside the rounding comes near full quantization-aware training at a "
    "fraction of its memory, beats rounding after training, and adds nothing at inference.",
    judge=judge,
    quick={"layers": 2, "width": 128, "pretrain": 900, "steps": 250, "ranks": (4, 32),
        "spec": "int2-channel-sym", "tokens": 24576},
    full={"layers": 4, "width": 192, "pretrain": 4000, "steps": 3000, "ranks": (4, 32),
        "spec": "int2-channel-sym", "tokens": 65536},
)  # fmt: skip
def lr_qat(
    *,
    seed: int,
    layers: int,
    width: int,
    pretrain: int,
    steps: int,
    ranks: Sequence[int],
    spec: str,
    tokens: int,
) -> Findings:
    """Run it.

    Args:
        seed: of the model, windows and matrices.
        layers, width: of the byte-level model.
        pretrain: its steps.
        steps: of every kind of training.
        ranks: of LR-QAT; the last one is judged.
        spec: format of the weights.
        tokens: held-out bytes that are scored.
    """
    from actlas.measure.quant_price import extra, losses_of

    model = lab.trained_bytes(layers=layers, width=width, steps=pretrain, seed=seed)
    text = lab.prose()
    arms = made_by_all(model, text.learn, steps, ranks, spec, seed)
    base, found = losses_of(model, text.test, arms.edits, tokens=tokens, context=lab.CONTEXT)
    best = f"lr-qat {ranks[-1]}"
    out = [lab.loss_over_seeds("loss", [base], arm="float")]
    for arm, losses in found.items():
        out.append(lab.loss_over_seeds("loss", [losses], arm=arm))
    for over, name in (("gptq", "gptq"), ("rtn", "rtn"), ("full", "full"), ("lora", "lora"),
                       ("lower rank", f"lr-qat {ranks[0]}")):  # fmt: skip
        if name in found:
            out.append(
                _renamed(extra(found[best], found[name], seed=seed)[1], "extra loss of LR-QAT", over=over)
            )
    out += [
        _way(found[best], found["full"], found["gptq"], seed),
        *arms.measured,
        *flips(model, text.learn, spec, seed),
    ]
    way = next(m for m in out if m.name.startswith("share of the way"))
    headline = (
        f"{spec}: loss {lab.mean_loss(found[best]):.3f} with LR-QAT (rank {ranks[-1]}), full training "
        f"{lab.mean_loss(found['full']):.3f}, GPTQ {lab.mean_loss(found['gptq']):.3f}: {way.value:.0%} of "
        f"the way"
    )
    rows = [
        {"arm": "float", "loss": lab.mean_loss(base)},
        *({"arm": a, "loss": lab.mean_loss(f)} for a, f in found.items()),
    ]
    return Findings(out, headline, NOTE, [Plot("Loss by method", rows, x="arm", y="loss", mark="bar")])


NOTE = (
    "Published: equal to full quantization-aware training and better than common post-training methods on "
    "LLaMA 1-3 and "
    "Mistral, 7 billion parameters in under 24 GB. Ours: a byte-level Llama of two blocks and 128 channels, "
    "2-bit symmetric "
    "weights with a scale for each output channel, hundreds of steps of 512 bytes instead of 10,000 of "
    "32,768 tokens. "
    "smollm2 was not used: its weights already lie on a 4-bit grid. Rates here: low-rank matrices 1e-2 "
    "(with alpha / r = "
    "1 / r they enter divided by r), scales 1e-4, full training 1e-3 with scales 1e-4, LoRA 1e-3 at rank "
    "32; warm-up of a tenth and "
    "linear decay for all. Scales start from the least L4 error. Bytes are counted, not sampled; at this "
    "size activations "
    "weigh more than weights, so the ratio of the whole step is much nearer to 1 than at 7 billion "
    "parameters."
)


def _way(best: Any, full: Any, gptq: Any, seed: int) -> Measurement:
    """Return (LR-QAT - full) / (GPTQ - full), with a bootstrap over documents."""
    import numpy as np

    from actlas.core.intervals import percentiles

    a, b, c = (x.nll for x in (best, full, gptq))
    counts = np.random.default_rng(seed).multinomial(len(a), np.full(len(a), 1 / len(a)), size=2000)
    low, high = percentiles((counts @ (a - b)) / (counts @ (c - b)), len(a))
    value = float((a - b).sum() / (c - b).sum())
    return Measurement(
        "share of the way from full training to GPTQ", value, "fraction", len(a), low, high,
        "bootstrap over documents", seed, better="lower",
    )  # fmt: skip


def _renamed(m: Measurement, name: str, **group: str) -> Measurement:
    from dataclasses import replace

    return replace(m, name=name, group=group, unit="nats/byte")
