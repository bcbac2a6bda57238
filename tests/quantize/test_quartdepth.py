"""QuartDepth: the normal equations, unfolding, Fisher factors by brute force, and the pipeline."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actlas
from actlas.core.errors import InputError, ShapeError
from actlas.models.efficientnet_lite import SameConv2d
from actlas.nn.small_depth import SmallDepth
from actlas.quantize.compensation import columns_of, compensate, output_rows
from actlas.quantize.quartdepth import fisher_factors, quartdepth, quartdepth_network


def test_normal_equations_and_sign() -> None:
    torch.manual_seed(0)
    x = (torch.randn(300, 6) @ torch.randn(6, 6)).double()
    seen = (x * 2).round() / 2
    w = torch.randn(4, 6).double()
    new = compensate(w, x, seen, damp=0.0)
    rest = w @ x.T - new @ seen.T
    assert float((rest @ seen).abs().max()) < 1e-6 * float((w @ x.T).abs().max()) * len(x)
    before = float((w @ x.T - w @ seen.T).square().mean())
    after = float(rest.square().mean())
    wrong = float((w @ x.T - (2 * w - new) @ seen.T).square().mean())  # minus dW
    assert after < before < wrong
    # the best weight of all, by least squares
    best = torch.linalg.lstsq(seen, x @ w.T).solution.T
    assert torch.allclose(new, best, atol=1e-5)


def test_no_error_no_change_and_damping() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(50, 4), torch.randn(3, 4)
    assert torch.allclose(compensate(w, x, x), w, atol=1e-5)
    noisy = x + 0.3 * torch.randn(50, 4)
    sizes = [float((compensate(w, x, noisy, damp=d) - w).norm()) for d in (0.0, 0.1, 10.0)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_groups_are_solved_one_by_one() -> None:
    torch.manual_seed(0)
    x, seen, w = torch.randn(80, 6), torch.randn(80, 6), torch.randn(4, 3)
    whole = compensate(w, x, seen, groups=2)
    parts = [
        compensate(w[2 * i : 2 * i + 2], x[:, 3 * i : 3 * i + 3], seen[:, 3 * i : 3 * i + 3]) for i in (0, 1)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        SameConv2d(4, 6, 3, 2),
    ],
)
def test_a_convolution_is_its_unfolded_product(conv: nn.Conv2d) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    rows = columns_of(conv, x).reshape(-1, conv.groups, conv.weight[0].numel())
    w = conv.weight.flatten(1).reshape(conv.groups, -1, conv.weight[0].numel())
    got = torch.einsum("ngc,goc->ngo", rows, w).flatten(1)
    want = output_rows(conv, conv(x) if conv.bias is None else conv(x) - conv.bias.view(1, -1, 1, 1))
    assert torch.allclose(got, want, atol=1e-5)


def test_fisher_of_a_linear_map_is_known() -> None:
    """For y = B relu(A x) with a unit Gaussian, the gradient at A's output has E[g g^T] = D B^T B D on
    average.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Identity(), nn.Linear(4, 2, bias=False))
    calls = [((torch.randn(2000, 3),), {}) for _ in range(4)]
    found = fisher_factors(network, calls, ["0", "2"], damp=0.0)
    b = network[2].weight.detach().double()
    assert torch.allclose(found["0"], b.T @ b, atol=0.08)
    assert torch.allclose(found["2"], torch.eye(2).double(), atol=0.08)


def test_fisher_of_logits() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4))
    x = torch.randn(1, 3)
    found = fisher_factors(network, [((x.expand(20_000, 3),), {})], ["0"], "categorical", damp=0.0)
    p = network(x)[0].softmax(-1).detach().double()
    assert torch.allclose(found["0"], torch.diag(p) - torch.outer(p, p), atol=0.02)


def depth() -> tuple[SmallDepth, torch.Tensor]:
    torch.manual_seed(0)
    return SmallDepth(width=4).eval(), torch.randn(24, 3, 8, 8)


def test_each_step_brings_the_output_nearer() -> None:
    network, images = depth()
    with torch.no_grad():
        want = network(images)
    errors = []
    for steps in (
        {"polish": True, "compensation": False, "iterations": 0},
        {"polish": True, "compensation": True, "iterations": 0},
        {"polish": True, "compensation": True, "iterations": 60},
    ):
        soft = quartdepth_network(network, [((x,), {}) for x in images.split(8)], w_bits=3, a_bits=4, **steps)
        with torch.no_grad():
            errors.append(float((soft.network(images) - want).square().mean()))
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_edit_saves_and_loads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    network, images = depth()
    model = actlas.load(network)
    edit = quartdepth(model, images, batch=8, iterations=5)
    with model.edit(edit):
        want = network(images)
    edit.save(tmp_path / "e", model)
    with model.edit(actlas.Edit.load(tmp_path / "e", model)):
        assert torch.equal(network(images), want)
    assert edit.bits_per_weight < 6


def test_bad_input() -> None:
    network, images = depth()
    with pytest.raises(InputError, match=r"n, channels"):
        quartdepth(network, images[0])
    with pytest.raises(InputError, match="calibration"):
        quartdepth_network(network, [])
    with pytest.raises(InputError, match="gaussian or categorical"):
        quartdepth(network, images, predicts="poisson")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"needs both"):
        compensate(torch.ones(2, 3), torch.ones(5, 3), torch.ones(5, 2))
    with pytest.raises(InputError, match="damping"):
        compensate(torch.ones(2, 3), torch.ones(5, 3), torch.ones(5, 3), damp=-1.0)
