"""Transcoders: loss and gradient in float64, a known map is found, and edits read one site and write another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens
from actlas.core.model import Model
from actlas.dictionaries import Batch, RowsSource, TrainSettings, train
from actlas.dictionaries.transcoder import SkipTranscoder, Transcoder

from .brute import check_gradients, random_weights, recovery, state

SITE, TARGET = "blocks.1.mlp_norm", "blocks.1.mlp.out"


@pytest.mark.parametrize("kind", [Transcoder, SkipTranscoder])
@pytest.mark.parametrize("k", [None, 2])
def test_loss_and_gradient_are_the_formula(kind: type[Transcoder], k: int | None) -> None:
    sae = random_weights(kind.create("s", 4, 8, d_out=3, seed=1, k=k))
    sae.target_scale.fill_(0.5)
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(7, 4, generator=g).double(), torch.randn(7, 3, generator=g).double()

    def loss(s: Transcoder) -> float:
        total = 0.0
        for row, target in zip(x, y, strict=True):
            pre = s.W_enc @ row + s.b_enc
            z = pre.relu() if k is None else torch.where(pre >= pre.sort().values[-k], pre, 0 * pre).relu()
            written = z @ s.W_dec + s.b_dec
            error = 0.5 * target - written
            if isinstance(s, SkipTranscoder):
                error = error - 0.5 * s.W_skip @ row
            total += float(error.square().sum()) + (0.7 * float(z.sum()) if k is None else 0.0)
        return total / len(x)

    check_gradients(sae, Batch(x, y), state(sae, sparsity=0.7), loss, kind.trainable)


def known_layer(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs, outputs of a sparse layer (a detector and a writer a feature), and the writers."""
    g = torch.Generator().manual_seed(0)
    read = torch.linalg.qr(torch.randn(16, 16, generator=g)).Q[:12]
    write = torch.nn.functional.normalize(torch.randn(12, 12, generator=g))
    z = (torch.rand(n, 12, generator=g) < 0.15) * (0.5 + torch.rand(n, 12, generator=g))
    return z @ read + 0.01 * torch.randn(n, 16, generator=g), 5 * (z @ write), write


@pytest.mark.parametrize("options", [{"k": 3}, {}])
def test_a_known_map_is_found(options: dict[str, int]) -> None:
    x, y, write = known_layer(8000)
    x, y = x[x.norm(dim=1) > 0.4], y[x.norm(dim=1) > 0.4]
    sae = Transcoder.create("s", 16, 24, d_out=12, seed=0, **options)
    settings = TrainSettings(tokens=200_000, batch=256, lr=3e-3, sparsity=1.0)
    train(sae, RowsSource(x, y), settings, show=False)
    assert recovery(write, sae.atoms) > 0.9
    unexplained = (sae.reconstruct(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert float(unexplained) < 0.2
    assert float((y * sae.scale * sae.target_scale).norm(dim=1).mean()) == pytest.approx(12**0.5, rel=0.1)


@pytest.fixture(scope="module")
def fitted(toy: Model, text: list[str]) -> Transcoder:
    trace = toy.trace(text[:20], [SITE, TARGET])
    x, y = trace[SITE].reshape(-1, 32), trace[TARGET].reshape(-1, 32)
    sae = SkipTranscoder.create(SITE, 32, 48, seed=0, target=TARGET)
    return train(
        sae, RowsSource(x, y), TrainSettings(tokens=6000, batch=100, lr=1e-3, sparsity=0.2), show=False
    )


def test_substitution_writes_the_target(toy: Model, text: list[str], fitted: Transcoder) -> None:
    trace = toy.trace(text[20:23], [SITE, TARGET])
    x, y = trace[SITE], trace[TARGET]
    read = lambda edit: _under(toy, edit, text[20:23])  # noqa: E731
    torch.testing.assert_close(read(fitted.substitute()), fitted.reconstruct(x))
    codes = fitted.encode(x)
    top = int(codes.counts().argmax())
    gone = fitted.decode(codes) - fitted.decode(codes.without([top]))
    torch.testing.assert_close(
        read(fitted.substitute(without=[top])), fitted.reconstruct(x) - gone, atol=1e-4, rtol=1e-4
    )
    kept = fitted.substitute(keep_error=True, without=[top])
    torch.testing.assert_close(read(kept), y - gone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read(fitted.edit({top: 0.0})), y - gone, atol=1e-4, rtol=1e-4)
    extra = codes.of(3).unsqueeze(-1) * fitted.direction(3)
    torch.testing.assert_close(read(fitted.edit({3: ("scale", 2.0)})), y + extra, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read(fitted.edit(3, 2.0)), y + 2 * fitted.direction(3), atol=1e-4, rtol=1e-4)


def test_massive_rows_pass_untouched(toy: Model, text: list[str], fitted: Transcoder) -> None:
    trace = toy.trace(text[20:23], [SITE, TARGET])
    limit = float(trace[SITE].norm(dim=-1).median())
    strict = replace(fitted, skip_above=limit)
    after = _under(toy, strict.substitute(), text[20:23])
    massive = trace[SITE].norm(dim=-1) > limit
    assert torch.equal(after[massive], trace[TARGET][massive])
    assert not torch.allclose(after[~massive], trace[TARGET][~massive])


def test_lens_and_edits_are_saved(toy: Model, text: list[str], fitted: Transcoder, tmp_path: Path) -> None:
    fitted.save(tmp_path / "lens", toy)
    loaded = Lens.load(tmp_path / "lens", toy)
    assert isinstance(loaded, SkipTranscoder) and loaded.target == TARGET
    x = toy.trace(text[0], SITE)[SITE]
    assert torch.equal(loaded.reconstruct(x), fitted.reconstruct(x))
    for i, edit in enumerate(
        (fitted.substitute(without=(1,), keep_error=True), fitted.edit({2: ("add", 1.5)}))
    ):
        edit.save(tmp_path / f"edit{i}", toy)
        again = Edit.load(tmp_path / f"edit{i}", toy)
        assert torch.equal(_under(toy, again, text[:2]), _under(toy, edit, text[:2]))


def test_edits_work_while_generating(toy: Model, fitted: Transcoder) -> None:
    prompt = "w1 w2 w3"
    with toy.edit(fitted.substitute()):
        with_cache = toy.generate(prompt, max_new_tokens=6)
        without = toy.generate(prompt, max_new_tokens=6, use_cache=False)
    assert with_cache.texts == without.texts


def test_bad_input(toy: Model, fitted: Transcoder) -> None:
    with pytest.raises(InputError, match="a transcoder has k or a threshold, not both"):
        replace(Transcoder.create("s", 4, 8, k=2), threshold=torch.zeros(8))
    with pytest.raises(InputError, match="k is 9; it must be between 1 and the width, 8"):
        Transcoder.create("s", 4, 8, k=9)
    with pytest.raises(InputError, match="does not know where it writes"):
        Transcoder.create("s", 4, 8).substitute()
    with pytest.raises(InputError, match="a transcoder's error is dropped or kept"):
        fitted.substitute("linear")
    with (
        pytest.raises(ShapeError, match="the transcoder writes 32 channels"),
        toy.edit(fitted.at(SITE, "blocks.1.mlp.act").substitute()),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"comes after blocks\.0\.mlp\.out in a forward pass"),
        toy.edit(fitted.at(SITE, "blocks.0.mlp.out").substitute()),
    ):
        pass


def _under(model: Model, edit: Edit, prompts: list[str]) -> torch.Tensor:
    with model.edit(edit):
        return model.trace(prompts, TARGET)[TARGET]
