"""A cache in few bits: what is stored, by hand; windows and sinks; decoding, beams, padding; bytes; bad input."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.measure.cache_price import cache_price
from actlas.measure.kv_cache import cache_bytes
from actlas.quantize.kv_cache import QuantizeCache, cache_bits, decoded_cache, fit_kv_quant
from actlas.quantize.kv_layer import QuantizedKV, group_of
from actlas.sparsity.kv_rules import SnapKV
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

EXACT = QuantizeCache(8, 8, group=8, window=4)


def states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tokens, 16, generator=g), torch.randn(batch, 3, tokens, 16, generator=g)


def by_hand(x: Tensor, bits: int, dim: int, group: int) -> Tensor:
    """Codes with a minimum in groups along one axis, in float64 with scales in half precision."""
    x = x.transpose(dim, -1).double()
    groups = x.reshape(*x.shape[:-1], -1, group)
    low = groups.amin(-1, keepdim=True)
    step = ((groups.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().double()
    low = low.half().double()
    out = ((groups - low) / step).round().clamp(0, 2**bits - 1) * step + low
    return out.reshape(x.shape).transpose(dim, -1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("pieces", [[30], [1] * 30, [7, 1, 12, 10]])
def test_stored_numbers_are_those_of_the_definition(bits: int, pieces: list[int]) -> None:
    keys, values = states(30)
    layer, at = QuantizedKV(bits, bits, group=8, window=5, sinks=2), 0
    for n in pieces:
        k, _ = layer.update(keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
        assert k.shape == (2, 3, at, 16) and layer.get_seq_length() == at
    got_keys, got_values = decoded_cache(layer)
    coded = (30 - 2 - 5) // 8 * 8
    middle = slice(2, 2 + coded)
    want = by_hand(keys[:, :, middle], bits, 2, 8)
    assert torch.allclose(got_keys[:, :, middle].double(), want, atol=1e-5)
    want = by_hand(values[:, :, middle], bits, 3, 8)
    assert torch.allclose(got_values[:, :, middle].double(), want, atol=1e-5)
    for got, x in ((got_keys, keys), (got_values, values)):
        assert torch.equal(got[:, :, :2], x[:, :, :2]) and torch.equal(
            got[:, :, 2 + coded :], x[:, :, 2 + coded :]
        )
        assert not torch.equal(got[:, :, middle], x[:, :, middle])


def test_channels_with_large_keys_want_scales_of_their_own() -> None:
    keys, values = states(64)
    keys[..., 3] *= 50
    errors = {}
    for axis in ("channel", "token"):
        layer = QuantizedKV(2, 2, group=16, window=0, key_axis=axis)  # type: ignore[arg-type]
        layer.update(keys, values)
        off = (decoded_cache(layer)[0] - keys)[..., [0, 1, 2, 4]]
        errors[axis] = float(off.square().mean())
    assert errors["channel"] < 0.2 * errors["token"]


def test_bytes_are_counted() -> None:
    layer = QuantizedKV(2, 4, group=8, window=8)
    layer.update(*states(72))
    rows = 2 * 3
    keys = rows * 16 * (64 * 2 // 8 + 64 // 8 * 4)
    values = rows * 64 * (16 * 4 // 8 + 16 // 8 * 4)
    assert layer.stored_bytes == keys + values + 2 * rows * 8 * 16 * 4
    cache = DynamicCache()
    cache.layers = [layer]
    assert cache_bytes(cache) == layer.stored_bytes
    assert cache_bits(QuantizeCache(2, 4, group=8), 16) == pytest.approx((2 + 4 + 4 + 4) / 2)


def test_rows_of_the_batch_and_taking_back() -> None:
    keys, values = states(30)
    layer = QuantizedKV(4, 4, group=8, window=6)
    layer.update(keys, values)
    before = decoded_cache(layer)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(decoded_cache(layer)[0], before[0][[1, 0]])
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(3)
    assert torch.equal(decoded_cache(layer)[1], before[1][[0, 0, 0]])
    layer.crop(-4)
    assert layer.get_seq_length() == 26 and torch.equal(decoded_cache(layer)[0], before[0][[0, 0, 0], :, :26])
    with pytest.raises(InputError, match="not coded"):
        layer.crop(-10)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.stored_bytes == 0
    layer.update(keys, values)
    assert torch.equal(decoded_cache(layer)[0], before[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "qwen3"])
def test_decoding_from_it(family: str) -> None:
    model = BY_NAME[family].model()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 40), generator=g)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def run(*edits: Edit) -> tuple[Tensor, Tensor, DynamicCache]:
        cache = DynamicCache()
        with model.edit(*edits), torch.no_grad():
            a = model.module(
                input_ids=ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache, use_cache=True
            )
            b = model.module(
                input_ids=ids[:, 30:], attention_mask=mask, past_key_values=cache, use_cache=True
            )
        return a.logits[:, 3:], b.logits, cache

    first, second, plain = run()
    for bits, least, most in ((16, 0.0, 1e-5), (8, 1e-6, 0.05), (2, 1e-3, 50.0)):
        one, two, cache = run(QuantizeCache(bits, bits, group=8, window=4))
        assert torch.allclose(one, first, atol=1e-5)  # a prompt reads its own exact keys and values
        off = float((two - second).abs().max())
        assert least <= off <= most, (bits, off)
        assert all(isinstance(x, QuantizedKV) for x in cache.layers)
        if bits == 2:
            assert cache_bytes(cache) < cache_bytes(plain)


def test_generate_takes_it_and_everything_is_taken_back() -> None:
    model = tiny()
    prompt = TEXTS[0][:40]
    plain = model.generate(prompt, max_new_tokens=8)
    with model.edit(EXACT):
        close = model.generate(prompt, max_new_tokens=8)
        assert close.sequences.shape == plain.sequences.shape
        model.generate([prompt, "Why"], max_new_tokens=4, num_beams=2)
    with model.edit(QuantizeCache(16, 16, group=8)):
        assert torch.equal(model.generate(prompt, max_new_tokens=8).sequences, plain.sequences)
    assert torch.equal(model.generate(prompt, max_new_tokens=8).sequences, plain.sequences)


def test_price_and_saving(tmp_path: Path) -> None:
    model = tiny()
    text = [t[:60] for t in TEXTS if len(t) >= 50] * 2
    edit = fit_kv_quant(model, text, key_bits=2, value_bits=2, group=8, window=4, prompts=3, tokens=48)
    kl, share = edit.measurements
    assert kl.name == "cache-kl" and kl.value > 0 and share.name == "cache-share" and share.value < 0.7
    loaded = Edit.load(edit.save(tmp_path / "e", model), model)
    assert loaded.describe() == edit.describe() and loaded.measurements == edit.measurements
    found = cache_price(
        model, text, {"8": EXACT, "2": edit}, pairs=[("2", "8")], prompts=3, tokens=48, step=3
    )
    gap = next(m for m in found if m.name == "extra-cache-kl")
    by = {m.group["variant"]: m.value for m in found if m.name == "cache-kl"}
    assert gap.value == pytest.approx(by["2"] - by["8"]) and by["8"] < by["2"]
    nothing = cache_price(model, text, {"all": QuantizeCache(16, 16, group=8)}, prompts=2, tokens=48)
    assert nothing[0].value < 1e-6 and nothing[1].value == pytest.approx(1.0)


def test_bad_input() -> None:
    for given, said in (
        ({"key_bits": 1}, "2 to 8, or 16"),
        ({"value_bits": 12}, "2 to 8, or 16"),
        ({"group": 12}, "multiple of 8"),
        ({"window": -1}, "at least 0"),
        ({"key_axis": "head"}, "'channel' or 'token'"),
    ):
        with pytest.raises(InputError, match=said):
            QuantizeCache(**given)  # type: ignore[arg-type]
    model: Model = tiny()
    with pytest.raises(InputError, match=r"groups of 24; legal: 8, 16, 32, 64"):
        group_of(64, 24)
    assert group_of(8, 32) == 8
    with pytest.raises(InputError, match="one way"), model.edit(EXACT), model.edit(QuantizeCache()):
        pass
    with pytest.raises(ModelError, match="no cache"), tiny("bert").edit(EXACT):
        pass
    ids = torch.arange(3, 13)[None]
    with model.edit(EXACT), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        with pytest.raises(ModelError, match="StaticCache"):
            model.module(input_ids=ids, past_key_values=cache, use_cache=True)
    long = {"input_ids": torch.arange(3, 43)[None], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    with (
        model.edit(EXACT),
        model.edit(SnapKV(capacity=16, window=4)),
        pytest.raises(ModelError, match="cache policy|cannot be combined"),
    ):
        model.generate(long, max_new_tokens=2)
    with pytest.raises(InputError, match="names '9'"):
        cache_price(model, TEXTS, {"8": EXACT}, pairs=[("9", "8")])
    with pytest.raises(InputError, match="at least 8"):
        cache_price(model, TEXTS, {"8": EXACT}, tokens=4)


@pytest.mark.slow
def test_two_bits_want_channels_for_keys_and_tokens_for_values() -> None:
    from actlas.data import corpus
    from actlas.models import load

    variants = {
        "kivi": QuantizeCache(2, 2),
        "keys per token": QuantizeCache(2, 2, key_axis="token"),
        "values per channel": QuantizeCache(2, 2, value_axis="channel"),
    }
    pairs = [("kivi", name) for name in ("keys per token", "values per channel")]
    found = cache_price(load("smollm2"), corpus("prose"), variants, pairs=pairs, prompts=5, tokens=192)
    gaps = [m for m in found if m.name == "extra-cache-kl"]
    assert len(gaps) == 2 and all(m.high is not None and m.high < 0 for m in gaps)
