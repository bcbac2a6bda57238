"""Cache policies: true positions, brute force, what they keep, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.core.weight_edit import WeightEdit
from actlas.measure.kv_cache import (
    answer_mass,
    attention_mass_recall,
    cache_bytes,
    kept_positions,
    kv_bytes,
    read_prompt,
    recall_of,
)
from actlas.sparsity.draft import draft_of
from actlas.sparsity.kv_rules import H2O, RandomKV, SnapKV, StreamingWindow
from actlas.sparsity.spec_kv import SpecKV, look_ahead
from actlas.sparsity.spec_pc import Selector, SpecKVPC, SpecPC
from tests.core.tiny import tiny

PROMPT = "The committee met on Tuesday to talk"
LENGTH, KV, GROUP, LAYERS = 36, 2, 2, 3


def sharp(family: str = "llama") -> Model:
    """A small random model whose attention is far from uniform."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            if p.ndim == 2:
                scale = 0.6 if "q_proj" in name or "k_proj" in name else 0.25
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    model.module.double()
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return sharp()


def ids_of(model: Model, text: str = PROMPT) -> Tensor:
    ids: Tensor = model.encode(text)["input_ids"]
    return ids


def full_attention(model: Model, ids: Tensor) -> list[Tensor]:
    """Attention of every layer, float64 `[kv_heads, group, rows, columns]`, from transformers' eager code."""
    module = model.module
    before = module.config._attn_implementation
    module.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            found = module(input_ids=ids, output_attentions=True).attentions
    finally:
        module.config._attn_implementation = before
    return [a[0].double().unflatten(0, (KV, -1)) for a in found]


def masked_logits(model: Model, ids: Tensor, kept: list[Tensor], prompt: int) -> Tensor:
    """Logits of the whole text when tokens behind the prompt see only kept prompt positions, by brute force."""

    def hide(layer: int) -> Any:
        def change(scores: Tensor) -> Tensor:
            out = scores.clone()
            for head in range(KV):
                dropped = sorted(set(range(prompt)) - set(kept[layer][head].tolist()))
                rows = torch.arange(prompt, ids.shape[1])
                for q in range(GROUP * head, GROUP * head + GROUP):
                    out[0, q, rows[:, None], torch.tensor(dropped)] = torch.finfo(out.dtype).min
            return out

        return change

    from actlas.core.hooks import attach

    handles = [
        attach(model.module, model.resolve(f"blocks.{i}.attn.scores")[0], hide(i)) for i in range(LAYERS)
    ]
    try:
        with torch.no_grad():
            logits: Tensor = model.module(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


@pytest.mark.parametrize("edit", [SnapKV(12, 4, 3), RandomKV(12, 4), SpecKV(12, 4, 3, lookahead_tokens=5)])
def test_decoding_after_eviction_is_full_attention_with_dropped_keys_hidden(model: Model, edit: Edit) -> None:
    ids = ids_of(model)
    text = torch.cat([ids, torch.tensor([[20, 7, 33, 41]])], 1)
    with model.edit(edit):
        kept = kept_positions(model, ids)
        cache = read_prompt(model, ids)
        got = []
        for step in range(4):
            place = torch.tensor([[LENGTH + step]])
            token = text[:, LENGTH + step : LENGTH + step + 1]
            out = model.module(input_ids=token, past_key_values=cache, use_cache=True, position_ids=place)
            got.append(out.logits[0, -1])
    assert all(k.shape == (KV, 12) for k in kept)
    want = masked_logits(model, text, kept, LENGTH)[0, LENGTH:]
    assert torch.allclose(torch.stack(got), want, atol=1e-8)
    plain = model.logits({"input_ids": text})[0, LENGTH:]
    assert (want - plain).abs().max() > 1e-2  # the dropped keys did matter


def test_generate_uses_the_true_positions(model: Model) -> None:
    """transformers' own loop, which derives positions from the cache, gives what explicit positions give."""
    edit = SnapKV(12, 4, 3)
    ids = ids_of(model)
    with model.edit(edit):
        whole = model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8).sequences
        cache = read_prompt(model, ids)
        assert cache.get_seq_length() == LENGTH and cache.layers[0].keys.shape[2] == 12
        for step in range(7):
            token = whole[:, LENGTH + step : LENGTH + step + 1]
            place = torch.tensor([[LENGTH + step]])
            logits = model.module(
                input_ids=token, past_key_values=cache, use_cache=True, position_ids=place
            ).logits[0, -1]
            logits[2] = -torch.inf  # the end token is not allowed before the eighth
            assert int(logits.argmax()) == int(whole[0, LENGTH + step + 1])


