"""The atlas against brute force in float64: every document alone, unpadded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure import measure
from actlas.measure.attention import attention_measures
from actlas.measure.geometry import PARTS, atlas
from actlas.measure.observing import jackknife, quantile_interval
from actlas.measure.registry import measures
from actlas.measure.residual import channel_kurtosis, outlier_channels
from actlas.measure.spectrum import effective_rank, participation_ratio
from tests.measure.letter_models import TEXTS, gpt2, llama

SITES = ("resid_post", "attn.out", "mlp.out", "mlp.act")


def alone(model: Model, site: str) -> torch.Tensor:
    return torch.cat([model.trace(t, site).rows(site) for t in TEXTS]).double()


def by(found: list[Measurement], name: str) -> dict[tuple[str, ...], Measurement]:
    return {(m.group["layer"], m.group.get("site", "")): m for m in found if m.name == name}


@pytest.fixture(scope="module")
def found() -> list[Measurement]:
    return atlas(llama(), TEXTS, tokens=None)


def test_norms_are_quantiles_of_norms(found: list[Measurement]) -> None:
    model = llama()
    for kind in SITES:
        norms = alone(model, f"blocks.1.{kind}").norm(dim=1).numpy()
        assert by(found, "activation-norm")["1", kind].value == pytest.approx(
            np.quantile(norms, 0.5), rel=1e-5
        )
        high = by(found, "activation-norm-p95")["1", kind]
        assert high.value == pytest.approx(np.quantile(norms, 0.95), rel=1e-5)
        assert high.low <= high.value <= high.high and high.n == len(TEXTS)


def test_kurtosis_and_outliers(found: list[Measurement]) -> None:
    from scipy.stats import kurtosis

    for kind in ("resid_post", "mlp.act"):
        x = alone(llama(), f"blocks.2.{kind}").numpy()
        assert by(found, "token-kurtosis")["2", kind].value == pytest.approx(kurtosis(x, axis=1).mean())
        channel = by(found, "channel-kurtosis")["2", kind]
        assert channel.value == pytest.approx(kurtosis(x, axis=0).mean())
        assert channel.low < channel.value < channel.high
        peak = np.abs(x).max(0)
        outliers = by(found, "outlier-channels")["2", kind]
        assert outliers.value == (peak > 10 * np.median(peak)).sum()
        assert outliers.details["largest_over_median"] == pytest.approx(peak.max() / np.median(peak))


def test_rank_is_brute_force(found: list[Measurement]) -> None:
    x = alone(llama(), "blocks.0.resid_post")
    s = torch.linalg.svdvals(x)
    p = s / s.sum()
    rank = by(found, "effective-rank")["0", ""]
    assert rank.value == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-3)
    assert rank.low < rank.value < rank.high and rank.details["of"] == 16
    energy = s.square()
    ratio = by(found, "participation-ratio")["0", ""]
    assert ratio.value == pytest.approx(float(energy.sum() ** 2 / energy.square().sum()), rel=1e-4)
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum()
    assert rank.details["centred"] == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-3)
    assert effective_rank(torch.eye(7)) == pytest.approx(7) == participation_ratio(torch.eye(7))


def test_attention_is_brute_force(found: list[Measurement]) -> None:
    entropy, sink, count = torch.zeros(4).double(), torch.zeros(4).double(), 0
    for text in TEXTS:
        p = llama().trace(text, "blocks.1.attn.pattern")["blocks.1.attn.pattern"][
            0, :, 1:
        ]  # first query left out
        entropy += torch.special.entr(p).sum((-1, -2))
        sink += p[..., 0].sum(-1)
        count += p.shape[1]
    for name, expected in (("attention-entropy", entropy / count), ("attention-sink-mass", sink / count)):
        measured = by(found, name)["1", ""]
        assert measured.details["heads"] == pytest.approx(expected.tolist())
        assert measured.value == pytest.approx(float(expected.mean()))
        assert measured.low <= measured.value <= measured.high
    heads = attention_measures(llama(), TEXTS, tokens=None, by="head")
    one = next(m for m in heads if m.name == "attention-entropy" and m.group == {"layer": "1", "head": "2"})
    assert one.value == pytest.approx(float(entropy[2] / count)) and len(heads) == 2 * 3 * 4
    assert 0 < one.details["normalised"] < 1
    with pytest.raises(InputError, match="by must be"):
        attention_measures(llama(), TEXTS, by="token")  # type: ignore[arg-type]


def test_lens_agrees_with_the_model_at_the_end(found: list[Measurement]) -> None:
    agreement = by(found, "logit-lens-agreement")
    assert agreement["2", ""].value == 1.0
    model = llama()
    names = [f"blocks.{i}.resid_post" for i in range(3)]
    hits, row = [], 0
    for text in TEXTS:
        trace = model.trace(text, names)
        guess = [model.unembed(trace.rows(n)).argmax(-1) for n in names]
        for t in range(len(text)):
            if row % 16 == 0:
                hits.append(bool(guess[0][t] == guess[2][t]))
            row += 1
    assert agreement["0", ""].value == pytest.approx(np.mean(hits))
    assert agreement["0", ""].n == len(TEXTS) and f"at {len(hits)} tokens" in agreement["0", ""].note


def test_massive_tokens_are_reported_and_left_out() -> None:
    model = llama()
    with torch.no_grad():
        model.module.model.embed_tokens.weight[5, 3] = 1e5  # the letter f
    found = atlas(model, TEXTS, tokens=None, parts=("norms", "massive", "tails"))
    letters_f = sum(t.count("f") for t in TEXTS)
    massive = by(found, "massive-activations")["0", ""]
    assert massive.value == pytest.approx(letters_f / sum(map(len, TEXTS)))
    assert massive.details["count"] == letters_f and massive.details["tokens"] == {"f": letters_f}
    assert massive.details["channels"] == {"3": letters_f} and massive.details["largest"] > 9e4
    norm = by(found, "activation-norm-p95")["0", "resid_post"]
    assert norm.value < 1e4 and f"{letters_f} massive tokens left out" in norm.note


def test_where_all_tokens_are_massive_nothing_is_averaged() -> None:
    model = llama()
    with torch.no_grad():
        model.module.model.embed_tokens.weight[:, 3] = 1e5
    found = atlas(model, TEXTS, tokens=None)
    for m in found:
        if m.name == "massive-activations":
            assert m.value == 1.0
        else:
            assert np.isnan(m.value) and m.note


def test_everything_has_a_layer_and_hooks_are_gone() -> None:
    model = llama()
    found = atlas(model, TEXTS, tokens=100)
    assert all(m.group["layer"] in "012" for m in found)
    assert all(m.interval and m.unit and m.n for m in found)
    assert {m.name for m in found} == {i.name for i in measures().values() if i.together and i.name in _ATLAS}
    with torch.no_grad():
        model.module.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.1"):
        atlas(model, TEXTS, tokens=100)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all("forward" not in m.__dict__ for m in model.module.modules())
    with pytest.raises(InputError, match="no part"):
        atlas(model, TEXTS, parts=("colours",))


_ATLAS = {
    "activation-norm", "activation-norm-p95", "token-kurtosis", "channel-kurtosis", "outlier-channels",
    "massive-activations", "effective-rank", "participation-ratio", "logit-lens-agreement", "attention-entropy",
    "attention-sink-mass",
}  # fmt: skip


def test_single_measures_and_other_families() -> None:
    found = measure(llama(), ["effective-rank"], TEXTS, tokens=100)
    assert {m.name for m in found} == {"effective-rank"} and len(found) == 3
    other = atlas(gpt2(), TEXTS, tokens=None, parts=PARTS)
    assert {m.name for m in other} == _ATLAS


def test_jackknife_and_quantile_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    inside = [0, 0]
    for _ in range(60):
        documents = np.repeat(np.arange(12), 20)
        values = rng.normal(size=12)[documents] * 0.5 + rng.normal(size=240)
        low, high = quantile_interval(values, documents, 0.5, 0)
        inside[0] += low <= 0 <= high
        means = np.array([values[documents == d].mean() for d in range(12)])
        low, high = jackknife(values.mean(), [np.delete(means, d).mean() for d in range(12)])
        inside[1] += low <= 0 <= high
    assert min(inside) >= 50
    assert jackknife(1.0, [1.0]) == (None, None)


def test_small_helpers() -> None:
    assert np.isnan(
        channel_kurtosis(np.array([[2.0], [4.0], [8.0], [16.0]]), 1.0)
    ).all()  # a constant channel
    assert outlier_channels(np.array([1.0, 30.0, 1.0, 50.0, 1.0]), 10).tolist() == [3, 1]
