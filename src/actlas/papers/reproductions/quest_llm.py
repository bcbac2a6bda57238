"""quest-llm: training with 1- and 2-bit weights and activations, with and without rotation and trust.

Panferov et al. 2025. Byte-level Llamas learn prose from scratch with every linear layer of their blocks
rounded at each
step: QuEST (Hadamard rotation, Gaussian scales, trusted gradients), the same with the straight-through
gradient and no rotation, and trust without rotation; beside them the float model. Several seeds, the same
windows for all arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import rounded_bytes as lab

ARMS = {"quest": ("trust", True), "trust, not rotated": ("trust", False), "ste": ("ste", False)}


def judge(m: Measured) -> list[Check]:
    """Central: the Gaussian scales found numerically match the paper's table to 1e-3 for 1 to 5 bits;
    training with QuEST
    is stable at 1 bit: finite, and its loss falls below the loss of byte frequencies alone; at 1 bit QuEST
    loses no more than straight-through training (paired interval over documents and seeds lies below 0), and
    the same at 2 bits. Beside
    it: the scales match to 1e-3 at 6 to 8 bits too; QuEST loses no more than trust without rotation at 1 bit;
    the gradient of the trust estimator with rotation points more in the direction of the float model's
    gradient than the straight-through one (cosine, at the start of training); more bits lose less. Falsified
    if straight-through training wins at 1 bit over the seeds, or QuEST diverges. The claim that 4 bits at
    equal size in bytes beat 16 bits needs models of many sizes and is not tested.
    """
    few, many = (
        m["largest distance to the table, 1 to 5 bits"],
        m["largest distance to the table, 6 to 8 bits"],
    )
    one, unigram = m.get("loss", arm="quest", bits="1"), m["loss of byte frequencies"]
    two = m.get("loss", arm="quest", bits="2")
    assert one is not None and two is not None
    return [
        Check.below("scales match the table to 1e-3, 1 to 5 bits", few, 1e-3, central=True),
        Check(
            "1-bit training is stable", one.value == one.value and (one.high or one.value) < unigram.value,
            f"{one}; {unigram}", central=True,
        ),
        Check.below("QuEST beats straight-through at 1 bit", m.get("extra loss of QuEST", over="ste",
            bits="1"), 0.0, central=True),
        Check.below("QuEST beats straight-through at 2 bits", m.get("extra loss of QuEST", over="ste",
            bits="2"), 0.0, central=True),
        Check.below("scales match the table to 1e-3, 6 to 8 bits", many, 1e-3),
        Check.below("rotation helps at 1 bit", m.get("extra loss of QuEST", over="trust, not rotated",
            bits="1"), 0.0),
        Check.above("the trusted gradient is nearer to the float one",
            m["cosine to the float gradient, QuEST minus ste"], 0.0),
        Check("two bits lose less than one", two.value < one.value, f"{two.value:.3f} and {one.value:.3f}"),
    ]  # fmt: skip


@reproduction(
    "quest-llm",
    claim="With a Hadamard rotation, Gaussian-optimal scales and trusted gradients, training with 1-bit "
    "weights and activations is stable and loses less than straight-through training.",
    judge=judge,
    quick={"layers": 2, "width": 128, "steps": 200, "seeds": 2, "bits": (1, 2), "lr": 2e-3, "tokens": 24576},
    full={
        "layers": 2,
        "width": 128,
        "steps": 3000,
        "seeds": 3,
        "bits": (1, 2, 4),
        "lr": 2e-3,
        "tokens": 65536,
    },
)
def quest_llm(
    *, seed: int, layers: int, width: int, steps: int, seeds: int, bits: Sequence[int], lr: float, tokens: int
) -> Findings:
    """Run it.

    Args:
        seed: the first seed of weights and windows.
        layers, width: of the byte-level model.
        steps: of training, of 512 bytes.
        seeds: how many.
        bits: of weights and activations.
        lr: AdamW's peak rate, the same for all arms.
        tokens: held-out bytes that are scored.
    """
    text = lab.prose()
    arms: list[tuple[str, int]] = [("float", 16)]
    arms += [(name, b) for b in bits for name in ARMS if name != "trust, not rotated" or b == min(bits)]
    runs: dict[tuple[str, int], list[Any]] = {arm: [] for arm in arms}
    cosines: list[dict[str, float]] = []
    for s in range(seed, seed + seeds):
        for arm, b in arms:
            runs[arm, b].append(_train(arm, b, layers, width, steps, s, lr, tokens, text))
        cosines.append(_cosines(layers, width, s, text, min(bits)))
    out = [lab.loss_over_seeds("loss", found, arm=arm, bits=str(b)) for (arm, b), found in runs.items()]
    for arm, b in arms:
        if arm not in ("float", "quest"):
            out.append(
                lab.gap_over_seeds(
                    "extra loss of QuEST", runs["quest", b], runs[arm, b], seed=seed, over=arm, bits=str(b)
                )
            )
        if arm == "quest":
            gap = lab.gap_over_seeds(
                "extra loss over float", runs[arm, b], runs["float", 16], seed=seed, bits=str(b)
            )
            out.append(gap)
    out += [*_scales(), _unigram(text, runs["float", 16][0]), *_gradients(cosines)]
    first = next(
        m
        for m in out
        if m.name == "extra loss of QuEST" and m.group == {"over": "ste", "bits": str(min(bits))}
    )
    headline = (
        f"{min(bits)} bit: QuEST loses {first.value:+.3f} nats per byte against straight-through training"
    )
    rows = [
        {"bits": b, "loss": lab.mean_loss(run), "arm": arm}
        for (arm, b), found in runs.items()
        for run in found
    ]
    return Findings(
        out,
        headline,
        NOTE,
        [Plot("Loss by bits", rows, x="bits", y="loss", color="arm", mark="point", log="x")],
    )


NOTE = (
    "Published: 30 to 800 million parameters on C4 at 100 tokens a parameter; 4-bit weights and activations "
    "have less loss "
    "than 16 bits at equal bytes, 1-bit training is stable, and scaling laws hold. Ours: byte-level Llamas "
    "of 0.6 million "
    "parameters on prose, hundreds of steps of 512 bytes, blocks of 64 or 128 in the rotation, AdamW with "
    "weight decay 0.1 "
    "and a cosine, the same for every arm; embedding, head and norms in 32 bits. The straight-through arm "
    "has the same "
    "Gaussian scales on the unrotated rows. From a feasibility run of 150 steps it was known before that "
    "the order is the "
    "paper's at 1 and 2 bits with gaps of about 0.01 nats. The table's scales for 6, 7 and 8 bits are not "
    "the optimum of "
    "the Gaussian error: they lie below it by up to 0.04."
)


def _train(
    arm: str, bits: int, layers: int, width: int, steps: int, seed: int, lr: float, tokens: int, text: Any
) -> Any:
    """Train one arm from scratch and score it."""
    from actlas.measure.likelihood import nll
    from actlas.papers.reproductions.byte_models import byte_model
    from actlas.training.language_loop import corpus_tokens, train_language, windows
    from actlas.training.qat import quantizing

    model = byte_model("silu", seed, layers=layers, width=width)
    drawn = windows(
        corpus_tokens(model, text.learn, lab.CONTEXT), steps=steps, batch=8, context=lab.CONTEXT, seed=seed
    )

    def go() -> Any:
        parameters = [p for p in model.module.parameters() if p.requires_grad]
        train_language(model, drawn, parameters, steps=steps, lr=lr, decay=0.1, what=f"{arm}, {bits} bits")
        return nll(model, text.test, tokens=tokens, context=lab.CONTEXT)

    if arm == "float":
        return go()
    with quantizing(model, _maker(arm, bits)):
        return go()


def _maker(arm: str, bits: int) -> Any:
    from actlas.training.quest_llm import quest_linear

    grad, rotate = ARMS[arm]

    def make(layer: Any, linear: nn.Module) -> nn.Module:
        return quest_linear(linear, bits, bits, grad=grad, rotate=rotate, where=layer.path)  # type: ignore[arg-type]

    return make


def _cosines(layers: int, width: int, seed: int, text: Any, bits: int) -> dict[str, float]:
    """Return the cosine of each arm's gradient of the linear layers' weights with that of the float model, on
    one batch."""
    from actlas.measure.linear_layers import linear_layers
    from actlas.papers.reproductions.byte_models import byte_model
    from actlas.training.language_loop import corpus_tokens, windows
    from actlas.training.qat import quantizing

    model = byte_model("silu", seed, layers=layers, width=width)
    ids = next(
        windows(
            corpus_tokens(model, text.learn, lab.CONTEXT),
            steps=1,
            batch=32,
            context=lab.CONTEXT,
            seed=seed + 77,
        )
    )
    parts: dict[str, torch.Tensor] = {}

    def gradient(weights: list[Any]) -> torch.Tensor:
        found = torch.autograd.grad(model.module(input_ids=ids, labels=ids).loss, weights)
        return torch.cat([g.flatten() for g in found]).double()

    own = [x.module(model).weight for x in linear_layers(model)]
    parts["float"] = gradient(own)
    for arm in ARMS:
        with quantizing(model, _maker(arm, bits)) as exchanged:
            parts[arm] = gradient([m.weight for m in exchanged.values()])
    return {arm: float(torch.cosine_similarity(parts[arm], parts["float"], dim=0)) for arm in ARMS}


def _gradients(cosines: Sequence[dict[str, float]]) -> list[Measurement]:
    import numpy as np

    from actlas.core.intervals import bootstrap_mean

    out = [
        Measurement(
            "cosine to the float gradient", float(np.mean([c[arm] for c in cosines])), "cosine", len(cosines),
            group={"arm": arm}, details={"by_seed": [round(c[arm], 4) for c in cosines]},
        )
        for arm in ARMS
    ]  # fmt: skip
    gaps = [c["quest"] - c["ste"] for c in cosines]
    low, high = bootstrap_mean(gaps) if len(gaps) > 2 else (min(gaps), max(gaps))
    out.append(
        Measurement(
            "cosine to the float gradient, QuEST minus ste", float(np.mean(gaps)), "cosine", len(gaps), low,
                high,
            "bootstrap over seeds" if len(gaps) > 2 else "range over seeds",
        )
    )  # fmt: skip
    return out


def _scales() -> list[Measurement]:
    """Return how far the numerical optimum is from the published scales."""
    import math

    from actlas.core.numbers import gaussian_scale
    from actlas.training.quest_llm import PUBLISHED_SCALES

    away = {
        b: abs(gaussian_scale(math.log2(3) if b == 1.585 else b) - s) for b, s in PUBLISHED_SCALES.items()
    }
    out = []
    for name, chosen in (("1 to 5", [b for b in away if b <= 5]), ("6 to 8", [b for b in away if b > 5])):
        out.append(
            Measurement(
                f"largest distance to the table, {name} bits", max(away[b] for b in chosen),
                    "standard deviations",
                len(chosen), better="lower", details={str(b): round(away[b], 5) for b in chosen},
            )
        )  # fmt: skip
    return out


def _unigram(text: Any, run: Any) -> Measurement:
    """Return the held-out loss of byte frequencies alone."""
    import numpy as np

    from actlas.papers.reproductions.byte_models import byte_tokenizer

    def counts(documents: Any) -> Any:
        ids = [i for d in documents for i in byte_tokenizer()(d.text, verbose=False)["input_ids"]]
        return np.bincount(ids, minlength=256).astype(float)

    p = counts(text.learn) + 1
    q = counts(text.test)
    value = float(-(q * np.log(p / p.sum())).sum() / q.sum())
    return Measurement("loss of byte frequencies", value, "nats/byte", len(run.tokens))
