"""outlier-safe-pretraining: Muon, single-scale norms and projected embeddings against Adam and RMSNorm.

Park et al. 2025. Four byte-level Llamas see the same windows of prose: Adam with RMSNorm, Muon with
single-scale norms, Muon with projections, and all three. Outliers need far more training than a
quick run has, so what can be tested in minutes are the identities, the validation loss, and on
smollm2 (trained elsewhere with an Adam-like optimiser) that kurtosis is a matter of the basis.
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

ARMS = ("adam", "muon + ssnorm", "muon + embproj", "all")
CONTEXT, BATCH = 64, 8


def judge(m: Measured) -> list[Check]:
    """Central: with all three parts the validation loss is at most that of Adam with RMSNorm (paired
    interval over documents); where Adam's kurtosis rises above 1, that with all three parts stays
    below 1 and rounding weights and activations to 4 bits costs it less (not testable where Adam's
    model has no outliers). Beside it: merging the projections moves no logit by more than 1e-5 of
    the largest; a single-scale norm commutes with a rotation of the residual stream and an RMSNorm
    with its trained weights does not; smollm2's mean kurtosis over layers and tokens, first tokens
    left out, is above 10, and below 1 after a random rotation. Falsified if, in full mode, kurtosis
    or the price of 4 bits is higher with all three parts.
    """
    kurtosis = {arm: m.get("mean token kurtosis", arm=arm) for arm in ("adam", "all")}
    adam, safe = kurtosis["adam"], kurtosis["all"]
    assert adam is not None and safe is not None
    formed = adam.value > 1
    said = f"Adam {adam.value:.3g}, all three {safe.value:.3g}"
    price = m.get("price of 4 bits over Adam's", arm="all")
    ties = {k: m.get("change by a rotation", norm=k) for k in ("single", "rms")}
    assert ties["single"] is not None and ties["rms"] is not None
    merging = m["largest change by merging"]
    bare, turned = (m.get("smollm2 kurtosis", basis=b) for b in ("own", "rotated"))
    assert bare is not None and turned is not None
    return [
        Check.below(
            "no more validation loss than Adam", m.get("loss over Adam's", arm="all"), 0.0, central=True
        ),
        Check(
            "kurtosis stays below 1 where Adam's rises",
            safe.value < 1 if formed else None,
            said,
            central=True,
        ),
        Check.below("4 bits cost less than with Adam", price, 0.0, central=True)
        if formed
        else Check("4 bits cost less than with Adam", None, f"no outliers formed: {price}", central=True),
        Check("merging is exact", merging.value < 1e-5, str(merging)),
        Check(
            "only the single-scale norm commutes",
            ties["single"].value < 1e-5 < 1e-3 < ties["rms"].value,
            f"{ties['single'].value:.2g} and {ties['rms'].value:.2g}",
        ),
        Check("smollm2 has outliers", bare.value > 10, str(bare)),
        Check("a rotation takes them away", turned.value < 1, str(turned)),
    ]


@reproduction(
    "outlier-safe-pretraining",
    claim="Training without per-coordinate scaling, with single-scale norms and projected embeddings, keeps "
    "activation kurtosis near zero and makes 4-bit quantization far less harmful.",
    judge=judge,
    quick={"layers": 3, "width": 96, "steps": 200, "tokens": 16384, "read": 256},
    full={"layers": 8, "width": 384, "steps": 8000, "tokens": 65536, "read": 2048},
)
def outlier_safe_pretraining(
    *, seed: int, layers: int, width: int, steps: int, tokens: int, read: int
) -> Findings:
    """Run it.

    Args:
        seed: of weights and windows.
        layers, width: of the models.
        steps: of each arm, each 8 windows of 64 bytes.
        tokens: held-out bytes that are scored.
        read: tokens on which smollm2's kurtosis is read.
    """
    from actlas.measure.likelihood import nll

    text = lab.prose()
    models = {
        arm: trained(arm, text.learn, layers=layers, width=width, steps=steps, seed=seed) for arm in ARMS
    }
    losses: dict[str, Losses] = {}
    prices: dict[str, Losses] = {}
    out: list[Measurement] = []
    for arm, model in models.items():
        plain = model if arm == "adam" else _plain(model)
        losses[arm] = nll(plain, text.test, tokens=tokens, context=CONTEXT)
        with plain.edit(_four_bits(plain)):
            prices[arm] = nll(plain, text.test, tokens=tokens, context=CONTEXT)
        out += [
            lab.loss_over_seeds("loss", [losses[arm]], arm=arm, bits="32"),
            lab.loss_over_seeds("loss", [prices[arm]], arm=arm, bits="4"),
            _rise("price of 4 bits", losses[arm], prices[arm], arm, seed),
        ]
        out += _kurtosis(plain, text.test, arm, seed)
    for arm in ARMS[1:]:
        out.append(_rise("loss over Adam's", losses["adam"], losses[arm], arm, seed))
        out.append(_over(arm, prices, losses, seed))
    out += [_merging(models["all"], seed), *_rotation(models, seed), *_smollm2(read, seed)]
    by_arm = {a: lab.mean_loss(run) for a, run in losses.items()}
    four = {a: lab.mean_loss(run) for a, run in prices.items()}
    found = {m.group["arm"]: m.value for m in out if m.name == "mean token kurtosis"}
    own = next(m.value for m in out if m.name == "smollm2 kurtosis" and m.group["basis"] == "own")
    headline = (
        f"validation loss {by_arm['all']:.3f} (Adam {by_arm['adam']:.3f}), with 4 bits everywhere "
        f"{four['all']:.3f} ({four['adam']:.3f}); kurtosis {found['all']:.2f} ({found['adam']:.2f}); "
        f"smollm2 {own:.0f}"
    )
    rows = [{"arm": a, "loss": v, "bits": b} for b, d in (("32", by_arm), ("4", four)) for a, v in d.items()]
    return Findings(
        out,
        headline,
        NOTE,
        [Plot("Loss in full precision and at 4 bits", rows, "arm", "loss", "bits", "bar")],
    )


NOTE = (
    "Published: 1.4 billion parameters; kurtosis 0.04 against 1,819 with Adam, ten tasks at 4-4-4 bits "
    "37.5 against 26.8. Ours: byte-level Llamas trained for minutes, in which no outliers form with "
    "either optimiser (known from a feasibility run of another size), so the claim on outliers and 4 "
    "bits cannot be decided in quick mode. Kurtosis here is of the centred fourth moment on real "
    "sequences; the released script feeds every token as a sequence of its own and mixes an uncentred "
    "moment with a centred deviation. Rates: Adam 2e-3 (the byte models' usual one), Muon 1e-2 with "
    "tables at 2e-3, Adam's from earlier reproductions, Muon's the best of three in runs of 100 steps "
    "judged on text that is left out of the training there (loss 2.31, against 2.48 with Adam); the "
    "projections add 2 d^2 weights while training, which merging takes away."
)


def trained(arm: str, documents: Sequence[Any], *, layers: int, width: int, steps: int, seed: int) -> Model:
    """Return one arm's model, trained."""
    from actlas.nn.ss_norm import outlier_safe
    from actlas.papers.reproductions.byte_models import byte_model
    from actlas.training.language_loop import corpus_tokens, windows
    from actlas.training.outlier_safe import pretrain, safe_optimisers

    model = byte_model("silu", seed, layers=layers, width=width)
    optimisers: list[torch.optim.Optimizer]
    if arm == "adam":
        parameters = list(model.module.parameters())
        optimisers = [torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)]
    else:
        model = outlier_safe(
            model,
            norms=arm in ("muon + ssnorm", "all"),
            projections=arm in ("muon + embproj", "all"),
            seed=seed,
        )
        optimisers = safe_optimisers(model, lr=MUON_LR, table_lr=2e-3)
    drawn = windows(
        corpus_tokens(model, documents, CONTEXT), steps=steps, batch=BATCH, context=CONTEXT, seed=seed
    )
    pretrain(model, drawn, optimisers, steps=steps, what=f"training with {arm}")
    return model