def test_snap_kv_keeps_what_brute_force_keeps(model: Model) -> None:
    ids, capacity, window, kernel = ids_of(model), 14, 5, 3
    with model.edit(SnapKV(capacity, window, kernel)):
        kept = kept_positions(model, ids)
    for attention, found in zip(full_attention(model, ids), kept, strict=True):
        for head in range(KV):
            votes = attention[head, :, -window:, : LENGTH - window].amax((0, 1))
            pooled = [max(votes[max(0, j - 1) : j + 2].tolist()) for j in range(LENGTH - window)]
            chosen = set(found[head].tolist())
            assert set(range(LENGTH - window, LENGTH)) <= chosen and len(chosen) == capacity
            worst = min(pooled[j] for j in chosen if j < LENGTH - window)
            best = max(pooled[j] for j in range(LENGTH - window) if j not in chosen)
            assert worst >= best - 1e-6


def test_oracle_draft_keeps_what_the_true_answer_votes_for(model: Model) -> None:
    ids = ids_of(model)
    answer = look_ahead(draft_of(model), ids, 6)
    assert torch.equal(answer, model.generate(PROMPT, max_new_tokens=6).sequences[:, LENGTH:])
    rule = SnapKV(12, 4, 3)
    with model.edit(SpecKV(12, 4, 3, lookahead_tokens=6)):
        kept = kept_positions(model, ids)
    for attention, found in zip(full_attention(model, torch.cat([ids, answer], 1)), kept, strict=True):
        rows = attention[..., -(4 + answer.shape[1]) :, :][None]
        score = rule.score(rows, LENGTH)[0]
        for head in range(KV):
            want = set(score[head].topk(8).indices.tolist()) | set(range(LENGTH - 4, LENGTH))
            assert set(found[head].tolist()) == want
    with model.edit(rule):
        assert any(not torch.equal(a, b) for a, b in zip(kept, kept_positions(model, ids), strict=True))


@pytest.mark.parametrize(
    "edit",
    [
        SnapKV(36, 4, 3),
        SpecKV(36, 4, 3),
        SpecPC(36, window=4, skip_layers=0),
        SpecKVPC(36, 4, 3, prompt_capacity=36, prompt_window=4, skip_layers=0),
        StreamingWindow(60),
        H2O(60),
    ],
)
def test_a_prompt_that_fits_is_left_alone_bit_for_bit(model: Model, edit: Edit) -> None:
    base = model.generate(PROMPT, max_new_tokens=6, output_logits=True, return_dict_in_generate=False)
    plain = model.logits(PROMPT)
    with model.edit(edit):
        assert torch.equal(model.generate(PROMPT, max_new_tokens=6).sequences, base.sequences)
        assert torch.equal(model.logits(PROMPT), plain)
    assert torch.equal(model.logits(PROMPT), plain)


def test_the_draft_never_enters_the_cache_or_the_outputs(model: Model) -> None:
    ids = ids_of(model)
    with model.edit(SpecKV(12, 4, 3, lookahead_tokens=6)):
        cache = read_prompt(model, ids)
        assert all(int(x.positions.max()) < LENGTH for x in cache.layers)
        from transformers import DynamicCache

        logits = model.module(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).logits
    assert logits.shape[1] == LENGTH
    assert torch.allclose(logits, model.logits({"input_ids": ids}), atol=1e-5)


def test_rolling_policies_never_store_more_than_their_capacity(model: Model) -> None:
    ids = ids_of(model)
    for edit in (StreamingWindow(10, 2), H2O(10, 4)):
        with model.edit(edit):
            cache = read_prompt(model, ids)
            for step in range(5):
                place = torch.tensor([[LENGTH + step]])
                model.module(
                    input_ids=torch.tensor([[9 + step]]),
                    past_key_values=cache,
                    use_cache=True,
                    position_ids=place,
                )
                layer = cache.layers[1]
                assert layer.keys.shape[2] == 10 and layer.seen == LENGTH + step + 1
                assert int(layer.positions.max()) == LENGTH + step
        if isinstance(edit, StreamingWindow):
            want = [0, 1, *range(LENGTH + 5 - 8, LENGTH + 5)]
            assert cache.layers[0].positions[0].tolist() == [want] * KV


