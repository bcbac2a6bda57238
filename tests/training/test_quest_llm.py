"""QuEST: scales, gradients, and that what is saved computes what was trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.hadamard import block_hadamard
from actlas.core.numbers import QuantSpec, gaussian_scale, params_of
from actlas.training.qat import TrainedQuantLinear, quantizing
from actlas.training.quest_llm import PUBLISHED_SCALES, gaussian_format, quest, quest_linear
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

SMALL = {"steps": 4, "batch": 2, "context": 16, "tokens": 128}


def test_scales_are_the_table_up_to_five_bits_and_better_beyond():
    for bits, published in PUBLISHED_SCALES.items():
        levels = 3 if bits == 1.585 else 2**bits
        found = gaussian_scale(math.log2(levels))
        if bits <= 5:
            assert found == pytest.approx(published, abs=1e-3)
        assert _error(found, levels) <= _error(published, levels) * (1 + 1e-5)
        assert _error(published, levels) - _error(found, levels) < 1e-6


def _error(half, levels):
    """Squared error of the centred grid on a Gaussian, by an independent integration (midpoints)."""
    edges = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (edges[1] - edges[0])
    grid = torch.linspace(-half, half, levels, dtype=torch.float64)
    nearest = grid[(x[:, None] - (grid[:-1] + grid[1:]) / 2 > 0).sum(1)] if levels < 33 else None
    if nearest is None:
        step = 2 * half / (levels - 1)
        nearest = ((x + half) / step).round().clamp(0, levels - 1) * step - half
    return float(((x - nearest).square() * density).sum())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_forward_and_gradients_are_the_written_rule(bits):
    torch.manual_seed(bits)
    linear, x = nn.Linear(64, 24, bias=False), torch.randn(3, 5, 64, requires_grad=True)
    layer = quest_linear(linear, bits, bits)
    y = layer(x)
    pull = torch.randn_like(y)
    gx, gw = torch.autograd.grad((y * pull).sum(), [x, layer.weight])

    a, top = gaussian_scale(bits), 2**bits - 1

    def rule(v, half_scale):
        h = block_hadamard(v, 64)
        sigma = h.square().mean(-1, keepdim=True).sqrt()
        step = 2 * a * sigma / top
        if half_scale:  # scales of weights are stored in 16 bits
            step = step.half().float()
        s = step * top / 2
        q = ((h.clamp(-s, s) / step + 0.5).round() - 0.5) * step if bits > 1 else torch.sign(h) * s
        return q, ((q - h).abs() <= step / 2 * (1 + 1e-5)).float()

    xq, mx = rule(x.detach(), False)
    wq, mw = rule(linear.weight.detach(), True)
    torch.testing.assert_close(y.detach(), xq @ wq.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gx, block_hadamard((pull @ wq) * mx, 64), rtol=1e-4, atol=1e-4)
    flat = pull.flatten(0, 1).T @ xq.flatten(0, 1)
    torch.testing.assert_close(gw, block_hadamard(flat * mw, 64), rtol=1e-4, atol=1e-4)
    if bits < 4:
        assert 0 < float(mx.mean()) < 1


def test_trust_is_straight_through_but_for_far_clipping():
    linear, x = nn.Linear(64, 8), torch.randn(2, 64, requires_grad=True)
    far = torch.zeros(64)
    far[3] = 50.0
    for grad, blocked in (("trust", True), ("ste", False)):
        layer = quest_linear(linear, 4, 4, grad=grad, rotate=False)
        (g,) = torch.autograd.grad(layer(x + far).sum(), x)
        assert (g[:, 3] == 0).all() == blocked and (g[:, 4] != 0).all()


def test_rotation_cancels_without_rounding():
    linear, x = nn.Linear(96, 12), torch.randn(4, 96)
    layer = quest_linear(linear, 8, 8)
    assert layer.rotate == 32
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert error < 0.02


@pytest.mark.parametrize("grad", ["ste", "trust"])
@pytest.mark.parametrize("bits", [(1, 16), (3, 4), (8, 8)])
def test_frozen_layers_compute_what_training_did(bits, grad):
    linear, x = nn.Linear(64, 24), torch.randn(5, 64)
    layer = quest_linear(linear, *bits, grad=grad)
    frozen = layer.frozen()
    assert frozen.rotate == 64 and frozen.spec.bits == bits[0]
    torch.testing.assert_close(frozen(x), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_learned_steps_are_saved():
    linear, x = nn.Linear(32, 24), torch.randn(5, 32)
    spec, act = QuantSpec.parse("int4-channel-sym"), QuantSpec(8, granularity="tensor")
    layer = TrainedQuantLinear(linear, spec, grad="lsq", act=act, act_grad="lsq")
    with pytest.raises(InputError, match="has seen no inputs"):
        layer.frozen()
    want = layer(x).detach()
    torch.testing.assert_close(layer.frozen()(x), want, rtol=2e-3, atol=2e-3)  # its scales have 16 bits
    assert layer.frozen().act_scale is not None and want.shape == (5, 24)


def test_quest_leaves_the_model_alone_and_saves(tmp_path):
    model = tiny()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    edit = quest(model, TEXTS, w_bits=2, a_bits=4, train="all", **SMALL)
    for name, p in model.module.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None
    assert edit.parameters and "model.norm.weight" in edit.parameters
    names = {m.name for m in edit.measurements}
    assert {"perplexity-ratio", "kl-to-base", "extra-kl"} <= names
    inputs = model.encode(TEXTS[0])
    plain = model.forward(inputs).logits
    with model.edit(edit):
        want = model.forward(inputs).logits
    assert not torch.equal(plain, want)
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(model.forward(inputs).logits, want)
    assert torch.equal(model.forward(inputs).logits, plain)


def test_a_tied_embedding_is_trained_under_both_names():
    model = tiny("smollm2") if "smollm2" in BY_NAME else tiny()
    config = model.module.config
    edit = quest(model, TEXTS, w_bits=4, a_bits=16, train="all", **SMALL)
    has = {"model.embed_tokens.weight", "lm_head.weight"} <= set(edit.parameters)
    assert has
    same = torch.equal(edit.parameters["model.embed_tokens.weight"], edit.parameters["lm_head.weight"])
    assert same == bool(config.tie_word_embeddings)


def test_one_bit_has_two_levels_at_the_mean_deviation():
    spec = gaussian_format(1)
    x = torch.randn(1, 4096)
    params = params_of(x, spec)
    assert float(params.scale) / 2 == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    assert spec.name == "int1-channel-centred-gaussian" and QuantSpec.parse(spec.name) == spec


def test_bad_input():
    model = tiny()
    for options in (
        {"w_bits": 0},
        {"w_bits": 9},
        {"a_bits": 12},
        {"grad": "lots"},
        {"held_out": 0.0},
        {"steps": 0},
    ):
        with pytest.raises(InputError) as error:
            quest(model, TEXTS, **{**SMALL, **options})
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="tokens"):
        quest(model, ["a", "b"], **SMALL)
    with pytest.raises(ModelError):
        quest(BY_NAME["bert"].model(), TEXTS, **SMALL)
    with pytest.raises(InputError, match="train is"):
        quest(model, TEXTS, **{**SMALL, "train": "half"})
    with quantizing(model, lambda layer, linear: quest_linear(linear, 4, 4)) as layers:
        assert all(type(model.module.get_submodule(p)).__name__ == "TrainedQuantLinear" for p in layers)
    assert type(model.module.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "Linear"
