"""KV blocks: the same numbers as a prefill, moved exactly, never mutated, refused where they do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actlas.core.edits import Add
from actlas.core.errors import ArtifactError, FingerprintError, InputError, ModelError
from actlas.core.model import Model
from actlas.core.rotary import Rotary, rotary_of
from actlas.store.memory import KVBlock
from tests.core.tiny import tiny

TEXT, MORE = "It was raining; the river", " had risen"


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


@pytest.fixture(scope="module")
def block(model: Model) -> KVBlock:
    return KVBlock.build(model, TEXT)


def test_a_cached_prefix_gives_what_a_whole_prefill_gives(model: Model, block: KVBlock) -> None:
    whole = model.logits(TEXT + MORE)[0]
    logits, cache = block.extend(model, MORE)
    torch.testing.assert_close(logits, whole[len(TEXT) :], atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == len(TEXT + MORE)
    last, _ = block.prefill(model, TEXT + MORE)
    torch.testing.assert_close(last, whole[-1], atol=1e-5, rtol=1e-5)
    last, _ = block.prefill(model, TEXT)
    torch.testing.assert_close(last, model.logits(TEXT)[0, -1], atol=1e-5, rtol=1e-5)


def test_greedy_generation_is_the_models_own(model: Model, block: KVBlock) -> None:
    own = model.generate(TEXT + MORE, max_new_tokens=8).tokens[0].tolist()
    assert block.generate(model, MORE, max_new_tokens=8)[: len(own)] == own


def test_rotation_against_complex_numbers() -> None:
    rotary = Rotary((1.0, 0.25), "default")
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = [0, 3, -2, 100, 7]
    turned = rotary(x, places)
    for t, place in enumerate(places):
        for i, f in enumerate((1.0, 0.25)):
            z = torch.complex(x[:, t, i], x[:, t, i + 2]) * complex(math.cos(place * f), math.sin(place * f))
            torch.testing.assert_close(turned[:, t, i], z.real)
            torch.testing.assert_close(turned[:, t, i + 2], z.imag)
    torch.testing.assert_close(rotary(turned, [-p for p in places]), x)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_shifted_keys_are_those_computed_at_the_shifted_positions(family: str) -> None:
    model = tiny(family)
    here, there = KVBlock.build(model, TEXT), KVBlock.build(model, TEXT, start=17)
    moved = here.shift(17)
    assert moved.positions == there.positions
    torch.testing.assert_close(moved.keys, there.keys, atol=1e-4, rtol=1e-4)
    assert (moved.keys - here.keys).abs().max() > 0.1
    torch.testing.assert_close(here.values, there.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.shift(-17).keys, here.keys, atol=1e-5, rtol=1e-5)


def test_joins(model: Model, block: KVBlock) -> None:
    other = KVBlock.build(model, MORE)
    exact = block.join(other, "recompute", model=model)
    whole = KVBlock.build(model, TEXT + MORE)
    assert exact.exact and exact.ids == whole.ids and exact.positions == whole.positions
    torch.testing.assert_close(exact.keys, whole.keys, atol=1e-4, rtol=1e-4)

    moved = block.join(other)
    assert moved.positions == whole.positions and not moved.exact
    torch.testing.assert_close(moved.keys[:, :, len(TEXT) :], other.shift(len(TEXT)).keys)
    plain = block.join(other, "none")
    assert plain.positions == (*range(len(TEXT)), *range(len(MORE))) and plain.next_position == len(whole)
    dropped = block.join(other, "shift+drop_first")
    assert dropped.ids == block.ids + other.ids[1:] and dropped.positions == whole.positions[:-1]
    assert moved.cache().get_seq_length() == len(TEXT + MORE)  # and not 0, as in caches built by hand
    # what the second block has not seen makes a difference: the join is not the true cache
    assert (moved.keys - whole.keys).abs().max() > 1e-2


def test_generation_does_not_change_what_is_stored(model: Model, block: KVBlock) -> None:
    before = block.keys.clone(), block.values.clone()
    first = block.generate(model, MORE, max_new_tokens=5)
    _, cache = block.extend(model, MORE)
    for layer in cache.layers:
        layer.keys.zero_()
    assert block.generate(model, MORE, max_new_tokens=5) == first
    assert torch.equal(block.keys, before[0]) and torch.equal(block.values, before[1])
    two = block.cache(rows=2)
    two.layers[0].keys[0] += 1
    assert torch.equal(two.layers[0].keys[1], block.keys[0])


def test_save_and_load(model: Model, block: KVBlock, tmp_path: Path) -> None:
    block.save(tmp_path / "b")
    again = KVBlock.load(tmp_path / "b", model)
    assert torch.equal(again.keys, block.keys) and torch.equal(again.values, block.values)
    assert (again.ids, again.positions, again.rotary, again.exact) == (
        block.ids,
        block.positions,
        block.rotary,
        True,
    )
    assert {p.suffix for p in (tmp_path / "b").iterdir()} == {".json", ".safetensors"}
    record, tensors = block.record()
    with pytest.raises(ArtifactError, match="do not fit"):
        KVBlock.from_record({**record, "positions": [0]}, tensors)
    with pytest.raises(ArtifactError, match="incomplete"):
        KVBlock.from_record({k: v for k, v in record.items() if k != "ids"}, tensors)


def test_a_block_of_another_model_is_refused(model: Model, block: KVBlock) -> None:
    with pytest.raises(FingerprintError, match="another model"):
        block.check(tiny("qwen2"))
    changed = tiny("llama")
    with torch.no_grad():
        changed.block(0).mlp.down_proj.weight.mul_(1.01)  # type: ignore[union-attr, operator]
    with pytest.raises(FingerprintError, match="other weights"):
        block.extend(changed, MORE)
    half = tiny("llama")
    half.module.bfloat16()
    with pytest.raises(FingerprintError, match="bfloat16"):
        block.check(half)
    with pytest.raises(FingerprintError, match="rotary"):
        replace(block, rotary=Rotary((0.5, 0.1, 0.1, 0.1))).check(model)
    one = Add("blocks.0.resid_post", torch.ones(32))
    with model.edit(one):
        with pytest.raises(FingerprintError, match="under the edits none"):
            block.extend(model, MORE)
        steered = KVBlock.build(model, TEXT)
        steered.check(model)
    with model.edit(Add("blocks.0.resid_post", torch.full((32,), 2.0))):  # of the same description
        model.logits(TEXT)
        with pytest.raises(FingerprintError, match="under the edits"):
            steered.check(model)
    with pytest.raises(FingerprintError, match="weights"):
        block.join(replace(block, weights="0"))


def test_bad_input(model: Model, block: KVBlock) -> None:
    with pytest.raises(InputError, match="leaves the block at token 3"):
        block.prefill(model, "It xas raining; the river had")
    with pytest.raises(InputError, match="fewer than"):
        block.prefill(model, "It was")
    with pytest.raises(InputError, match="context of 64"):
        block.generate(model, MORE, max_new_tokens=60)
    with pytest.raises(InputError, match="context of 64"):
        KVBlock.build(model, TEXT, start=60)
    with pytest.raises(InputError, match="one text"):
        KVBlock.build(model, [TEXT, MORE])
    with pytest.raises(InputError, match="no token"):
        block.extend(model, "")
    with pytest.raises(InputError, match="must be one of"):
        block.join(block, "both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model="):
        block.join(block, "recompute")
    with pytest.raises(InputError, match="first token to -1"):
        block.shift(-1)
    with pytest.raises(ModelError, match="not a decoder"):
        KVBlock.build(tiny("bert"), TEXT)
    gpt2 = tiny("gpt2")  # absolute positions: cached and reused, but never moved
    fixed = KVBlock.build(gpt2, TEXT)
    torch.testing.assert_close(
        fixed.extend(gpt2, MORE)[0][-1], gpt2.logits(TEXT + MORE)[0, -1], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ModelError, match="no plain rotation"):
        fixed.shift(1)
    with pytest.raises(ModelError, match="not of a kind"):
        rotary_of(gpt2)


def test_sliding_windows_are_refused(model: Model) -> None:
    import copy

    other = tiny("llama")
    other.config = copy.deepcopy(other.config)
    other.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="sliding"):
        rotary_of(other)
