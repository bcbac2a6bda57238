"""The small U-Net: sizes, timesteps, saving as a model folder."""

from __future__ import annotations

import json

import pytest
import torch

import actlas
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.module_folder import save_module
from actlas.nn.small_depth import SmallDepth
from actlas.nn.small_unet import SmallUNet


def test_sizes_and_start() -> None:
    network = SmallUNet()
    assert 380_000 < sum(p.numel() for p in network.parameters()) < 420_000
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 199])
    assert torch.equal(network(x, t), torch.zeros_like(x))
    assert torch.equal(SmallUNet(seed=3).conv_in.weight, SmallUNet(seed=3).conv_in.weight)


def test_rows_do_not_mix_and_time_matters() -> None:
    network = SmallUNet(width=8)
    with torch.no_grad():
        network.conv_out.weight.normal_(0, 0.1)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 50, 199])
    whole = network(x, t)
    assert torch.allclose(whole[1:2], network(x[1:2], t[1:2]), atol=1e-5)
    assert not torch.allclose(whole, network(x, t.flip(0)), atol=1e-3)


@pytest.mark.parametrize("network", [SmallUNet(width=8, timesteps=50), SmallDepth(width=4)])
def test_saved_as_a_folder(network: torch.nn.Module, tmp_path) -> None:  # type: ignore[no-untyped-def]
    save_module(network, tmp_path / "net")
    model = actlas.load(str(tmp_path / "net"))
    assert model.name == "net" and model.module.config() == network.config()  # type: ignore[operator]
    for a, b in zip(model.module.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_damaged_folders(tmp_path) -> None:  # type: ignore[no-untyped-def]
    folder = save_module(SmallUNet(width=8), tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sizes": {"width": 16}}))
    with pytest.raises(ModelError, match="do not fit"):
        actlas.load(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "module": "Popen"}))
    with pytest.raises(ModelError, match="unknown type 'Popen'"):
        actlas.load(str(folder))
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="no whole model"):
        actlas.load(str(folder))
    with pytest.raises(InputError, match="Linear cannot be saved"):
        save_module(torch.nn.Linear(2, 2), tmp_path / "other")


def test_bad_input() -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        SmallUNet(width=12)
    with pytest.raises(ShapeError, match="this network takes"):
        SmallUNet(width=8)(torch.zeros(2, 1, 9, 9), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ShapeError, match="multiples of 4"):
        SmallDepth()(torch.zeros(1, 3, 6, 6))
