"""Calibration against brute force over all rows, on models that really run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actlas.core.calibration import Calibration, calibrate
from actlas.core.calibration.origin import Origin
from actlas.core.calibration.reading import Batch, Source, read_batch, rows_of
from actlas.core.edits import Add
from actlas.core.errors import (
    ArtifactError,
    FingerprintError,
    InputError,
    NonFiniteError,
    SiteError,
)
from actlas.core.model import Model
from actlas.core.sites import Site
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

ALL = ("moments", "absmax", "quantiles", "channel_quantiles", "kurtosis", "channel_norms", "hessian", "rows")
SITES = ("blocks.1.resid_post", "blocks.0.mlp.act", "blocks.2.attn.z")


def brute_force(model: Model, site: str, texts: list[str], context: int = 64) -> Tensor:
    """Return every row of a site in float64, one document and one window at a time."""
    rows = []
    for text in texts:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        for window in ids.split(context):
            rows.append(model.trace(window.unsqueeze(0), site)[site][0].flatten(1))
    return torch.cat(rows).double()


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


@pytest.fixture(scope="module")
def calibration(model: Model) -> Calibration:
    return calibrate(model, TEXTS, SITES, ALL, batch_tokens=80, rows=40)


@pytest.mark.parametrize("site", SITES)
def test_every_statistic_equals_brute_force(model: Model, calibration: Calibration, site: str) -> None:
    x, found = brute_force(model, site, TEXTS), calibration[site]
    assert found.count == len(x) == calibration.tokens
    assert calibration.documents == len(TEXTS)
    close = {"rtol": 1e-5, "atol": 1e-6}  # rows of a padded batch differ from single ones in float32 rounding
    torch.testing.assert_close(found.mean, x.mean(0), **close)
    torch.testing.assert_close(found.second_moment, x.square().mean(0), **close)
    torch.testing.assert_close(found.variance, x.var(0, correction=0), **close)
    torch.testing.assert_close(found.std, x.std(0, correction=0), **close)
    torch.testing.assert_close(found.mean_abs, x.abs().mean(0), **close)
    torch.testing.assert_close(found.absmax, x.abs().amax(0), **close)
    torch.testing.assert_close(found.channel_norm, x.norm(dim=0), **close)
    torch.testing.assert_close(found.hessian, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.covariance, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(found.excess_kurtosis, z.pow(4).mean(0) - 3, rtol=1e-3, atol=1e-4)
    z = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    assert found.token_kurtosis == pytest.approx(float((z.pow(4).mean(1) - 3).mean()), rel=1e-4)


@pytest.mark.parametrize("q", [0.0, 0.001, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_quantiles_are_within_their_stated_error(model: Model, calibration: Calibration, q: float) -> None:
    for site in SITES:
        x, found = brute_force(model, site, TEXTS), calibration[site]
        flat = x.flatten().sort().values
        magnitudes = x.abs().flatten().sort().values
        rank = math.floor(q * (len(flat) - 1))
        # neighbours in rank allow for float32 rounding of ties between batches
        for value, ordered in ((found.quantile(q), flat), (found.abs_quantile(q), magnitudes)):
            near = ordered[max(rank - 1, 0) : rank + 2]
            errors = (near - value).abs() / near.abs().clamp(min=1e-6)
            assert errors.min() <= 0.00501 or near.abs().min() <= 1e-6
        per_channel = found.channel_quantile(q)
        exact = x.abs().sort(0).values[math.floor(q * (len(x) - 1))]
        assert ((per_channel - exact).abs() <= 0.0201 * exact + 1e-5).all()


def test_sampled_rows_are_real_rows_with_their_origins(model: Model, calibration: Calibration) -> None:
    names = {}
    for site in SITES:
        sample = calibration[site].sample
        assert len(sample.rows) == len(sample.documents) == 40
        x = brute_force(model, site, TEXTS)
        distance = torch.cdist(sample.rows.double(), x).amin(1)
        assert distance.max() < 1e-4
        names[site] = list(
            zip(sample.documents, sample.position.tolist(), sample.token.tolist(), strict=True)
        )
        assert len(set(names[site])) == 40
    assert names[SITES[0]] == names[SITES[1]] == names[SITES[2]]
    for _, position, token in names[SITES[0]]:
        assert any(
            position < len(ids) and ids[position] == token
            for ids in (model.tokenizer(t)["input_ids"] for t in TEXTS)
        )


def test_the_sample_depends_on_the_seed_and_is_spread_over_documents(model: Model) -> None:
    found = [calibrate(model, TEXTS, SITES[0], "rows", rows=20, seed=s)[SITES[0]].sample for s in (0, 0, 1)]
    assert torch.equal(found[0].rows, found[1].rows)
    assert not torch.equal(found[0].priority, found[2].priority)
    assert len(set(found[0].documents)) > 2


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_padding_never_contributes(model: Model, batch_tokens: int) -> None:
    x = brute_force(model, SITES[0], TEXTS)
    found = calibrate(model, TEXTS, SITES[0], ("moments", "quantiles"), batch_tokens=batch_tokens)[SITES[0]]
    assert found.count == len(x)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    assert int(found.parts["sketch"].counts.sum()) == x.numel()


def test_left_padding_never_contributes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on the left, with garbage in it, changes no statistic."""
    texts = [text[:60] for text in TEXTS]
    right = calibrate(model, texts, SITES, ALL, rows=16)

    def left_padded(self: Source, model: Model, *limits: object) -> Iterator[Batch]:
        documents = list(self._documents())
        encoded = model.encode([d.text for d in documents], padding_side="left")
        yield Batch(encoded, [d.id for d in documents], [0] * len(documents))

    def poisoned(x: Tensor, site: Site, batch: Batch, *rest: Any) -> Iterator[tuple[Tensor, Origin]]:
        x = x.clone()
        x[~batch.mask] = math.nan
        return rows_of(x, site, batch, *rest)

    monkeypatch.setattr(Source, "batches", left_padded)
    monkeypatch.setattr("actlas.core.calibration.collect.rows_of", poisoned)
    left = calibrate(model, texts, SITES, ALL, rows=16)
    for site in SITES:
        assert left[site].count == right[site].count
        torch.testing.assert_close(left[site].mean, right[site].mean, rtol=1e-4, atol=1e-5)
        assert left[site].sample.position.tolist() == right[site].sample.position.tolist()
        assert left[site].sample.token.tolist() == right[site].sample.token.tolist()


