"""Q-Diffusion's parts on small networks: concatenations found, blocks, the split, the whole method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actlas
from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError, ModelError
from actlas.core.network_blocks import blocks_of, capture
from actlas.core.numbers import QuantSpec
from actlas.quantize.concat_split import concat_readers
from actlas.quantize.q_diffusion import learn_scales, q_diffusion, q_diffusion_network
from actlas.quantize.soft_layers import SoftLayer
from actlas.quantize.soft_network import calibrate_acts, soften
from actlas.quantize.trajectory import Trajectory, trajectory_data
from tests.quantize.small_networks import (
    TwoPaths,
    quick_ranges,  # noqa: F401  (a fixture that is used by all tests)
    tiny_unet,
    unet_calls,
)


def test_concatenations_are_found_by_running() -> None:
    unet = tiny_unet()
    found = concat_readers(unet, unet_calls(1, 2)[0])
    assert found == {
        "up2.conv1": (16, 16),
        "up2.shortcut": (16, 16),
        "up1.conv1": (8, 8),
        "up1.shortcut": (8, 8),
    }
    assert concat_readers(TwoPaths(), ((torch.randn(1, 2, 4, 4),), {})) == {"join": (4, 6)}


def test_concatenations_end_at_a_layer_and_at_reshapes() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([x, x], 0)  # along the batch: no channels meet
            return self.second(torch.cat([self.first(y), y * 2], 1)[:, ::2])

    assert concat_readers(Other(), ((torch.randn(1, 4, 2, 2),), {})) == {}


def test_blocks_in_the_order_in_which_they_run() -> None:
    unet = tiny_unet()
    order = blocks_of(unet, unet_calls(1, 2)[0])
    assert order == [
        "time.0", "time.2", "conv_in", "down1", "shrink", "down2", "middle", "attention", "up2", "grow", "up1",
        "conv_out",
    ]  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    assert blocks_of(llama, ((torch.tensor([[1, 2]]),), {})) == [
        "model.layers.0",
        "model.layers.1",
        "lm_head",
    ]


def test_captured_inputs_give_the_captured_outputs() -> None:
    unet, calls = tiny_unet(), unet_calls()
    data = capture(unet, "up2", calls)
    with torch.no_grad():
        for i in range(2):
            assert torch.allclose(data.run(unet.up2, i), data.outputs[i], atol=1e-6)
        rows = torch.tensor([5, 1])
        assert torch.allclose(data.run(unet.up2, 0, rows), data.outputs[0][rows], atol=1e-5)
    with pytest.raises(InputError, match="no module 'nowhere'"):
        capture(unet, "nowhere", calls)


def split_gain(ratio: float) -> float:
    """Error of a convolution on a concatenation whose second half is `ratio` times wider (its weights as much
    narrower, so that the float output is the same): unsplit over split."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(8, 4, 6, 6), ratio * torch.randn(8, 4, 6, 6)], 1)
    conv = nn.Conv2d(8, 6, 3, padding=1)
    with torch.no_grad():
        conv.weight[:, 4:] /= ratio
        want = conv(x)
    errors = []
    for split in (None, (4, 4)):
        act = ActQuantizer(4, 8, segments=split)
        act.calibrate(x)
        layer = SoftLayer(conv, QuantSpec(4, granularity="channel"), split=split, act=act)
        errors.append(float((layer(x).detach() - want).square().mean()))
    return errors[0] / errors[1]


def test_split_helps_more_the_more_the_halves_differ() -> None:
    gains = [split_gain(r) for r in (1.0, 3.0, 8.0)]
    assert gains[0] > 0.9 and gains[0] < gains[1] < gains[2]
    assert gains[2] > 3


