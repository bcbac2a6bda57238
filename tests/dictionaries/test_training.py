"""The training loop: resuming, sources, constraints, failures that change nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actlas.core.errors import FingerprintError, InputError, NonFiniteError, SiteError
from actlas.core.model import Model
from actlas.dictionaries import LiveSource, RowsSource, TopKSAE, TrainSettings, fit_sae, train
from actlas.dictionaries.sources import join_blocks
from actlas.dictionaries.training import clip, geometric_median
from tests.core.families import BY_NAME

from .conftest import sparse_rows

SITE = "blocks.1.resid_post"


def fresh() -> TopKSAE:
    return TopKSAE.create("s", 16, 32, k=3, seed=0)


def test_training_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    loop = importlib.import_module("actlas.dictionaries.training")
    rows, _ = sparse_rows(600, 16, 24, 2)
    settings = TrainSettings(tokens=6000, batch=100)
    whole = train(fresh(), RowsSource(rows), settings, show=False)
    monkeypatch.setattr(loop, "_EVERY", 0.0)
    sae, steps = fresh(), iter(range(1000))
    step = loop._Run.step

    def interrupted(run: object, batch: object) -> object:
        if next(steps) == 33:
            raise KeyboardInterrupt
        return step(run, batch)

    monkeypatch.setattr(loop._Run, "step", interrupted)
    before = sae.W_dec.clone()
    with pytest.raises(KeyboardInterrupt):
        train(sae, RowsSource(rows), settings, checkpoint=tmp_path / "c", show=False)
    assert torch.equal(sae.W_dec, before)  # a run that did not end changes nothing
    monkeypatch.setattr(loop._Run, "step", step)
    train(sae, RowsSource(rows), settings, checkpoint=tmp_path / "c", show=False)
    assert torch.equal(sae.W_dec, whole.W_dec) and torch.equal(sae.b_enc, whole.b_enc)
    with pytest.raises(InputError, match="a run with other settings"):
        train(fresh(), RowsSource(rows), TrainSettings(tokens=100, batch=50), checkpoint=tmp_path / "c")
    with pytest.raises(InputError, match="a run with other source"):
        train(fresh(), RowsSource(rows + 1), settings, checkpoint=tmp_path / "c")


def test_atoms_have_unit_norm_and_the_scale_is_set() -> None:
    rows, _ = sparse_rows(500, 16, 24, 2)
    sae = train(fresh(), RowsSource(7 * rows), TrainSettings(tokens=2000, batch=100), show=False)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert sae.scale == pytest.approx(4 / float((7 * rows).norm(dim=1).mean()), rel=0.05)
    assert sae.trained_rows == 2000


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    rows, _ = sparse_rows(500, 16, 24, 2)
    sae = fresh()
    sae.W_enc[:, 0] = float("inf")
    before = sae.W_dec.clone()
    with pytest.raises(NonFiniteError, match="at step 0; lower the learning rate"):
        train(sae, RowsSource(rows), TrainSettings(tokens=2000, batch=100), show=False)
    assert torch.equal(sae.W_dec, before)


def test_rows_source_leaves_out_massive_rows_and_names_bad_ones() -> None:
    rows, _ = sparse_rows(500, 16, 24, 2)
    massive = torch.cat([rows, 1000 * rows[:3]])
    source = RowsSource(massive)
    assert len(source) == 500 and source.skip_above == pytest.approx(10 * float(massive.norm(dim=1).median()))
    assert len(RowsSource(massive, keep_massive=True)) == 503
    seen = torch.cat([b.x for b in source.batches(50, seed=1)])
    assert torch.equal(seen.sort(0).values, rows.sort(0).values)
    late = torch.cat([b.x for b in source.batches(50, seed=1, start=4)])
    assert torch.equal(late, seen[200:])
    rows[7, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"row 7 .* \(1 such rows\)"):
        RowsSource(rows)


def test_batch_larger_than_the_data() -> None:
    rows, _ = sparse_rows(50, 16, 24, 2)
    with pytest.raises(InputError, match="fewer rows than one batch of 64"):
        train(fresh(), RowsSource(rows), TrainSettings(tokens=640, batch=64), show=False)


def test_wrong_width_is_refused() -> None:
    rows, _ = sparse_rows(50, 8, 24, 2)
    with pytest.raises(InputError, match="the data has 8 -> 8 channels; the autoencoder reads 16"):
        train(fresh(), RowsSource(rows), TrainSettings(tokens=50, batch=10))


def test_live_source_reads_every_row_once(toy: Model, text: list[str]) -> None:
    source = LiveSource(toy, text, SITE, buffer=256, batch_tokens=64)
    expected = torch.cat([t.rows(SITE) for t in toy.stream(text, SITE)])
    norm = expected.norm(dim=1)
    seen = torch.cat([b.x for b in source.batches(10, seed=0)])
    assert source.channels == 32 and source.target_channels == 32
    assert len(seen) == int((norm <= source.skip_above).sum()) // 10 * 10
    assert torch.cdist(seen, expected).min(1).values.max() < 1e-3
    assert len({tuple(r.tolist()) for r in seen}) == len(seen) or len(expected.unique(dim=0)) < len(expected)
    late = torch.cat([b.x for b in source.batches(10, seed=0, start=20)])
    assert torch.equal(late, seen[200:])
    assert not torch.equal(seen[:100], torch.cat([b.x for b in source.batches(10, seed=1)])[:100])


def test_live_source_gradients_are_autograds(toy: Model, text: list[str]) -> None:
    source = LiveSource(toy, text[:2], SITE, gradient=True, keep_massive=True)
    batch = source.read(1000)
    assert batch is not None and batch.gradient is not None
    ids = toy.encode(text[0])["input_ids"]
    trace = toy.trace(text[0], SITE, grad=True, stop=False)
    loss = lambda logits: torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")  # noqa: E731
    expected = trace.gradients(loss)[SITE][0, :-1]
    torch.testing.assert_close(batch.gradient[: len(expected)], expected, atol=1e-5, rtol=1e-4)


def test_blocks_join_documents(toy: Model, text: list[str]) -> None:
    blocks = join_blocks(toy, text[:5], 16)
    whole = [i for b in blocks for i in b.ids]
    assert all(len(b.ids) == 16 for b in blocks) and whole.count(2) == len(whole) // 31
    assert LiveSource(toy, text, SITE, packing="block", context=16).channels == 32


@pytest.mark.parametrize("site", [SITE, "blocks.0.attn.z"])
def test_fit_from_a_corpus(toy: Model, text: list[str], site: str) -> None:
    sae = fit_sae(toy, text, site, width="2x", k=4, tokens=6000, batch=128, lr=3e-3)
    beside = [m.group["dictionary"] for m in sae.measurements if m.group]
    assert beside == ["random atoms", "random directions"]
    found = {m.name: m for m in sae.measurements if not m.group}
    assert sae.features == 64 and sae.fingerprint == toy.fingerprint
    assert found["fraction of variance unexplained"].value < 0.6
    assert found["L0"].value <= 4
    edited = sae.edit(0, 2.0)
    with toy.edit(edited):
        toy.logits("w1 w2 w3")


def test_fit_refuses_in_one_line(toy: Model, text: list[str]) -> None:
    for options, match in (
        ({"architecture": "topq"}, "no dictionary architecture 'topq'; did you mean"),
        ({"width": "big"}, "width is 'big'"),
        ({"kk": 3}, "topk has no option 'kk'; did you mean"),
        ({"k": 65, "width": "2x"}, "k is 65"),
        ({"lr": 3.0}, "lr is 3.0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"packing": "pile"}, "packing is 'pile'"),
    ):
        with pytest.raises(InputError, match=match):
            fit_sae(toy, text, SITE, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="names 3 sites"):
        fit_sae(toy, text, "blocks.*.resid_post")
    with pytest.raises(InputError, match="no text"):
        fit_sae(toy, [], SITE)
    with pytest.raises(InputError, match="needs the model"):
        fit_sae(None, text, SITE)


def test_helpers() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [100.0, 100.0]])
    assert float(geometric_median(rows, 200).norm()) < 1.0 < float(rows.mean(0).norm())
    g = [torch.tensor([3.0]), torch.tensor([4.0])]
    clip(g, 1.0)
    assert torch.allclose(torch.cat(g), torch.tensor([0.6, 0.8]))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from actlas.dictionaries import RowsSource, TopKSAE, TrainSettings, train\n"
        "rows = torch.randn(800, 16, generator=torch.Generator().manual_seed(0))\n"
        "sae = train(TopKSAE.create('s', 16, 32, k=3), RowsSource(rows), TrainSettings(tokens=4000, batch=100))\n"
        "import os, numpy\n"
        "if os.environ.get('RANK', '0') == '0': numpy.save(sys.argv[1], sae.W_dec.numpy())\n"
    )
    import numpy as np

    alone, both = tmp_path / "alone.npy", tmp_path / "both.npy"
    subprocess.run([sys.executable, str(script), str(alone)], check=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511"]
    subprocess.run([*launch, str(script), str(both)], check=True)
    np.testing.assert_allclose(np.load(both), np.load(alone), atol=2e-4)


def test_fit_from_a_store(toy: Model, text: list[str], tmp_path: Path) -> None:
    from actlas.store import harvest

    store = harvest(toy, text, [SITE, "blocks.1.mlp.out"], tmp_path / "s", dtype="float32")
    sae = fit_sae(toy, store, SITE, width=48, k=4, tokens=6000, batch=128, lr=3e-3)
    memory = fit_sae(toy, text, SITE, width=48, k=4, tokens=6000, batch=128, lr=3e-3)
    assert sae.fingerprint == toy.fingerprint and "not trained on" in sae.measurements[0].note
    assert sae.measurements[0].value == pytest.approx(memory.measurements[0].value, abs=0.1)
    alone = fit_sae(None, store, SITE, width=48, k=4, tokens=600, batch=128)
    assert alone.fingerprint == store.fingerprint
    with pytest.raises(SiteError):
        fit_sae(toy, store, "blocks.0.resid_post", width=48, k=4)
    other = Model(BY_NAME["gpt2"].model().module, toy.tokenizer, name="other")
    with pytest.raises(FingerprintError, match="the store was made for another model"):
        fit_sae(other, store, SITE, width=48, k=4)