def test_h2o_keeps_the_heavy_hitters(model: Model) -> None:
    ids = ids_of(model)
    with model.edit(H2O(12, 4)):
        kept = kept_positions(model, ids)
    for attention, found in zip(full_attention(model, ids), kept, strict=True):
        mass = attention.sum((1, 2))[:, : LENGTH - 4]
        for head in range(KV):
            want = set(mass[head].topk(8).indices.tolist()) | set(range(LENGTH - 4, LENGTH))
            assert set(found[head].tolist()) == want


def test_selector_brute_force(model: Model) -> None:
    ids = ids_of(model)
    select = Selector(12, window=4, pool=3, neighbors=3, skip_layers=1)
    scores = select.scores(model, ids)
    want = torch.zeros(LENGTH, dtype=torch.float64)
    for attention in full_attention(model, ids)[1:]:
        for r in range(4):
            rows = attention[:, :, LENGTH - 4 + r].amax((0, 1))
            want = torch.maximum(want, rows * (r / 3))
    assert torch.allclose(scores.double(), want, atol=1e-6)
    chosen = select.choose(scores)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 12
    assert set(range(LENGTH - 4, LENGTH)) <= set(chosen.tolist())
    centre = F.max_pool1d(scores[None], 3, 1, 1)[0].argmax().item()
    assert {j for j in (centre - 1, centre, centre + 1) if 0 <= j < LENGTH} <= set(chosen.tolist())
    assert select.choose(torch.ones(12)).tolist() == list(range(12))


def test_a_compressed_prompt_is_read_as_a_fresh_one(model: Model) -> None:
    ids = ids_of(model)
    edit = SpecPC(14, window=4, pool=4, neighbors=4, skip_layers=0)
    chosen = edit.selector.choose(edit.selector.scores(model, ids))
    alone = model.generate({"input_ids": ids[:, chosen]}, max_new_tokens=8).sequences[:, 14:]
    with model.edit(edit):
        assert torch.equal(model.generate(PROMPT, max_new_tokens=8).sequences[:, LENGTH:], alone)
        assert read_prompt(model, ids).layers[0].keys.shape[2] == 14


def test_prompt_and_cache_are_compressed_with_one_draft(model: Model) -> None:
    ids = ids_of(model)
    edit = SpecKVPC(
        8, 3, 3, lookahead_tokens=4, prompt_capacity=20, prompt_window=4, pool=3, neighbors=3, skip_layers=0
    )
    with model.edit(edit):
        cache = read_prompt(model, ids)
        model.generate(PROMPT, max_new_tokens=4)
    assert all(x.keys.shape[2] == 8 and int(x.positions.max()) == 19 for x in cache.layers)


