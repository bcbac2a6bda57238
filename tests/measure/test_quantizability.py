"""Round-to-nearest against the formulas, and weights that always come back bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.measure.likelihood import nll
from actlas.measure.quantizability import output_fidelity, quantizability, signal_to_noise
from actlas.measure.rounding import SCHEMES, Scheme, fake_quant, rounded, weighted_modules
from tests.measure.letter_models import LETTERS, TEXTS, gpt2, letters, llama, trained


def by_hand(row: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """One row, written as on paper."""
    if symmetric:
        s = float(row.abs().max()) / (2 ** (bits - 1) - 1) or 1.0
        q = [max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(float(v) / s))) for v in row]
        return torch.tensor([s * v for v in q], dtype=row.dtype)
    low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
    s = (high - low) / (2**bits - 1) or 1.0
    z = max(0, min(2**bits - 1, round(-low / s)))
    q = [max(0, min(2**bits - 1, round(float(v) / s) + z)) for v in row]
    return torch.tensor([s * (v - z) for v in q], dtype=row.dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.sampled_from([None, 3, 4, 5]), st.integers(0, 10_000))
def test_grid_is_the_formula(bits: int, symmetric: bool, group: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 12, dtype=torch.float64) * 10 ** torch.randn(3, 1, dtype=torch.float64)
    x[0, :4] = 0
    found = fake_quant(x, bits, group=group, symmetric=symmetric)
    for row, out in zip(x, found, strict=True):
        parts = (
            [row]
            if group is None
            else row.split(group)
            if 12 % group == 0
            else [*row[:10].split(5), row[10:]]
        )
        assert torch.allclose(out, torch.cat([by_hand(p, bits, symmetric) for p in parts]))
    assert torch.allclose(
        fake_quant(found, bits, group=group, symmetric=symmetric), found, rtol=1e-9
    )  # on the grid


def test_grid_is_refused_and_keeps_dtype() -> None:
    assert fake_quant(torch.randn(4).bfloat16(), 8).dtype == torch.bfloat16
    with pytest.raises(InputError, match="bits"):
        fake_quant(torch.randn(4), 1)
    with pytest.raises(InputError, match="group"):
        fake_quant(torch.randn(4), 4, group=0)
    with pytest.raises(InputError, match="unknown number format"), rounded(nn.Linear(2, 2), "w5"):
        pass


def test_rounded_weights_are_what_runs_and_come_back() -> None:
    model = llama()
    before = {n: p.clone() for n, p in model.module.state_dict().items()}
    pointers = {n: p.data_ptr() for n, p in model.module.named_parameters()}
    with rounded(model.module, "w4-channel") as names:
        one = model.logits(TEXTS[0])
        assert len(names) == 3 * 7 + 1  # the output head is not tied here
    other = llama()
    with torch.no_grad():
        for name, p in other.module.named_parameters():
            if "proj" in name or "lm_head" in name:
                p.copy_(fake_quant(p, 4))
    assert torch.equal(one, other.logits(TEXTS[0]))
    for name, p in model.module.named_parameters():
        assert torch.equal(p, before[name]) and p.data_ptr() == pointers[name]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_weights_come_back_after_exceptions() -> None:
    model = llama()
    before = {n: p.clone() for n, p in model.module.state_dict().items()}

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    def run(register: Any) -> None:
        with rounded(model.module, "w4a4"):
            handle = register(fail)
            try:
                model.logits(TEXTS[0])
            finally:
                handle.remove()

    target = model.block(1).mlp.up_proj
    for register in (target.register_forward_pre_hook, target.register_forward_hook):
        with pytest.raises(RuntimeError, match="inside"):
            run(register)
        for name, p in model.module.state_dict().items():
            assert torch.equal(p, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_tied_heads_are_left_alone() -> None:
    model = gpt2()
    assert "lm_head" not in weighted_modules(model.module)
    assert len(weighted_modules(model.module)) == 2 * 4  # Conv1D counts


def test_activations_are_rounded_by_token() -> None:
    model = llama()
    seen = {}
    with rounded(model.module, "a4"):
        handle = model.block(0).mlp.down_proj.register_forward_hook(lambda _m, a, _o: seen.update(x=a[0]))
        model.logits(TEXTS[0])
        handle.remove()
    assert all(len(row.unique()) <= 16 for row in seen["x"][0])


def test_perplexity_ratio_is_paired() -> None:
    model = trained()
    found = quantizability(model, TEXTS, tokens=220, schemes=("w8a8", "w3-g64", Scheme("w2", 2)))
    assert [m.group["format"] for m in found] == ["w8a8", "w3-g64", "w2"]
    base = nll(model, TEXTS, tokens=220)
    with rounded(model.module, "w3-g64"):
        other = nll(model, TEXTS, tokens=220)
    expected = math.exp((other.nll - base.nll).sum() / base.tokens.sum())
    assert found[1].value == pytest.approx(expected)
    assert found[0].value < found[1].value < found[2].value and found[2].value > 1.05
    noise = [m.details["sqnr"] for m in found]
    assert noise[0] > noise[1] > noise[2] and len(found[0].details["worst"]) == 5
    assert all(m.low <= m.value <= m.high for m in found)


def test_noise_is_brute_force() -> None:
    model = llama()
    text = TEXTS[0]
    found = signal_to_noise(model, [text], "w4a4", rows=1000)
    down = model.block(1).mlp.down_proj
    x = model.trace(text, "blocks.1.mlp.act").rows("blocks.1.mlp.act")
    y = x @ down.weight.T
    error = fake_quant(x, 4) @ fake_quant(down.weight.detach(), 4).T - y
    expected = (10 * torch.log10(y.square().sum(1) / error.square().sum(1))).mean()
    assert found["model.layers.1.mlp.down_proj"] == pytest.approx(float(expected.detach()))
    assert set(found) == set(weighted_modules(model.module))


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as converted TensorFlow models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_subclasses_and_plain_modules_count() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        Padded(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    model = Model(net, name="plain")
    assert len(weighted_modules(net)) == 3
    x = torch.randn(6, 3, 8, 8)
    found = output_fidelity(model, x, schemes=("w8a8",))[0]
    assert found.value > 0.999 and len(found.details["by_layer"]) == 3
    first = net[0]
    y = first(x)
    with rounded(net, "w8a8"):
        error = first(x) - y
    expected = 10 * torch.log10(y[:4].flatten(1).square().sum(1) / error[:4].flatten(1).square().sum(1))
    assert signal_to_noise(model, x, "w8a8")["0"] == pytest.approx(float(expected.detach().mean()), rel=1e-4)


def test_more_bits_are_nearer_for_encoders_and_images() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = Model(BertModel(BertConfig(**sizes, vocab_size=len(LETTERS) + 1)), letters(), name="tiny-bert")
    found = output_fidelity(encoder, TEXTS)
    cosine = {m.group["format"]: m.value for m in found}
    assert 0.9 < cosine["w4-channel"] < cosine["w8a8"] < 1
    images = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    classifier = Model(ResNetForImageClassification(images), name="tiny-resnet")
    before = {n: p.clone() for n, p in classifier.module.state_dict().items()}
    found = output_fidelity(classifier, torch.randn(20, 3, 32, 32), schemes=("w8a8", Scheme("w2a2", 2, 2)))
    cosine = {m.group["format"]: m.value for m in found if m.name == "quantized-output-cosine"}
    agree = {m.group["format"]: m.value for m in found if m.name == "quantized-agreement"}
    assert cosine["w2a2"] < cosine["w8a8"] and agree["w8a8"] > 0.8
    assert all(torch.equal(p, before[n]) for n, p in classifier.module.state_dict().items())
    with pytest.raises(InputError, match="at least one"):
        output_fidelity(encoder, [])
    assert np.isfinite([m.value for m in found]).all() and "w4-g64" in SCHEMES
