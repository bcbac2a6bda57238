"""QuantNAS's parts: mixed edges, half-wave rounding, the adaptive norm, networks and the search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers import QuantSpec, quantize
from actlas.nn.adaptive_skip_norm import AdaptiveSkipNorm
from actlas.nn.mixed_op import MixedOp, QuantizedOp, conv_op, half_wave, half_wave_step
from actlas.nn.super_resolution import SuperResolution, super_edges
from actlas.training.quant_nas import edges_of, search, train_images


def edge(how="noise", bits=(4, 8)):
    torch.manual_seed(0)
    return MixedOp({"1x1": conv_op(4, 4, 1), "3x3": conv_op(4, 4, 3)}, bits, how=how)


def batches(n=2, size=16):
    generator = torch.Generator().manual_seed(0)
    while True:
        y = torch.rand(n, 1, size, size, generator=generator)
        yield functional.avg_pool2d(y, 2), y


def test_a_direct_edge_is_the_written_sum():
    op = edge("ste")
    with torch.no_grad():
        op.logits.copy_(torch.tensor([[0.3, -0.2], [1.0, 0.1]]))
    x = torch.rand(2, 4, 6, 6)
    p = op.logits.flatten().softmax(0).view(2, 2)
    want = 0
    for i, conv in enumerate(op.ops):
        for j, b in enumerate(op.bits):
            w = quantize(conv.weight.flatten(1), QuantSpec.parse(f"int{b}-channel-float")).view_as(
                conv.weight
            )
            inner = quantize(x, QuantSpec.parse(f"int{b}-tensor-float"))
            want = want + p[i, j] * functional.conv2d(inner, w, conv.bias, padding=conv.padding)
    torch.testing.assert_close(op(x), want)


def test_noise_averages_to_the_exact_sum_and_gradients_reach_everything():
    op, x = edge(bits=(8,)), torch.rand(1, 4, 6, 6)
    p = op.probabilities.sum(1)
    want = sum(p[i] * conv(x) for i, conv in enumerate(op.ops))
    found = torch.stack([op(x) for _ in range(200)])
    assert (found.mean(0) - want).abs().max() < 4 * found.std(0).max() / math.sqrt(200) + 1e-4
    op = edge()
    op(x).square().mean().backward()
    assert bool((op.logits.grad != 0).all()) and all(bool(c.weight.grad.any()) for c in op.ops)


def test_costs_and_choices():
    op = edge()
    with pytest.raises(InputError, match="after the first image"):
        op.bit_operations()
    op(torch.rand(1, 4, 6, 5))
    assert op.macs() == [30 * 16, 30 * 144]
    want = sum(0.25 * m * b * b for m in op.macs() for b in (4, 8))
    assert op.bit_operations().item() == pytest.approx(want)
    assert op.entropy().item() == pytest.approx(math.log(4), rel=1e-6)
    with torch.no_grad():
        op.logits[1, 0] = -1.0
        op.logits[0] = -2.0
        op.logits[1, 1] = -0.5  # all negative: the best one still wins
    assert op.choice == ("3x3", 8)
    fixed = op.fixed()
    assert isinstance(fixed, QuantizedOp) and fixed.bits == 8
    torch.testing.assert_close(fixed.op.weight, op.ops[1].weight)
    assert op.fixed("1x1", 4).op.weight.shape[-1] == 1


def test_half_wave_steps_are_the_best_of_a_grid():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs()
    for bits in (2, 4):
        best = half_wave_step(bits)

        def error(step, bits=bits):
            return float((x - (x / step).round().clamp(0, 2**bits - 1) * step).square().mean())

        assert error(best) <= min(error(best * f) for f in (0.9, 0.95, 1.05, 1.1))
    y = half_wave(torch.relu(torch.randn(64, 64)), 4)
    assert len(y.unique()) <= 16 and float(y.min()) == 0
    v = torch.tensor([0.1, 0.2, 100.0] + [0.1] * 997, requires_grad=True)
    (g,) = torch.autograd.grad(half_wave(v, 4).sum(), v)
    assert g[2] == 0 and g[0] == 1


def test_adaptive_norm_is_its_formula():
    torch.manual_seed(0)
    conv, x = conv_op(3, 3, 3), torch.randn(4, 3, 5, 5) * 2 + 1
    block = AdaptiveSkipNorm(conv, 3).train()
    normed = functional.batch_norm(x, None, None, training=True)
    deviation = x.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    torch.testing.assert_close(block(x), x + conv(normed) * 1.5 * deviation, rtol=1e-4, atol=1e-4)
    plain = AdaptiveSkipNorm(conv, 3, "none")
    torch.testing.assert_close(plain(x), x + conv(x))
    constant = AdaptiveSkipNorm(conv, 3).train()
    flat = torch.ones(2, 3, 4, 4, requires_grad=True)
    constant(flat).sum().backward()
    assert bool(torch.isfinite(flat.grad).all())


def test_search_and_training_of_a_network():
    torch.manual_seed(0)
    net = SuperResolution(super_edges(8, edges=2), 8)
    assert len(edges_of(net)) == 2
    trace = search(net, batches(), steps=8, warmup=0.5, lr_logits=0.3, penalty=5.0)
    assert trace.bit_operations[0] == trace.bit_operations[3] > trace.bit_operations[-1]
    assert len(trace.losses) == 8 and len(trace.seconds) == 4
    fixed = net.fixed()
    x, y = next(batches())
    assert fixed(x).shape == y.shape == net(x).shape
    assert [(e.op.kernel_size[0], e.bits) for e in fixed.edges] == [
        ({"1x1": 1, "3x3": 3, "5x5/4": 5}[op], bits) for op, bits in net.choice
    ]
    losses = train_images(fixed, itertools.repeat((x, y)), steps=20, lr=3e-3)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(fixed.head.weight.shape, net.head.weight.shape)


def test_bad_input():
    with pytest.raises(InputError, match="odd"):
        conv_op(4, 4, 2)
    with pytest.raises(InputError, match="do not divide"):
        conv_op(4, 6, 3, groups=4)
    with pytest.raises(InputError, match="operation and a width"):
        MixedOp({}, (4,))
    with pytest.raises(InputError, match="no operation"):
        edge().fixed("7x7", 4)
    with pytest.raises(InputError, match="norm is"):
        AdaptiveSkipNorm(nn.Identity(), 3, "layer")
    net = SuperResolution(super_edges(4, edges=1), 4)
    for options in ({"steps": 0}, {"warmup": 1.0}, {"lr": 0.0}, {"entropy": -1.0}):
        with pytest.raises(InputError):
            search(net, batches(), **{"steps": 2, **options})
    with pytest.raises(InputError, match="no edges"):
        search(nn.Linear(2, 2), batches(), steps=1)
    with pytest.raises(InputError, match="choices"):
        net.fixed([("1x1", 4)] * 2)
    with pytest.raises(InputError, match="can still choose"):
        net.fixed([("1x1", 4)]).fixed([("1x1", 4)])
    with pytest.raises(NonFiniteError):
        train_images(
            net.fixed([("1x1", 4)]),
            iter([(torch.full((1, 1, 8, 8), torch.nan), torch.zeros(1, 1, 16, 16))]),
            steps=1,
        )