def test_windows_and_limits(model: Model) -> None:
    x = brute_force(model, SITES[0], TEXTS, context=7)
    found = calibrate(model, TEXTS, SITES[0], "moments", context=7)
    torch.testing.assert_close(found[SITES[0]].mean, x.mean(0), rtol=1e-5, atol=1e-6)
    assert found.documents == len(TEXTS)
    limited = calibrate(model, TEXTS, SITES[0], "moments", max_tokens=60)
    assert limited.tokens == limited[SITES[0]].count == 60
    assert limited.documents == 2


def test_parts_of_a_corpus_merge_to_the_whole(model: Model, calibration: Calibration) -> None:
    parts = [calibrate(model, TEXTS[i : i + 2], SITES, ALL, batch_tokens=80, rows=40) for i in (0, 2, 4)]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]])
        assert (merged.tokens, merged.documents) == (calibration.tokens, calibration.documents)
        for site in SITES:
            mine, whole = merged[site], calibration[site]
            torch.testing.assert_close(mine.mean, whole.mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine.hessian, whole.hessian, rtol=1e-5, atol=1e-5)
            assert mine.sample.documents == whole.sample.documents
            assert mine.sample.position.tolist() == whole.sample.position.tolist()


def test_save_and_load_lose_nothing(model: Model, calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c", model)
    assert {k: v for k, v in loaded.__dict__.items() if k != "sites"} == {
        k: v for k, v in calibration.__dict__.items() if k != "sites"
    }
    for site in SITES:
        for name, part in calibration[site].parts.items():
            for field, tensor in part.tensors().items():
                assert torch.equal(tensor, loaded[site].parts[name].tensors()[field])
        assert loaded[site].sample.documents == calibration[site].sample.documents
        assert loaded[site].massive == calibration[site].massive
    assert loaded.merge(calibration).tokens == 2 * calibration.tokens


def test_a_tampered_calibration_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    manifest = calibration.save(tmp_path / "c") / "manifest.json"
    good = json.loads(manifest.read_text())
    for change in (
        {"sites": {**good["sites"], "blocks.9.mlp.act": good["sites"][SITES[0]]}},
        {"sites": {s: {**r, "channels": 10**9} for s, r in good["sites"].items()}},
        {"scheme": {}},
        {"stats": ["everything"]},
        {"document_names": []},
        {"size": 3},
        {"fingerprint": {"architecture": "x", "colour": 1}},
    ):
        manifest.write_text(json.dumps({**good, **change}))
        with pytest.raises(ArtifactError) as caught:
            Calibration.load(tmp_path / "c")
        assert "\n" not in str(caught.value)


def test_another_model_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    other = tiny("gpt2")
    calibration.save(tmp_path / "c")
    with pytest.raises(FingerprintError, match="LlamaForCausalLM and GPT2LMHeadModel"):
        Calibration.load(tmp_path / "c", other)
    with pytest.raises(FingerprintError, match="two models"):
        calibration.merge(calibrate(other, TEXTS, SITES, ALL, rows=40))


def test_calibrations_that_do_not_belong_together_are_refused(model: Model, calibration: Calibration) -> None:
    for options, said in (
        ({"sites": SITES[0]}, "sites"),
        ({"stats": "moments"}, "stats"),
        ({"seed": 3}, "seed"),
        ({"rows": 7}, "size"),
        ({"context": 9}, "context"),
        ({"keep_massive": True}, "keep_massive"),
    ):
        given = {"sites": SITES, "stats": ALL, "rows": 40, **options}
        other = calibrate(model, TEXTS, given.pop("sites"), given.pop("stats"), **given)
        with pytest.raises(InputError, match=said):
            calibration.merge(other)
    with model.edit(Add(SITES[0], torch.ones(32))):
        edited = calibrate(model, TEXTS, SITES, ALL, rows=40)
    assert edited.under == ("Add at blocks.1.resid_post",)
    with pytest.raises(InputError, match="under"):
        calibration.merge(edited)


def test_what_was_not_collected_says_how_to_collect_it(model: Model) -> None:
    found = calibrate(model, TEXTS, SITES[0], "absmax")[SITES[0]]
    assert (found.absmax > 0).all()
    for read in ("mean", "variance", "hessian", "excess_kurtosis", "rows", "channel_norm", "token_kurtosis"):
        with pytest.raises(InputError, match="calibrate with stats="):
            getattr(found, read)
    for ask in (found.quantile, found.abs_quantile, found.channel_quantile):
        with pytest.raises(InputError, match="quantiles"):
            ask(0.5)
    with pytest.raises(InputError, match="between 0 and 1"):
        calibrate(model, TEXTS, SITES[0], "quantiles")[SITES[0]].quantile(1.5)


def test_bad_input_is_named(model: Model) -> None:
    with pytest.raises(InputError, match="did you mean moments"):
        calibrate(model, TEXTS, SITES, ("moment",))
    with pytest.raises(InputError, match="no statistics"):
        calibrate(model, TEXTS, SITES, ())
    with pytest.raises(SiteError, match=r"blocks\.1\.attn\.pattern"):
        calibrate(model, TEXTS, "blocks.1.attn.pattern")
    with pytest.raises(SiteError, match="query"):
        calibrate(model, TEXTS, "blocks.1.attn.scores")
    with pytest.raises(SiteError, match="logits"):
        calibrate(model, TEXTS, "logits")
    with pytest.raises(InputError, match="text"):
        calibrate(model, [], SITES)
    for option in ("batch_tokens", "max_tokens", "rows"):
        with pytest.raises(InputError, match=option):
            calibrate(model, TEXTS, SITES, **{option: 0})
    with pytest.raises(
        InputError, match=r"no site 'blocks\.1\.resid_pos'; did you mean blocks\.1\.resid_post"
    ):
        calibrate(model, TEXTS, SITES, "absmax")["blocks.1.resid_pos"]


def test_too_much_memory_is_refused_before_it_is_taken(model: Model) -> None:
    with pytest.raises(InputError, match="raise memory_limit") as caught:
        calibrate(model, TEXTS, SITES, "hessian", memory_limit=25_000)
    said = "blocks.0.mlp.act (48 channels) take 20.7 kB, with the sites before it 30.5 kB"
    assert said in str(caught.value)
    assert calibrate(model, TEXTS, SITES, "hessian", memory_limit=60_000).tokens == sum(map(len, TEXTS))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_named_by_site_document_and_position(model: Model, bad: float) -> None:
    @dataclass
    class Document:
        id: str
        text: str

    def poison(module: nn.Module, args: object, output: Tensor) -> Tensor:
        hit = output.clone()
        hit[1, 3, :2] = bad
        return hit

    handle = model.module.model.layers[1].mlp.register_forward_hook(poison)
    try:
        documents = [Document("good", TEXTS[0]), Document("bad", TEXTS[2])]
        with pytest.raises(NonFiniteError) as caught:
            calibrate(model, documents, "blocks.1.mlp.out")
    finally:
        handle.remove()
    assert "blocks.1.mlp.out: 2 of" in str(caught.value)
    assert "'bad' at position 3" in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_rows_come_in_small_pieces(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(model, TEXTS, SITES, ALL, rows=16)
    monkeypatch.setattr("actlas.core.calibration.reading._PIECE", 7)
    pieces = calibrate(model, TEXTS, SITES, ALL, rows=16)
    for site in SITES:
        torch.testing.assert_close(pieces[site].mean, whole[site].mean, rtol=1e-12, atol=1e-12)
        assert torch.equal(pieces[site].rows, whole[site].rows)
        assert torch.equal(pieces[site].parts["sketch"].counts, whole[site].parts["sketch"].counts)


def test_reading_stops_after_the_last_site_and_holds_one_site_at_a_time(model: Model) -> None:
    seen: list[str] = []
    for i, block in enumerate(model.module.model.layers):
        block.register_forward_hook(lambda *_, i=i: seen.append(f"block {i}"))
    try:
        batch = next(Source(TEXTS).batches(model, 500, None, None))
        sites = model.resolve(["blocks.1.mlp.act", "blocks.0.resid_post"])
        read_batch(model, batch, sites, lambda site, x: seen.append(site.name))
    finally:
        for block in model.module.model.layers:
            block._forward_hooks.clear()
    assert seen == ["block 0", "blocks.0.resid_post", "blocks.1.mlp.act"]


def test_a_string_is_one_document(model: Model) -> None:
    one = calibrate(model, TEXTS[0], SITES[0], "moments")
    assert (one.documents, one.tokens) == (1, len(TEXTS[0]))
    assert one.corpora[0]["name"] == "text" and len(one.corpora[0]["hash"]) == 64
    assert "moments" in repr(one) and "1 documents" in repr(one)


def test_parts_of_a_site(model: Model) -> None:
    names = ["blocks.1.resid_post[channel=17]", "blocks.1.attn.z[head=2]", "blocks.1.attn.z[head=1,3]"]
    found = calibrate(model, TEXTS, names, "moments", context=40)
    x = brute_force(model, "blocks.1.resid_post", TEXTS, context=40)[:, [17]]
    z = brute_force(model, "blocks.1.attn.z", TEXTS, context=40).unflatten(1, (4, 8))
    for name, whole in zip(names, (x, z[:, 2], z[:, [1, 3]].flatten(1)), strict=True):
        assert found[name].count == len(whole) and found[name].channels == whole.shape[1]
        torch.testing.assert_close(found[name].mean, whole.mean(0), rtol=1e-5, atol=1e-6)


def test_images_and_plain_modules() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    model = Model(net, name="cnn")
    pixels = torch.rand(20, 3, 8, 8)
    found = calibrate(model, pixels, ["module:0", "module:3"], ("moments", "rows"), rows=8)
    with torch.no_grad():
        maps, out = net[0](pixels), net(pixels)
    assert found["module:0"].count == 20 * 36
    torch.testing.assert_close(found["module:0"].mean, maps.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert found["module:3"].count == 20 == found.tokens
    torch.testing.assert_close(found["module:3"].mean, out.double().mean(0), rtol=1e-5, atol=1e-6)
    assert set(found["module:3"].sample.documents) <= {str(i) for i in range(20)}


def test_a_vision_transformer() -> None:
    family = BY_NAME["vit"]
    model = family.model()
    pixels = torch.randn(18, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = calibrate(model, pixels, "blocks.1.resid_post", "moments")["blocks.1.resid_post"]
    x = model.trace(pixels, "blocks.1.resid_post")["blocks.1.resid_post"].double().flatten(0, 1)
    assert found.count == len(x)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "bert", "mixtral"])
def test_other_families(family: str) -> None:
    model = tiny(family)
    site = "blocks.1.moe.experts" if family == "mixtral" else "blocks.1.mlp.act"
    found = calibrate(model, TEXTS, site, "moments")[site]
    x = brute_force(model, site, TEXTS)
    assert found.count == len(x)
    np.testing.assert_allclose(found.mean.numpy(), x.mean(0).numpy(), rtol=1e-4, atol=1e-5)


# -- massive rows -----------------------------------------------------------------------------------


def with_sinks(letters: str) -> Model:
    """Return a model whose embedding of some letters holds one activation of -700."""
    model = tiny("llama")
    with torch.no_grad():
        for letter in letters:
            model.module.model.embed_tokens.weight[model.tokenizer.convert_tokens_to_ids(letter), 7] = -700.0
    return model


def test_massive_rows_are_reported_and_not_averaged_in() -> None:
    model = with_sinks("WT")
    site = "blocks.0.resid_pre"
    x = brute_force(model, site, TEXTS)
    sinks = x[:, 7] < -600
    found = calibrate(model, TEXTS, [site, "blocks.0.mlp.act"], ("moments", "absmax", "quantiles"))
    kept = calibrate(model, TEXTS, site, ("moments", "absmax"), keep_massive=True)
    massive = found[site].massive
    n = sum(text.count("T") + text.count("W") for text in TEXTS)
    assert int(sinks.sum()) == n == massive.count and n > 3
    assert found[site].count == len(x) - n and found["blocks.0.mlp.act"].count == len(x)
    torch.testing.assert_close(found[site].mean, x[~sinks].mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept[site].mean, x.mean(0), rtol=1e-5, atol=1e-6)
    assert (
        kept[site].count == len(x) and kept[site].massive.kept and "kept in" in kept[site].massive.describe()
    )
    assert float(found[site].absmax[7]) < 100 < 600 < float(kept[site].absmax[7])
    assert massive.largest == pytest.approx(700) and massive.channels == {7: n}
    assert massive.first == sum(text[0] in "TW" for text in TEXTS)
    example = massive.examples[0]
    assert example.value == pytest.approx(-700) and example.channel == 7 and not massive.kept
    for row in massive.examples:
        assert row.token in model.tokenizer.convert_tokens_to_ids(["W", "T"])
    assert sum(massive.positions.values()) == n


def test_a_massive_row_is_the_same_in_any_batch_and_part() -> None:
    model = with_sinks("WT")
    whole = calibrate(model, TEXTS, "embed", ("moments", "rows"), rows=30)
    single = calibrate(model, TEXTS, "embed", ("moments", "rows"), rows=30, batch_tokens=1)
    parts = [calibrate(model, TEXTS[i : i + 3], "embed", ("moments", "rows"), rows=30) for i in (3, 0)]
    merged = parts[0].merge(parts[1])
    for other in (single, merged):
        assert other["embed"].massive == whole["embed"].massive
        assert other["embed"].sample.documents == whole["embed"].sample.documents
        assert other["embed"].sample.position.tolist() == whole["embed"].sample.position.tolist()


def test_rows_that_are_massive_by_the_dozen_are_called_large_channels() -> None:
    model = with_sinks("etaoin ")
    with pytest.warns(UserWarning, match="keep_massive=True"):
        calibrate(model, TEXTS, "blocks.0.resid_pre", "moments")


def test_a_site_with_nothing_but_massive_rows_says_so() -> None:
    model = with_sinks("e")
    with pytest.warns(UserWarning, match="massive"):
        found = calibrate(model, ["eee"], "embed", "moments")["embed"]
    with pytest.raises(InputError, match="3 massive rows left out"):
        found.mean
