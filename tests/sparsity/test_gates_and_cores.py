"""CHESS and CoreInfer: rules on neurons, against brute force, with bad input."""

from __future__ import annotations

import math

import pytest
import torch

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.skip_inputs import SkipInputs
from actlas.measure.linear_layers import linear_layers
from actlas.measure.sparsity_price import sparsity_price
from actlas.sparsity.chess import calibrate_gates, fit_chess
from actlas.sparsity.core_clusters import CoreNeuronClusters, fit_core_clusters
from actlas.sparsity.core_neurons import (
    core_counts,
    core_set,
    fit_core_neurons,
    freeze,
    overlap,
    prompt_sets,
    sparse_blocks,
)
from tests.core.tiny import TEXTS, tiny

LONG = [" ".join([t] * 2)[:60] for t in TEXTS if len(t) > 10]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate_gates(model, LONG, tokens=300, context=60)


def test_chess_is_its_equation(model, calibration) -> None:
    edit = fit_chess(model, calibration, sparsity=0.5, attention="none")
    gates = torch.nn.functional.silu(calibration["blocks.1.mlp.gate"].rows)
    up = model.trace(LONG, "blocks.1.mlp.up").rows("blocks.1.mlp.up").double()
    m = up.square().mean(0).sqrt()
    score = gates.double().abs() * m
    kept = edit.parts()[1].mask(calibration["blocks.1.mlp.gate"].rows)
    want = score >= score.flatten().sort().values[score.numel() // 2]
    assert float((kept == want).double().mean()) > 0.999
    t = edit.parts()[1].threshold / m  # a threshold of its own for every channel
    assert bool(((gates.abs() >= t) == kept).double().mean() > 0.999) and float(t.std()) > 0


def test_chess_zeroes_the_product_and_counts_rows(model, calibration) -> None:
    edit = fit_chess(model, calibration, sparsity=0.5, attention="none")
    with model.edit(edit):
        h = model.trace(LONG, "blocks.1.mlp.act").rows("blocks.1.mlp.act")
    assert float((h == 0).float().mean()) == pytest.approx(0.5, abs=0.08)
    price = {m.name: m.value for m in sparsity_price(model, LONG, edit)}
    layers = linear_layers(model)
    size = {n: sum(p.size for p in layers if p.name == n) for n in {p.name for p in layers}}
    kept = 1 - (size["up_proj"] + size["down_proj"]) * 0.5 / sum(size.values())
    assert price["weights-touched"] == pytest.approx(kept, abs=0.02)


def test_cats_is_chess_with_equal_channels(model, calibration) -> None:
    edit = fit_chess(model, calibration, sparsity=0.4, channel_stat="none", attention="none")
    rows = calibration["blocks.0.mlp.gate"].rows
    gate = torch.nn.functional.silu(rows).abs()
    kept = edit.parts()[0].mask(rows)
    assert float(gate[~kept].max()) < float(gate[kept].min())


@pytest.mark.parametrize(("attention", "per_block"), [("none", 1), ("selective", 3), ("all", 5)])
def test_which_projections(model, calibration, attention: str, per_block: int) -> None:
    assert len(fit_chess(model, calibration, attention=attention).parts()) == 3 * per_block


def test_chess_refuses(model, calibration) -> None:
    with pytest.raises(InputError, match="channel_stat is 'max'"):
        fit_chess(model, calibration, channel_stat="max")
    with pytest.raises(InputError, match="must lie in"):
        fit_chess(model, calibration, sparsity=1.0)
    with pytest.raises(InputError, match="attention_sparsity is the share"):
        fit_chess(model, calibration, attention_sparsity=-0.5)
    with pytest.raises(ModelError, match="no gated MLPs"):
        fit_chess(tiny("gpt2"), LONG)


def _brute(h: torch.Tensor, keep: float, alpha: float) -> torch.Tensor:
    counts = [0.0] * h.shape[1]
    for row in h.tolist():
        positive = sorted((v for v in row if v > 0), reverse=True)
        limit = int(alpha * len(positive))
        for i, v in enumerate(row):
            counts[i] += limit > 0 and v >= positive[limit - 1]
    mean = h.abs().mean(0)
    key = [c + 0.5 * float(m / mean.max()) for c, m in zip(counts, mean, strict=True)]
    best = sorted(range(len(key)), key=lambda i: (-key[i], i))[: round(keep * len(key))]
    out = torch.zeros(h.shape[1], dtype=torch.bool)
    out[best] = True
    return out


@pytest.mark.parametrize("seed", range(5))
def test_core_set_is_the_definition(seed: int) -> None:
    h = torch.randn(13, 20, generator=torch.Generator().manual_seed(seed))
    for alpha, keep in ((0.4, 0.2), (0.9, 0.5), (0.05, 0.3)):
        assert torch.equal(core_set(h, keep, alpha=alpha), _brute(h, keep, alpha))


@pytest.mark.parametrize("rank", ["positive", "abs"])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_counts_of_cores_are_those_of_a_sort(rank: str, rows: int) -> None:
    h = (
        torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)).mul(2).round().div(2)
    )  # with ties
    h[0] = -h[0].abs()  # nothing positive: no core
    want = torch.zeros(24, dtype=torch.int64)
    for row in h:
        k = int(0.4 * int((row > 0).sum()))
        if k:
            size = row if rank == "positive" else row.abs()
            want += size >= size.sort(descending=True).values[k - 1]
    assert torch.equal(core_counts(h, 0.4, rank), want)


