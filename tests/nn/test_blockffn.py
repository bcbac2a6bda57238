"""BlockFFN, its losses and chunk-level sparsity against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actlas.core.errors import InputError, ShapeError
from actlas.core.model import Model
from actlas.core.swap import SwapModule
from actlas.measure.chunk_sparsity import cls, tls
from actlas.measure.routing import trace_routing
from actlas.nn import BlockFFN
from actlas.training.chunk_losses import AdaptiveWeight, activation_locality, chunk_sparsification
from tests.core.tiny import TEXTS, tiny


def layer() -> BlockFFN:
    torch.manual_seed(0)
    m = BlockFFN(6, 5, 7)
    with torch.no_grad():
        m.router.weight.copy_(torch.randn(7))
    return m


def test_layer_is_its_equations_with_and_without_gradients() -> None:
    m, x = layer().double(), torch.randn(11, 6, dtype=torch.float64)
    want = torch.zeros(11, 6, dtype=torch.float64)
    for t in range(11):
        a1 = F.relu(m.router.linear.weight.float() @ x[t].float())
        a = m.router.weight.float() * a1 / (a1.square().mean() + 1e-6).sqrt()
        for i in range(7):
            if a1[i] > 0:
                z = m.w_enc[i] @ x[t]
                want[t] += a[i].double() * (m.w_dec[i] @ (z * torch.sigmoid(z)))
    torch.testing.assert_close(m(x), want, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(m(x), want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(m.features(x, gated=True) @ m.atoms, want, atol=1e-6, rtol=1e-5)


def test_no_expert_gives_zero_and_finite_gradients() -> None:
    m = layer()
    x = torch.randn(4, 6, requires_grad=True)
    with torch.no_grad():
        m.router.linear.weight.zero_()
    y = m(x)
    assert not y.any()
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *m.parameters()) if p.grad is not None)
    with torch.no_grad():
        assert not m(x).any()


def test_router_learns_and_mask_is_by_score_not_gate() -> None:
    m, x = layer(), torch.randn(9, 6)
    assert (m.router.weight < 0).any()
    said = m.route(x)
    assert torch.equal(said.active, said.scores > 0) and (said.gates[said.active] < 0).any()
    m(x).square().sum().backward()
    assert m.router.linear.weight.grad is not None and m.router.linear.weight.grad.any()


def test_chunk_loss_is_the_product() -> None:
    w = F.relu(torch.randn(2, 11, 5))
    p = w / (w.sum(-1, keepdim=True) + 1e-5)
    values = []
    for b in range(2):
        for c in range(2):
            for i in range(5):
                left = 1.0
                for k in range(4):
                    left *= 1 - float(p[b, 4 * c + k, i]) + 1e-5
                values.append(1 - left)
    assert float(chunk_sparsification(w, chunk=4)) == pytest.approx(np.mean(values), abs=1e-5)
    one = torch.zeros(1, 8, 5)
    one[..., 2] = 3.0  # one expert for all: as sparse as it gets, and finite
    assert float(chunk_sparsification(one, chunk=8)) == pytest.approx(0.2, abs=1e-3)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 4:] = False
    before = w.clone()
    assert float(chunk_sparsification(w, chunk=4, mask=mask)) < float(chunk_sparsification(w, chunk=4))
    assert torch.equal(w, before)


def test_locality_loss_is_its_equation() -> None:
    a = torch.randn(2, 5, 3) / 100
    p = torch.sigmoid(100 * a)
    want = F.binary_cross_entropy(p[:, :-1], p[:, 1:], reduction="mean")
    assert float(activation_locality(a)) == pytest.approx(float(want), rel=1e-4)
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    kept = F.binary_cross_entropy(p[:, :-1], p[:, 1:], reduction="none").mean(-1)
    kept = torch.cat([kept[0, [0, 2, 3]], kept[1]]).mean()
    assert float(activation_locality(a, documents=documents)) == pytest.approx(float(kept), rel=1e-4)
    steady = torch.randn(1, 1, 3).expand(1, 6, 3)
    assert float(activation_locality(steady)) < float(activation_locality(torch.randn(1, 6, 3)))


def test_adaptive_weight_follows_the_rule() -> None:
    weight = AdaptiveWeight(start=1.0, warm=20, every=10)
    seen = [weight.step(1.0) for _ in range(19)]
    assert set(seen) == {1.0}
    for _ in range(10):
        weight.step(0.5)  # at step 20: the loss fell a little below
    low = weight.value
    assert low < 1.0
    for _ in range(400):
        weight.step(weight._losses[-1] * 1.01)
    assert weight.value == pytest.approx(4.0)
    with pytest.raises(InputError, match="warm is 5"):
        AdaptiveWeight(warm=5)


def test_sparsity_of_tokens_and_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(50, 12, generator=generator) < 0.3
    windows = np.repeat([0, 1, 2], [21, 20, 9])
    t = tls(active).value
    assert t == pytest.approx(1 - float(active.double().mean()))
    assert cls(active, windows, 1).value == pytest.approx(t)
    values = []
    for w in range(3):
        part = active[windows == w]
        for c in range(len(part) // 4):
            values.append(1 - float(part[4 * c : 4 * c + 4].any(0).double().mean()))
    assert cls(active, windows, 4).value == pytest.approx(np.mean(values))
    by_length = [cls(active[:40], np.zeros(40, int), length).value for length in (1, 2, 4, 8)]
    assert by_length == sorted(by_length, reverse=True)
    steady = active[:1].repeat(50, 1) | (torch.arange(50)[:, None] // 25 == torch.arange(12))
    assert cls(steady, windows, 4).value > cls(steady, windows, 4, shuffled=True).value


def test_trace_edit_and_saving(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from actlas.core.edit import Edit

    model: Model = tiny("llama")
    d = model.d_model or 0
    torch.manual_seed(0)
    edit = SwapModule("model.layers.0.mlp", BlockFFN(d, 4, 6).eval())
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model)):
        trace = trace_routing(model, TEXTS)
        x = model.trace(TEXTS[0], "blocks.0.mlp_norm")["blocks.0.mlp_norm"][0]
    assert trace.layers == (0,)
    assert torch.equal(trace.active[0][: len(x)], edit.module.route(x).active)
    assert torch.equal(trace.active[0], trace.logits[0] > 0)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="hidden is 0"):
        BlockFFN(6, 0)
    with pytest.raises(InputError, match="chunk is 9"):
        chunk_sparsification(torch.ones(1, 8, 2), chunk=9)
    with pytest.raises(ShapeError, match="scores must be"):
        activation_locality(torch.ones(1, 1, 2))
    with pytest.raises(ShapeError, match="a mask is bool"):
        tls(torch.ones(3, 2))
    with pytest.raises(InputError, match="no window has 9"):
        cls(torch.ones(8, 2, dtype=torch.bool), np.zeros(8, int), 9)
