"""Activation Beacon against the model itself, against transformers' cache, and against brute-force masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from actlas.core.errors import ArtifactError, FingerprintError, InputError, ModelError, ShapeError
from actlas.core.model import Model
from actlas.nn.activation_beacon import ActivationBeacon, beacon_mask
from actlas.nn.activation_beacon_memory import BeaconMemory
from actlas.training.beacons import fit_beacons
from tests.core.tiny import tiny

W, R = 8, 4


@pytest.fixture(scope="module")
def model() -> Model:
    made = tiny("llama")
    made.module.double()
    return made


def ids(n: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (rows, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_text_that_fits_is_the_models_own(model: Model) -> None:
    beacon = ActivationBeacon(model, W, R)
    torch.testing.assert_close(beacon(ids(W)), model.logits(ids(W)), atol=1e-5, rtol=1e-5)
    assert beacon.memory.condensed == W // R and beacon.memory.raw_tokens == 0


@pytest.mark.parametrize("attn", ["step", "segment", "full"])
@pytest.mark.parametrize(("memory", "window", "stride", "ratio"), [(0, 8, 8, 4), (5, 8, 4, 2), (2, 6, 6, 1)])
def test_masks_against_brute_force(attn: str, memory: int, window: int, stride: int, ratio: int) -> None:
    mask = beacon_mask(memory, window, stride, ratio, attn)  # type: ignore[arg-type]
    k = stride // ratio
    assert mask.shape == (k, memory + window + k)
    for j in range(1, k + 1):
        for column in range(memory + window + k):
            if column < memory:
                wanted = True
            elif column < memory + window:
                token = column - memory + 1
                first = {"step": 1, "segment": (j - 1) * ratio + 1, "full": 1}[attn]
                last = window if attn == "full" else j * ratio
                wanted = first <= token <= last
            else:
                wanted = column - memory - window == j - 1
            assert bool(mask[j - 1, column]) == wanted, (j, column)


@torch.no_grad()
def test_untrained_beacons_are_end_of_text_tokens_behind_their_segment(model: Model) -> None:
    """With copied projections beacon j computes what the model does for [x_1..x_jr, end-of-text]."""
    beacon = ActivationBeacon(model, W, R)
    text = ids(W)
    beacon(text)
    for j in (1, 2):
        row = torch.cat([text[:, : j * R], torch.full((2, 1), model.config.eos_token_id)], 1)
        trace = model.trace(row, ["blocks.*.attn.k", "blocks.*.attn.v"])
        for i in range(3):
            for site, held in (("k", beacon.memory.keys[i]), ("v", beacon.memory.values[i])):
                wanted = trace[f"blocks.{i}.attn.{site}"][:, -1]  # before rotation, [rows, heads, width]
                torch.testing.assert_close(held[:, :, j - 1], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_second_window_is_the_models_own_behind_a_cache_of_beacons(model: Model) -> None:
    beacon = ActivationBeacon(model, W, R)
    for p in beacon.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    first, second = ids(W), ids(W, seed=1)
    beacon(first)
    cache = DynamicCache()
    for i, (k, v) in enumerate(zip(beacon.memory.keys, beacon.memory.values, strict=True)):
        cache.update(beacon.rotary(k, torch.arange(k.shape[2])), v, i)  # compacted: positions 0, 1
    wanted = model.module(input_ids=second, past_key_values=cache).logits
    torch.testing.assert_close(beacon(second), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - model.logits(second)).abs().max() > 1e-2  # the memory is used


@torch.no_grad()
@pytest.mark.parametrize("stride", [8, 4])
def test_reading_in_pieces_is_reading_at_once(model: Model, stride: int) -> None:
    beacon = ActivationBeacon(model, W, 2, stride=stride)
    text = ids(27)
    whole = beacon(text)
    memory = beacon.memory
    beacon.reset()
    pieces = torch.cat([beacon(piece) for piece in text.split([3, 1, 9, 14], 1)], 1)
    torch.testing.assert_close(pieces, whole)
    assert (memory.condensed, memory.windows) == (beacon.memory.condensed, beacon.memory.windows)
    torch.testing.assert_close(memory.keys[2], beacon.memory.keys[2])
    alone = ActivationBeacon(model, W, 2, stride=stride)(text[1:])
    torch.testing.assert_close(alone[0], whole[1])


def test_only_beacons_learn_and_the_model_keeps_its_bits(model: Model) -> None:
    text = ids(24, rows=6)
    beacon = ActivationBeacon(model, W, R)
    before = [p.detach().clone() for p in model.module.parameters()]
    start = [p.detach().clone() for p in beacon.parameters()]
    losses = fit_beacons(beacon, text, steps=25, ratios=(2, 4), batch=6, rate=1e-2)
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))
    assert all(p.grad is None for p in model.module.parameters())
    assert not torch.equal(start[0], next(iter(beacon.parameters())))
    assert beacon.memory.rows is None


def test_losses_score_the_last_token_of_a_window(model: Model) -> None:
    beacon, text = ActivationBeacon(model, W, R), ids(20)
    with torch.no_grad():
        losses, logits = beacon.losses(text), beacon(text)
    assert losses.shape == (2, 19)
    wanted = -logits.log_softmax(-1)[:, W - 1].gather(1, text[:, W : W + 1])[:, 0]
    torch.testing.assert_close(losses[:, W - 1], wanted)


@torch.no_grad()
def test_memory_resets_saves_and_loads(model: Model, tmp_path: Path) -> None:
    beacon = ActivationBeacon(model, W, R)
    first, more = ids(19), ids(7, seed=3)
    beacon(first)
    beacon.memory.save(tmp_path / "m", model)
    held = beacon.memory
    wanted = beacon(more)
    beacon.memory = BeaconMemory.load(tmp_path / "m", model)
    torch.testing.assert_close(beacon(more), wanted, atol=0, rtol=0)
    beacon.memory = held  # a memory is a value: what was read after it is not in it
    torch.testing.assert_close(beacon(more), wanted, atol=0, rtol=0)
    beacon.reset()
    assert not torch.equal(beacon(more), wanted)

    beacon.save(tmp_path / "b")
    again = ActivationBeacon.load(tmp_path / "b", model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), beacon.parameters(), strict=True))
    beacon.reset()
    torch.testing.assert_close(again(first), beacon(first), atol=0, rtol=0)
    with pytest.raises(FingerprintError, match="another model"):
        ActivationBeacon.load(tmp_path / "b", tiny("qwen2"))
    with pytest.raises(FingerprintError, match="other weights"):
        BeaconMemory.load(tmp_path / "m", tiny("llama"))  # float32
    with pytest.raises(ArtifactError, match="not a beacon-memory"):
        BeaconMemory.load(tmp_path / "b", model)


@torch.no_grad()
def test_it_reaches_beyond_the_models_positions_and_says_where_it_ends(model: Model) -> None:
    beacon = ActivationBeacon(model, W, W)
    assert model.context_length == 64 and beacon.reach == (64 - W) * W + W
    beacon(ids(200, rows=1))
    assert beacon.memory.condensed == 25
    with pytest.raises(InputError, match="reaches 456 tokens"):
        beacon(ids(400, rows=1))
    beacon.reset()
    made = beacon.generate(ids(70, rows=1), max_new_tokens=5)
    assert made.shape == (1, 5)


def test_bad_input(model: Model) -> None:
    with pytest.raises(InputError, match="8 is not divisible by the ratio 3"):
        ActivationBeacon(model, W, 3)
    with pytest.raises(InputError, match="stride is 9"):
        ActivationBeacon(model, W, 1, stride=9)
    with pytest.raises(InputError, match="context of 64"):
        ActivationBeacon(model, 128, 2)
    with pytest.raises(InputError, match="'step', 'segment' or 'full'"):
        ActivationBeacon(model, W, R, attn="all")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="not of a kind"):
        ActivationBeacon(tiny("gpt2"), W, R)
    beacon = ActivationBeacon(model, W, R)
    with pytest.raises(ShapeError, match="ids"):
        beacon(torch.zeros(2, 3))
    beacon(ids(3))
    with pytest.raises(ShapeError, match="holds 2 rows, not 1"):
        beacon(ids(3, rows=1))
    with pytest.raises(InputError, match="must divide the stride"):
        fit_beacons(beacon, ids(24), steps=1, ratios=(3,))
    with pytest.raises(InputError, match="window's 8"):
        fit_beacons(beacon, ids(8), steps=1)