MUON_LR = 1e-2


def _plain(model: Model) -> Model:
    """Return the model with its projections merged, if it has any."""
    from actlas.nn.ss_norm import ProjectedEmbedding, merged

    has = any(isinstance(m, ProjectedEmbedding) for m in model.module.modules())
    return merged(model) if has else model


def _four_bits(model: Model) -> Any:
    from actlas.papers.reproductions.ostquant import plain

    return plain(model)


def _rise(name: str, base: Losses, other: Losses, arm: str, seed: int) -> Measurement:
    """Return the mean rise of the loss, paired over documents."""
    return _paired(name, base.nll / base.tokens, other.nll / other.tokens, base.tokens, arm, seed)


def _over(arm: str, prices: dict[str, Losses], losses: dict[str, Losses], seed: int) -> Measurement:
    """Return how much more 4 bits cost an arm than Adam's model, paired over documents."""
    tokens = losses["adam"].tokens
    extra = {a: (prices[a].nll - losses[a].nll) / tokens for a in ("adam", arm)}
    return _paired("price of 4 bits over Adam's", extra["adam"], extra[arm], tokens, arm, seed)


def _paired(name: str, first: Any, second: Any, tokens: Any, arm: str, seed: int) -> Measurement:
    from actlas.measure.statistics import paired_difference

    drawn = paired_difference(first, second, tokens, seed=seed)
    return Measurement(
        name,
        drawn.value,
        "nats/byte",
        drawn.n,
        drawn.low,
        drawn.high,
        "paired bootstrap over documents",
        seed,
        group={"arm": arm},
        better="lower",
    )


