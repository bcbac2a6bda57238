"""LR-QAT: the written rule, its hand-made backward pass, exact merging, memory, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.numbers import QuantSpec, lp_search
from actlas.core.quant_linear import QuantLinear
from actlas.measure.training_memory import training_memory
from actlas.training.lr_qat import lr_qat
from actlas.training.lr_qat_linear import LowRankQuantLinear
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

SMALL = {"rank": 4, "steps": 4, "batch": 2, "context": 16, "tokens": 128}
FORMS = ["int3-channel-sym", "int2-g16-sym", "int4-tensor-sym"]


def layer_of(form="int3-channel-sym", moved=1.0, **options):
    torch.manual_seed(0)
    made = LowRankQuantLinear(nn.Linear(32, 24), QuantSpec.parse(form), rank=4, **options)
    with torch.no_grad():
        made.up.add_(moved * torch.randn_like(made.up))
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("downcast", ["fixed8", "int", "bf16", "fp32"])
def test_the_weight_is_the_written_rule(form, downcast):
    layer = layer_of(form, downcast=downcast)
    torch.manual_seed(0)
    linear, spec = nn.Linear(32, 24), QuantSpec.parse(form)
    b = spec.bits
    s0 = lp_search(linear.weight.detach(), spec, p=4.0).scale
    phi = (spec.groups(linear.weight.detach()) / s0.unsqueeze(-1)).reshape(24, 32)
    if downcast == "fixed8":
        phi = (phi.clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1) * 2 ** (8 - b)).round() / 2 ** (8 - b)
        assert layer.frozen.dtype == torch.int8
    elif downcast == "int":
        phi = phi.round().clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1)
    elif downcast == "bf16":
        phi = phi.bfloat16().float()
    code = (phi + 1.0 / 4 * layer.up @ layer.down).round().clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1)
    scale = layer.scale.detach().half().float()
    want = (spec.groups(code) * scale.unsqueeze(-1)).reshape(24, 32)
    torch.testing.assert_close(layer.quantized(), want)
    assert torch.equal(layer.integers(), code.detach())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moved", [0.1, 8.0])
def test_rounding_again_gives_the_gradients_of_autograd(form, moved):
    layer = layer_of(form, moved)
    x, pull = torch.randn(3, 5, 32, requires_grad=True), torch.randn(3, 5, 24)
    found = []
    for recompute in (True, False):
        layer.recompute = recompute
        y = layer(x)
        wanted = [x, layer.up, layer.down, layer.scale]
        found.append([y.detach(), *torch.autograd.grad((y * pull).sum(), wanted)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(bool(g.any()) for g in found[0][1:])


def test_clipped_entries_have_no_gradient():
    layer = layer_of(moved=0.0, downcast="fp32")
    layer.frozen.fill_(0.3)
    layer.frozen[0] = 9.0  # far above the grid
    y = layer(torch.ones(1, 32))
    (g,) = torch.autograd.grad(y.sum(), layer.up)
    assert bool((g[0] == 0).all()) and bool((g[1:] != 0).any())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", ["zero", "svd"])
@pytest.mark.parametrize("act", [None, "int8-token"])
def test_merging_is_exact(form, start, act):
    inputs = None if act is None else QuantSpec.parse(act)
    layer = layer_of(form, moved=2.0, start=start, act=inputs)
    merged = layer.merge()
    assert isinstance(merged, QuantLinear) and merged.spec.name == form
    x = torch.randn(7, 32)
    with torch.no_grad():
        assert torch.equal(merged(x), layer(x))
    assert torch.equal(merged.unpacked.float() - 2 ** (merged.spec.bits - 1), layer.integers())
    assert "up" not in dict(merged.named_buffers()) or merged.up is None


def test_a_start_by_singular_vectors_is_nearer_to_the_integers_kept():
    torch.manual_seed(0)
    linear, spec = nn.Linear(64, 48), QuantSpec.parse("int2-channel-sym")
    errors = {}
    for start in ("zero", "svd"):
        layer = LowRankQuantLinear(linear, spec, rank=16, start=start, downcast="int")
        wanted = linear.weight.detach() / layer.scale.detach()
        errors[start] = float((layer.phi() + layer.factor * layer.up @ layer.down - wanted).detach().norm())
    assert errors["svd"] < 0.9 * errors["zero"]


def test_fixed_point_flips_where_integers_stall():
    flips = {}
    for downcast in ("fixed8", "int"):
        layer = layer_of(moved=0.0, downcast=downcast)
        before = layer.integers()
        with torch.no_grad():
            layer.up.fill_(0.3)
        flips[downcast] = int((layer.integers() != before).sum())
    assert flips["fixed8"] > 0 and flips["int"] == 0


def test_memory_counts_each_part():
    torch.manual_seed(0)
    net, x = nn.Linear(16, 8, bias=False), torch.randn(4, 16)
    parts = {m.group["part"]: m.value for m in training_memory(net, lambda: net(x).square().sum())}
    assert parts["weights"] == parts["gradients"] == 4 * 128 and parts["optimiser"] == 2 * 4 * 128
    assert parts["saved"] == 4 * (4 * 16 + 4 * 8)  # x and y
    assert parts["all"] == sum(v for k, v in parts.items() if k != "all")
    saved = {}
    for recompute in (True, False):
        layer = layer_of(recompute=recompute)
        found = training_memory(layer, lambda layer=layer: layer(torch.randn(4, 32)).sum())
        saved[recompute] = next(m.value for m in found if m.group["part"] == "saved")
    assert saved[True] == 4 * 4 * 32 < saved[False]
    with pytest.raises(InputError, match="no parameter"):
        training_memory(net.requires_grad_(False), lambda: net(x).sum())


def test_lr_qat_merges_to_the_logits_of_training_and_learns(tmp_path):
    model = tiny()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    edit = lr_qat(model, TEXTS * 2, **{**SMALL, "steps": 20, "lr_ab": 1e-1, "lr_scale": 1e-3})
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert all(type(m).__name__ == "QuantLinear" for m in edit.modules.values())
    inputs = model.encode(TEXTS[0])
    with model.edit(edit):
        want = model.forward(inputs).logits
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(model.forward(inputs).logits, want)
    ratios = {m.group["variant"]: m.value for m in edit.measurements if m.name == "perplexity-ratio"}
    assert ratios["lr-qat"] < 0.98 * ratios["rtn"]


def test_bad_input():
    linear = nn.Linear(32, 24)
    bad = [
        ("int8-channel-sym", {}, "fraction"),
        ("int3-channel", {}, "symmetric"),
        ("nf4-g16", {}, "symmetric"),
        ("int3-g20-sym", {}, "legal sizes"),
        ("int3-channel-sym", {"rank": 0}, "rank"),
        ("int3-channel-sym", {"rank": 25}, "1 to 24"),
        ("int3-channel-sym", {"downcast": "fp8"}, "downcast"),
        ("int3-channel-sym", {"start": "pca"}, "start"),
    ]
    for form, options, said in bad:
        with pytest.raises(InputError, match=said) as error:
            LowRankQuantLinear(linear, QuantSpec.parse(form), **{"rank": 4, **options})
        assert "\n" not in str(error.value)
    broken = nn.Linear(32, 24)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        LowRankQuantLinear(broken, QuantSpec.parse("int3-channel-sym"), rank=4)
    with pytest.raises(ModelError):
        lr_qat(BY_NAME["bert"].model(), TEXTS, **SMALL)
    with pytest.raises(InputError, match="no number format"):
        lr_qat(tiny(), TEXTS, **{**SMALL, "spec": "3bits"})
