"""OutlierTune: folds are exact, the arithmetic is that of integers, outlier channels are saved, bad input."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.integer_product import input_integers, integer_forward
from actlas.core.model import Model
from actlas.core.numbers import integers
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.core.transforms import PlainNorm
from actlas.quantize.channel_ranges import channel_ranges
from actlas.quantize.fold_cost import fold_costs
from actlas.quantize.layers import WeightFormat, targets
from actlas.quantize.outliertune import fit_outliertune, fold_channels, folded_edit, norm_slots, observe_norms
from tests.core.tiny import TEXTS, tiny

TEXTS = [t[:60] for t in TEXTS]
TEXT = TEXTS * 6
SMALL = {"tokens": 200, "context": 48, "evaluate": 0}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny(request.param)


def logits(model: Model, *edits: Edit) -> Tensor:
    with model.edit(*edits), torch.no_grad():
        out: Tensor = model.forward(model.encode(TEXT[0])).logits
    return out


def change(model: Model, *edits: Edit) -> float:
    before = logits(model)
    return float((logits(model, *edits) - before).abs().max() / before.abs().max())


def layers_of(edit: Edit) -> QuantEdit:
    found = edit.parts()[0]
    assert isinstance(found, QuantEdit)
    return found


@pytest.mark.parametrize("symmetrise", ["auto", True, False])
def test_the_fold_is_exact(model: Model, symmetrise: bool | str) -> None:
    chosen = targets(model, WeightFormat(8, 0))
    found = norm_slots(model, [t.path for t in chosen])
    assert len(found) == 6  # both norms of three blocks
    ranges = observe_norms(model, found, TEXT, tokens=200, context=48)
    folded = fold_channels(model, found, ranges, bits=8, symmetrise=symmetrise)  # type: ignore[arg-type]
    assert change(model, folded.fold.edit()) < 1e-4
    shifted = symmetrise is True or (symmetrise == "auto" and model.name == "tiny-gpt2")
    assert bool(folded.shifts) == shifted
    plain = sum(isinstance(m, PlainNorm) for m in folded.fold.modules.values())
    assert plain == (6 if symmetrise is True and model.name == "tiny-llama" else 0)
    edit = folded_edit(model, chosen, folded, bits=8)
    assert 0 < change(model, edit) < 0.2


def test_sixteen_bits_change_little(model: Model) -> None:
    read = {"tokens": 4000, "context": 64, "evaluate": 0}
    edit = fit_outliertune(model, TEXT, bits=16, attention="none", **read)
    assert change(model, edit) < 2e-3
    assert change(model, fit_outliertune(model, TEXT, bits=4, attention="none", **read)) > 2e-2


def test_shift_and_scale_are_those_of_the_paper() -> None:
    model = tiny("gpt2")
    site = "module:transformer.h.1.ln_1.output"
    rows = [model.trace(t, [site])[site][0].double() for t in TEXTS[:3]]
    found = channel_ranges(model, TEXTS[:3], [site])[model.resolve(site)[0].name]
    z = torch.stack([(x.amax(0) + x.amin(0)) / 2 for x in rows]).mean(0)
    assert torch.allclose(found.middle(), z, atol=1e-6)
    every = torch.cat(rows)
    assert torch.allclose(found.middle("union"), (every.amax(0) + every.amin(0)) / 2, atol=1e-6)
    assert torch.allclose(found.shifted(z).absmax, (every - z).abs().amax(0), atol=1e-6)
    assert found.windows == 3 and found.tokens == len(every)
    slot = next(
        s
        for s in norm_slots(model, [t.path for t in targets(model, WeightFormat(8, 0))])
        if "1.ln_1" in s.producer
    )
    folded = fold_channels(model, [slot], {slot.producer: found}, bits=6)
    assert torch.allclose(folded.scales[slot.producer], (every - z).abs().amax(0) / 31, atol=1e-6)
    clipped = fold_channels(model, [slot], {slot.producer: found}, bits=6, symmetrise=False, clip_ratio=0.5)
    want = every.abs().amax(0).clamp_max(0.5 * float(every.abs().max())) / 31
    assert torch.allclose(clipped.scales[slot.producer], want, atol=1e-6)


def test_layers_are_integer_arithmetic(model: Model) -> None:
    """With the edit installed, what a norm-fed layer gives is one scale a row times sums of integers."""
    edit = layers_of(fit_outliertune(model, TEXT, bits=6, **SMALL))
    static = {p: m for p, m in edit.modules.items() if isinstance(m, QuantLinear) and m.act_scale is not None}
    assert len(static) == (6 if model.name == "tiny-gpt2" else 15)
    seen: dict[str, Tensor] = {}
    with model.edit(edit), torch.no_grad():
        handles = [
            m.register_forward_pre_hook(lambda _, args, path=p: seen.__setitem__(path, args[0]))
            for p, m in static.items()
        ]
        model.forward(model.encode(TEXT[0]))
        for handle in handles:
            handle.remove()
    for path, layer in static.items():
        x = seen[path]
        codes = input_integers(layer, x)
        assert int(codes.min()) >= -32 and int(codes.max()) <= 31 and int(codes.abs().max()) > 15
        want = codes.double() @ integers(layer.unpacked, layer.spec, layer.params).double().T
        want = want * layer.scale.double().flatten() + (0 if layer.bias is None else layer.bias.double())
        assert torch.equal(integer_forward(layer, x), want)
        assert torch.equal(layer(x.double()), want)


def outlying(model: Model) -> Model:
    """Make two channels of a norm a hundred times as large, and their columns in its readers as much smaller."""
    block = model.module.model.layers[1]
    with torch.no_grad():
        block.input_layernorm.weight[[3, 7]] *= 100
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).weight[:, [3, 7]] /= 100
    return model


def test_channel_scales_save_outlier_channels() -> None:
    from actlas.core.quant_activations import QuantizeActivations

    model = outlying(tiny("llama"))
    site = "blocks.1.attn_norm"
    folded = layers_of(fit_outliertune(model, TEXT, bits=8, attention="none", **SMALL))
    readers = {p: m for p, m in folded.modules.items() if "layers.1.self_attn" in p and "o_proj" not in p}
    names = {n: v for n, v in folded.parameters.items() if "layers.1.input_layernorm" in n}
    one = change(model, QuantEdit(readers, names))
    token = change(model, QuantizeActivations(site, "int8-token-sym"))
    assert one < 0.3 * token


def test_cost_of_the_fold_against_brute_force() -> None:
    model = tiny("gpt2")
    path = "transformer.h.1.attn.c_attn"
    (cost,) = fold_costs(model, TEXTS, [path], bits=4)
    site = f"module:{path}.input"
    x = torch.cat([model.trace(t, [site])[site][0] for t in TEXTS]).double()
    weight = model.module.get_submodule(path).weight.T.double()
    spec = targets(model, WeightFormat(4, 0))[0].spec
    from actlas.core.numbers import quantize

    exact = x @ weight.T
    plain = (x @ (weight - quantize(weight, spec)).T).square().sum() / exact.square().sum()
    assert cost.plain == pytest.approx(float(plain), rel=1e-4)
    s = x.abs().amax(0)
    off = weight - quantize(weight * s, spec) / s
    assert cost.folded == pytest.approx(float((x @ off.T).square().sum() / exact.square().sum()), rel=1e-4)
    found = channel_ranges(model, TEXTS, [site])[model.resolve(site)[0].name]
    z = found.middle()
    s = (x - z).abs().amax(0)
    off = weight - quantize(weight * s, spec) / s
    want = ((x - z) @ off.T).square().sum() / exact.square().sum()
    assert cost.symmetrised == pytest.approx(float(want), rel=1e-4)


def test_saved_measured_and_counted(model: Model, tmp_path: Path) -> None:
    edit = fit_outliertune(model, TEXT, bits=8, tokens=200, context=48, evaluate=120)
    loaded = Edit.load(edit.save(tmp_path / "e", model), model)
    assert torch.equal(logits(model, edit), logits(model, loaded))
    names = [m.name for m in edit.measurements]
    assert names == ["bits-per-weight", "perplexity-ratio", "kl-to-base", "agreement", "clipped-inputs"]
    assert 0 <= next(m.value for m in edit.measurements if m.name == "clipped-inputs") < 0.1
    assert torch.equal(logits(model), logits(model))


def test_bad_input() -> None:
    model = tiny("gpt2")
    with pytest.raises(InputError, match="2 to 16"):
        fit_outliertune(model, TEXT, bits=1, **SMALL)
    with pytest.raises(InputError, match="clip_ratio is 0"):
        fit_outliertune(model, TEXT, clip_ratio=0.0, **SMALL)
    with pytest.raises(InputError, match="must be 'token' or 'none'"):
        fit_outliertune(model, TEXT, attention="tensor", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="middle is 'mean'"):
        fit_outliertune(model, TEXT, middle="mean", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="symmetrise is 'yes'"):
        fit_outliertune(model, TEXT, symmetrise="yes", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="do not divide|not divide"):
        fit_outliertune(model, TEXT, group_size=24, **SMALL)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 1e9])
def test_integer_arithmetic_holds_for_scales_beyond_half_precision(size: float) -> None:
    """Folded weights can be tiny, so that their scales are kept in float32; the products stay exact."""
    from actlas.core.numbers import QuantParams, QuantSpec, params_of
    from actlas.core.quant_linear import ActQuant
    from actlas.quantize.outliertune import short_scales

    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(200, 30, bias=size <= 1)
    weight = size * torch.randn(30, 200, generator=g)
    spec = QuantSpec(8, granularity="channel")
    act = ActQuant(QuantSpec(8, symmetric=True, granularity="tensor"), QuantParams(torch.ones(1, 1)))
    x = 50 * torch.randn(20, 200, generator=g)
    short = short_scales(params_of(weight, spec))
    assert torch.allclose(short.scale, params_of(weight, spec).scale, rtol=2**-11)
    layer = QuantLinear.of(linear, spec, params=short, act=act, weight=weight)
    assert torch.equal(layer(x.double()), integer_forward(layer, x))
    if size in (1e-9, 1e9):
        assert layer.scale.dtype == torch.float32
        plain = QuantLinear.of(linear, spec, act=act, weight=weight)
        assert not torch.equal(plain(x.double()), integer_forward(plain, x))