def test_an_edit_of_the_target_is_a_draft_and_leaves_the_target_alone(model: Model) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(model.module.named_parameters())[name]
    before = weight.clone()
    draft = draft_of(model, WeightEdit({name: torch.ones_like(weight)}))
    assert torch.equal(weight, before)
    assert not torch.equal(draft.logits(PROMPT), model.logits(PROMPT))
    shared = dict(draft.module.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert (
        shared.data_ptr()
        == dict(model.module.named_parameters())["model.layers.0.mlp.down_proj.weight"].data_ptr()
    )
    from actlas.core.edits import Zero

    with model.edit(Zero("blocks.0.mlp.out")):  # edits of the target are not the draft's
        plain = draft_of(model)
        inside = plain.logits(PROMPT)
    assert torch.equal(inside, model.logits(PROMPT))


def test_saved_and_loaded_policies_do_the_same(model: Model, tmp_path: Path) -> None:
    from actlas.core.edits import Zero

    edit = SpecKV(12, 4, 3, draft=Zero("blocks.1.mlp.out"), lookahead_tokens=4)
    loaded = Edit.load(edit.save(tmp_path / "spec", model=model), model)
    ids = ids_of(model)
    with model.edit(edit):
        want = kept_positions(model, ids)
    with model.edit(loaded):
        assert all(torch.equal(a, b) for a, b in zip(want, kept_positions(model, ids), strict=True))
    with pytest.raises(InputError, match="cannot be saved"):
        SpecKV(12, 4, 3, draft=draft_of(model)).save(tmp_path / "model", model=model)


def test_beams_and_batches_keep_rows_apart(model: Model) -> None:
    with model.edit(SnapKV(12, 4, 3)):
        one = model.generate(PROMPT, max_new_tokens=5, num_beams=1).sequences
        both = model.generate({"input_ids": ids_of(model).repeat(2, 1)}, max_new_tokens=5).sequences
        assert torch.equal(both[0], one[0]) and torch.equal(both[1], one[0])
    with model.edit(H2O(12, 4)):
        model.generate(PROMPT, max_new_tokens=5, num_beams=3)


def test_other_families(model: Model) -> None:
    for family in ("gpt2",):
        other = tiny(family)
        with other.edit(SnapKV(12, 4, 3)):
            assert read_prompt(other, ids_of(other)).layers[0].keys.shape[2] == 12
            other.generate(PROMPT, max_new_tokens=3)


def test_recall_and_bytes(model: Model) -> None:
    ids = ids_of(model)
    answer = model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5).sequences[:, LENGTH:]
    mass = answer_mass(model, ids, answer)
    for attention, found in zip(full_attention(model, torch.cat([ids, answer], 1)), mass, strict=True):
        assert torch.allclose(found, attention[:, :, -5:, :LENGTH].sum((1, 2)), atol=1e-6)
    everything = [torch.arange(LENGTH).expand(KV, -1)] * LAYERS
    assert recall_of(mass, everything) == pytest.approx(1)
    half = [torch.arange(LENGTH // 2).expand(KV, -1)] * LAYERS
    other = [torch.arange(LENGTH // 2, LENGTH).expand(KV, -1)] * LAYERS
    assert recall_of(mass, half) + recall_of(mass, other) == pytest.approx(1)
    full = cache_bytes(read_prompt(model, ids))
    assert full == 2 * LAYERS * KV * 8 * LENGTH * 8
    texts = [PROMPT, "x", PROMPT[::-1]]
    base = kv_bytes(model, texts, prompts=2, tokens=30)
    assert attention_mass_recall(model, texts, prompts=2, tokens=30).value == 1
    with model.edit(SnapKV(12, 4, 3)):
        assert kv_bytes(model, texts, prompts=2, tokens=30).value == pytest.approx(base.value * 12 / 30)
        found = attention_mass_recall(model, texts, prompts=2, tokens=30, answer_tokens=5)
    assert 0.1 < found.value < 1 and found.n == 2 and found.under
    with model.edit(RandomKV(12, 4)):
        assert attention_mass_recall(model, texts, prompts=2, tokens=30, answer_tokens=5).value < found.value


def test_bad_input(model: Model) -> None:
    for bad in (
        lambda: SnapKV(8, 8),
        lambda: SnapKV(0),
        lambda: SnapKV(16, 4, 4),
        lambda: SnapKV(16, 4, 3, "median"),  # type: ignore[arg-type]
        lambda: StreamingWindow(4, 4),
        lambda: H2O(4, 4),
        lambda: SpecKV(16, 4, 3, lookahead_tokens=0),
        lambda: SpecPC(4, window=5),
        lambda: SnapKV(16, 4, 3) * 2,
        lambda: SnapKV(16, 4, 3).at(positions="last"),
    ):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(InputError, match="one cache policy"), model.edit(SnapKV(16, 4, 3), H2O(16)):
        pass
    with pytest.raises(InputError, match="padding"), model.edit(SnapKV(6, 2, 3)):
        model.generate(["A bridge over it", "Nobody said so and went away"], max_new_tokens=2)
    with pytest.raises(InputError, match="tokenizer"), model.edit(SpecKV(16, 4, 3, draft=sized())):
        pass
    with pytest.raises(InputError, match="skip_layers"), model.edit(SpecPC(8, window=2, skip_layers=3)):
        model.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(InputError, match="one prompt"), model.edit(SpecKV(12, 4, 3)):
        model.generate({"input_ids": ids_of(model).repeat(2, 1)}, max_new_tokens=2)
    with pytest.raises(ModelError), tiny("bert").edit(SnapKV(16, 4, 3)):
        pass
    with pytest.raises(ModelError, match="growing cache"), model.edit(SnapKV(12, 4, 3)):
        model.generate(PROMPT, max_new_tokens=2, cache_implementation="static")
    assert torch.equal(model.logits(PROMPT), model.logits(PROMPT))


def sized() -> Model:
    """A model with another tokenizer."""
    model = tiny("llama")
    model.tokenizer.add_tokens(["zebra"])
    return model
