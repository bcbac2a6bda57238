"""edgeqat: quantization-aware training guided by attention, and fewer bits for unimportant tokens.

Shen et al. 2024. A byte-level Llama is trained on with 4-bit weights and 4-bit activations (learned steps):
with the next-token loss alone, with distillation, and with the similarity and the entropy loss beside it, one
at a time and both.
The second part rounds activations of the float model token by token to 4 or 8 bits: by the published score,
by chance, and by the opposite choice, at the same mean number of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import rounded_bytes as lab

#: arm -> (share of distillation, weight of similarity, weight of entropy)
ARMS = {
    "next-token loss": (0.0, 0.0, 0.0),
    "distillation": (0.5, 0.0, 0.0),
    "and similarity": (0.5, 1.0, 0.0),
    "and entropy": (0.5, 0.0, 1.0),
    "and both": (0.5, 1.0, 1.0),
}


def judge(m: Measured) -> list[Check]:
    """Central: trained with both losses beside distillation the model diverges less from its float teacher
    than with distillation alone (KL in nats per byte, paired interval over documents and seeds), and its
    attention maps are nearer to the teacher's (cosine); and at the same mean number of bits, tokens chosen by
    the published score cost less divergence than tokens chosen by chance (paired interval). Beside it:
    distillation beats the next-token loss; the entropy loss raises the variance of queries and keys; the
    released form of the similarity loss lowers the cosine when it is minimised (its sign); the opposite
    choice of tokens is worse than chance. Falsified if the guided model is no better than plain distillation
    over the seeds.
    """
    maps, base = (
        m.get("cosine of attention maps", arm="and both"),
        m.get("cosine of attention maps", arm="distillation"),
    )
    spread = m.get("variance of queries and keys", arm="and entropy")
    plain = m.get("variance of queries and keys", arm="distillation")
    official = m["cosine after minimising the released loss, minus before"]
    assert maps is not None and base is not None and spread is not None and plain is not None
    return [
        Check.below("guided beats distillation", m.get("extra divergence", arm="and both",
            over="distillation"), 0.0, central=True),
        Check("guided maps are nearer to the teacher's", maps.value > base.value,
              f"{maps.value:.4f} and {base.value:.4f}", central=True),
        Check.below("the score beats chance", m.get("extra divergence", arm="first_token", over="random"),
            0.0, central=True),
        Check.below("distillation beats the next-token loss", m.get("extra divergence", arm="distillation",
            over="next-token loss"), 0.0),
        Check("entropy loss spreads queries and keys", spread.value > plain.value,
            f"{spread.value:.3f} and {plain.value:.3f}"),
        Check.below("the released sign drives maps apart", official, 0.0),
        Check.above("the opposite choice is worse than chance", m.get("extra divergence", arm="inverse",
            over="random"), 0.0),
    ]  # fmt: skip


@reproduction(
    "edgeqat",
    claim="Guiding quantization-aware training by attention's entropy and maps beats plain distillation, and "
    "giving unimportant tokens 4 instead of 8 bits costs less than giving them to tokens at random.",
    judge=judge,
    quick={"layers": 3, "width": 96, "pretrain": 900, "steps": 80, "seeds": 2, "w_bits": 4, "a_bits": 4,
        "tokens": 16384},
    full={"layers": 4, "width": 128, "pretrain": 4000, "steps": 1000, "seeds": 3, "w_bits": 4, "a_bits": 4,
        "tokens": 65536},
)  # fmt: skip
def edgeqat(
    *,
    seed: int,
    layers: int,
    width: int,
    pretrain: int,
    steps: int,
    seeds: int,
    w_bits: int,
    a_bits: int,
    tokens: int,
) -> Findings:
    """Run it.

    Args:
        seed: of the model, and the first seed of the windows.
        layers, width, pretrain: of the byte-level model.
        steps: of training with rounding, for each arm.
        seeds: how many.
        w_bits, a_bits: of weights and activations.
        tokens: held-out bytes that are scored.
    """
    from actlas.measure.quant_price import losses_of
    from actlas.training.edgeqat import edgeqat as fit

    model = lab.trained_bytes(layers=layers, width=width, steps=pretrain, seed=seed)
    text = lab.prose()
    runs: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    maps: dict[str, list[float]] = {arm: [] for arm in ARMS}
    spread: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for s in range(seed, seed + seeds):
        for arm, (distil, similarity, entropy) in ARMS.items():
            edit = fit(
                model, text.learn, w_bits=w_bits, a_bits=a_bits, distil=distil, similarity=similarity,
                    entropy=entropy,
                steps=steps, lr=1e-3, lr_steps=1e-4, context=lab.CONTEXT, tokens=512, seed=s,
            )  # fmt: skip
            runs[arm].append(
                losses_of(model, text.test, {arm: edit}, tokens=tokens, context=lab.CONTEXT)[1][arm]
            )
            cosine, variance = _attention(model, edit, text.test)
            maps[arm].append(cosine)
            spread[arm].append(variance)
    out: list[Measurement] = []
    for arm in ARMS:
        out.append(lab.loss_over_seeds("loss", runs[arm], arm=arm))
        out.append(
            lab.loss_over_seeds("divergence from the float model", [_as_loss(r) for r in runs[arm]], arm=arm)
        )
        out.append(_over_seeds("cosine of attention maps", "cosine", maps[arm], arm=arm))
        out.append(_over_seeds("variance of queries and keys", "activation squared", spread[arm], arm=arm))
    for arm, over in [(a, "distillation") for a in ("and similarity", "and entropy", "and both")] + [
        ("distillation", "next-token loss")
    ]:
        out.append(_gap(runs[arm], runs[over], seed, arm=arm, over=over))
    out += [*_tokens(model, text, tokens, seed), _released_sign(model, text.learn, seed)]
    gain = next(x for x in out if x.name == "extra divergence" and x.group["arm"] == "and both")
    by_score = next(x for x in out if x.name == "extra divergence" and x.group["arm"] == "first_token")
    headline = (
        f"W{w_bits}A{a_bits}: both losses {gain.value:+.4f} nats per byte of divergence against "
        f"distillation; "
        f"tokens by score {by_score.value:+.4f} against tokens by chance"
    )
    rows = [
        {"arm": arm, "divergence": float(_as_loss(r).nll.sum() / r.tokens.sum())}
        for arm, found in runs.items()
        for r in found
    ]
    return Findings(
        out,
        headline,
        NOTE,
        [Plot("Divergence from the float model", rows, x="arm", y="divergence", mark="point")],
    )


NOTE = (
    "Published: 58M and 97M models trained on BabyLM-10M with two larger teachers, large gains over plain "
    "training with "
    "rounding, up to 2.37 times faster on devices. Ours: a byte-level Llama of 0.4 million parameters, the "
    "float model as its "
    "only teacher, 4-bit activations because 8 bits cost almost nothing here, tens of steps; speed is not "
    "tested. Queries "
    "and keys are rounded before the rotary embedding. The similarity loss is 1 minus the mean cosine; the "
    "released code "
    "adds the logarithm of the sum of cosines, which drives maps apart when it is minimised. The entropy "
    "loss asks for no "
    "more variance than the teacher has, since scaling queries and keys could raise it without bound. "
    "Tokens are chosen by a "
    "threshold from training text (a token's bits depend on the text before it alone); values stay at 8 bits."
)


def _as_loss(run: Any) -> Any:
    """Return a run whose losses are its divergences."""
    return replace(run, nll=run.divergence)


def _gap(runs: Sequence[Any], others: Sequence[Any], seed: int, **group: str) -> Measurement:
    return lab.gap_over_seeds(
        "extra divergence", [_as_loss(r) for r in runs], [_as_loss(r) for r in others], seed=seed, **group
    )


def _over_seeds(name: str, unit: str, values: Sequence[float], **group: str) -> Measurement:
    return Measurement(
        name, sum(values) / len(values), unit, len(values), min(values), max(values), "range over seeds",
            group=group,
        details={"by_seed": [round(v, 5) for v in values]},
    )  # fmt: skip


@torch.no_grad()
def _attention(model: Model, edit: Any, documents: Any) -> tuple[float, float]:
    """Return the mean cosine of score maps with the float model's, and the mean variance of queries and
    keys."""
    from actlas.training.edgeqat import AttentionReader
    from actlas.training.edgeqat_losses import map_cosines
    from actlas.training.language_loop import corpus_tokens

    ids = corpus_tokens(model, documents, 32 * lab.CONTEXT)[: 32 * lab.CONTEXT].view(32, lab.CONTEXT)
    kinds = ("attn.scores", "attn.q", "attn.k")
    found = []
    for edits in ((), (edit,)):
        with model.edit(*edits), AttentionReader(model).reading(kinds) as reader:
            model.module(input_ids=ids)
            found.append({kind: reader.layers(kind) for kind in kinds})
    cosine = float(map_cosines(found[1]["attn.scores"], found[0]["attn.scores"]).mean())
    both = [*found[1]["attn.q"], *found[1]["attn.k"]]
    return cosine, float(torch.stack([x.var(-1).mean() for x in both]).mean())


def _tokens(model: Model, text: Any, tokens: int, seed: int) -> list[Measurement]:
    """Return what rounding tokens by score, by chance and the other way round costs, at 4 and 8 bits."""
    from actlas.measure.quant_price import losses_of
    from actlas.training.token_bits import TokenBits, calibrate_thresholds

    limits = calibrate_thresholds(model, text.learn, 0.5, tokens=8192, context=lab.CONTEXT)
    first = TokenBits(limits, 4, 8, 0.5, "first_token")
    found = {
        "first_token": losses_of(model, text.test, {"x": first}, tokens=tokens, context=lab.CONTEXT)[1]["x"]
    }
    share = first.counts[0] / max(1, first.counts[1])
    upper = calibrate_thresholds(model, text.learn, 1 - share, tokens=8192, context=lab.CONTEXT)
    edits = {
        "random": TokenBits(limits, 4, 8, share, "random", seed),
        "inverse": TokenBits(upper, 4, 8, share, "inverse"),
    }
    for name, edit in edits.items():
        found[name] = losses_of(model, text.test, {"x": edit}, tokens=tokens, context=lab.CONTEXT)[1]["x"]
    edits["first_token"] = first
    out = [
        Measurement("mean activation bits", e.mean_bits, "bits", e.counts[1], group={"arm": name})
        for name, e in edits.items()
    ]
    for name in ("first_token", "inverse"):
        out.append(_gap([found[name]], [found["random"]], seed, arm=name, over="random"))
    out += [
        lab.loss_over_seeds("divergence from the float model", [_as_loss(r)], arm=f"tokens, {name}")
        for name, r in found.items()
    ]
    return out


def _released_sign(model: Model, documents: Any, seed: int) -> Measurement:
    """Return how the cosine to the teacher's maps changes in ten steps that minimise the released loss
    alone."""
    from actlas.training.edgeqat import AttentionReader
    from actlas.training.edgeqat_losses import attention_similarity, map_cosines
    from actlas.training.language_loop import corpus_tokens, windows

    mine = lab.copied(model)
    with torch.no_grad():  # the loss has no slope where the maps are the teacher's own
        generator = torch.Generator().manual_seed(seed)
        for name, p in mine.module.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.add_(0.2 * p.std() * torch.randn(p.shape, generator=generator))
    ids = next(
        windows(
            corpus_tokens(mine, documents, lab.CONTEXT), steps=1, batch=16, context=lab.CONTEXT, seed=seed
        )
    )
    optimiser = torch.optim.Adam(mine.module.parameters(), lr=1e-3)
    cosines = []
    with (
        AttentionReader(mine).reading(["attn.scores"]) as own,
        AttentionReader(model).reading(["attn.scores"]) as theirs,
    ):
        for _ in range(11):
            with torch.no_grad():
                model.module(input_ids=ids)
            mine.module(input_ids=ids)
            maps = own.layers("attn.scores"), theirs.layers("attn.scores")
            cosines.append(float(map_cosines(*maps).mean().detach()))
            if cosines[-1] <= 0.01:  # the logarithm of the released loss ends here
                break
            optimiser.zero_grad()
            attention_similarity(*maps, official=True).backward()
            optimiser.step()
    return Measurement(
        "cosine after minimising the released loss, minus before", cosines[-1] - cosines[0], "cosine", 16,
        details={"cosines": [round(c, 4) for c in cosines]},
    )  # fmt: skip
