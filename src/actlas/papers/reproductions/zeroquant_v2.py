"""zeroquant-v2: low-rank compensation of the rounding error, and what activations lose against weights.

Yao et al. 2023, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low
Rank Compensation". SmolLM2 at 3 bits in groups of 64, round to nearest, with branches of rank 2, 8 and 32;
the same bytes spent on smaller groups; and weights alone against activations alone at 8 and at 4 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.quant_arms import kl, less, outside, reading, rows, texts

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.measure.likelihood import Losses

BITS, GROUP = 3, 64
SCHEMES = {"W8 per channel": "w8", "A8 per token": "a8", "W4 per channel": "w4-channel", "A4 per token": "a4"}


def judge(m: Measured) -> list[Check]:
    """Central: a branch of rank 8 in 16 bits diverges less from the full model than rounding alone, the
    whole 95% interval of the difference of KL (paired bootstrap over documents) below 0; and activations
    alone diverge more than weights alone at 8 bits and at 4 bits. Also: rank 8 beats rank 2 and rank 32
    beats rank 8; a branch that is weighted by the inputs beats the plain one; factors in 8 bits lose
    nothing that shows (KL not above 16 bits' beyond the interval); rank 8 in 16 bits beats the same bytes
    in groups of 32; and in every layer the weight error that is left is what Eckart and Young say (to 1%).
    """
    tail = m["weight error over the tail of singular values"]
    factors = m.get("extra-kl", variant="rank 8, 8-bit factors", over="rank 8")
    lost = None if factors is None or factors.low is None else not factors.low > 0
    return [
        less(m, "rank 8 lowers KL", "rank 8", "rtn", central=True),
        less(m, "weights alone lose less than activations alone at 8 bits", *_pair(8), central=True),
        less(m, "weights alone lose less than activations alone at 4 bits", *_pair(4), central=True),
        less(m, "rank 8 beats rank 2", "rank 8", "rank 2"),
        less(m, "rank 32 beats rank 8", "rank 32", "rank 8"),
        less(m, "weighting by inputs helps", "rank 8, weighted", "rank 8"),
        Check("8-bit factors lose nothing that shows", lost, str(factors)),
        less(m, "rank 8 beats groups of 32 at about equal bytes", "rank 8", "rtn, groups of 32"),
        Check("Eckart and Young in every layer", abs(tail.value - 1) < 0.01, str(tail)),
    ]


def _pair(bits: int) -> tuple[str, str]:
    return f"W{bits} per channel", f"A{bits} per token"


@reproduction(
    "zeroquant-v2",
    claim="Adding back a low-rank part of the rounding error improves a model for few bytes, and activations "
    "are more sensitive than weights.",
    judge=judge,
    quick={"step": 3, "calibration": 256, "tokens": 512, "context": 128},
    full={"step": 1, "calibration": 2048, "tokens": 4096, "context": 256},
)
def zeroquant_v2(*, seed: int, step: int, calibration: int, tokens: int, context: int) -> Findings:
    """Run it.

    Args:
        seed: of texts and the bootstrap.
        step: every step-th block is quantised for the part on branches.
        calibration: tokens of calibration text for the weighting.
        tokens, context: tokens of held-out text, and of a window.
    """
    from actlas.core.quant_edit import QuantEdit
    from actlas.measure.likelihood import nll
    from actlas.measure.quant_price import extra, losses_of, prices_of
    from actlas.models import load
    from actlas.quantize.input_moments import input_moments
    from actlas.quantize.layers import split_text
    from actlas.quantize.lorc import branches, with_branches
    from actlas.quantize.rtn import fit_rtn

    model = load("smollm2")
    fit, held_out = texts(seed)
    common: dict[str, Any] = {"bits": BITS, "skip": outside(model, step), "evaluate": 0, "seed": seed}
    rtn = fit_rtn(model, group_size=GROUP, **common)
    assert isinstance(rtn, QuantEdit)
    plain = branches(model, rtn, rank=32)
    sizes = input_moments(model, split_text(model, fit, tokens=calibration, context=context, seed=seed))
    weighted = branches(model, rtn, rank=8, input_sizes=sizes)
    variants: dict[str, Edit] = {
        "rtn": rtn,
        "rank 2": with_branches(model, rtn, plain, rank=2),
        "rank 8": with_branches(model, rtn, plain, rank=8),
        "rank 32": with_branches(model, rtn, plain),
        "rank 8, 8-bit factors": with_branches(model, rtn, plain, rank=8, factor_bits=8),
        "rank 8, weighted": with_branches(model, rtn, weighted),
        "rtn, groups of 32": fit_rtn(model, group_size=32, **common),
    }
    base, losses = losses_of(model, held_out, variants, **reading(tokens, context))
    measured = prices_of(base, losses, variants, seed=seed)
    kept: list[Any] = []
    nll(model, held_out, keep_logits=kept, **reading(tokens, context))
    schemes = {name: _rounded(model, held_out, s, kept, tokens, context) for name, s in SCHEMES.items()}
    measured += prices_of(base, schemes, {}, seed=seed)
    every = {**losses, **schemes}
    for name, over in (
        ("rank 2", "rtn"),
        ("rank 8", "rtn"),
        ("rank 32", "rtn"),
        ("rank 8", "rank 2"),
        ("rank 32", "rank 8"),
        ("rank 8, weighted", "rank 8"),
        ("rank 8, 8-bit factors", "rank 8"),
        ("rank 8", "rtn, groups of 32"),
        ("rank 8, 8-bit factors", "rtn, groups of 32"),
        _pair(8),
        _pair(4),
    ):
        measured += extra(every[name], every[over], seed=seed, group={"variant": name, "over": over})
    measured += _energy(plain, weighted)
    measured.append(_tail(model, rtn, variants["rank 8"], plain))
    said = ", ".join(f"{name} {kl(measured, name):.3f}" for name in ("rtn", "rank 8", "rtn, groups of 32"))
    plot = Plot(
        "What a branch buys",
        rows(measured),
        x="bits a weight",
        y="KL to the full model",
        color="variant",
        mark="point",
    )
    return Findings(measured, f"KL at 3 bits: {said}", NOTE, [plot])


def _rounded(
    model: Model, held_out: list[Any], scheme: str, kept: list[Any], tokens: int, context: int
) -> Losses:
    """Return the losses with all weights or all inputs of linear layers rounded."""
    from actlas.measure.likelihood import nll
    from actlas.measure.rounding import rounded

    with rounded(model.module, scheme):
        return nll(model, held_out, against_base=True, base_logits=kept, **reading(tokens, context))


def _energy(plain: dict[str, Any], weighted: dict[str, Any]) -> list[Measurement]:
    """Return the share of the squared error that branches hold, over layers."""
    from actlas.measure.samples import mean_measurement

    out = []
    for label, held, rank in (
        ("rank 2", plain, 2),
        ("rank 8", plain, 8),
        ("rank 32", plain, 32),
        ("rank 8, weighted", weighted, 8),
    ):
        shares = [float(b.energy[rank - 1]) for b in held.values()]
        out.append(
            mean_measurement(
                "error held", "fraction", shares, over="layers", group={"variant": label}, seed=0
            )
        )
    return out


def _tail(model: Model, rtn: Any, edit: Any, plain: dict[str, Any]) -> Measurement:
    """Return what is left of the weight error over what Eckart and Young say, the layer farthest from 1."""
    from actlas.core.layout import find, weight_matrix

    ratios = []
    for path, layer in edit.modules.items():
        linear = find(model.module, path)
        assert linear is not None
        weight = weight_matrix(linear).detach()
        before = float((weight - rtn.modules[path].weight).double().square().sum())
        after = float((weight - layer.weight).double().square().sum())
        ratios.append(after / (before * (1 - float(plain[path].energy[7]))))
    worst = max(ratios, key=lambda r: abs(r - 1))
    return Measurement("weight error over the tail of singular values", worst, "ratio", len(ratios))


NOTE = (
    "Published: OPT and BLOOM from 125M to 176B; no method recovers the original quality at W4 or W4A8, "
    "and branches of rank 8 narrow the gap. Ours: SmolLM2-135M; quick mode quantises every third block for "
    "the part on branches and all layers for weights against activations (symmetric, except at 4 bits). A "
    "stored weight has 16 bits of scale and 8 of zero point a group. Single runs before this one (other "
    "text, all blocks): KL 1.30 by rounding, 1.22 with rank 8, 1.01 with rank 32, and 1.08 in groups of 32."
)
