"""Activation quantisers against the definitions, entry by entry."""

from __future__ import annotations

import pytest
import torch

from actlas.core.act_quantizer import ActQuantizer
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.numbers import QuantSpec, quantize
from actlas.core.polish import depolish, knee_of, polish
from actlas.core.quant_linear import QuantLinear
from actlas.core.quantized_input import QuantizedInput
from actlas.core.timestep import at_timestep, current_timestep


def by_hand(x: float, low: float, high: float, bits: int) -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    top = 2**bits - 1
    s = (high - low) / top
    z = round(-low / s)
    q = min(max(round(x / s) + z, 0), top)
    return s * (q - z)


def test_one_range_is_the_definition_and_the_core_grid() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 2) + 0.5
    quantizer = ActQuantizer(4, 4)
    quantizer.calibrate(x, rule="minmax")
    want = torch.tensor([by_hand(float(v), float(x.min()), float(x.max()), 4) for v in x.flatten()])
    assert torch.allclose(quantizer(x).flatten(), want, atol=1e-5)
    whole = quantize(x, QuantSpec(4, granularity="tensor"))
    assert torch.allclose(quantizer(x), whole, atol=1e-5)


def test_segments_have_their_own_ranges() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5, 3, 4, 4), 8 * torch.randn(5, 2, 4, 4)], 1)
    split, one = ActQuantizer(4, segments=(3, 2)), ActQuantizer(4, 5)
    for q in (split, one):
        q.calibrate(x, rule="minmax")
    halves = []
    for part in x.split((3, 2), 1):
        q = ActQuantizer(4, part.shape[1])
        q.calibrate(part, rule="minmax")
        halves.append(q(part))
    assert torch.equal(split(x), torch.cat(halves, 1))
    assert float((split(x) - x).square().mean()) < float((one(x) - x).square().mean())


def test_channels_on_the_last_axis() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3)
    last, first = ActQuantizer(4, segments=(1, 1, 1), axis=-1), ActQuantizer(4, segments=(1, 1, 1), axis=1)
    last.calibrate(x)
    first.calibrate(x.transpose(1, 2))
    assert torch.equal(last(x), first(x.transpose(1, 2)).transpose(1, 2))


def test_rows_take_the_range_of_the_nearest_timestep() -> None:
    x = torch.stack([torch.full((2, 3, 3), v) for v in (1.0, 10.0, 1.0, 10.0)])
    quantizer = ActQuantizer(2, 2, times=(90, 10))
    quantizer.calibrate(x, torch.tensor([90, 10, 80, 20]), rule="minmax")
    assert quantizer.scale[:, 0].tolist() == pytest.approx([1 / 3, 10 / 3])
    with at_timestep(torch.tensor([99, 0, 55, 40])):
        assert torch.allclose(quantizer(x), x, atol=1e-5)
    with at_timestep(0):
        got = quantizer(x)
    assert torch.allclose(got[0], torch.zeros(2, 3, 3), atol=1e-5)  # 1.0 is below half a step of 10/3


def test_missing_timestep_and_data_are_refused() -> None:
    quantizer = ActQuantizer(4, 2, times=(5, 1))
    with pytest.raises(InputError, match="no calibration data is nearest"):
        quantizer.calibrate(torch.ones(2, 2, 1, 1), torch.tensor([5, 5]))
    with pytest.raises(InputError, match="timestep of every row"):
        quantizer.calibrate(torch.ones(2, 2, 1, 1))
    quantizer.calibrate(torch.randn(4, 2, 1, 1), torch.tensor([5, 5, 1, 1]))
    with pytest.raises(InputError, match="at_timestep"):
        quantizer(torch.ones(2, 2, 1, 1))
    with at_timestep(torch.tensor([1, 2, 3])), pytest.raises(InputError, match="2 rows"):
        quantizer(torch.ones(2, 2, 1, 1))


def test_timesteps_nest() -> None:
    with at_timestep(3):
        with at_timestep(torch.tensor([1, 2])):
            assert current_timestep(2).tolist() == [1, 2]
        assert current_timestep(2).tolist() == [3, 3]


