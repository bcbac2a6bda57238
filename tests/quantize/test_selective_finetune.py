"""QuEST: time layers found by running, the ranking by its definition, the stages, ranges by timestep."""

from __future__ import annotations

import copy

import pytest
import torch

import actlas
from actlas.core.errors import InputError
from actlas.core.timestep import at_timestep
from actlas.quantize.q_diffusion import q_diffusion_network
from actlas.quantize.selective_finetune import Stage, quest_diffusion, selective_finetune
from actlas.quantize.sensitive_layers import site_sensitivity, time_layers, with_times
from actlas.quantize.soft_network import SoftNetwork
from actlas.quantize.trajectory import Trajectory, trajectory_data
from tests.quantize.small_networks import (
    quick_ranges,  # noqa: F401  (a fixture that is used by all tests)
    tiny_unet,
)


@pytest.fixture(scope="module")
def start() -> tuple[SoftNetwork, Trajectory]:
    network = tiny_unet()
    data = trajectory_data(network, n_steps=3, n_per_step=12, sampling_steps=6)
    return q_diffusion_network(network, data, w_bits=4, a_bits=4, iterations=0, act_iterations=0), data


def test_time_layers(start) -> None:  # type: ignore[no-untyped-def]
    soft, data = start
    found = time_layers(soft, data.mixed(8)[0][0])
    assert set(found) == {"time.0", "time.2"} | {p for p in soft.layers if p.endswith(".emb")}


def test_sensitivity_is_the_error_of_one_rounded_input(start) -> None:  # type: ignore[no-untyped-def]
    soft, data = start
    calls = data.calls
    found = site_sensitivity(soft, calls)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert set(found) == set(soft.layers) | set(soft.inner)
    path = "up1.conv1"
    soft.acts_on(False)
    with torch.no_grad():
        want = [soft.network(*a) for a, _ in calls]
        soft.layers[path].act_on = True
        got = [soft.network(*a) for a, _ in calls]
    soft.acts_on(True)
    by_hand = sum(float((g - w).square().mean()) for g, w in zip(got, want, strict=True)) / len(calls)
    assert found[path] == pytest.approx(by_hand, rel=1e-5)
    assert all(layer.act_on for layer in soft.layers.values())


def test_ranges_by_timestep(start) -> None:  # type: ignore[no-untyped-def]
    soft, data = start
    timed = with_times(soft, data)
    assert timed.teacher is soft.teacher
    act = timed.layers["up1.conv1"].act
    assert act is not None and act.times is not None and act.scale.shape == (3, 2)
    assert torch.equal(timed.layers["up1.conv1"].weight, soft.layers["up1.conv1"].weight)
    for i, x in enumerate(data.x):  # the input convolution's range is that of x_t at each timestep
        first = timed.layers["conv_in"].act
        assert first is not None
        width = float(first.scale[i, 0]) * (2**first.bits - 1)
        assert width == pytest.approx(float(x.max() - x.min()), rel=0.15)
    with pytest.raises(InputError, match="at_timestep"):
        act(torch.zeros(1, 16, 8, 8))
    with at_timestep(0):
        act(torch.zeros(1, 16, 8, 8))


def test_only_what_a_stage_names_changes(start) -> None:  # type: ignore[no-untyped-def]
    soft, data = start
    tuned = copy.deepcopy(soft)
    stage = Stage(("down1.emb",), ("up1.conv1", "attention.at_v"), own_outputs=True, lr=1e-2, steps=5)
    history = selective_finetune(tuned, data, [stage])
    assert len(history) == 2
    for path, layer in tuned.layers.items():
        before = soft.layers[path]
        assert torch.equal(layer.matrix, before.matrix) == (path != "down1.emb"), path
        assert layer.act is not None and before.act is not None
        assert torch.equal(layer.act.scale, before.act.scale) == (path != "up1.conv1"), path
        assert not layer.matrix.requires_grad and torch.equal(layer.v, before.v)
    assert not torch.equal(tuned.inner["attention.at_v"].scale, soft.inner["attention.at_v"].scale)
    assert torch.equal(tuned.inner["attention.at_q"].scale, soft.inner["attention.at_q"].scale)


def test_fine_tuning_helps_and_exports(start, tmp_path) -> None:  # type: ignore[no-untyped-def]
    soft, data = start
    tuned = with_times(soft, data)
    everything = tuple(tuned.layers)
    history = selective_finetune(tuned, data, [Stage(everything, everything, lr=1e-3, steps=60)])
    assert history[1] < 0.8 * history[0]
    model = actlas.load(copy.deepcopy(soft.teacher))
    x, t = data.mixed(16)[0][0][0]
    edit = tuned.export("quest")
    with model.edit(edit):
        inside = model.module(x, t)
    assert torch.allclose(inside, tuned.network(x, t), atol=1e-3)
    edit.save(tmp_path / "e", model)
    with model.edit(actlas.Edit.load(tmp_path / "e", model)):
        assert torch.equal(model.module(x, t), inside)


def test_the_method() -> None:
    edit = quest_diffusion(tiny_unet(), n_steps=2, n_per_step=6, iterations=2, steps=3, sensitive=2)
    assert [m.group["stage"] for m in edit.measurements] == ["before fine-tuning", "after fine-tuning"]
    assert all(0 < m.value < 1 for m in edit.measurements)


def test_bad_input(start) -> None:  # type: ignore[no-untyped-def]
    soft, data = start
    with pytest.raises(InputError, match="no stage"):
        selective_finetune(soft, data, [])
    with pytest.raises(InputError, match="'nothing' is no quantised layer"):
        selective_finetune(soft, data, [Stage(("nothing",), ())])
    with pytest.raises(InputError, match="nothing to learn"):
        selective_finetune(soft, data, [Stage((), ())])
