"""Counts against closed forms, and nothing skipped silently."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from actlas.core.errors import InputError
from actlas.measure.anynet import build_anynet, efficientnet_lite
from actlas.measure.complexity import complexity
from actlas.measure.cost import median_interval, run_time
from actlas.measure.scaling import ConvArch, DecoderArch, Stage, closed_form

CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=56,
    vocab_size=100,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_llama_equals_the_closed_form(kernel: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    model.set_attn_implementation(kernel)
    counted = complexity(model, torch.arange(24).reshape(2, 12))
    one = closed_form(DecoderArch.from_config(CONFIG, context=12))
    assert counted.macs == 2 * one.macs
    assert counted.flops == 4 * one.macs
    assert counted.total.scores == 2 * one.scores
    assert counted.total.activations == 2 * one.activations
    assert counted.activations == 2 * (one.activations + one.scores)
    assert counted.parameters == one.parameters
    assert not counted.uncounted
    bare = complexity(model, torch.arange(24).reshape(2, 12), attention="none")
    assert bare.activations == 2 * one.activations and bare.macs == counted.macs


@pytest.mark.parametrize("block", ["bottleneck", "inverted"])
def test_conv_nets_equal_the_closed_form(block: str) -> None:
    stages = (Stage(1, 16, 1, 1.0, 8), Stage(2, 32, 2, 2.0, 16, 5))
    if block == "inverted":
        stages = tuple(Stage(s.depth, s.width, s.stride, s.expansion, 1, s.kernel) for s in stages)
    spec = ConvArch(stages, resolution=27, stem_width=8, head_width=24, block=block)  # type: ignore[arg-type]
    counted = complexity(build_anynet(spec), torch.randn(3, 3, 27, 27))
    one = closed_form(spec)
    assert (counted.macs, counted.activations) == (3 * one.macs, 3 * one.activations)
    assert counted.parameters == one.parameters
    assert not counted.uncounted


def test_efficientnet_lite_has_its_published_size() -> None:
    for version, params, macs in (
        (0, 4.7e6, 407e6),
        (1, 5.4e6, 631e6),
        (2, 6.1e6, 899e6),
        (4, 13.0e6, 2564e6),
    ):
        cost = closed_form(efficientnet_lite(version))
        assert cost.parameters == pytest.approx(params, rel=0.02)
        assert cost.macs == pytest.approx(macs, rel=0.06)


def test_modules_add_up_and_carry_names() -> None:
    model = LlamaForCausalLM(CONFIG).eval()
    counted = complexity(model, torch.arange(12)[None])
    layers = [counted.under(f"model.layers.{i}") for i in range(2)]
    head = counted.under("lm_head")
    assert layers[0] == layers[1]
    assert sum(c.macs for c in layers) + head.macs == counted.macs
    assert head.macs == 12 * 32 * 100
    role = counted.by_role()["model.layers.*.mlp.up_proj"]
    assert role.macs == 2 * 12 * 32 * 56 and role.calls == 2


@pytest.mark.parametrize(
    ("module", "macs"),
    [
        (nn.LSTM(8, 16, batch_first=True), 2 * 5 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, batch_first=True), 2 * 5 * 3 * 16 * (8 + 16)),
        (
            nn.TransformerEncoderLayer(8, 2, 32, batch_first=True),
            2 * 5 * (4 * 64 + 2 * 8 * 32) + 2 * 2 * 25 * 8,
        ),
        (nn.ConvTranspose1d(5, 6, 3, stride=2), 2 * 8 * 5 * 6 * 3),
        (nn.Conv1d(5, 10, 3, groups=5), 2 * 6 * 10 * 3),
    ],
)
def test_fused_and_unusual_layers_are_taken_apart(module: nn.Module, macs: int) -> None:
    counted = complexity(module.eval(), torch.randn(2, 5, 8))
    assert counted.macs == macs
    assert not counted.uncounted


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(torch.cdist(x, x)).real + torch.linalg.inv(torch.eye(x.shape[-2]))


def test_what_is_not_counted_is_listed() -> None:
    counted = complexity(Odd(), torch.randn(1, 4, 4))
    assert {"aten._fft_c2c", "aten._cdist_forward"} & set(counted.uncounted)
    assert any("inv" in op for op in counted.uncounted)
    macs = next(m for m in counted.measurements() if m.name == "multiply-adds")
    assert "not counted" in macs.note and macs.details["uncounted"] == counted.uncounted


def test_outer_products_and_lookups_are_free() -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.outer(x, x) @ torch.ones(4, 1) + nn.functional.embedding(
                torch.tensor([1]), torch.ones(4, 4)
            )

    counted = complexity(Outer(), torch.randn(4))
    assert counted.macs == 16 and not counted.uncounted


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        raise RuntimeError("broken")


def test_nothing_is_left_behind_after_an_exception() -> None:
    model = Fails()
    fast, native = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError, match="broken"):
        complexity(model, torch.randn(1, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.mkldnn.enabled == native


def test_a_module_without_example_is_refused() -> None:
    with pytest.raises(InputError, match="give example="):
        complexity(nn.Linear(3, 3))
    with pytest.raises(InputError, match="attention"):
        complexity(nn.Linear(3, 3), torch.randn(1, 3), attention="all")  # type: ignore[arg-type]


def test_run_time_has_a_baseline() -> None:
    timed = run_time(nn.Linear(64, 64), torch.randn(32, 64), repeats=3)
    assert timed.value > 0 and timed.baseline is not None and timed.baseline.value > 0
    assert timed.low is not None and timed.low <= timed.value <= (timed.high or 0)


def test_median_interval_covers() -> None:
    assert median_interval([3, 1, 2, 5, 4, 7, 6]) == (1, 7)  # 98.4%; the next pair covers 87.5% only
    low, high = median_interval(list(range(101)))
    assert 38 <= low <= 41 and 59 <= high <= 62
    assert all(map(math.isnan, median_interval([1.0])))


def test_cost_of_a_language_model() -> None:
    from actlas.measure.cost import cost
    from tests.measure.letter_models import gpt2, llama

    model = llama()
    found = {m.name: m for m in cost(model, tokens=20, repeats=2)}
    assert found["kv-cache"].value == 2 * 3 * 2 * 4 * 8  # keys and values, layers, heads, head_dim, float64
    one = closed_form(DecoderArch.from_config(model.config, context=20))
    assert found["multiply-adds"].value == one.macs / 20
    assert found["activation-elements"].value == (one.activations + one.scores) / 20
    assert found["activation-elements"].unit == "elements/token"
    assert found["forward-time"].details["items"] == 20 and found["forward-time"].baseline is not None
    assert complexity(gpt2(), tokens=20).item == "token" and not complexity(gpt2(), tokens=20).uncounted


def test_edits_are_part_of_the_count() -> None:
    from actlas.measure.void_edits import static_layer_skip
    from tests.measure.letter_models import llama

    model = llama()
    whole = complexity(model, tokens=20).macs
    block = complexity(model, tokens=20).under("model.layers.1").macs
    with model.edit(static_layer_skip(model, [1.0, 0.0, 1.0], 1)):
        assert complexity(model, tokens=20).macs == whole - block
    assert complexity(model, tokens=20).macs == whole
