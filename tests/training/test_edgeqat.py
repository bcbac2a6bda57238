"""EdgeQAT: its losses against their definitions, bits by token, and the edit that comes out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.numbers import QuantSpec, quantize
from actlas.training.edgeqat import AttentionReader, RoundAt, edgeqat
from actlas.training.edgeqat_losses import (
    attention_entropy,
    attention_similarity,
    distillation,
    map_cosines,
)
from actlas.training.token_bits import TokenBits, calibrate_thresholds, first_token_scores, token_bits
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

SMALL = {"steps": 3, "batch": 2, "context": 16, "tokens": 400}


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_entropy_loss_is_half_the_log_variance():
    q, k = [rows(0, 2, 5, 3, 8), rows(1, 2, 5, 3, 8)], [rows(2, 2, 5, 1, 8), rows(3, 2, 5, 1, 8)]
    want = sum((0.5 * torch.log(1 + x.var(-1))).mean() for x in (*q, *k)) / 4
    assert attention_entropy(q, k).item() == pytest.approx(-float(want), rel=1e-5)
    total = sum(torch.log(1 + x.var(-1)).sum() for x in (*q, *k))
    assert attention_entropy(q, k, official=True).item() == pytest.approx(-0.5 * math.log(total), rel=1e-5)
    wide = [x * 3 for x in q], [x * 3 for x in k]
    assert attention_entropy(*wide).item() < attention_entropy(q, k).item()
    assert (
        attention_entropy(*wide, reference=(q, k)).item() == 0
    )  # more than the teacher has is not asked for
    assert attention_entropy([x / 3 for x in q], k, reference=(q, k)).item() > 0


def test_similarity_leaves_masked_scores_out():
    a, b = rows(0, 2, 3, 6, 6), rows(1, 2, 3, 6, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.float32).min
    masked = [torch.where(mask, x, torch.full_like(x, lowest)) for x in (a, b)]
    want = F.cosine_similarity(a[..., mask], b[..., mask], dim=-1)
    torch.testing.assert_close(map_cosines(masked[:1], masked[1:])[0], want)
    assert attention_similarity(masked[:1], masked[1:]).item() == pytest.approx(
        1 - float(want.mean()), rel=1e-5
    )
    assert attention_similarity(masked[:1], masked[:1]).item() == pytest.approx(0, abs=1e-6)


def test_the_released_similarity_has_the_other_sign():
    a = rows(0, 1, 2, 4, 4)
    b = a + 0.5 * rows(1, 1, 2, 4, 4)
    gradients = []
    for official in (False, True):
        x = a.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(attention_similarity([x], [b], official=official), x)
        gradients.append(g)
    assert F.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) < -0.99
    with pytest.raises(NonFiniteError, match="no logarithm"):
        attention_similarity([a], [-a], official=True)


def test_distillation_is_its_formula():
    z, t, u, y = rows(0, 2, 5, 7), rows(1, 2, 5, 7), rows(2, 2, 5, 7), torch.arange(10).view(2, 5) % 7
    ce = F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    p = ((t + u) / 2 / 2.0)[:, :-1].softmax(-1)
    kl = (p * (p.log() - (z / 2.0)[:, :-1].log_softmax(-1))).sum(-1).mean()
    assert distillation(z, [t, u], y).item() == pytest.approx(float(0.5 * ce + 0.5 * 4 * kl), rel=1e-5)
    assert distillation(z, [], y).item() == pytest.approx(float(ce), rel=1e-6)


def test_edgeqat_gives_an_edit_that_saves_and_leaves_the_model(tmp_path):
    model = tiny()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    edit = edgeqat(model, TEXTS * 2, **SMALL)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.module.named_parameters())
    kinds = [type(p).__name__ for p in edit.parts()]
    assert kinds[0] == "QuantEdit" and kinds.count("RoundAt") == 4 * 3
    assert "extra-kl" in {m.name for m in edit.measurements}
    inputs = model.encode(TEXTS[0])
    with model.edit(edit):
        want = model.forward(inputs).logits
        trace = model.trace(TEXTS[0], sites="blocks.1.attn.q")
    (at,) = [p for p in edit.parts() if isinstance(p, RoundAt) and p.site == "blocks.1.attn.q"]
    steps = trace["blocks.1.attn.q"] / at.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(model.forward(inputs).logits, want)


def test_the_reader_rounds_with_gradients():
    model = tiny()
    ids = model.encode(TEXTS[0])["input_ids"]
    reader = AttentionReader(model, 8)
    with reader.reading(["attn.scores", "attn.q"]):
        model.module(input_ids=ids)
        seen = reader.layers("attn.q")
        assert len(seen) == len(reader.layers("attn.scores")) == 3
        attention_entropy(seen, seen).backward()
    assert all(q.scale.grad is not None for site, q in reader.quantizers.items() if site.endswith("attn.q"))
    assert model.module.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert not reader.layers("attn.q")


@pytest.mark.parametrize("score", ["first_token", "inverse"])
def test_tokens_get_the_bits_that_their_scores_say(score):
    model = tiny()
    limits = calibrate_thresholds(model, TEXTS, 0.5, tokens=400, context=32)
    edit = TokenBits(limits, 2, 8, 0.5, score)
    inputs = model.encode(TEXTS[0])
    with model.edit(edit):
        trace = model.trace(
            TEXTS[0], sites=["blocks.1.attn.scores", "blocks.1.mlp.act", "blocks.2.attn_norm"]
        )
    few = first_token_scores(trace["blocks.1.attn.scores"]) < limits[1]
    few = ~few if score == "inverse" else few
    assert 0 < int(few.sum()) < few.numel()
    for site in ("blocks.1.mlp.act", "blocks.2.attn_norm"):
        x = trace[site][0]
        levels = torch.tensor([len(row.unique()) for row in x])
        assert int(levels[few[0]].max()) <= 4 < int(levels[~few[0]].min())
    assert edit.mean_bits == pytest.approx(8 - 6 * edit.counts[0] / edit.counts[1])
    assert inputs["input_ids"].shape == few.shape


def test_bits_of_a_token_do_not_depend_on_later_ones():
    model = tiny()
    edit = TokenBits(calibrate_thresholds(model, TEXTS, 0.5, tokens=400, context=32), 2, 8)
    ids = model.encode(TEXTS[0])["input_ids"]
    with model.edit(edit), torch.no_grad():
        whole = model.module(input_ids=ids).logits[:, :10]
        part = model.module(input_ids=ids[:, :10]).logits
    torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-4)


def test_equal_bits_are_plain_rounding_and_a_saved_edit_is_the_same(tmp_path):
    model = tiny()
    limits = torch.zeros(3)
    edit = TokenBits(limits, 8, 8)
    with model.edit(edit):
        x = model.trace(TEXTS[0], sites="blocks.0.mlp_norm")["blocks.0.mlp_norm"]
    plain = model.trace(TEXTS[0], sites="blocks.0.mlp_norm")["blocks.0.mlp_norm"]
    torch.testing.assert_close(x, quantize(plain, QuantSpec(8, granularity="channel")))
    made = token_bits(model, TEXTS, low=4, tokens=200, context=32)
    assert {m.group.get("variant") for m in made.measurements} >= {"token-bits", "random"}
    made.save(tmp_path / "e", model)
    loaded = Edit.load(tmp_path / "e", model)
    assert isinstance(loaded, TokenBits) and torch.equal(loaded.thresholds, made.thresholds)


def test_bad_input():
    model = tiny()
    for options in ({"low": 1}, {"low": 8, "high": 4}, {"fraction": 1.5}, {"score": "length"}):
        with pytest.raises(InputError) as error:
            token_bits(model, TEXTS, **options)
        assert "\n" not in str(error.value)
    for options in ({"w_bits": 1}, {"similarity": -1.0}, {"distil": 2.0}, {"held_out": 1.0}):
        with pytest.raises(InputError):
            edgeqat(model, TEXTS, **{**SMALL, **options})
    with pytest.raises(ModelError):
        edgeqat(BY_NAME["bert"].model(), TEXTS, **SMALL)
    with pytest.raises(InputError, match="thresholds"):
        model.edit(TokenBits(torch.zeros(2), 4, 8)).__enter__()
    with pytest.raises(InputError, match="layers"):
        attention_entropy([], [])
