"""ostquant: learned rotations and scales against fixed ones, with 4-bit weights and activations everywhere.

Hu et al. 2025. A byte-level Llama of four blocks, in which an exact fold makes three channels of every
norm, value and up projection 30 times as large (so that outliers exist by construction), is rounded to 4
bits, weights by output channel and inputs by token: as it is, after SmoothQuant, after fixed Hadamard
rotations, after the start of the rotations (WOMI) alone, and after learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure.likelihood import Losses
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import rounded_bytes as lab

CONTEXT = 128


def judge(m: Measured) -> list[Check]:
    """Central: the learned transforms have at least 15% less divergence from the full-precision model than
    fixed Hadamard rotations, and less than their own start (WOMI), than SmoothQuant on all inputs
    and than rounding as it is (paired intervals over documents); log QSUR at the inputs that norms
    give is, on the mean over sites, lowest raw and highest scaled and rotated. Falsified if
    learning does not beat WOMI. Beside it: rotation fills more than scaling; all folds together
    change no logit by more than 1e-3 of the largest; log QSUR and the error of 4-bit outputs rank
    sites and transforms alike (Spearman below -0.7); q-k scales that are tied within rotary pairs
    leave the scores alone and untied ones do not.
    """
    order = [m.get("mean log QSUR", transform=t) for t in ("raw", "scale", "rotation", "both")]
    values = [x.value for x in order if x is not None]
    said = ", ".join(
        f"{n} {v:.3f}" for n, v in zip(("raw", "scale", "rotation", "both"), values, strict=True)
    )
    folds = m["largest change by exact folds"]
    ties = {k: m.get("change by q-k scales", pairs=k) for k in ("tied", "untied")}
    assert ties["tied"] is not None and ties["untied"] is not None
    return [
        Check.below("15% less divergence than Hadamard", m["kl over 0.85 of hadamard"], 0.0, central=True),
        Check.below(
            "less than its start", m.get("extra-kl", variant="ostquant", over="womi"), 0.0, central=True
        ),
        Check.below(
            "less than SmoothQuant",
            m.get("extra-kl", variant="ostquant", over="smoothquant"),
            0.0,
            central=True,
        ),
        Check.below(
            "less than plain rounding", m.get("extra-kl", variant="ostquant", over="rtn"), 0.0, central=True
        ),
        Check(
            "QSUR: raw lowest, both highest",
            values[0] == min(values) and values[3] == max(values) and len(set(values)) == 4,
            said,
            central=True,
        ),
        Check("QSUR: rotation above scaling", values[2] > values[1], said),
        Check("folds are exact", folds.value < 1e-3, str(folds)),
        Check.below("QSUR ranks like the error", m["rank correlation of log QSUR and log error"], -0.7),
        Check(
            "scales of q and k must be tied in pairs",
            ties["tied"].value < 1e-4 < 10 * 1e-4 < ties["untied"].value,
            f"{ties['tied'].value:.2g} tied, {ties['untied'].value:.2g} untied",
        ),
    ]


@reproduction(
    "ostquant",
    claim="Orthogonal and scaling transforms that are learned and fold exactly fill the quantization range "
    "better than fixed ones, and lose less with 4-bit weights and activations.",
    judge=judge,
    quick={"pretrain": 800, "steps": 100, "calibration": 2048, "tokens": 8192, "exact": "bytes"},
    full={"pretrain": 800, "steps": 300, "calibration": 8192, "tokens": 32768, "exact": "smollm2"},
)
def ostquant(*, seed: int, pretrain: int, steps: int, calibration: int, tokens: int, exact: str) -> Findings:
    """Run it.

    Args:
        seed: of channels, transforms and windows.
        pretrain: steps of the byte-level model.
        steps: of learning.
        calibration: bytes to learn from.
        tokens: held-out bytes that are scored.
        exact: the model on which all folds together are tested: `"bytes"` or a bundled name.
    """
    import actlas
    from actlas.measure.quant_price import extra, losses_of, prices_of
    from actlas.quantize.ostquant import fit_ostquant
    from actlas.quantize.rotate import fit_rotate
    from actlas.quantize.smoothquant import fit_smoothquant

    model = amplified(lab.copied(lab.trained_bytes(layers=4, width=128, steps=pretrain)), seed)
    text = lab.prose()
    common: dict[str, Any] = {"tokens": calibration, "context": CONTEXT, "evaluate": 0, "seed": seed}
    edits = {
        "rtn": plain(model),
        "smoothquant": fit_smoothquant(
            model,
            text.learn,
            bits=4,
            act_bits=4,
            symmetric=False,
            act_symmetric=False,
            everywhere=True,
            **common,
        ),
        "hadamard": fit_rotate(model, text.learn, **common),
        "womi": fit_rotate(model, text.learn, start="womi", **common),
        "ostquant": fit_ostquant(model, text.learn, steps=steps, **common),
    }
    base, found = losses_of(model, text.test, edits, tokens=tokens, context=CONTEXT)
    out = prices_of(base, found, edits, seed=seed)
    for over in ("rtn", "smoothquant", "hadamard", "womi"):
        out += extra(found["ostquant"], found[over], seed=seed, group={"variant": "ostquant", "over": over})
    out.append(_against(found["ostquant"], found["hadamard"], 0.85, seed))
    out += _filling(model, text.learn, seed)
    out.append(_exact(model if exact == "bytes" else actlas.load(exact), seed))
    out += _pairs(model, seed)
    kl = {name: _kl(losses) for name, losses in found.items()}
    headline = (
        f"W4A4 divergence {kl['ostquant']:.4f} learned, {kl['womi']:.4f} at its start, {kl['hadamard']:.4f} "
        f"with Hadamard rotations, {kl['smoothquant']:.3f} SmoothQuant, {kl['rtn']:.3f} as it is"
    )
    rows = [{"method": name, "nats/token": value} for name, value in kl.items()]
    plot = Plot(
        "Divergence from full precision, 4 bits everywhere", rows, x="method", y="nats/token", mark="bar"
    )
    return Findings(out, headline, NOTE, [plot])


NOTE = (
    "Published: W4A4KV4 on LLaMA-3-8B, 32% of the remaining gap closed; here a byte-level Llama of 1.1 "
    "million parameters with planted outliers, 4-bit weights by output channel and inputs by token (key- "
    "value caches and the head stay), Hadamard blocks at the down projection's inputs in all rotated "
    "variants. The outliers are planted by scaling channels, so scales undo them exactly: norms' vanish "
    "when norms are folded, as all rotation methods do, and SmoothQuant, applied here to all inputs and "
    "not to norms' alone, is a strong baseline (on norms' inputs alone it gave 0.32 in a trial). For the "
    "same reason scaling fills more than rotation here, which was known before this run. Scales of "
    "queries and keys are tied within rotary pairs; public forks do not tie them, which changes the "
    "function. Rates are ours: the paper's are unconfirmed. Tried before this run on other held-out text: "
    "60 steps 0.026 (WOMI 0.053, Hadamard 0.073), 100 steps at twice the rate of rotations 0.021 "
    "(SmoothQuant 0.027)."
)


def plain(model: Model) -> Any:
    """Return the edit that rounds weights and inputs of the model as it is."""
    from actlas.quantize.rounded_transforms import Formats, rounded
    from actlas.quantize.transform_set import TransformSet

    return rounded(model, TransformSet(model, ()), Formats(), method="rtn", online=False)


def amplified(model: Model, seed: int, *, channels: int = 3, by: float = 30.0) -> Model:
    """Make a few channels of each norm, value and up projection larger, by an exact fold."""
    from actlas.core.transforms import Folding

    folding = Folding(model)
    generator = torch.Generator().manual_seed(seed)
    for slot in folding.slots.of("norm", "v_o", "up_down"):
        s = torch.ones(slot.width, dtype=torch.float64)
        s[torch.randperm(slot.width, generator=generator)[:channels]] = 1 / by
        folding.scale(slot, s)
    folding.fold().edit().bake(model)
    return model


def _kl(losses: Losses) -> float:
    assert losses.divergence is not None
    return float(losses.divergence.sum() / losses.tokens.sum())


def _against(losses: Losses, over: Losses, share: float, seed: int) -> Measurement:
    from actlas.measure.statistics import paired_difference

    assert losses.divergence is not None and over.divergence is not None
    drawn = paired_difference(
        share * over.divergence / over.tokens, losses.divergence / losses.tokens, losses.tokens, seed=seed
    )
    return Measurement(
        f"kl over {share} of hadamard",
        drawn.value,
        "nats/token",
        drawn.n,
        drawn.low,
        drawn.high,
        "paired bootstrap over documents",
        seed,
        better="lower",
    )


def _filling(model: Model, documents: Sequence[Any], seed: int) -> list[Measurement]:
    """Measure QSUR and the 4-bit output error of each norm-fed site under four transforms of its inputs."""
    from actlas.core.calibration import calibrate
    from actlas.core.layout import weight_matrix
    from actlas.core.numbers import QuantSpec, quantize
    from actlas.core.transforms import slots
    from actlas.measure.qsur import log_qsur

    spec = QuantSpec(4, granularity="channel")
    sites = [f"blocks.{i}.{kind}" for i in range(model.n_blocks or 0) for kind in ("attn_norm", "mlp_norm")]
    found = calibrate(
        model, documents, sites, ("rows",), rows=1024, max_tokens=4096, context=CONTEXT, seed=seed
    )
    norms = slots(model).of("norm")
    shares: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for slot, site in zip(norms, sites, strict=True):
        x = found[site].rows
        assert x is not None
        x = x.double()
        weight = torch.cat(
            [weight_matrix(model.module.get_submodule(p)).detach().double() for p in slot.readers]
        )
        for name, t in _four(x, seed).items():
            y = x @ t
            shares.setdefault(name, []).append(log_qsur(y))
            inverse = weight @ torch.linalg.inv(t).T
            off = (quantize(y, spec) - y) @ inverse.T
            errors.setdefault(name, []).append(float(off.square().sum() / (x @ weight.T).square().sum()))
    out = []
    for name, values in shares.items():
        out.append(
            Measurement(
                "mean log QSUR",
                float(np.mean(values)),
                "nats/channel",
                len(values),
                group={"transform": name},
                better="higher",
                details={"by_site": [round(v, 4) for v in values]},
            )
        )
        out.append(
            Measurement(
                "relative output error at 4 bits",
                float(np.mean(errors[name])),
                "fraction",
                len(values),
                group={"transform": name},
                better="lower",
            )
        )
    flat = [v for values in shares.values() for v in values]
    other = [float(np.log(v)) for values in errors.values() for v in values]
    out.append(_spearman(flat, other, seed))
    return out


def _four(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the four transforms `[d, d]` that are applied on the right."""
    from actlas.quantize.transform_set import mixing

    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    mix = mixing(x.shape[1], seed)
    even = values.clamp_min(1e-7 * float(values[-1])).rsqrt()
    return {
        "raw": torch.eye(x.shape[1], dtype=torch.float64),
        "scale": torch.diag(1 / centred.std(0)),
        "rotation": vectors @ mix,
        "both": vectors @ torch.diag(even) @ mix,
    }


