"""TopK: the sparse gradients are autograd's, known features are found, dead ones come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actlas.core.errors import InputError
from actlas.dictionaries import Batch, RowsSource, TopKSAE, TrainSettings, train
from actlas.dictionaries.objective import TrainState
from actlas.dictionaries.sae import SAE

from .conftest import sparse_rows


def state(sae: SAE, dead: list[int] | None = None, **options: object) -> TrainState:
    fired = torch.zeros(sae.features, dtype=torch.int64)
    fired[dead or []] = 10**9
    return TrainState(TrainSettings(tokens=1000, batch=16, **options), fired)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dead", [[], [0, 3], list(range(20))])
def test_sparse_gradients_are_autograds(centred: bool, dead: list[int], norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    sae = replace(
        TopKSAE.create("s", 12, 24, k=4, seed=3), centred=centred,
        b_dec=0.3 * torch.randn(12, generator=g), b_enc=0.2 * torch.randn(24, generator=g),
    )  # fmt: skip
    batch = Batch(torch.randn(16, 12, generator=g))
    if norm == "free":
        sae.W_dec *= 0.5 + torch.rand(24, 1, generator=g)
    now = state(sae, dead, decoder_norm=norm)
    dense_objective, dense = SAE.gradients(sae, batch, now)
    objective, sparse = sae.gradients(batch, now)
    torch.testing.assert_close(objective.loss, dense_objective.loss.detach())
    for name in sae.trainable:
        torch.testing.assert_close(sparse[name], dense[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("norm", ["unit", "free"])
def test_a_whole_step_is_gradients_and_adam(
    norm: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = sparse_rows(600, 12, 24, 2)
    settings = TrainSettings(
        tokens=3000, batch=100, lr=3e-3, dtype="float32", decoder_norm=norm, clip=clip, dead_after=200  # type: ignore[arg-type]
    )  # fmt: skip
    whole = train(TopKSAE.create("s", 12, 40, k=3), RowsSource(rows), settings, show=False)
    monkeypatch.setattr(TopKSAE, "step", SAE.step)
    pieces = train(TopKSAE.create("s", 12, 40, k=3), RowsSource(rows), settings, show=False)
    for name in whole.trainable:
        torch.testing.assert_close(
            getattr(whole, name), getattr(pieces, name), atol=2e-4, rtol=1e-3, msg=name
        )


def test_dense_loss_is_the_paper_in_float64() -> None:
    g = torch.Generator().manual_seed(1)
    sae = TopKSAE.create("s", 8, 16, k=3, seed=0)
    x = torch.randn(10, 8, generator=g)
    pre = x.double() @ sae.W_enc.double().T
    kept = pre.topk(3).values[:, -1:]
    z = torch.where(pre >= kept, pre, 0).relu()
    error = x.double() - z @ sae.W_dec.double()
    dead = [1, 5]
    e_hat = pre[:, dead].relu() @ sae.W_dec[dead].double()
    auxiliary = (2 / 4) * (error - e_hat).square().sum(1).mean()
    expected = error.square().sum(1).mean() + auxiliary / 32
    found = sae.objective(Batch(x), state(sae, dead)).loss
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_decoder_gradient_keeps_atoms_at_unit_norm() -> None:
    sae = TopKSAE.create("s", 12, 24, k=4)
    _, found = sae.gradients(Batch(torch.randn(16, 12)), state(sae))
    assert float((found["W_dec"] * sae.W_dec).sum(1).abs().max()) < 1e-6


def test_known_features_are_found() -> None:
    rows, truth = sparse_rows(8000, 24, 40, 2)
    sae = TopKSAE.create("s", 24, 60, k=3, seed=0)
    train(sae, RowsSource(rows), TrainSettings(tokens=160_000, batch=256, lr=3e-3), show=False)
    best = (truth @ sae.W_dec.T).max(1).values
    random = torch.nn.functional.normalize(torch.randn(60, 24, generator=torch.Generator().manual_seed(9)))
    assert float(best.mean()) > 0.9 > float((truth @ random.T).max(1).values.mean()) + 0.2


def test_free_norms_are_folded_at_the_end() -> None:
    rows, _ = sparse_rows(2000, 24, 40, 2)
    sae = TopKSAE.create("s", 24, 60, k=3, seed=0)
    settings = TrainSettings(tokens=40_000, batch=256, lr=3e-3, decoder_norm="free")
    train(sae, RowsSource(rows), settings, show=False)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(60))
    unit = TopKSAE.create("s", 24, 60, k=3, seed=0)
    train(unit, RowsSource(rows), TrainSettings(tokens=40_000, batch=256, lr=3e-3), show=False)
    errors = [float((lens.reconstruct(rows) - rows).square().sum()) for lens in (sae, unit)]
    assert errors[0] == pytest.approx(errors[1], rel=0.3)


def test_folding_changes_no_reconstruction() -> None:
    g = torch.Generator().manual_seed(0)
    sae = TopKSAE.create("s", 12, 24, k=4, seed=3)
    sae.W_dec *= 0.5 + torch.rand(24, 1, generator=g)
    x = torch.randn(16, 12, generator=g)
    now = state(sae, decoder_norm="free")
    norms = sae.W_dec.norm(dim=1)
    pre = sae.pre(x)
    z = torch.zeros_like(pre).scatter(1, (pre * norms).topk(4).indices, 1.0) * pre.relu()
    expected = z @ sae.W_dec + sae.b_dec
    sae.finish(now)
    torch.testing.assert_close(sae.reconstruct(x), expected)


def test_free_norms_are_for_topk_only() -> None:
    from actlas.dictionaries import fit_sae

    rows, _ = sparse_rows(200, 24, 40, 2)
    with pytest.raises(InputError, match="decoder_norm='free' is for topk; relu"):
        fit_sae(None, rows, "s", architecture="relu", width=30, decoder_norm="free", tokens=100, batch=50)


def test_bfloat16_training_stays_close() -> None:
    rows, _ = sparse_rows(2000, 24, 40, 2)
    errors = []
    for dtype in ("float32", "bfloat16"):
        sae = TopKSAE.create("s", 24, 60, k=3, seed=0)
        settings = TrainSettings(tokens=20_000, batch=256, lr=3e-3, dtype=dtype)  # type: ignore[arg-type]
        train(sae, RowsSource(rows), settings, show=False)
        errors.append(float((sae.reconstruct(rows) - rows).square().sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_bad_k() -> None:
    for k in (0, 25):
        with pytest.raises(InputError, match=f"k is {k}; it must be between 1 and the width, 24"):
            TopKSAE.create("s", 12, 24, k=k)
