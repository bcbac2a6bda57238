"""Generating on the lean loop gives what transformers gives, or says why it is not used."""

from __future__ import annotations

import pytest
import torch

from actlas.core.direction import Direction
from actlas.core.edit import Edit
from actlas.core.edits import Add
from actlas.core.errors import FingerprintError, InputError, NonFiniteError
from actlas.core.packed_weights import PackedWeights
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.core.skip_inputs import SkipInputs
from actlas.core.weight_edit import WeightEdit
from actlas.kernels.loading import native
from actlas.measure.linear_layers import linear_layers
from actlas.models.fast_generate import fast_generate, lean_weights, reason_against
from tests.core.tiny import tiny

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.3, "top_p": 0.7}])
def test_the_same_tokens_as_transformers(family: str, options: dict[str, float]) -> None:
    model = tiny(family)
    assert reason_against(model, "hello there") is None
    want = model.generate("hello there", max_new_tokens=20, **options)  # type: ignore[arg-type]
    seen: list[int] = []
    found = fast_generate(
        model, "hello there", max_new_tokens=20, on_token=lambda t: seen.append(int(t)), **options
    )  # type: ignore[arg-type]
    assert found.tokens[0].tolist() == want.tokens[0].tolist() == seen
    assert found.texts == want.texts and found.prompts == want.prompts
    assert torch.equal(found.sequences, want.sequences)


def test_edits_apply_without_being_installed() -> None:
    model = tiny()
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    gate = "model.layers.1.mlp.gate_proj"
    edits: list[Edit] = [
        Add("blocks.1.resid_post", 3 * vector),
        QuantEdit({gate: QuantLinear.of(model.module.get_submodule(gate), "int3-g32")}),
        WeightEdit({"model.norm.weight": 0.1 * vector}),
    ]
    assert reason_against(model, "hello", edits) is None
    with model.edit(*edits):
        want = model.generate("hello there", max_new_tokens=16).tokens[0].tolist()
    plain = model.generate("hello there", max_new_tokens=16).tokens[0].tolist()
    found = fast_generate(model, "hello there", edits, max_new_tokens=16).tokens[0].tolist()
    assert found == want != plain
    assert not model.installed


def test_packed_weights_are_the_loops_own() -> None:
    model = tiny()
    paths = [layer.path for layer in linear_layers(model)]
    edit = PackedWeights({**dict.fromkeys(paths, "q4"), "lm_head": "q8"})
    lean = lean_weights(model, [edit])
    assert (lean.weights, lean.head, lean.edits) == ("q4", "q8", ())
    fast = lean.decoder(model, 32)
    ids = list(range(5, 15))
    with model.edit(edit):
        want = model.logits(torch.tensor(ids))[0, -1]
    assert torch.allclose(fast.feed(ids), want, atol=5e-3)
    mixed = PackedWeights({**dict.fromkeys(paths, "q4"), paths[0]: "q8"})
    with pytest.raises(InputError, match="one format"):
        lean_weights(model, [mixed])


def test_skipped_inputs() -> None:
    model = tiny()
    skip = [SkipInputs("blocks.*.mlp_norm", threshold=0.5), SkipInputs("blocks.*.attn_norm", threshold=0.4)]
    assert reason_against(model, "hello", skip) is None
    with model.edit(*skip):
        want = model.generate("hello there", max_new_tokens=16).tokens[0].tolist()
    decoder = lean_weights(model, skip).decoder(model, 64)
    found = fast_generate(model, "hello there", skip, max_new_tokens=16, decoder=decoder)
    assert found.tokens[0].tolist() == want and 0.05 < decoder.skipped < 0.95
    down = [SkipInputs("blocks.*.mlp.act", threshold=0.5)]
    assert "48 inputs" in str(reason_against(model, "hello", down))


@pytest.mark.parametrize("spec", ["int2-g32", "int3-g32", "int4-g32", "int4-g32-float", "int8-g32-sym"])
def test_quantised_layers_run_on_their_own_codes(spec: str) -> None:
    model = tiny()
    layers = [layer for layer in linear_layers(model) if layer.columns % 32 == 0]
    quant = {layer.path: QuantLinear.of(layer.module(model), spec) for layer in layers}
    decoder = lean_weights(model, [QuantEdit(quant)]).decoder(model, 32)
    assert decoder.layers.blocks[0]["q"].format == f"q{spec[3]}"
    ids = list(range(5, 15))
    with model.edit(QuantEdit(quant)):
        want = model.logits(torch.tensor(ids))[0, -1]
    assert torch.allclose(decoder.feed(ids), want, atol=5e-4)
    both = [QuantEdit(quant), SkipInputs("blocks.*.mlp_norm", threshold=0.5)]
    assert reason_against(model, "hello", both) is None


def test_why_it_is_not_used() -> None:
    model = tiny()
    assert "beam" in str(reason_against(model, "a", num_beams=2))
    assert "one prompt" in str(reason_against(model, ["a", "b"]))
    assert "top_k" in str(reason_against(model, "a", top_k=5))
    assert "not between two blocks" in str(
        reason_against(model, "a", [Add("blocks.1.mlp.out", torch.zeros(32))])
    )
    assert "architecture is gpt2" in str(reason_against(tiny("gpt2"), "a"))
    with model.edit(Add("blocks.1.resid_post", torch.ones(32))):
        assert "installed" in str(reason_against(model, "a"))
    act = QuantLinear.of(model.module.lm_head, "int8-channel")
    act.act_spec = act.spec
    assert "rounds or shifts" in str(reason_against(model, "a", [QuantEdit({"lm_head": act})]))
    model.module.generation_config.repetition_penalty = 1.5
    assert "repetition_penalty" in str(reason_against(model, "a"))
    model.module.generation_config.repetition_penalty = 1.0
    assert reason_against(model, "a") is None
    half = tiny()
    half.module.bfloat16()
    assert "bfloat16" in str(reason_against(half, "a"))


def test_bad_input() -> None:
    model = tiny()
    with pytest.raises(InputError, match="context of 64"):
        fast_generate(model, "hello", max_new_tokens=100)
    with pytest.raises(InputError, match="top_p"):
        fast_generate(model, "hello", top_p=0.0)
    other = (
        Direction(site="blocks.1.resid_post", vector=torch.ones(32)).edit().bind(tiny("qwen3").fingerprint)
    )
    with pytest.raises(FingerprintError):
        fast_generate(model, "hello", [other])
    model.module.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="new token 1"):
        fast_generate(model, "hello", max_new_tokens=4)