def _spearman(a: Sequence[float], b: Sequence[float], seed: int) -> Measurement:
    from scipy.stats import spearmanr

    first, second = np.array(a), np.array(b)
    value = float(spearmanr(first, second).statistic)
    generator = np.random.default_rng(seed)
    draws = [generator.integers(len(first), size=len(first)) for _ in range(1000)]
    drawn = [float(spearmanr(first[i], second[i]).statistic) for i in draws]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Measurement(
        "rank correlation of log QSUR and log error",
        value,
        "correlation",
        len(first),
        float(low),
        float(high),
        "bootstrap over sites and transforms",
        seed,
    )


def _exact(model: Model, seed: int) -> Measurement:
    """Fold everything at once with random numbers; return how far the logits move."""
    from actlas.core.transforms import Folding
    from actlas.quantize.transform_set import mixing

    generator = torch.Generator().manual_seed(seed)
    folding = Folding(model, untie=True)
    for slot in folding.slots.of("residual"):
        folding.rotate_residual(mixing(slot.width, seed), slot)
    for slot in folding.slots.of("v_o", "up_down", "qk"):
        if slot.kind == "v_o":
            folding.rotate_v_o(slot, mixing(slot.width // slot.groups, seed))
        folding.scale(slot, torch.exp(torch.randn(slot.width, generator=generator, dtype=torch.float64)))
    fold = folding.fold(verify=False)
    ids = torch.randint(model.vocab_size or 256, (1, 64), generator=generator)
    return Measurement(
        "largest change by exact folds",
        fold.moved(model, {"input_ids": ids}),
        "fraction of the largest logit",
        64,
        note=f"{model.name}: {fold.note}",
    )


def _pairs(model: Model, seed: int) -> list[Measurement]:
    """Scale queries and keys of every block, tied within rotary pairs and not."""
    from actlas.core.transforms import Folding

    out = []
    ids = torch.randint(model.vocab_size or 256, (1, 64), generator=torch.Generator().manual_seed(seed))
    for name in ("tied", "untied"):
        folding = Folding(model)
        generator = torch.Generator().manual_seed(seed)
        for slot in folding.slots.of("qk"):
            if name == "tied":
                folding.scale(
                    slot, torch.exp(torch.randn(slot.width, generator=generator, dtype=torch.float64))
                )
                continue
            key = torch.exp(torch.randn(len(slot.rows), generator=generator, dtype=torch.float64))
            query = key[slot.index]
            folding.scale_rows(slot.producer, 1 / query).scale_rows(slot.readers[0], key)
        moved = folding.fold(verify=False).moved(model, {"input_ids": ids})
        out.append(
            Measurement(
                "change by q-k scales", moved, "fraction of the largest logit", 64, group={"pairs": name}
            )
        )
    return out
