"""AWQ: the folded model, the point r = 0, the searches against brute force, controls, bad input."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.model import Model
from actlas.core.numbers import QuantSpec, quantize
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.awq import fit_awq
from actlas.quantize.awq_search import candidate, clip_range, round_fast
from actlas.quantize.rtn import fit_rtn
from actlas.quantize.smoothquant import fit_smoothquant, smoothing
from tests.core.tiny import TEXTS, tiny

OPTIONS = {"bits": 3, "group_size": 16, "tokens": 300, "context": 32, "evaluate": 0}


def _logits(model: Model) -> torch.Tensor:
    out = model.forward(model.encode([TEXTS[0]])).logits
    assert isinstance(out, torch.Tensor)
    return out


def _fit(model: Model, **options: object) -> QuantEdit:
    edit = fit_awq(model, TEXTS * 4, **{**OPTIONS, **options})  # type: ignore[arg-type]
    assert isinstance(edit, QuantEdit)
    return edit


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "gpt2"])
def test_folded_model_equals_rounding_in_place(family: str) -> None:
    """Norms and layers as folded, against `Q(W s) / s` in the original basis with the same s."""
    model = tiny(family)
    folded = _fit(model, clip=False)
    with model.edit(folded):
        got = _logits(model)
    # The scale of each input is what the folded weight and the original one differ by.
    place = folded.modules
    assert folded.parameters, "nothing was folded"
    norms = folded.parameters
    modules = dict(model.module.named_modules())
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    with torch.no_grad():  # folded norms by hand, then the dequantised weights
        for name, value in norms.items():
            model.module.get_parameter(name).copy_(value)
        for path, layer in place.items():
            weight = modules[path].weight
            value = layer.weight
            weight.copy_(value.T if type(modules[path]).__name__ == "Conv1D" else value)
            if layer.bias is not None:
                modules[path].bias.copy_(layer.bias)
        want = _logits(model)
        for name, value in before.items():
            model.module.get_parameter(name).copy_(value)
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["norm", "v_o", "up_down"])
def test_folded_layers_equal_scaled_rounding_in_place(kind: str) -> None:
    """`Q(W s)` behind a folded division against `Q(W s) / s` put into the model's own layers."""
    from actlas.core.swap import SwapModule
    from actlas.quantize.channel_scales import BlockScales, Place, known_slots
    from actlas.quantize.layers import Target

    model = tiny()
    spec = QuantSpec(3, group_size=16)
    modules = dict(model.module.named_modules())
    known = known_slots(model)
    for slot in known.of(kind):
        s = torch.exp(
            0.7 * torch.randn(slot.width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        )
        readers = [Target(path, modules[path], spec) for path in slot.readers]
        scales = BlockScales(model, known)
        scales.add(Place(slot.readers, len(slot.index), known), s)
        layers = {t.path: scales.layer(t) for t in readers}
        folded = QuantEdit(layers, scales.parameters(layers))
        assert folded.parameters
        in_place = []
        for t in readers:
            linear = torch.nn.Linear(*reversed(t.weight.shape), bias=False)
            wide = s[slot.index].float()
            linear.weight = torch.nn.Parameter(round_fast(t.weight * wide, spec) / wide, requires_grad=False)
            in_place.append(SwapModule(t.path, linear))
        with model.edit(folded):
            got = _logits(model)
        with model.edit(*in_place):
            want = _logits(model)
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max())), slot.name


def test_ratio_zero_is_round_to_nearest() -> None:
    model = tiny()
    one, nearest = _fit(model, ratios=1, clip=False), fit_rtn(model, bits=3, group_size=16, evaluate=0)
    for path, layer in nearest.modules.items():  # type: ignore[attr-defined]
        assert torch.equal(one.modules[path].unpacked, layer.unpacked), path


def test_never_worse_than_rounding_on_calibration_text() -> None:
    model = tiny()
    searched, nearest = _fit(model), _fit(model, ratios=1, clip=False)
    for path in searched.modules:
        if path.endswith(("o_proj", "down_proj")):  # their inspected module is the layer itself
            assert searched.errors[path] <= nearest.errors[path] * 1.001, path
    assert sum(searched.errors.values()) < 0.9 * sum(nearest.errors.values())


def test_candidates() -> None:
    a = torch.tensor([0.5, 2.0, 8.0, 0.0], dtype=torch.float64)
    assert torch.equal(candidate(a, 0.0), torch.ones(4, dtype=torch.float64))
    s = candidate(a, 0.5)
    assert float(s.max() * s.min()) == pytest.approx(1.0)
    assert float(s[2] / s[0]) == pytest.approx(4.0)
    assert float(s.min()) > 0