def _kurtosis(model: Model, documents: Sequence[Any], arm: str, seed: int) -> list[Measurement]:
    from actlas.measure.kurtosis import excess_kurtosis

    ids = model.tokenizer(documents[0].text[:4000], add_special_tokens=False)["input_ids"]
    n = len(ids) // CONTEXT
    batch = torch.tensor(ids[: n * CONTEXT]).view(n, CONTEXT)
    trace = model.trace({"input_ids": batch}, "blocks.*.resid_post")
    layers = [
        float(excess_kurtosis(trace[s.name][:, 1:].reshape(-1, trace[s.name].shape[-1])).mean())
        for s in model.resolve("blocks.*.resid_post")
    ]
    return [
        Measurement(
            "mean token kurtosis",
            float(np.mean(layers)),
            "excess kurtosis",
            n,
            seed=seed,
            group={"arm": arm},
            better="lower",
            note="mean over layers and tokens, first tokens left out",
            details={"by_layer": [round(v, 4) for v in layers]},
        )
    ]


def _merging(model: Model, seed: int) -> Measurement:
    from actlas.nn.ss_norm import merged

    ids = torch.randint(256, (4, CONTEXT), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        a, b = (m.module(input_ids=ids).logits.double() for m in (model, merged(model)))
    moved = float((a - b).abs().max() / a.abs().max())
    return Measurement("largest change by merging", moved, "fraction of the largest logit", 4)


def _rotation(models: dict[str, Model], seed: int) -> list[Measurement]:
    """Turn a norm's input and compare with its output turned."""
    from actlas.quantize.transform_set import mixing

    out = []
    for name, arm in (("single", "all"), ("rms", "adam")):
        norm = models[arm].module.get_submodule("model.layers.1.input_layernorm").double()
        width = models[arm].d_model or 0
        turn = mixing(width, seed)
        x = torch.randn(64, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            value = norm(x).double()
            off = float((norm(x @ turn).double() - value @ turn).abs().max() / value.abs().max())
        norm.float()
        out.append(Measurement("change by a rotation", off, "fraction", 64, group={"norm": name}))
    return out


def _smollm2(tokens: int, seed: int) -> list[Measurement]:
    """Kurtosis of smollm2's residual stream in its own basis and after a random rotation."""
    import actlas
    from actlas.measure.kurtosis import excess_kurtosis
    from actlas.quantize.transform_set import mixing

    model = actlas.load("smollm2")
    text = "".join(d.text for d in lab.prose().test)[: 12 * tokens]
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    trace = model.trace({"input_ids": torch.tensor([ids])}, "blocks.*.resid_post")
    alone = model.trace({"input_ids": torch.tensor(ids)[1:, None]}, "blocks.*.resid_post")
    turn = mixing(model.d_model or 0, seed)
    values: dict[str, list[Tensor]] = {
        "own": [],
        "rotated": [],
        "own, as the released script computes it": [],
    }
    for site in model.resolve("blocks.1-28.resid_post"):
        values["own, as the released script computes it"].append(
            excess_kurtosis(alone[site.name][:, 0], official=True)
        )
        rows = trace[site.name][0, 1:].double()
        values["own"].append(excess_kurtosis(rows))
        values["rotated"].append(excess_kurtosis(rows @ turn))
    out = []
    for basis, found in values.items():
        mean = torch.stack(found).mean(0).numpy()
        half = 1.96 * float(mean.std(ddof=1)) / len(mean) ** 0.5
        out.append(
            Measurement(
                "smollm2 kurtosis",
                float(mean.mean()),
                "excess kurtosis",
                len(mean),
                float(mean.mean()) - half,
                float(mean.mean()) + half,
                "normal over tokens",
                seed,
                group={"basis": basis},
                details={"by_layer": [round(float(f.mean()), 2) for f in found]},
            )
        )
    return out
