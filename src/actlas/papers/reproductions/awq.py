"""awq: input channels scaled up by their activations before rounding, against plain rounding and controls.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration". SmolLM2
at 3 bits in groups of 64 (its own weights lie on a 4-bit grid in groups of 32), calibrated and evaluated on
different documents. Controls: scales from the weights instead of the activations, and the found scales in
another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.quant_arms import kl, less, outside, part_less, reading, rows, texts

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

BITS, GROUP = 3, 64


def judge(m: Measured) -> list[Check]:
    """Central: scaling by activations diverges less from the full model than round-to-nearest, the whole 95%
    interval of the difference of KL (paired bootstrap over documents) below 0; with the clip search, KL is at
    most 80% of round-to-nearest's, beyond the interval; and the same scales in another order (permuted) are
    worse. Also: scales from the weights lie between both (better than round-to-nearest, worse than those from
    activations); ratio 0 gives exactly the codes of round-to-nearest; a folded layer equals Q(W s) / s in
    place to 1e-4 of the largest logit.
    """
    exact = m["codes that differ at ratio 0"]
    fold = m["folded against in place"]
    return [
        less(m, "scaling by activations beats rounding", "awq-scale", "rtn", central=True),
        Check.below(
            "with clipping, KL is 20% below rounding's or better",
            m.get("kl minus 0.8 of it", variant="awq", over="rtn"),
            0.0,
            central=True,
        ),
        less(m, "activation scales beat the same scales permuted", "awq-scale", "permuted", central=True),
        less(m, "scales from weights beat rounding", "weight-scale", "rtn"),
        less(m, "scales from activations beat those from weights", "awq-scale", "weight-scale"),
        Check("ratio 0 is round-to-nearest", exact.value == 0, str(exact)),
        Check("the fold is exact", fold.value <= 1e-4, str(fold)),
    ]


@reproduction(
    "awq",
    claim="Scaling up the input channels that see large activations before rounding cuts the loss of 3-bit "
    "weights.",
    judge=judge,
    quick={"step": 3, "calibration": 256, "ratios": 8, "tokens": 768, "context": 128},
    full={"step": 1, "calibration": 1024, "ratios": 20, "tokens": 4096, "context": 256},
)
def awq(*, seed: int, step: int, calibration: int, ratios: int, tokens: int, context: int) -> Findings:
    """Run it.

    Args:
        seed: of texts, controls and the bootstrap.
        step: every step-th block is quantised, the others stay as they are.
        calibration: tokens of calibration text.
        ratios: exponents that are tried.
        tokens, context: tokens of held-out text, and of a window.
    """
    from actlas.measure.quant_price import extra, losses_of, prices_of
    from actlas.models import load
    from actlas.quantize.awq import fit_awq
    from actlas.quantize.rtn import fit_rtn

    model = load("smollm2")
    fit, held_out = texts(seed)
    common: dict[str, Any] = {
        "bits": BITS,
        "group_size": GROUP,
        "skip": outside(model, step),
        "evaluate": 0,
        "seed": seed,
    }
    search = {**common, "ratios": ratios, "tokens": calibration, "context": context}
    rtn = fit_rtn(model, **common)
    zero = fit_awq(model, fit, **{**search, "ratios": 1, "clip": False, "tokens": 64})
    variants: dict[str, Edit] = {
        "rtn": rtn,
        "awq-scale": fit_awq(model, fit, clip=False, **search),
        "awq": fit_awq(model, fit, **search),
        "weight-scale": fit_awq(model, fit, clip=False, statistic="weight", **search),
        "permuted": fit_awq(model, fit, clip=False, statistic="permuted", **search),
    }
    base, losses = losses_of(model, held_out, variants, **reading(tokens, context))
    measured = prices_of(base, losses, variants, seed=seed)
    for name, over in (
        ("awq-scale", "rtn"),
        ("awq", "rtn"),
        ("awq", "awq-scale"),
        ("awq-scale", "permuted"),
        ("weight-scale", "rtn"),
        ("awq-scale", "weight-scale"),
    ):
        measured += extra(losses[name], losses[over], seed=seed, group={"variant": name, "over": over})
    both = {"variant": "awq", "over": "rtn"}
    measured.append(part_less(losses["awq"], losses["rtn"], 0.8, seed=seed, group=both))
    measured += [_differing(zero, rtn), _fold_error(model, held_out[0].text[:400], step)]
    said = ", ".join(f"{name} {kl(measured, name):.3f}" for name in variants)
    plot = Plot("Divergence at 3 bits", rows(measured), x="variant", y="KL to the full model", mark="bar")
    return Findings(measured, f"KL at 3 bits: {said}", NOTE, [plot])


def _differing(a: Any, b: Any) -> Measurement:
    """Return how many codes of two edits differ."""
    n = sum(int((a.modules[path].unpacked != b.modules[path].unpacked).sum()) for path in b.modules)
    return Measurement("codes that differ at ratio 0", float(n), "count", len(b.modules))


def _fold_error(model: Model, text: str, step: int) -> Measurement:
    """Return the largest change of a logit between folded and in-place scaled layers, over the largest."""
    from actlas.core.layout import find, weight_matrix
    from actlas.core.numbers import QuantSpec
    from actlas.core.quant_edit import QuantEdit
    from actlas.core.swap import SwapModule
    from actlas.quantize.awq_search import round_fast
    from actlas.quantize.channel_scales import BlockScales, Place, known_slots
    from actlas.quantize.layers import Target

    known, spec = known_slots(model), QuantSpec(BITS, group_size=GROUP)
    assert model.tower is not None
    block = step * (model.tower.n_blocks // step // 2)
    slot = next(s for s in known.of("norm") if f".{block}." in s.producer)
    generator = torch.Generator().manual_seed(0)
    s = torch.exp(0.5 * torch.randn(slot.width, generator=generator, dtype=torch.float64))
    scales, layers, in_place = BlockScales(model, known), {}, []
    scales.add(Place(slot.readers, len(slot.index), known), s)
    for path in slot.readers:
        module = find(model.module, path)
        assert module is not None
        layers[path] = scales.layer(Target(path, module, spec))
        weight, wide = weight_matrix(module).detach(), s[slot.index].float()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(round_fast(weight * wide, spec) / wide, requires_grad=False)
        in_place.append(SwapModule(path, linear))
    inputs = model.encode([text])
    with model.edit(QuantEdit(layers, scales.parameters(layers))):
        got = model.forward(inputs).logits
    with model.edit(*in_place):
        want = model.forward(inputs).logits
    off = float((got - want).abs().max() / want.abs().max())
    return Measurement("folded against in place", off, "fraction", 1, note=f"attention of block {block}")


NOTE = (
    "Published: LLaMA-2-7B at 3 bits in groups of 128, WikiText-2 perplexity 6.66 (round-to-nearest), 6.43 "
    "(GPTQ), 6.24 (AWQ), full precision 5.47. Official code: 20 ratios, 128 windows of 512 tokens, v -> o "
    "left out with grouped-query attention. Ours: SmolLM2-135M in groups of 64; one scale serves the query "
    "heads of a key-value head, so v -> o folds; quick mode quantises every third block, with 8 ratios and "
    "256 calibration tokens. Tried before the stored run, on another order of the corpus: all blocks, KL "
    "1.31 (round-to-nearest) and 0.67 (AWQ with 10 ratios and clipping); every third block, 0.39 "
    "(round-to-nearest), 0.26 (AWQ), 0.30 (without clipping), and 0.27 with a limit on how much one token "
    "counts, which is off."
)
