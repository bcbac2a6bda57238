"""Latent attention, squared ReLU, PLM, delta activations: identities, gradients, streams, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.swap import MODULE_TYPES
from actlas.nn.delta_activation import DeltaActivation, DeltaLayer, DeltaStream, temporal_penalty
from actlas.nn.mla import LatentCache, MLAttention, rotate
from actlas.nn.plm import PLM, PLMConfig
from actlas.nn.squared_relu import ReLU2MLP

SMALL = PLMConfig(vocab=31, d=24, layers=2, heads=3, hidden=40, rank=10, nope=6, rope=4, v_dim=5)


def attention(absorb="auto", seed=0, **sizes):
    torch.manual_seed(seed)
    given = {"rank": 10, "nope": 6, "rope": 4, "v_dim": 5, **sizes}
    return MLAttention(24, 3, absorb=absorb, **given).double()


@torch.no_grad()
def test_latent_attention_against_loops_over_heads_and_tokens():
    block = attention("never")
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    q = block.q_proj(x).reshape(2, 7, 3, 10)
    down = block.kv_down(x)
    c = block.kv_norm(down[..., :10])
    key = rotate(down[..., 10:], torch.arange(7), block.theta)
    out = torch.zeros(2, 7, 15, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            w_k, w_v = block.k_up.weight[6 * h : 6 * h + 6], block.v_up.weight[5 * h : 5 * h + 5]
            for t in range(7):
                q_r = rotate(q[b, t, h, 6:][None], torch.tensor([t]), block.theta)[0]
                scores = torch.stack(
                    [q[b, t, h, :6] @ (w_k @ c[b, s]) + q_r @ key[b, s] for s in range(t + 1)]
                ) / math.sqrt(10)
                a = scores.softmax(0)
                out[b, t, 5 * h : 5 * h + 5] = sum(a[s] * (w_v @ c[b, s]) for s in range(t + 1))
    torch.testing.assert_close(block(x), block.o_proj(out), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_absorbed_and_explicit_are_one_function_and_a_cache_changes_nothing():
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    want = attention("never")(x)
    torch.testing.assert_close(attention("always")(x), want, atol=1e-6, rtol=1e-6)
    for mode in ("auto", "always", "never"):
        block, cache = attention(mode), LatentCache()
        parts = [block(x[:, :4], cache)] + [block(x[:, t : t + 1], cache) for t in range(4, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-6, rtol=1e-6)
        assert len(cache) == 9 and cache.numbers == 9 * 14 == 9 * block.cache_numbers


@torch.no_grad()
def test_masked_tokens_are_not_read():
    block = attention()
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    other = x.clone()
    other[:, 4:] += 5
    assert torch.equal(block(x, mask=mask)[:, :4], block(other, mask=mask)[:, :4])
    torch.testing.assert_close(block(x, mask=mask)[:, :4], block(x[:, :4]), atol=1e-9, rtol=1e-9)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    x, y = torch.randn(2, 8, dtype=torch.float64)

    def dot(i, j):
        return float(rotate(x[None], torch.tensor([i]), 1e4)[0] @ rotate(y[None], torch.tensor([j]), 1e4)[0])

    assert dot(3, 1) == pytest.approx(dot(13, 11), rel=1e-5) and dot(3, 1) != pytest.approx(
        dot(3, 2), rel=1e-5
    )
    assert float(rotate(x[None], torch.tensor([7]), 1e4).norm()) == pytest.approx(float(x.norm()), rel=1e-5)


def test_plm_counts_parameters_and_generates_as_without_a_cache():
    torch.manual_seed(0)
    model = PLM(SMALL)
    assert sum(p.numel() for p in model.parameters()) == SMALL.parameters
    assert 1.8e9 < PLMConfig().parameters < 1.85e9 and PLMConfig().cache_numbers == 576
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ids = torch.randint(31, (2, 6))
    want = ids
    with torch.no_grad():
        for _ in range(5):
            want = torch.cat([want, model(want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 5), want)
    loss = model(ids, labels=ids).loss
    reference = nn.functional.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 31), ids[:, 1:].reshape(-1))
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_squared_relu_mlp_is_its_equation_and_agrees_with_transformers():
    from transformers.activations import ACT2FN

    mlp = ReLU2MLP(6, 9)
    x = torch.randn(3, 6)
    want = torch.relu(x @ mlp.up_proj.weight.T) ** 2 @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), want)
    torch.testing.assert_close(mlp.act_fn(x), ACT2FN["relu2"](x))
    again = MODULE_TYPES["ReLU2MLP"].from_config(mlp.config())
    again.load_state_dict(mlp.state_dict())
    assert torch.equal(again(x), mlp(x)) and ReLU2MLP.matching(1536) == 2304


def test_delta_activation_quantises_and_has_the_released_gradients():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for kind in ("released", "lsq"):
        layer = DeltaActivation(0.3, theta_grad=kind).double()
        q = layer(x)
        assert torch.equal(q, layer.theta * torch.round(x / layer.theta))
        g = torch.randn_like(q)
        to_x, to_theta = torch.autograd.grad(q, (x, layer.theta_raw), g)
        steps = torch.round(x / 0.3)
        want = -(g * steps).sum() if kind == "released" else (g * (steps - x / 0.3)).sum()
        assert torch.equal(to_x, g)
        torch.testing.assert_close(to_theta, want.detach(), atol=1e-5, rtol=1e-5)


def test_the_temporal_penalty_sees_time_and_not_the_first_frame():
    layer = DeltaActivation(0.5, (4,), rate=2.0, fan_out=3.0)
    x = torch.randn(2, 5, 4)
    q = layer(x)
    want = 6.0 * (q[:, 1:] - q[:, :-1]).abs().mean()
    torch.testing.assert_close(temporal_penalty(layer), want)
    layer(x[:, :1].expand(2, 5, 4) * 9)
    assert temporal_penalty(layer).item() == 0
    with torch.no_grad():
        layer(x)
    with pytest.raises(InputError, match="no delta activation"):
        temporal_penalty(layer)
    again = MODULE_TYPES["DeltaActivation"].from_config(layer.config())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_the_penalty_makes_changes_rare():
    """Minimising it alone, with the released gradient, widens the steps until nothing changes."""
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    layer = DeltaActivation(0.1, rate=1.0)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = float((layer(x).diff(dim=1) == 0).float().mean())
    for _ in range(30):
        layer(x)
        optimiser.zero_grad()
        temporal_penalty(layer).backward()
        optimiser.step()
    after = float((layer(x).diff(dim=1) == 0).float().mean())
    assert before < 0.1 and after > before + 0.3


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)))


@torch.no_grad()
def test_a_delta_stream_is_inference_and_counts_what_changed():
    torch.manual_seed(0)
    net = _Net()
    clip = torch.randn(16, 2, 1, 8, 8)
    clip[4:, :, :, :4] = clip[4, :, :, :4]  # half of the picture stands still from there on
    want = [net(f) for f in clip]
    for sync in (0, 4):
        with DeltaStream(net, sync=sync) as stream:
            got = [net(f) for f in clip]
            torch.testing.assert_close(torch.stack(got), torch.stack(want), atol=1e-4, rtol=1e-4)
            conv = stream.layers["conv"]
            assert conv.total == clip.numel() and conv.multiplied < 0.75 * conv.total
            stream.reset()
            assert torch.equal(net(clip[9]), want[9])  # a new clip begins from a whole frame
    assert type(net.conv) is nn.Conv2d and torch.equal(net(clip[3]), want[3])
    layer = DeltaLayer(net.conv)
    layer(clip[0])
    layer.multiplied = 0
    layer(clip[0])
    assert layer.multiplied == 0


@torch.no_grad()
def test_left_out_changes_are_made_up_for():
    layer = DeltaLayer(nn.Linear(3, 2), threshold=0.25)
    frames = [torch.full((1, 3), 0.1 * t) for t in range(20)]
    for frame in frames:
        got = layer(frame)
        assert float((got - layer.layer(frame)).abs().max()) <= 0.26 * float(
            layer.layer.weight.abs().sum(1).max()
        )
    assert layer.multiplied < layer.total / 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: MLAttention(24, 0), InputError),
        (lambda: MLAttention(24, 2, rope=3), InputError),
        (lambda: MLAttention(24, 2, absorb="yes"), InputError),
        (lambda: attention()(torch.zeros(2, 24).double()), ShapeError),
        (lambda: ReLU2MLP(0, 4), InputError),
        (lambda: PLM(PLMConfig(vocab=0)), InputError),
        (lambda: DeltaActivation(0.0), InputError),
        (lambda: DeltaActivation(0.1, theta_grad="ste"), InputError),
        (lambda: DeltaActivation()(torch.zeros(2, 3)), ShapeError),
        (lambda: DeltaLayer(nn.ReLU()), InputError),
        (lambda: DeltaLayer(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), InputError),
        (lambda: DeltaStream(nn.Sequential(nn.ReLU())), InputError),
        (lambda: DeltaLayer(nn.Linear(2, 2))(torch.tensor([[math.nan, 1.0]])), NonFiniteError),
    ],
)
def test_bad_input(call, error):
    with pytest.raises(error) as found:
        call()
    assert "\n" not in str(found.value)


def test_a_clip_of_another_shape_is_refused():
    layer = DeltaLayer(nn.Linear(2, 2))
    layer(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match="reset"):
        layer(torch.zeros(2, 2))
