"""The logit lens at the last block is the model; the tuned lens starts there and gets closer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actlas.core.errors import FingerprintError, InputError, ModelError, ShapeError, SiteError
from actlas.core.lens import Lens
from actlas.core.logit_lens import LogitLens
from actlas.core.tuned_lens import TunedLens, fit_tuned_lens
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

LANGUAGE_MODELS = (
    "llama",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt-neox",
    "opt",
    "opt-post-norm",
    "bloom",
    "falcon",
    "mixtral",
    "qwen3-moe",
)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_last_block_gives_the_models_own_logits(family: str) -> None:
    model = BY_NAME[family].model()
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(2))
    site = f"blocks.{model.n_blocks - 1}.resid_post"
    lens = LogitLens(model=model)
    found = lens.logits(model.trace(ids, site)[site])
    torch.testing.assert_close(found, model.logits(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_layer_equals_hidden_states_through_norm_and_head(family: str) -> None:
    model = tiny(family)
    encoded = model.encode("hello there")
    with torch.no_grad():
        hidden = model.module(**encoded, output_hidden_states=True).hidden_states
    table = LogitLens(model=model).top("hello there", k=67)
    for i, layer in enumerate(table.layers[:-1]):
        logits = model.unembed(hidden[i + 1][0]).float()
        p = logits.softmax(-1)
        found = torch.zeros_like(p).scatter(1, layer.ids, layer.probabilities)
        torch.testing.assert_close(found, p, rtol=1e-3, atol=1e-6)
        assert layer.site == f"blocks.{i}.resid_post"


def test_the_table_of_a_prompt() -> None:
    model = tiny()
    table = LogitLens(model=model).top("Why not?", k=3)
    assert table.tokens == list("Why not?") and table.sites == [f"blocks.{i}.resid_post" for i in range(3)]
    logits = model.logits("Why not?")[0].float()
    p = logits.softmax(-1)
    last = table.layers[-1]
    torch.testing.assert_close(last.probabilities, p.topk(3).values, rtol=1e-4, atol=1e-6)
    assert last.agrees.all() and last.kl.abs().max() < 1e-5
    torch.testing.assert_close(
        last.entropy, torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-4, atol=1e-5
    )
    first = table.layers[0]
    q = (
        model.unembed(model.trace("Why not?", "blocks.0.resid_post")["blocks.0.resid_post"][0])
        .float()
        .log_softmax(-1)
    )
    torch.testing.assert_close(first.kl, (p * (p.log() - q)).sum(-1), rtol=1e-3, atol=1e-5)
    assert torch.equal(first.agrees, q.argmax(-1) == p.argmax(-1))
    assert table.strings[0][2] == [model.tokenizer.decode([int(i)]) for i in first.ids[2]]
    records = list(table.rows())
    assert len(records) == 3 * len("Why not?")
    json.dumps(records)
    assert records[0]["token"] == "W" and len(records[0]["top"]) == 3


def test_long_prompts_are_read_in_chunks_and_padding_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    lens = LogitLens(model=model)
    whole = lens.top(TEXTS[0], k=2)
    monkeypatch.setattr("actlas.core.logit_lens._CHUNK", 7)
    pieces = lens.top(TEXTS[0], k=2)
    trace = model.trace([TEXTS[1], TEXTS[0]], "blocks.*.resid_post")
    padded = lens.top(trace, k=2, row=0)
    single = lens.top(TEXTS[1], k=2)
    for a, b in ((whole, pieces), (padded, single)):
        assert a.tokens == b.tokens
        for x, y in zip(a.layers, b.layers, strict=True):
            torch.testing.assert_close(x.probabilities, y.probabilities, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(x.kl, y.kl, rtol=1e-3, atol=1e-5)


def test_other_sites_of_the_residual_stream() -> None:
    model = tiny()
    table = LogitLens(model=model).top("hello", sites=["embed", "blocks.1.resid_mid"])
    assert table.sites == ["embed", "blocks.1.resid_mid"]
    with pytest.raises(InputError, match=r"not blocks\.0\.mlp\.act"):
        LogitLens(model=model).top("hello", sites="blocks.0.mlp.act")
    with pytest.raises(SiteError):
        LogitLens(model=model).top("hello", sites="blocks.9.resid_post")
    with pytest.raises(InputError, match="row 3"):
        LogitLens(model=model).top("hello", row=3)


def test_steering_toward_a_token() -> None:
    model = tiny()
    lens = LogitLens(model=model, site="blocks.2.resid_post")
    token = model.tokenizer.convert_tokens_to_ids("q")
    plain = model.logits("hello")[0, -1].softmax(-1)[token]
    with model.edit(lens.edit(token, 300.0)):
        steered = model.logits("hello")[0, -1].softmax(-1)[token]
    assert steered > plain


def test_models_without_an_output_head_are_refused() -> None:
    for family in ("bert-encoder", "vit"):
        with pytest.raises(ModelError, match="no output head"):
            LogitLens(model=BY_NAME[family].model())


# -- tuned lens ---------------------------------------------------------------------------------------


def test_a_tuned_lens_at_its_start_is_the_logit_lens() -> None:
    model = tiny()
    sites = ("blocks.0.resid_post", "blocks.1.resid_post")
    tuned = TunedLens(
        site="blocks.*.resid_post", sites=sites, weight=torch.zeros(2, 32, 32), bias=torch.zeros(2, 32)
    )
    a, b = LogitLens(model=model).top("hello"), tuned.on(model).top("hello")
    for x, y in zip(a.layers, b.layers, strict=True):
        assert torch.equal(x.probabilities, y.probabilities)
    with pytest.raises(InputError, match=r"no translator for blocks\.1\.resid_mid"):
        tuned.on(model).top("hello", sites="blocks.1.resid_mid")
    with pytest.raises(InputError, match="say which"):
        tuned.on(model).logits(torch.zeros(32))


def test_training_brings_early_layers_closer_on_held_out_text(tmp_path: Path) -> None:
    model = tiny()
    corpus = TEXTS * 6
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    lens = fit_tuned_lens(
        model, corpus, steps=60, batch_tokens=128, sample=64, held_out=2, learning_rate=1e-2
    )
    assert lens.sites == ("blocks.0.resid_post", "blocks.1.resid_post")
    for measurement in lens.measurements:
        assert measurement.baseline is not None
        assert measurement.high < measurement.baseline.low
    for name, p in model.module.named_parameters():
        assert p.requires_grad and torch.equal(p, before[name]) and p.grad is None
    lens.save(tmp_path / "t")
    loaded = Lens.load(tmp_path / "t", model)
    assert isinstance(loaded, TunedLens) and loaded.sites == lens.sites
    plain, tuned = LogitLens(model=model).top(TEXTS[0]), loaded.on(model).top(TEXTS[0])
    for x, y in zip(plain.layers[:2], tuned.layers[:2], strict=True):
        assert float(y.kl.mean()) < float(x.kl.mean())
    assert torch.equal(plain.layers[2].probabilities, tuned.layers[2].probabilities)
    with pytest.raises(FingerprintError):
        loaded.on(tiny("gpt2"))
    again = fit_tuned_lens(
        model, corpus, steps=60, batch_tokens=128, sample=64, held_out=2, learning_rate=1e-2
    )
    assert torch.equal(again.weight, lens.weight)


def test_biases_are_learned_in_units_of_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    options = {"steps": 3, "batch_tokens": 128, "held_out": 1, "learning_rate": 1e-2}
    plain = fit_tuned_lens(model, TEXTS * 3, "blocks.0.resid_post", **options)
    rms = float(model.trace(TEXTS[0], "blocks.0.resid_post")["blocks.0.resid_post"].square().mean().sqrt())
    assert 0.5 * 0.01 * rms < float(plain.bias.abs().max()) < 3.5 * 0.01 * rms  # Adam's first steps
    monkeypatch.setattr("actlas.core.tuned_lens._scales", lambda test, names: torch.full((1, 1), 1e-3))
    small = fit_tuned_lens(model, TEXTS * 3, "blocks.0.resid_post", **options)
    assert float(small.bias.abs().max()) < 3.5e-5


def test_tuned_lens_bad_input() -> None:
    model = tiny()
    with pytest.raises(InputError, match="only the last block"):
        fit_tuned_lens(model, TEXTS, "blocks.2.resid_post", steps=1)
    with pytest.raises(InputError, match="beyond the 8 held-out batches"):
        fit_tuned_lens(model, TEXTS[:1], steps=1)
    with pytest.raises(InputError, match="steps"):
        fit_tuned_lens(model, TEXTS, steps=0)
    with pytest.raises(ShapeError):
        TunedLens(site="s", sites=("a",), weight=torch.zeros(1, 3, 4), bias=torch.zeros(1, 4))