def test_polish_has_an_inverse_and_helps_heavy_tails() -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(2.0).sample((1, 8, 4096)).float()
    knee = knee_of(x[0])
    assert torch.allclose(
        depolish(polish(x, knee.view(1, 8, 1)), knee.view(1, 8, 1)), x, rtol=1e-4, atol=1e-5
    )
    want = torch.quantile(x[0].abs(), 0.95, dim=1)
    assert torch.allclose(knee, want)
    plain, bent = ActQuantizer(4, segments=(1,) * 8), ActQuantizer(4, segments=(1,) * 8, polished=True)
    for q in (plain, bent):
        q.calibrate(x, rule="minmax")
    bulk = x.abs() < knee.view(1, 8, 1)
    power = float(x[bulk].square().mean())
    errors = [float((q(x) - x)[bulk].square().mean()) / power for q in (plain, bent)]
    assert errors[1] < 0.5 * errors[0]


def test_dead_channels_have_a_knee() -> None:
    assert knee_of(torch.zeros(2, 10)).tolist() == [1.0, 1.0]
    quantizer = ActQuantizer(4, 2, polished=True)
    quantizer.calibrate(torch.zeros(3, 2, 2, 2))
    assert torch.equal(quantizer(torch.zeros(3, 2, 2, 2)), torch.zeros(3, 2, 2, 2))


def test_dynamic_ranges_are_those_of_each_row() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 4) * torch.tensor([1.0, 5.0, 20.0]).view(3, 1, 1, 1)
    quantizer = ActQuantizer(4, 2, dynamic=True)
    for i in range(3):
        row = x[i : i + 1]
        want = [by_hand(float(v), float(row.min()), float(row.max()), 4) for v in row.flatten()]
        assert torch.allclose(quantizer(x)[i].flatten(), torch.tensor(want), atol=1e-4)


def test_scale_gradient_is_lsq() -> None:
    """d x_hat / ds = round(x/s) - x/s inside, the clipped end outside (Esser et al. 2020, equation 3)."""
    quantizer = ActQuantizer(3, 1)
    x = torch.tensor([[0.3], [-0.9], [7.0], [-9.0]]).requires_grad_(True)
    quantizer.start_learning(torch.ones(1, 1))
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is not None
    want = (1 - 0.6) + (-2 + 1.8) + 3 + (-4)
    assert float(quantizer.scale.grad) == pytest.approx(want, abs=1e-5)
    assert x.grad is not None and x.grad.flatten().tolist() == [1, 1, 0, 0]


def test_saved_and_loaded() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    quantizer = ActQuantizer(4, 4, axis=-1, times=(7, 3), polished=True)
    quantizer.calibrate(x, torch.tensor([7, 7, 7, 3, 3, 3]))
    layer = QuantizedInput(quantizer, QuantLinear.of(torch.nn.Linear(4, 2), "int8-channel"))
    again = QuantizedInput.from_config(layer.config())
    again.load_state_dict(layer.state_dict())
    with at_timestep(4):
        assert torch.equal(layer(x), again(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1, "channels": 2}, "2 to 8 bits"),
        ({"bits": 4}, "number of channels"),
        ({"bits": 4, "channels": 3, "segments": (1, 1)}, "do not make 3"),
        ({"bits": 4, "channels": 3, "axis": 2}, "axis"),
        ({"bits": 4, "channels": 3, "times": ()}, "timesteps"),
    ],
)
def test_bad_sizes(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ActQuantizer(**options)


def test_bad_activations() -> None:
    quantizer = ActQuantizer(4, 3)
    with pytest.raises(InputError, match="never calibrated"):
        quantizer(torch.ones(2, 3))
    with pytest.raises(InputError, match="never reached"):
        quantizer.calibrate(torch.ones(0, 3))
    with pytest.raises(NonFiniteError):
        quantizer.calibrate(torch.full((2, 3), torch.inf))
    with pytest.raises(ShapeError, match="3 channels"):
        quantizer.calibrate(torch.ones(2, 4))
