"""Four-bit floats: the 16 codes, real-valued biases, shifts that fold exactly, the search, bad input."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers import QuantParams, QuantSpec, quantize
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.papers.reproductions.llm_fp4 import table_of
from actlas.quantize.fp_search import (
    FORMATS,
    bias_of,
    candidates,
    channel_shifts,
    fp_search,
    parse_format,
    round_scaled,
    scale_of,
    shifted_scale,
)
from actlas.quantize.llm_fp4 import fit_llm_fp4, float_inputs
from tests.core.tiny import TEXTS, tiny

TEXTS = [t[:60] for t in TEXTS]
TEXT = TEXTS * 6
SMALL = {"tokens": 200, "context": 48, "evaluate": 0, "steps": 6, "rounds": 1, "rows": 64}


def paper_grid(x: torch.Tensor, e: int, m: int, b: torch.Tensor) -> torch.Tensor:
    """The grid as the paper and its code define it, in float64, for a real-valued bias b."""
    x, b = x.double(), b.double()
    most = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - b)
    x = torch.minimum(torch.maximum(x, -most), most)
    exponent = torch.floor(torch.log2(x.abs().clamp_min(1e-300)) + b).clamp_min(1)
    step = 2.0 ** (exponent - m - b)
    return step * torch.round(x / step)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_the_table(name: str) -> None:
    e, m = parse_format(name)
    levels = torch.tensor(table_of(e, m))
    assert len(levels) == 16
    assert torch.equal(round_scaled(levels, torch.tensor(1.0), e, m), levels)
    x = torch.linspace(-1.3, 1.3, 40_001) * levels.max()
    own = round_scaled(x, torch.tensor(1.0), e, m)
    assert set(own.tolist()) == set(levels.tolist())
    assert torch.allclose((own - x).abs(), (x[:, None] - levels).abs().amin(1), atol=1e-6)
    spec = QuantSpec(4, "float", exp_bits=e, granularity="tensor")
    assert torch.equal(own, quantize(x, spec, QuantParams(torch.ones(1, 1))))


@pytest.mark.parametrize("name", [*FORMATS, "e2m3", "e3m2"])
@pytest.mark.parametrize("bias", [-2.3, 0.0, 0.4, 1.0, 5.75])
def test_real_valued_biases(name: str, bias: float) -> None:
    e, m = parse_format(name)
    b = torch.tensor(bias)
    scale = scale_of(b, e)
    assert torch.allclose(bias_of(scale, e), b, atol=1e-5)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * float(scale) * 2 ** (e)
    want = paper_grid(x, e, m, b)
    assert torch.allclose(round_scaled(x, scale, e, m).double(), want, rtol=1e-5)


def test_powers_of_two_are_exact() -> None:
    """A float logarithm can land below the integer at a power of two; the grid must not."""
    x = torch.ldexp(torch.ones(60), torch.arange(-30, 30, dtype=torch.int32))
    for name in FORMATS:
        e, m = parse_format(name)
        for k in range(60):
            scale = x[k]
            assert float(round_scaled(scale, scale, e, m) / scale) in table_of(e, m)
            assert float(round_scaled(2 * scale, scale, e, m)) <= 2 * float(scale)


@pytest.mark.parametrize("name", FORMATS)
def test_shifts_are_those_of_the_paper(name: str) -> None:
    e, m = parse_format(name)
    most = torch.tensor([8.0, 7.9, 4.1, 1.0, 0.3, 0.01, 0.0])
    shifts = channel_shifts(most, e, m)
    bias = 2**e - torch.log2(most[:-1].double()) + torch.log2(torch.tensor(2 - 2.0**-m)).double() - 1
    want = (bias.round() - bias.min().round()).clamp(0, 2**e - 1).long()
    assert torch.equal(shifts[:-1], want)
    assert int(shifts[-1]) == int(shifts.max()) == 2**e - 1
    assert int(shifts[0]) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_shifts_fold_into_the_weight_exactly(name: str) -> None:
    e, m = parse_format(name)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 24, generator=g) * torch.logspace(-2, 1, 24)
    weight = torch.randn(10, 24, generator=g)
    shifts = channel_shifts(x.abs().amax(0), e, m)
    assert len(set(shifts.tolist())) > 1
    shared = x.abs().max() / max(table_of(e, m))
    channels = round_scaled(x, shifted_scale(shared, shifts), e, m)
    codes = round_scaled(torch.ldexp(x, shifts.int()), shared, e, m)
    assert torch.equal(channels, torch.ldexp(codes, -shifts.int()))
    moved = torch.ldexp(weight, -shifts.int())
    assert torch.equal(F.linear(channels.double(), weight.double()), F.linear(codes.double(), moved.double()))
    w_scale = weight.abs().amax(1, keepdim=True) / max(table_of(e, m))
    rounded = round_scaled(weight, w_scale, e, m)
    assert torch.equal(  # the same codes, another exponent bias of the column
        torch.ldexp(rounded, -shifts.int()), round_scaled(moved, w_scale * torch.exp2(-shifts.float()), e, m)
    )


def test_preshift_saves_small_channels() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(200, 64, generator=g) * torch.logspace(-1.5, 0.5, 64)
    weight = torch.randn(32, 64, generator=g) / torch.logspace(-1.5, 0.5, 64)
    options = {"steps": 12, "rounds": 2, "formats": ("e2m1",)}
    shared, shifted = fp_search(weight, x, preshift=False, **options), fp_search(weight, x, **options)
    assert shifted.error < 0.8 * shared.error
    assert shared.shifts is None and shared.act_scale is not None and shared.act_scale.shape == (1,)
    assert shifted.act_scale is not None and shifted.act_scale.shape == (64,)


def test_search_finds_the_best_of_its_candidates() -> None:
    """One round, weights only, against trying every candidate of every format by hand."""
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(40, 16, generator=g), torch.randn(6, 16, generator=g)
    found = fp_search(weight, x, act_formats=(), steps=7, rounds=1, low=0.4, high=1.1)
    target, best = x @ weight.T, {}
    for name in FORMATS:
        e, m = parse_format(name)
        rows = torch.full((6,), torch.inf)
        for c in [1.0, *torch.linspace(0.4, 1.1, 7).tolist()]:
            scale = c * weight.abs().amax(1, keepdim=True) / max(table_of(e, m))
            error = (x @ round_scaled(weight, scale, e, m).T - target).square().sum(0)
            rows = torch.minimum(rows, error)
        best[name] = float(rows.double().sum())
    assert found.weight_format == min(best, key=best.__getitem__)
    assert found.error == pytest.approx(min(best.values()) / float(target.double().square().sum()), rel=1e-4)
    assert found.error <= found.before


def test_official_search_multiplies_the_bias() -> None:
    scale = torch.tensor([0.5, 1.0, 4.0])
    bias = bias_of(scale, 2)
    tried = candidates(scale, 2, [0.5, 1.2], "official")
    assert torch.allclose(bias_of(tried[0], 2), 0.5 * bias) and torch.allclose(
        bias_of(tried[1], 2), 1.2 * bias
    )
    assert bool((bias == torch.tensor([2.0, 1.0, -1.0])).all())
    assert float(tried[1][2]) > 4.0 > float(tried[0][2])  # a negative bias: the other direction
    ours = candidates(scale, 2, [0.5, 1.2], "range")
    assert torch.allclose(torch.stack(ours), torch.stack([0.5 * scale, 1.2 * scale]))
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(40, 16, generator=g), torch.randn(6, 16, generator=g)
    assert (
        fp_search(weight, x, variant="official", steps=9, rounds=1).error
        <= fp_search(weight, x, steps=1).before
    )


def test_edit_installs_saves_and_counts(tmp_path: Path) -> None:
    model = tiny("llama")
    edit = fit_llm_fp4(model, TEXT, **{**SMALL, "evaluate": 120}, embedding="e2m1")
    assert isinstance(edit, QuantEdit) and len(edit.modules) == 21
    layer = next(iter(edit.modules.values()))
    assert isinstance(layer, QuantLinear) and layer.spec.bits == 4 and layer.spec.grid == "float"
    rows = torch.tensor(layer.unpacked.shape[0])
    x = torch.randn(5, layer.in_features)
    assert layer.act is not None and layer.act.params is not None and int(rows) == layer.out_features
    e = layer.act.spec.exp_bits or 2
    by_hand = round_scaled(x, layer.act.params.scale.flatten(), e, 3 - e)
    assert torch.allclose(layer(x), F.linear(by_hand, layer.dequantized(), layer.bias), atol=1e-6)
    before = model.module.get_input_embeddings().weight.clone()
    with model.edit(edit), torch.no_grad():
        a = model.forward(model.encode("Why")).logits
        assert not torch.equal(model.module.get_input_embeddings().weight, before)
    with model.edit(Edit.load(edit.save(tmp_path / "e", model), model)), torch.no_grad():
        assert torch.equal(a, model.forward(model.encode("Why")).logits)
    assert torch.equal(model.module.get_input_embeddings().weight, before)
    assert {m.name for m in edit.measurements} >= {"kl-to-base", "bits-per-weight"}
    only = fit_llm_fp4(model, TEXT, act_formats=(), formats=("e2m1",), blocks=[1], **SMALL)
    assert isinstance(only, QuantEdit) and len(only.modules) == 7
    assert all(isinstance(m, QuantLinear) and m.act is None for m in only.modules.values())


def test_activations_alone() -> None:
    from actlas.core.calibration import calibrate

    model = tiny("llama")
    seen = calibrate(
        model, TEXT, [f"blocks.*.{k}" for k in ("attn_norm", "attn.z", "mlp_norm", "mlp.act")], ("absmax",)
    )
    site = "blocks.1.mlp.act"
    x = model.trace(TEXTS[0], [site])[site]
    most = seen[site].absmax.float()
    for preshift in (True, False):
        with model.edit(float_inputs(model, seen, "e2m1", kinds=("mlp.act",), preshift=preshift)):
            got = model.trace(TEXTS[0], ["blocks.0.mlp.act", site])["blocks.0.mlp.act"]
        first = model.trace(TEXTS[0], ["blocks.0.mlp.act"])["blocks.0.mlp.act"]
        reach = seen["blocks.0.mlp.act"].absmax.float()
        scale = reach.max() / 6
        want = round_scaled(
            first, shifted_scale(scale, channel_shifts(reach, 2, 1)) if preshift else scale, 2, 1
        )
        assert torch.allclose(got, want, atol=1e-6)
    assert x.shape[-1] == len(most)
    with pytest.raises(InputError, match="was not calibrated"):
        float_inputs(model, seen, kinds=("resid_post",))


def test_bad_input() -> None:
    model = tiny("llama")
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    for name in ("m2e1", "e0m3", "fp4", "e2"):
        with pytest.raises(InputError, match="float format"):
            fit_llm_fp4(model, TEXT, formats=(name,), **SMALL)
    with pytest.raises(InputError, match="no formats"):
        fit_llm_fp4(model, TEXT, formats=(), **SMALL)
    with pytest.raises(InputError, match="blocks 0 to 2; asked for 7"):
        fit_llm_fp4(model, TEXT, blocks=[7], **SMALL)
    with pytest.raises(InputError, match="'range' or 'official'"):
        fp_search(weight, x, variant="paper")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1"):
        fp_search(weight, x, steps=0)
    with pytest.raises(NonFiniteError, match="weight"):
        fp_search(weight / 0, x)
    with pytest.raises(NonFiniteError, match="inputs"):
        fp_search(weight, x * float("nan"))
    with pytest.raises(InputError, match="silent"):
        channel_shifts(torch.zeros(4), 2, 1)