def test_split_is_the_sum_of_two_layers() -> None:
    """`Q(X1) Q(W1) + Q(X2) Q(W2)`, written out."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4, 3, 5, 5), 8 * torch.randn(4, 2, 5, 5)], 1)
    conv = nn.Conv2d(5, 4, 3, padding=1, bias=False)
    act = ActQuantizer(4, segments=(3, 2))
    act.calibrate(x)
    whole = SoftLayer(conv, "int4-channel", split=(3, 2), act=act)
    total = torch.zeros(4, 4, 5, 5)
    for part, weight in zip(x.split((3, 2), 1), conv.weight.detach().split((3, 2), 1), strict=True):
        one = nn.Conv2d(part.shape[1], 4, 3, padding=1, bias=False)
        with torch.no_grad():
            one.weight.copy_(weight)
        own = ActQuantizer(4, part.shape[1])
        own.calibrate(part)
        total = total + SoftLayer(one, "int4-channel", act=own)(part).detach()
    assert torch.allclose(whole(x).detach(), total, atol=1e-5)


def trajectory(network: nn.Module, n: int = 4, rows: int = 12) -> Trajectory:
    return trajectory_data(network, n_steps=n, n_per_step=rows, sampling_steps=8)


def test_trajectory_keeps_what_the_sampler_sees() -> None:
    unet = tiny_unet()
    data = trajectory(unet)
    assert data.t[0] == 99 and len(data.t) == 4 and list(data.t) == sorted(data.t, reverse=True)
    first = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data.x[0], first)
    calls, times = data.mixed(10)
    assert sum(len(t) for t in times) == 48 and len(calls) == 5
    assert len(set(times[0].tolist())) > 1
    assert data.only(-1).t == data.t[-1:]


def test_rounding_learns_and_the_edit_is_the_network(tmp_path) -> None:  # type: ignore[no-untyped-def]
    unet = tiny_unet()
    data = trajectory(unet)
    rtn = q_diffusion_network(unet, data, w_bits=3, a_bits=None, iterations=0)
    soft = q_diffusion_network(unet, data, w_bits=3, a_bits=6, iterations=60, act_iterations=10, lr=3e-2)
    for r in soft.roundings.values():
        assert min(r.learned, r.nearest) <= r.nearest
    model = actlas.load(unet)
    x, t = unet_calls(1)[0][0]
    before = unet(x, t)
    with model.edit(soft.export("q")):
        inside = unet(x, t)
    assert torch.allclose(inside, soft.network(x, t), atol=1e-4)
    assert torch.equal(unet(x, t), before)
    soft.acts_on(False)
    errors = [float((s.network(x, t) - before).detach().square().mean()) for s in (soft, rtn)]
    assert errors[0] < 0.7 * errors[1]
    edit = soft.export("q")
    edit.save(tmp_path / "e", model)
    with model.edit(edit):
        want = unet(x, t)
    with model.edit(actlas.Edit.load(tmp_path / "e", model)):
        assert torch.equal(unet(x, t), want)


def test_ends_and_inner_places() -> None:
    unet = tiny_unet()
    soft = soften(unet, unet_calls(1, 2)[0], w_bits=4, a_bits=4)
    assert soft.layers["conv_in"].spec.bits == soft.layers["conv_out"].spec.bits == 8
    assert soft.layers["up1.conv1"].act is not None and soft.layers["up1.conv1"].act.segments == (8, 8)
    assert {p: q.bits for p, q in soft.inner.items()} == {
        "attention.at_q": 4,
        "attention.at_k": 4,
        "attention.at_v": 4,
        "attention.at_map": 8,
    }


def test_learned_scales_are_never_worse() -> None:
    unet = tiny_unet()
    data = trajectory(unet)
    calls, when = data.mixed(16)
    soft = soften(unet, unet_calls(1, 2)[0], w_bits=8, a_bits=3)
    calibrate_acts(soft, calls, when)
    soft.acts_on(True)

    def error() -> float:
        return sum(float((soft.network(*a) - unet(*a)).square().mean()) for a, _ in calls)

    with torch.no_grad():
        start = error()
        learn_scales(soft, calls, when, iterations=30)
        assert error() < 1.02 * start


def test_command_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from typer.testing import CliRunner

    from actlas.cli.main import app
    from actlas.core.module_folder import save_module

    save_module(tiny_unet(), tmp_path / "net")
    words = [
        "fit",
        "q-diffusion",
        str(tmp_path / "net"),
        "--w-bits",
        "4",
        "--n-steps",
        "3",
        "--n-per-step",
        "8",
    ]
    words += ["--iterations", "5", "--act-iterations", "2", "-o", str(tmp_path / "e")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "relative noise error" in result.output
    model = actlas.load(str(tmp_path / "net"))
    edit = actlas.Edit.load(tmp_path / "e", model)
    assert edit.measurements[0].value < 1


def test_bad_input() -> None:
    with pytest.raises(ModelError, match="no diffusion model"):
        q_diffusion(nn.Linear(2, 2))
    with pytest.raises(InputError, match="w_bits is 1"):
        q_diffusion(tiny_unet(), w_bits=1, n_steps=2, n_per_step=2)
    with pytest.raises(InputError, match="n_steps"):
        trajectory_data(tiny_unet(), n_steps=0)
    with pytest.raises(ModelError, match="noise schedule"):
        trajectory_data(nn.Linear(2, 2))
    with pytest.raises(InputError, match="empty"):
        Trajectory((), ())
