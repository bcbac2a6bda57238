"""The lean decoding loop gives transformers' tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actlas.core.direction import Direction
from actlas.core.edits import Add, ProjectOut
from actlas.core.errors import ActlasError
from actlas.core.model import Model
from actlas.core.skip_inputs import SkipInputs
from actlas.kernels.loading import native
from actlas.kernels.packed import pack
from actlas.models.decoder import FastDecoder, why_not
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels")


@pytest.mark.parametrize("family", [f for f in ("llama", "mistral", "qwen2", "qwen3") if f in BY_NAME])
def test_logits_are_those_of_the_model(family: str) -> None:
    model = tiny(family)
    if why_not(model) is not None:
        pytest.skip(why_not(model))
    fast = FastDecoder(model, length=32)
    ids = torch.randint(4, 60, (13,), generator=torch.Generator().manual_seed(0))
    want = model.logits(ids)[0]
    found = fast.feed(ids[:9].tolist())
    assert torch.allclose(found, want[8], atol=1e-4)
    for i in range(9, 13):
        assert torch.allclose(fast.feed([int(ids[i])]), want[i], atol=1e-4)


def test_greedy_tokens_are_those_of_generate() -> None:
    model = tiny()
    fast = FastDecoder(model, length=64)
    for prompt in ("hello there", "a"):
        want = model.generate(prompt, max_new_tokens=24).tokens[0].tolist()
        ids = model.encode(prompt)["input_ids"][0].tolist()
        assert list(fast.greedy(ids, 24, frozenset([2]))) == want


def test_packed_weights_are_those_of_a_model_with_the_rounded_ones() -> None:
    model = tiny()
    fast = FastDecoder(model, "q4", length=32)
    with torch.no_grad():
        for name, module in model.module.named_modules():
            if isinstance(module, torch.nn.Linear):
                format = "q8" if name.endswith("lm_head") else "q4"
                format = format if module.in_features % 32 == 0 else "f32"
                module.weight.data = pack(module.weight, format).dequantised()  # type: ignore[arg-type]
    ids = list(range(5, 15))
    found = fast.feed(ids)
    if not model.config.tie_word_embeddings:
        assert torch.allclose(found, model.logits(torch.tensor(ids))[0, -1], atol=2e-3)


def test_what_cannot_run_says_why() -> None:
    gpt2 = Model(BY_NAME["gpt2"].model().module)
    assert "gpt2" in (why_not(gpt2) or "")
    with pytest.raises(ActlasError, match="cannot run on the lean loop"):
        FastDecoder(gpt2)


def test_a_full_cache_is_refused() -> None:
    fast = FastDecoder(tiny(), length=8)
    with pytest.raises(ActlasError, match="cache of 8"):
        fast.feed(list(range(4, 13)))
    with pytest.raises(ActlasError, match="at least one"):
        fast.feed([])


def _model32() -> Model:
    """A small llama whose sizes are multiples of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.core.tiny import tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    return Model(LlamaForCausalLM(config), tokenizer(), name="llama32")


def _skips(model: Model) -> list[SkipInputs]:
    generator = torch.Generator().manual_seed(3)
    return [
        SkipInputs("blocks.*.mlp.act", torch.rand(96, generator=generator) + 0.1, threshold=0.01),
        SkipInputs("blocks.1.mlp_norm", threshold=0.8),
        SkipInputs(
            "module:model.layers.2.self_attn.q_proj.input", frozen=torch.rand(64, generator=generator) > 0.4
        ),
        SkipInputs("blocks.0.attn.z", threshold=0.02),
    ]


@pytest.mark.parametrize("phase", [None, "generated"])
def test_skipped_inputs_are_those_of_the_edit(phase: Any) -> None:
    model = _model32()
    skips = [s.at(phase=phase) if phase else s for s in _skips(model)]
    fast = FastDecoder(model, length=48, edits=skips)
    ids = model.encode("hello there")["input_ids"][0].tolist()
    found = list(fast.greedy(ids, 20, frozenset([2])))
    assert 0.2 < fast.skipped < 0.9
    with model.edit(*skips):
        want = model.generate("hello there", max_new_tokens=20).tokens[0].tolist()
    assert found == want
    assert want != model.generate("hello there", max_new_tokens=20).tokens[0].tolist()


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_packed_columns_give_the_products_of_packed_rows(format: Any) -> None:
    model = _model32()
    ids = list(range(5, 20))
    everything = [
        SkipInputs("blocks.*.mlp.act", threshold=1e-30),
        SkipInputs("blocks.*.attn_norm", threshold=1e-30),
    ]
    dense, sparse = (FastDecoder(model, format, length=32, edits=e) for e in ((), everything))
    for decoder in (dense, sparse):
        decoder.feed(ids[:6])
    for token in ids[6:]:
        assert torch.allclose(dense.feed([token]), sparse.feed([token]), atol=2e-4)
    assert sparse.skipped == 0.0


def test_edits_between_blocks_apply_as_in_generate() -> None:
    model = _model32()
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    lens = Direction(site="blocks.0.resid_post", vector=vector)
    for edit in (
        Add("blocks.1.resid_post", vector) * 0.5,
        Add("blocks.1.resid_post", vector).at(phase="generated") + ProjectOut("blocks.2.resid_pre", vector),
        Add("blocks.2.resid_post", vector).when(lens, per="sequence") * 2,
        (Add("embed", vector) * 0.1).at(positions="last"),
    ):
        fast = FastDecoder(model, length=48, edits=[edit])
        for prompt in ("hello there", "my friend the fox"):
            with model.edit(edit):
                want = model.generate(prompt, max_new_tokens=12).tokens[0].tolist()
            ids = model.encode(prompt)["input_ids"][0].tolist()
            assert list(fast.greedy(ids, 12, frozenset([2]))) == want


@pytest.mark.parametrize(
    "edit",
    [
        SkipInputs("blocks.0.mlp.act", keep=0.5),
        SkipInputs("blocks.0.mlp.act", threshold=0.1).at(positions=3),
        Add("blocks.0.mlp.out", torch.ones(64)),
        SkipInputs("blocks.0.resid_post", threshold=0.1),
    ],
)
def test_edits_that_the_loop_cannot_carry_are_refused(edit: Any) -> None:
    with pytest.raises(ActlasError, match="cannot carry"):
        FastDecoder(_model32(), edits=[edit])