def test_rankings_differ_where_they_should() -> None:
    h = torch.full((4, 6), 0.1)
    h[:, 3] = -5.0
    assert not bool(core_set(h, 1 / 6, alpha=0.2)[3])
    assert bool(core_set(h, 1 / 6, alpha=0.2, rank="abs")[3])
    norms = torch.tensor([1.0, 1, 1, 0, 1, 9])
    assert core_set(h, 1 / 6, rank="output", norms=norms).nonzero().item() == 5


def test_frozen_sets_serve_generated_tokens_only(model) -> None:
    sets = prompt_sets(model, LONG[0], keep=0.5, blocks=[1, 2])
    assert overlap(sets, sets) == 1.0 and all(int(s.sum()) == 24 for s in sets.values())
    assert overlap(sets, {b: ~s for b, s in sets.items()}) == 0.0
    edit = freeze(model, sets)
    before = model.logits(LONG[0])
    with model.edit(edit):
        assert torch.equal(model.logits(LONG[0]), before)
    with model.edit(freeze(model, sets, "all")):
        h = model.trace(LONG[0], "blocks.1.mlp.act").rows("blocks.1.mlp.act")
    assert torch.equal(h.abs().sum(0) > 0, sets[1])


def test_core_neurons_of_a_text(model) -> None:
    edit = fit_core_neurons(model, LONG, keep=0.5, skip_first=1, skip_last=1, rank="output", tokens=100)
    assert [p.site for p in edit.parts()] == ["blocks.1.mlp.act"]
    assert isinstance(edit.parts()[0], SkipInputs) and int(edit.parts()[0].frozen.sum()) == 24
    with pytest.raises(InputError, match="leave none of 3 blocks"):
        sparse_blocks(model, 2, 1)
    with pytest.raises(InputError, match="keep is a share"):
        fit_core_neurons(model, LONG, keep=0.0, skip_first=0, skip_last=0)
    with pytest.raises(InputError, match="at least one token"):
        core_set(torch.zeros(0, 4), 0.5)
    with pytest.raises(NonFiniteError):
        core_set(torch.tensor([[1.0, math.nan]]), 0.5)


def test_clusters_recover_topics_and_their_sets(model, tmp_path) -> None:
    texts = [
        "aaaa abab abba aaba " * 3,
        "abab aaaa baab abba " * 3,
        "XYXY YYXX XXXY YXYX " * 3,
        "YXYX XYYX XXYY YYYX " * 3,
    ]
    lens = fit_core_clusters(model, texts, site="blocks.1.mlp.act", k=2, keep=0.5, skip_first=0, skip_last=0)
    found = [lens.cluster(model, t) for t in texts]
    assert found[0] == found[1] != found[2] == found[3]
    lens.save(tmp_path / "c", model)
    again = CoreNeuronClusters.load(tmp_path / "c", model)
    assert again.cluster(model, texts[0]) == found[0]
    edit = again.edit_for(model, texts[2])
    assert len(edit.parts()) == 3 and int(edit.parts()[0].frozen.sum()) == 24
    with pytest.raises(InputError, match="k is 9"):
        fit_core_clusters(model, texts, site="blocks.1.mlp.act", k=9, skip_first=0, skip_last=0)
