"""Dynamic filter pruning: labels, gates, gradients, counting, refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from actlas.core.errors import InputError, ModelError
from actlas.training.channel_gate import FilterGates, filter_heat, mass_mask


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


X = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(3))


def by_hand(heat, mass):
    order = sorted(range(len(heat)), key=lambda i: (-heat[i], i))
    total, running, kept = sum(heat), 0.0, {order[0]}
    for i in order:
        running += heat[i] / total
        if running - mass > 1e-5:
            break
        kept.add(i)
    return [i in kept for i in range(len(heat))]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.sampled_from([0.2, 0.5, 0.8, 0.95]))
def test_labels_are_the_rule_of_the_paper(heat, mass):
    got = mass_mask(torch.tensor([heat], dtype=torch.float64), mass)[0].tolist()
    assert got == by_hand(heat, mass)


def test_labels_grow_with_the_mass_and_keep_all_but_dead_filters_at_1():
    heat = torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    heat[:, 3] = 0
    masks = [mass_mask(heat, m) for m in (0.1, 0.5, 0.9, 0.99, 1.0)]
    assert all(bool((a <= b).all()) for a, b in pairwise(masks))
    assert bool(masks[0].any(1).all()) and torch.equal(masks[-1][0], heat[0] > 0)
    assert len({int(k) for k in masks[1].sum(1)}) > 1  # how many is decided for each image
    assert bool(mass_mask(torch.zeros(1, 3), 0.5).sum() == 1)  # a dead unit keeps one


def test_gates_multiply_the_output_and_come_off():
    net = network()
    plain = net(X)
    gates = FilterGates(net, ["0", "1"], mass=0.7)
    with gates:
        gates.rule = "dense"
        assert torch.equal(net(X), plain)
        gates.rule = "oracle"
        out = net(X)
        first = net[0][0](X).relu()
        first = first * mass_mask(filter_heat(first), 0.7)[..., None, None]
    second = net[1](first)
    second = second * mass_mask(filter_heat(second), 0.7)[..., None, None]
    torch.testing.assert_close(out, net[3](second.flatten(1)))
    assert torch.equal(net(X), plain)


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_predictors_learn_and_only_joint_reaches_the_network(mode):
    net = network()
    gates = FilterGates(net, ["0", "1"], mass=0.7, mode=mode, softmax=False)
    with gates:
        net(X)
        gates.loss().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in gates.parameters())
    reached = net[0][0].weight.grad is not None and bool(net[0][0].weight.grad.any())
    assert reached == (mode == "joint") and not any(
        p is q for p in gates.parameters() for q in net.parameters()
    )
    optimiser = torch.optim.Adam(gates.parameters(), lr=0.05)
    with gates:
        net(X)
        before = float(gates.loss().detach())
        for _ in range(60):
            net(X)
            optimiser.zero_grad()
            gates.loss().backward()
            optimiser.step()
        net(X)
        assert float(gates.loss().detach()) < 0.7 * before and gates.agreement() > 0.8


def test_multiplications_are_counted_with_active_inputs_and_predictors():
    net = network()
    gates = FilterGates(net, ["0", "1"])
    gates.fixed = {"0": torch.tensor([1, 1, 0, 0, 0, 0]).bool(), "1": torch.tensor([1, 0, 0, 0]).bool()}
    gates.rule = "fixed"
    with gates, torch.no_grad():
        net(X)
        spent, dense = gates.flops()
        assert dense == 2 * 6 * 9 * 16 + 6 * 4 * 9 * 16
        assert spent.tolist() == [2 * 2 * 9 * 16 + 1 * 2 * 9 * 16] * 5
        gates.rule = "predict"
        net(X)
        active = gates.masks["0"].sum(1).double(), gates.masks["1"].sum(1).double()
        want = active[0] * 2 * 144 + 12 + active[1] * active[0] * 144 + 24
        assert torch.equal(gates.flops()[0], want)


def test_random_masks_keep_as_many_filters():
    net = network()
    gates = FilterGates(net, ["0"], softmax=False)
    with torch.no_grad():
        gates.predictors[0].bias.copy_(torch.tensor([1.0, 1, -9, -9, 1, -9]))
        with gates:
            net(X)
            wanted = gates.masks["0"].sum(1)
            gates.rule = "random"
            net(X)
    assert (
        torch.equal(gates.masks["0"].sum(1), wanted)
        and len({tuple(r) for r in gates.masks["0"].tolist()}) > 1
    )


def test_bad_input():
    net = network()
    for bad, error in (
        (lambda: FilterGates(net, []), InputError),
        (lambda: FilterGates(net, ["0"], mass=1.5), InputError),
        (lambda: FilterGates(net, ["0"], mass=0.0), InputError),
        (lambda: FilterGates(net, ["0"], mode="both"), InputError),
        (lambda: FilterGates(net, ["9"]), ModelError),
        (lambda: FilterGates(net, ["3"]), ModelError),
        (lambda: FilterGates(net, ["0"]).loss(), InputError),
        (lambda: filter_heat(torch.zeros(3)), InputError),
    ):
        with pytest.raises(error) as found:
            bad()
        assert "\n" not in str(found.value)
