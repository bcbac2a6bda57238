"""What every kind of autoencoder must do: find known features, be saved, stand in for an activation."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.core.model import Model
from actlas.dictionaries import RowsSource, TrainSettings, train
from actlas.dictionaries.fit import fit_sae
from actlas.dictionaries.sae import SAE, architecture

from .brute import recovery
from .conftest import sparse_rows

SITE = "blocks.1.resid_post"
#: Kind -> its options, and the sparsity weight that suits the synthetic rows.
KINDS: dict[str, tuple[dict[str, Any], float | None]] = {
    "topk": ({"k": 3}, None),
    "batchtopk": ({"k": 3}, None),
    "matryoshka": ({"k": 3, "levels": (30, 60)}, None),
    "gradient": ({"k": 3, "beta": 0.1}, None),
    "relu": ({}, 2.0),
    "gated": ({}, 5.0),
    "jumprelu": ({"bandwidth": 2.0, "threshold": 1.0}, 2.0),
}


@pytest.fixture(scope="module")
def known() -> tuple[Tensor, Tensor]:
    return sparse_rows(8000, 24, 40, 2)


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request: pytest.FixtureRequest, known: tuple[Tensor, Tensor]) -> tuple[SAE, float]:
    """A trained autoencoder of each kind, and how well its first weights knew the truth by chance."""
    options, sparsity = KINDS[request.param]
    rows, truth = known
    sae = architecture(request.param).create("s", 24, 60, seed=0, **options)
    before = recovery(truth, sae.atoms)
    gradient = torch.randn(len(rows), 24, generator=torch.Generator().manual_seed(1))
    settings = TrainSettings(tokens=160_000, batch=256, lr=3e-3, sparsity=sparsity)
    train(sae, RowsSource(rows, gradient=gradient), settings, show=False)
    return sae, before


def test_known_features_are_found(trained: tuple[SAE, float], known: tuple[Tensor, Tensor]) -> None:
    sae, before = trained
    rows, truth = known
    unexplained = (sae.reconstruct(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert recovery(truth, sae.atoms) > 0.9 > before + 0.2, sae.architecture
    assert float(unexplained) < 0.2
    assert 1 < float(sae.encode(rows).l0.double().mean()) < 6
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(60))


def test_decode_is_atoms_and_offset(trained: tuple[SAE, float], known: tuple[Tensor, Tensor]) -> None:
    sae, rows = trained[0], known[0][:50]
    z = sae.encode(rows).dense()
    torch.testing.assert_close(sae.reconstruct(rows), z @ sae.atoms + sae.offset, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae.decode(z), sae.reconstruct(rows), atol=1e-5, rtol=1e-4)
    shaped = sae.encode(rows.reshape(5, 10, 24))
    assert torch.equal(shaped.dense().reshape(50, 60), z)


def test_saved_and_loaded(
    trained: tuple[SAE, float], known: tuple[Tensor, Tensor], toy: Model, tmp_path: Path
) -> None:
    sae, rows = trained[0], known[0][:100]
    sae.save(tmp_path / "sae", toy)
    again = Lens.load(tmp_path / "sae")
    assert type(again) is type(sae) and isinstance(again, Dictionary)
    assert torch.equal(again.reconstruct(rows), sae.reconstruct(rows))
    assert again.skip_above == sae.skip_above


@pytest.mark.filterwarnings("ignore::actlas.core.installation.EditHadNoEffect")
@pytest.mark.parametrize("name", [n for n in KINDS if n != "gradient"])
def test_fit_and_substitute_on_a_model(name: str, toy: Model, text: list[str]) -> None:
    options, sparsity = KINDS[name]
    sae = fit_sae(
        toy,
        text,
        SITE,
        architecture=name,
        width=60,
        tokens=3000,
        batch=128,
        lr=3e-3,
        sparsity=sparsity,
        **options,
    )
    x = toy.trace(text[0], SITE)[SITE]
    with toy.edit(sae.substitute()):
        after = toy.trace(text[0], SITE)[SITE]
    expected = torch.where(sae.massive(x)[..., None], x, sae.reconstruct(x))
    torch.testing.assert_close(after, expected)
    with toy.edit(sae.substitute(error="keep")):
        torch.testing.assert_close(toy.trace(text[0], SITE)[SITE], x)
    feature = int(sae.encode(x).counts().argmax())
    with toy.edit(sae.edit({feature: 0.0})):
        after = toy.trace(text[0], SITE)[SITE]
    gone = sae.encode(x).of(feature).unsqueeze(-1) * sae.direction(feature)
    torch.testing.assert_close(
        after, torch.where(sae.massive(x)[..., None], x, x - gone), atol=1e-5, rtol=1e-4
    )
    names = {m.name for m in sae.measurements}
    assert "fraction of variance unexplained" in names and "L0" in names


def test_fit_with_gradients_from_a_corpus(toy: Model, text: list[str]) -> None:
    sae = fit_sae(
        toy, text, SITE, architecture="gradient", width=64, k=4, beta=0.5, tokens=3000, batch=128, lr=3e-3
    )
    assert sae.architecture == "gradient" and sae.beta == 0.5  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="trains on rows with gradients"):
        fit_sae(None, torch.randn(300, 8), "s", architecture="gradient", k=2, tokens=300, batch=100)


def test_fit_a_transcoder_from_a_corpus(toy: Model, text: list[str]) -> None:
    options = {"width": 64, "tokens": 30_000, "batch": 128, "lr": 3e-3, "sparsity": 0.3}
    sae = fit_sae(
        toy, text, "blocks.1.mlp_norm", architecture="transcoder", target="blocks.1.hook_mlp_out", **options
    )
    assert sae.target == "blocks.1.mlp.out"  # type: ignore[attr-defined]
    trace = toy.trace(text[0], ["blocks.1.mlp_norm", "blocks.1.mlp.out"])
    y = trace["blocks.1.mlp.out"]
    unexplained = (sae.reconstruct(trace["blocks.1.mlp_norm"]) - y).square().sum() / y.square().sum()
    assert float(unexplained) < 0.5
    with toy.edit(sae.substitute()):
        toy.logits(text[0])
    with pytest.raises(InputError, match="rows are of one site"):
        fit_sae(None, torch.randn(300, 8), "s", architecture="transcoder", target="t")


def test_fit_a_crosscoder_from_a_corpus(toy: Model, text: list[str]) -> None:
    sites = ["blocks.0.resid_post", "blocks.1.mlp.act"]
    options = {"width": 64, "tokens": 3000, "batch": 128, "lr": 3e-3, "sparsity": 0.2}
    sae = fit_sae(toy, text, sites, architecture="crosscoder", **options)  # type: ignore[arg-type]
    assert sae.sites == tuple(sites) and sae.sizes == (32, 48)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="2 sites are given; a topk dictionary is fitted at one"):
        fit_sae(toy, text, sites, k=4)
    rows = fit_sae(
        None, torch.randn(300, 10), "a, b", architecture="crosscoder", width=8, tokens=600, batch=100
    )
    assert rows.sites == ("a", "b") and rows.sizes == (5, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "relu", "transcoder", "crosscoder"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a kind keeps beside its weights (thresholds, scales of sites) is part of a checkpoint."""
    loop = importlib.import_module("actlas.dictionaries.training")
    monkeypatch.setattr(loop, "_EVERY", 0.0)
    rows, _ = sparse_rows(600, 16, 24, 2)
    source = RowsSource(rows, 3 * rows[:, :8] if name == "transcoder" else None)
    options: dict[str, Any] = {"transcoder": {"d_out": 8}, "batchtopk": {"k": 3}}.get(name, {})
    where = "a, b" if name == "crosscoder" else "s"
    settings = TrainSettings(tokens=6000, batch=100, dead_after=500)
    fresh = lambda: architecture(name).create(where, 16, 32, seed=1, **options)  # noqa: E731
    whole = train(fresh(), source, settings, show=False)
    step, count = loop._Run.step, iter(range(1000))

    def interrupted(run: Any, batch: Any) -> Any:
        if next(count) == 37:
            raise KeyboardInterrupt
        return step(run, batch)

    monkeypatch.setattr(loop._Run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), source, settings, checkpoint=tmp_path / "c", show=False)
    monkeypatch.setattr(loop._Run, "step", step)
    again = train(fresh(), source, settings, checkpoint=tmp_path / "c", show=False)
    for key, tensor in whole._tensors().items():
        assert torch.equal(again._tensors()[key], tensor), key
