"""Training of diffusion models, float and binary, on tiny networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actlas
from actlas.core.diffusion import NoiseSchedule
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.nn.small_unet import SmallUNet
from actlas.training.binarize_diffusion import (
    binarize_diffusion,
    binarize_network,
    binary_copy,
    binary_edit,
)
from actlas.training.diffusion import denoising_loss, train_diffusion
from actlas.training.feature_mimicking import lowrank_mimic, principal_directions


def images(n: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    base = torch.linspace(-0.8, 0.8, 8).view(1, 1, 1, 8).expand(n, 1, 8, 8)
    return (base + 0.1 * torch.randn(n, 1, 8, 8, generator=g)).clamp(-1, 1)


def tiny(seed: int = 0) -> SmallUNet:
    return SmallUNet(width=8, timesteps=50, seed=seed)


def test_it_learns_and_is_kept(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ACTLAS_CACHE", str(tmp_path))
    network, data = tiny(), images()
    start = float(denoising_loss(network, data, network.schedule).mean())
    trained = train_diffusion(network, data, steps=40, batch=16)
    assert float(denoising_loss(trained, data, network.schedule).mean()) < 0.7 * start
    assert torch.equal(network.conv_out.weight, torch.zeros_like(network.conv_out.weight))
    again = train_diffusion(network, data, steps=40, batch=16)
    other = train_diffusion(network, data, steps=40, batch=16, cache=False)
    for a, b, c in zip(trained.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_bad_training_input() -> None:
    with pytest.raises(InputError, match="scale them to -1 to 1"):
        train_diffusion(tiny(), images() * 5)
    with pytest.raises(InputError, match="n above 0"):
        train_diffusion(tiny(), images(0))
    with pytest.raises(InputError, match="steps is 0"):
        train_diffusion(tiny(), images(), steps=0)
    with pytest.raises(InputError, match="no noise schedule"):
        train_diffusion(nn.Conv2d(1, 1, 1), images())
    with pytest.raises(NonFiniteError):
        train_diffusion(tiny(), images() * torch.nan)


def test_principal_directions_are_those_of_the_svd() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 3, 3) * torch.linspace(3, 0.2, 8).view(1, 8, 1, 1)
    v = principal_directions(x, 3)
    assert torch.allclose(v.T @ v, torch.eye(3), atol=1e-5)
    rows = x.movedim(1, -1).reshape(-1, 8)
    want = torch.linalg.svd(rows - rows.mean(0)).Vh[:3]
    assert torch.allclose((v.T @ want.T).abs(), torch.eye(3), atol=1e-3)
    assert principal_directions(x).shape == (8, 2) and principal_directions(
        torch.randn(2, 16, 3, 3)
    ).shape == (16, 4)
    assert principal_directions(x, axis="width").shape == (3, 2)


def test_mimicking_projects_and_full_rank_is_the_plain_error() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    whole = principal_directions(t, 6)
    assert float(lowrank_mimic({"a": s}, {"a": t}, {"a": whole})) == pytest.approx(
        float((s - t).square().mean()), rel=1e-4
    )
    few = principal_directions(t, 2)
    by_hand = ((s - t).movedim(1, -1).reshape(-1, 6) @ few).square().mean()
    assert float(lowrank_mimic({"a": s}, {"a": t}, {"a": few})) == pytest.approx(float(by_hand), rel=1e-5)


def test_which_layers_have_which_bases() -> None:
    _, binary = binary_copy(tiny(), images(2), high=2, low=1)
    orders = {p: layer.order for p, layer in binary.items()}
    assert not {"time.0", "time.2", "conv_in", "conv_out"} & set(orders)
    assert orders["down1.conv1"] == orders["up1.conv2"] == orders["down1.emb"] == orders["shrink"] == 2
    assert orders["middle.conv1"] == orders["attention.qkv"] == orders["up2.emb"] == 1


def test_binary_training_and_its_edit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = images()
    teacher = train_diffusion(tiny(), data, steps=60, batch=16, cache=False)
    student, binary, losses = binarize_network(teacher, data, steps=30, batch=16, lr=2e-3, act_bits=8)
    assert sum(losses[-5:]) < sum(losses[:5])
    model = actlas.load(teacher)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 30, 49])
    before = teacher(x, t)
    edit = binary_edit(student, teacher, binary)
    with model.edit(edit), torch.no_grad():
        inside = teacher(x, t)
        assert torch.allclose(inside, student(x, t), atol=1e-4)
    assert torch.equal(teacher(x, t), before)
    edit.save(tmp_path / "e", model)
    with model.edit(actlas.Edit.load(tmp_path / "e", model)), torch.no_grad():
        assert torch.equal(teacher(x, t), inside)


def test_the_method_needs_no_data() -> None:
    edit = binarize_diffusion(tiny(), images(), steps=2, batch=8)
    assert [m.group["network"] for m in edit.measurements] == ["float", "binary"]


def test_bad_binary_input() -> None:
    with pytest.raises(ModelError, match="no diffusion model"):
        binarize_diffusion(nn.Linear(2, 2))
    with pytest.raises(InputError, match="mimicking 'half'"):
        binarize_network(tiny(), images(), mimic="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be positive"):
        binarize_network(tiny(), images(), steps=0)
    with pytest.raises(InputError, match="channel or their width"):
        principal_directions(torch.randn(2, 3, 4, 4), axis="height")
    assert NoiseSchedule(50).steps == 50
