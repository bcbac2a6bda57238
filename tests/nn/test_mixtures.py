"""Mixtures of experts: the routed layer against brute force, the wide view, the router's statistics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy.stats import spearmanr

from actlas.core.errors import ArtifactError, InputError, ShapeError
from actlas.core.lens import Lens
from actlas.core.swap import MODULE_TYPES
from actlas.nn import ExpertDictionary, MoEX, SparsityRouter, SwitchMoE, balance_loss
from tests.core.families import BY_NAME

KINDS = {"moe-x": MoEX, "switch": SwitchMoE}


def layer(kind="moe-x", *, d=10, hidden=6, experts=5, top_k=2, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    made = KINDS[kind](d, hidden, experts, top_k, bias=True, **options).to(dtype)
    with torch.no_grad():
        for bias in (made.b_enc, made.b_up, made.b_dec):
            if bias is not None:
                bias.normal_()
    return made


def rows(n=40, d=10, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def brute_force(made, x, gates=True):
    """Every expert at every row, one by one, and then the choice."""
    routing = made.route(x)
    y, z = torch.zeros_like(x), torch.zeros(len(x), made.experts * made.hidden, dtype=x.dtype)
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[made.activation]
    for i in range(len(x)):
        for place in range(made.top_k):
            j = int(routing.experts[i, place])
            h = act(made.w_enc[j] @ x[i] + made.b_enc[j])
            if made.w_up is not None:
                h = h * (made.w_up[j] @ x[i] + made.b_up[j])
            w = routing.gates[i, place].to(x) if gates else 1.0
            y[i] += w * (made.w_dec[j] @ h)
            z[i, j * made.hidden : (j + 1) * made.hidden] = w * h
    return y + made.b_dec, z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_layer_and_its_features_are_what_brute_force_gives(kind, gated, top_k):
    made, x = layer(kind, gated=gated, top_k=top_k), rows()
    with torch.no_grad():
        y, z = brute_force(made, x)
        _, bare = brute_force(made, x, gates=False)
        torch.testing.assert_close(made(x), y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(made.features(x, gated=True), z, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(made.features(x), bare, rtol=1e-10, atol=1e-12)
        shaped = made(x.reshape(4, 10, -1))
        assert shaped.shape == (4, 10, 10)
        torch.testing.assert_close(shaped.reshape(40, -1), y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_the_wide_view_is_the_layer(kind, gated):
    made, x = layer(kind, gated=gated), rows()
    with torch.no_grad():
        y = made(x)
        z = made.features(x, gated=True)
        torch.testing.assert_close(z @ made.atoms + made.b_dec, y, rtol=1e-9, atol=1e-12)
        assert int((z != 0).sum(1).max()) <= 2 * made.hidden
        exact = made.as_dictionary("blocks.1.mlp_norm", gated=True)
        torch.testing.assert_close(exact.reconstruct(x), y, rtol=1e-9, atol=1e-12)
        bare = made.as_dictionary("blocks.1.mlp_norm")
        torch.testing.assert_close(bare.encode(x).dense(), made.features(x))
        assert float((bare.reconstruct(x) - y).abs().max()) > 1e-3
    assert exact.target == "blocks.1.mlp.out" and exact.features == 30 and exact.channels == 10
    assert exact.expert_of(13) == 2


def test_a_dictionary_keeps_the_weights_of_its_moment_and_saves_and_loads(tmp_path):
    model = BY_NAME["llama"].model()
    made = layer("switch", d=32, dtype=torch.float32)
    found = made.as_dictionary("blocks.1.mlp_norm", gated=True)
    x = rows(d=32, dtype=torch.float32)
    before = found.encode(x)
    with torch.no_grad():
        made.w_enc.zero_()
    assert torch.equal(found.encode(x).dense(), before.dense())
    found.save(tmp_path / "d", model)
    again = Lens.load(tmp_path / "d", model)
    assert isinstance(again, ExpertDictionary)
    assert torch.equal(again.encode(x).dense(), before.dense()) and torch.equal(again.atoms, found.atoms)
    with pytest.raises(InputError, match="at one site"):
        found.edit({3: 0.0})
    with pytest.raises(InputError, match="nothing to substitute"):
        found.substitute()
    assert found.edit(3, 2.0).site == "blocks.1.mlp.out"
    with pytest.raises(InputError, match="say where it writes"):
        made.as_dictionary("blocks.1.resid_pre")
    with pytest.raises(ArtifactError, match="no mixture of experts"):
        ExpertDictionary(site="a", target="b", layer={"type": "Linear"}, w_enc=made.w_enc, w_dec=made.w_dec)


# -- the router ------------------------------------------------------------------------------------


def test_predicted_activity_is_the_normal_approximation():
    made, x = layer(), rows()
    predicted = made.predicted_l0(x).detach()
    for i in range(5):
        for j in range(made.experts):
            w, b = made.w_enc[j].detach(), made.b_enc[j].detach()
            mean = float((w.mean(0) * x[i]).sum() + b.mean())
            var = float((w.var(0, correction=0) * x[i] ** 2).sum() + b.var(correction=0))
            expected = made.hidden * 0.5 * (1 + math.erf(mean / math.sqrt(2 * var)))
            assert float(predicted[i, j]) == pytest.approx(expected, rel=1e-5)


def test_it_chooses_the_sparsest_and_its_gates_are_the_softmax_of_the_scores():
    made, x = layer(floor=0.0), rows()
    routing = made.route(x)
    order = made.predicted_l0(x).argsort(1)
    assert torch.equal(routing.experts, order[:, :2])
    expected = torch.softmax(routing.scores.gather(1, routing.experts), 1)
    torch.testing.assert_close(routing.gates, expected)
    torch.testing.assert_close(
        routing.scores, 1 - 2 * made.predicted_l0(x) / made.hidden, atol=1e-5, rtol=1e-5
    )


def test_prediction_ranks_random_experts_by_their_true_sparsity():
    torch.manual_seed(3)
    made, x = MoEX(96, 192, 8), torch.randn(300, 96)
    true = (torch.einsum("nd,mhd->nmh", x, made.w_enc) > 0).sum(2)
    predicted = made.predicted_l0(x).detach()
    found = sum(spearmanr(p, t)[0] for p, t in zip(predicted, true, strict=True)) / 300
    assert found > 0.65
    learned = SwitchMoE(96, 192, 8).route(x).scores.detach()
    assert abs(sum(spearmanr(-s, t)[0] for s, t in zip(learned, true, strict=True)) / 300) < 0.3


def test_saturated_experts_are_still_told_apart():
    made = layer(dtype=torch.float32, floor=0.0)
    with torch.no_grad():
        made.b_enc.copy_(torch.tensor([-50.0, -70.0, -60.0, -80.0, -55.0]).unsqueeze(1) + torch.randn(5, 6))
    routing = made.route(torch.zeros(1, 10))
    t = made.router.standardised(torch.zeros(1, 10), made.w_enc, made.b_enc)
    assert len(set(routing.scores[0].tolist())) == 1  # erf has saturated
    assert routing.experts[0].tolist() == t[0].argsort()[:2].tolist()


def test_a_dead_expert_wins_without_a_floor_and_not_with_one():
    dead = 3
    x = rows(200)
    for floor, wins in ((0.0, True), (0.05, False)):
        made = layer(floor=floor)
        with torch.no_grad():
            made.b_enc[dead] -= 100
        assert bool((made.route(x).experts[:, 0] == dead).all()) is wins
    with pytest.raises(InputError, match="floor is 0.5"):
        SparsityRouter(2, 0.5)


def test_gradients_reach_the_encoders_through_mean_and_variance():
    made, x = layer(floor=0.0), rows(8)
    made.double()

    def scores(weight, bias):
        mean, var, bias_mean, bias_var = (
            weight.mean(1),
            weight.var(1, correction=0),
            bias.mean(1),
            bias.var(1, correction=0),
        )
        return -torch.erf((x @ mean.T + bias_mean) / torch.sqrt(2 * ((x * x) @ var.T + bias_var)))

    weight = made.w_enc.detach().clone().requires_grad_()
    bias = made.b_enc.detach().clone().requires_grad_()
    up = torch.randn(8, 5, dtype=torch.float64)
    expected = torch.autograd.grad((scores(weight, bias) * up).sum(), (weight, bias))
    found = torch.autograd.grad((made.route(x).scores.double() * up).sum(), (made.w_enc, made.b_enc))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_zero_input_gives_finite_outputs_and_gradients():
    made = MoEX(8, 4, 3)
    x = torch.zeros(5, 8, requires_grad=True)
    made(x).square().sum().backward()
    assert float(made.predicted_l0(x)[0, 0]) == pytest.approx(2.0)
    assert torch.isfinite(x.grad).all() and torch.isfinite(made.w_enc.grad).all()


def test_statistics_are_kept_until_the_weights_change(monkeypatch):
    made, x = layer(dtype=torch.float32), rows(dtype=torch.float32)
    import actlas.nn.sparsity_router as module

    calls = []
    real = module._statistics
    monkeypatch.setattr(module, "_statistics", lambda *a: calls.append(1) or real(*a))
    with torch.no_grad():
        first = made.predicted_l0(x)
        made.predicted_l0(x)
        assert len(calls) == 1
    made(x)  # with gradients: its own graph, and nothing stays
    made(x)
    assert len(calls) == 3
    with torch.no_grad():
        for change in (
            lambda: made.w_enc.add_(0.1),
            lambda: made.w_enc.data.mul_(2.0),
            lambda: made.load_state_dict({k: v + 1 for k, v in made.state_dict().items()}),
            lambda: made.b_enc.add_(1.0),
        ):
            made.predicted_l0(x)
            change()
            now = made.predicted_l0(x)
            made.router.forget()
            assert torch.equal(now, made.predicted_l0(x)) and not torch.equal(now, first)
            first = now


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_an_optimizers_step_is_seen(options):
    made, x = layer(dtype=torch.float32), rows(dtype=torch.float32)
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.05, **options)
    made(x).square().mean().backward()
    with torch.no_grad():
        before = made.predicted_l0(x)  # cached between the backward pass and the step
    optimiser.step()
    with torch.no_grad():
        after = made.predicted_l0(x)
        made.router.forget()
        assert torch.equal(after, made.predicted_l0(x)) and not torch.equal(after, before)


def test_bfloat16_weights_have_float32_statistics():
    wide = layer(dtype=torch.float32)
    low = copy.deepcopy(wide).to(torch.bfloat16)
    wide.load_state_dict(low.state_dict())  # the same rounded weights
    mean, var, *_ = low.router.statistics(low.w_enc, low.b_enc)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(var, wide.w_enc.var(1, correction=0))
    x = rows(dtype=torch.float32).to(torch.bfloat16)
    assert torch.equal(low.route(x).experts, wide.route(x.float()).experts)
    assert low(x).dtype == torch.bfloat16


# -- balance, copying, configuration ---------------------------------------------------------------


def test_balance_loss_is_switchs():
    made, x = layer("switch"), rows(300)
    made(x)
    routing = made.routed
    f = torch.tensor([(routing.experts == j).double().sum() / (300 * 2) for j in range(5)])
    p = torch.softmax(x.float() @ made.router.weight.float().T, 1).mean(0).double()
    assert float(balance_loss(made)) == pytest.approx(float(5 * (f * p).sum()), rel=1e-5)
    assert balance_loss(made).requires_grad
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[0] = 100.0
    made(x.abs())
    assert float(balance_loss(made).detach()) == pytest.approx(
        2.5, rel=1e-3
    )  # one of two choices always the same


def test_balance_needs_a_forward_pass_with_gradients():
    made, x = layer(), rows()
    with pytest.raises(InputError, match="call the model first"):
        balance_loss(made)
    with torch.no_grad():
        made(x)
    with pytest.raises(InputError, match="call the model first"):
        balance_loss(made)


def test_training_on_balance_alone_balances():
    made, x = layer("switch", d=10, dtype=torch.float32), rows(400, dtype=torch.float32)
    with torch.no_grad():
        made.router.weight[0] += 0.5 * x.mean(0) + 1.0
    start = float(made.route(x).load.max())
    optimiser = torch.optim.Adam(made.router.parameters(), lr=0.05)
    for _ in range(60):
        made(x)
        optimiser.zero_grad()
        balance_loss(made).backward()
        optimiser.step()
    assert float(made.route(x).load.max()) < min(start, 0.35)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_configurations_give_the_same_layer(kind):
    made, x = layer(kind, gated=True), rows()
    made(x)  # leaves a graph behind
    twin = copy.deepcopy(made)
    with torch.no_grad():
        assert torch.equal(twin(x), made(x))
        new = MODULE_TYPES[type(made).__name__].from_config(made.config())
        new.load_state_dict(made.state_dict())
        assert torch.equal(new(x), made(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"d": 0}, "d is 0"),
        ({"experts": 0}, "experts is 0"),
        ({"top_k": 6}, "top_k is 6; with 5 experts"),
        ({"top_k": 0}, "top_k is 0"),
        ({"activation": "rellu"}, "no activation 'rellu'; did you mean relu"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(InputError, match=message):
        MoEX(**{"d": 4, "hidden": 3, "experts": 5, "top_k": 2, **arguments})


def test_bad_input_and_configuration():
    with pytest.raises(ShapeError, match="reads 10 channels"):
        layer()(torch.zeros(2, 9, dtype=torch.float64))
    with pytest.raises(InputError, match="must be one of floats"):
        MoEX.from_config({**layer().config(), "dtype": "int8"})
    assert layer()(torch.zeros(0, 10, dtype=torch.float64)).shape == (0, 10)