def test_clip_is_the_best_of_its_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator) ** 3
    x = torch.randn(100, 32, generator=generator)
    spec = QuantSpec(3, group_size=16)
    params = clip_range(weight, (x.T @ x).double(), spec)
    found = quantize(weight, spec, params.stored(spec))
    for row in range(6):
        for group in range(2):
            part = slice(16 * group, 16 * group + 16)
            w = weight[row : row + 1, part]
            errors = []
            for step in range(10):
                bound = float(w.abs().max()) * (1 - 0.05 * step)
                low, high = w.aminmax(dim=1, keepdim=True)
                tried = round_fast(
                    w, QuantSpec(3, group_size=16), low.clamp_min(-bound), high.clamp_max(bound)
                )
                errors.append(float(((tried - w) @ x[:, part].T).square().sum()))
            got = float(((found[row : row + 1, part] - w) @ x[:, part].T).square().sum())
            assert got == pytest.approx(min(errors), rel=2e-2)


def test_fast_rounding_is_rounding() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for name in ("int3-g16", "int2-channel", "int4-g32-sym", "int4-g32-float", "nf4-g64"):
        spec = QuantSpec.parse(name)
        from actlas.core.numbers import params_of

        assert torch.equal(
            round_fast(weight, spec), quantize(weight, spec, params_of(weight, spec).stored(spec))
        )


def test_controls_differ_and_are_refused_when_unknown() -> None:
    model = tiny()
    kinds = {s: _fit(model, statistic=s, clip=False) for s in ("activation", "weight", "permuted")}
    path = "model.layers.1.self_attn.q_proj"
    codes = [kinds[s].modules[path].unpacked for s in kinds]  # type: ignore[index]
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    with pytest.raises(InputError, match="one of activation, weight, permuted"):
        _fit(model, statistic="luck")


def test_bad_input() -> None:
    model = tiny()
    with pytest.raises(InputError, match="at least 64 are needed"):
        fit_awq(model, ["Why?"])
    with pytest.raises(InputError, match="no linear layer is called 'q_prj'"):
        _fit(model, skip=("q_prj",))
    with pytest.raises(InputError, match="legal sizes are 16, 32"):
        _fit(model, group_size=20)
    with model.edit(fit_rtn(model, evaluate=0)), pytest.raises(ModelError, match="quantised already"):
        _fit(model)
    with torch.no_grad():
        model.module.model.layers[0].input_layernorm.weight[0] = torch.inf
    with pytest.raises(NonFiniteError):
        _fit(model)


def test_constant_and_zero_channels_pass() -> None:
    model = tiny()
    layer = model.module.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight[3] = 0.0
        layer.weight[:, 5] = 0.0
        layer.weight[4] = 0.25
    with pytest.warns(UserWarning, match="weights are all 0"):
        edit = _fit(model)
    weight = edit.modules["model.layers.0.mlp.up_proj"].weight
    assert bool((weight[3] == 0).all())
    assert bool(torch.isfinite(weight).all())


def test_save_and_load(tmp_path: object) -> None:
    from pathlib import Path

    from actlas.core.edit import Edit

    model = tiny()
    edit = fit_awq(model, TEXTS * 4, **{**OPTIONS, "evaluate": 100})  # type: ignore[arg-type]
    edit.save(Path(str(tmp_path)) / "e")
    again = Edit.load(Path(str(tmp_path)) / "e", model)
    with model.edit(edit):
        a = _logits(model)
    with model.edit(again):
        assert torch.equal(a, _logits(model))
    assert [m.name for m in again.measurements] == [m.name for m in edit.measurements]


# SmoothQuant ----------------------------------------------------------------------------------


def test_smoothing_equation() -> None:
    s = smoothing(torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 2.0, 0.25]), 0.5)
    assert s.tolist() == pytest.approx([2.0, 1.0, 6.0])


def test_smoothquant_helps_where_activations_have_outliers() -> None:
    model = tiny()
    with torch.no_grad():
        model.module.model.layers[1].input_layernorm.weight[3] *= 40
    options = {"bits": 6, "act_bits": 6, "tokens": 300, "context": 32, "evaluate": 200}
    smooth = fit_smoothquant(model, TEXTS * 4, **options)  # type: ignore[arg-type]
    flat = fit_smoothquant(model, TEXTS * 4, skip=(), alpha=0.0, **options)  # type: ignore[arg-type]
    kl = [next(m.value for m in e.measurements if m.name == "kl-to-base") for e in (smooth, flat)]
    assert kl[0] < kl[1]
    with pytest.raises(InputError, match="alpha lies in"):
        fit_smoothquant(model, TEXTS, alpha=2.0)
