"""Quantised layers on the decoding kernels: the codes that are stored, and the same tokens as transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actlas
from actlas.core.numbers import QuantSpec
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.skip_inputs import SkipInputs
from actlas.models.decoder import FastDecoder
from actlas.models.fast_generate import fast_generate, reason_against
from actlas.models.packed_codes import column_codes, packed_codes
from tests.core.tiny import tokenizer

SPECS = (
    "int4-g32", "int4-g64-float", "int4-channel-sym", "int3-g32", "int3-g64-sym", "int2-g32-float", "int2-g64",
    "int8-channel-sym", "int8-g64", "int6-g32-sym",
)  # fmt: skip


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 40)


def small() -> actlas.Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return actlas.Model(LlamaForCausalLM(config).eval(), tokenizer(), name="small")


def edit_of(model: actlas.Model, spec: str) -> QuantEdit:
    layers = {n: m for n, m in model.module.named_modules() if n.endswith("_proj")}
    return QuantEdit({n: QuantLinear.of(m, spec) for n, m in layers.items()}, method="rtn")


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_stand_for_the_stored_weight(spec: str) -> None:
    layer = QuantLinear.of(linear(), spec)
    packed = packed_codes(layer)
    assert packed is not None
    torch.testing.assert_close(packed.dequantised(), layer.weight, rtol=1e-5, atol=1e-6)
    columns = column_codes(layer)
    if spec == "int8-g64":
        assert columns is None
    else:
        assert columns is not None
        torch.testing.assert_close(columns.dequantised(), layer.weight, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("spec", ["nf4-g64", "fp8-e4m3-channel", "int4-g16", "int6-g32"])
def test_other_formats_are_left_to_their_weights(spec: str) -> None:
    assert packed_codes(QuantLinear.of(linear(), spec)) is None
    assert packed_codes(linear()) is None
    act = ActQuant(QuantSpec.parse("int8-token-sym"))
    assert packed_codes(QuantLinear.of(linear(), "int4-g32", act=act)) is None


@pytest.mark.parametrize(
    "spec", ["int4-g32", "int3-g64-sym", "int2-g32-float", "int8-channel-sym", "nf4-g64"]
)
def test_the_lean_loop_gives_the_tokens_of_the_quantised_model(spec: str) -> None:
    model = small()
    edit = edit_of(model, spec)
    prompt = "The river had risen"
    if (why := reason_against(model, prompt, [edit])) is not None:
        pytest.skip(why)
    with model.edit(edit):
        want = model.generate(prompt, max_new_tokens=12).tokens[0]
        logits = model.logits(prompt).reshape(-1, 67)[-1]
    assert torch.equal(fast_generate(model, prompt, [edit], max_new_tokens=12).tokens[0], want)
    with model.edit(edit):
        fast = FastDecoder(model)
    ids = model.encode(prompt)["input_ids"][0].tolist()
    torch.testing.assert_close(fast.feed(ids), logits, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("threshold", [0.0005, 0.02])  # few inputs skipped, and most
@pytest.mark.parametrize("spec", ["int4-g32", "int2-g32-float", "int8-channel-sym"])
def test_sparse_and_quantised_is_one_product(spec: str, threshold: float) -> None:
    model = small()
    quant = edit_of(model, spec)
    skip = SkipInputs("blocks.*.mlp.act", threshold=threshold)
    prompt = "The river had risen"
    if (why := reason_against(model, prompt, [quant, skip])) is not None:
        pytest.skip(why)
    with model.edit(quant, skip):
        want = model.generate(prompt, max_new_tokens=12).tokens[0]
    assert torch.equal(fast_generate(model, prompt, [quant, skip], max_new_tokens=12).tokens[0], want)
