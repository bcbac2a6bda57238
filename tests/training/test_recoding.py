"""Recoding of recurrent states: signals, steps, redecoding and training, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ShapeError
from actlas.training.recoding import Recoding, RecurrentLM, fit_recurrent, read
from actlas.training.recoding_signals import EnsembleDecoder, Signal, StepSize, entropy

V, D = 11, 16


def tokens(rows: int = 5, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def wide(layers: int = 1, decoder: str = "linear") -> RecurrentLM:
    return RecurrentLM(V, D, layers, decoder=decoder, seed=1).double()  # type: ignore[arg-type]


def test_cells_are_those_of_torch() -> None:
    model = wide(layers=2)
    own = nn.LSTM(D, D, 2, batch_first=True).double()
    with torch.no_grad():
        for i in range(2):
            w = model.gates[i].weight
            getattr(own, f"weight_ih_l{i}").copy_(w[:, :D])  # type: ignore[index]
            getattr(own, f"weight_hh_l{i}").copy_(w[:, D:])  # type: ignore[index]
            getattr(own, f"bias_ih_l{i}").copy_(model.gates[i].bias)
            getattr(own, f"bias_hh_l{i}").zero_()
    ids = tokens()
    states, _ = own(model.embed(ids[:, :-1]))
    logits = model.decode(states)
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(read(model, ids).nll.flatten(), wanted.detach())


@pytest.mark.parametrize("what", ["target_nll", "entropy", "mc_dropout"])
@pytest.mark.parametrize("layers", [1, 2])
def test_small_steps_lower_every_signal(what: str, layers: int) -> None:
    got = read(wide(layers), tokens(), Recoding(what, 1e-3))  # type: ignore[arg-type]
    assert bool((got.after < got.before).all())


def test_corrected_state_against_finite_differences() -> None:
    model = wide()
    ids = tokens(rows=2)
    state = model.step(ids[:, 0], model.start(2))
    (new_h, new_c), before = Recoding("entropy", 0.5)(state, model.decode, ids[:, 1])[0][0], state[0]
    gates = model.gates[0](torch.cat([model.embed(ids[:, 0]), torch.zeros(2, D).double()], -1)).chunk(4, -1)

    def delta(c: Tensor) -> Tensor:  # through h = o tanh(c)
        return entropy(model.decode(gates[2].sigmoid() * 0 + gates[3].sigmoid() * c.tanh()))

    step = 1e-6
    for j in range(D):
        e = torch.zeros(D).double()
        e[j] = step
        h, c = before
        by_h = (entropy(model.decode(h + e)) - entropy(model.decode(h - e))) / (2 * step)
        by_c = (delta(c + e) - delta(c - e)) / (2 * step)
        torch.testing.assert_close(h[:, j] - new_h[:, j], 0.5 * by_h, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(c[:, j] - new_c[:, j], 0.5 * by_c, atol=1e-7, rtol=1e-4)


def test_rows_are_independent_and_step_zero_changes_nothing() -> None:
    model, ids = wide(), tokens()
    whole = read(model, ids, Recoding("target_nll", 0.3)).nll
    torch.testing.assert_close(whole[2:3], read(model, ids[2:3], Recoding("target_nll", 0.3)).nll)
    assert torch.equal(read(model, ids, Recoding("entropy", 0.0)).nll, read(model, ids).nll)
    first, second = ids[:, :5], ids[:, 4:]  # reading in pieces is reading at once
    a = read(model, first, Recoding("target_nll", 0.3))
    b = read(model, second, Recoding("target_nll", 0.3), a.state)
    torch.testing.assert_close(torch.cat([a.nll, b.nll], 1), whole)


def test_surprisal_never_sees_its_own_target_in_time() -> None:
    model, ids = wide(), tokens()
    other = ids.clone()
    other[:, 4] = (other[:, 4] + 1) % V
    a, b = (read(model, x, Recoding("target_nll", 2.0)) for x in (ids, other))
    assert torch.equal(a.nll[:, :3], b.nll[:, :3])
    # the first prediction is made before any correction, so it equals the model's own
    assert torch.equal(a.nll[:, 0], read(model, ids).nll[:, 0])
    assert not torch.equal(a.nll[:, 1], read(model, ids).nll[:, 1])
    with pytest.raises(InputError, match="told the answer"):
        Recoding("target_nll", redecode=True)
    entropy_first = read(model, ids, Recoding("entropy", 2.0)).nll[:, 0]
    assert not torch.equal(entropy_first, a.nll[:, 0])  # decoded again


def test_mc_dropout_and_ensemble_signals_against_loops() -> None:
    model = wide()
    h = torch.randn(3, D).double()
    signal = Signal("mc_dropout", samples=4, seed=3)
    signal.draw(D)
    assert signal._masks is not None
    p = sum(model.decode(h * m).softmax(-1) for m in signal._masks.double()) / 4
    torch.testing.assert_close(signal(h, model.decode, tokens()[0]), -(p * p.log()).sum(-1))

    ensemble = EnsembleDecoder(D, V, 3).double()
    p = sum((h @ w.T + b).softmax(-1) for w, b in zip(ensemble.weight, ensemble.bias, strict=True)) / 3
    torch.testing.assert_close(ensemble(h), p.log())
    torch.testing.assert_close(Signal("ensemble")(h, ensemble, tokens()[0]), -(p * p.log()).sum(-1))
    assert float(ensemble.anchor_loss(10).detach()) == 0
    with torch.no_grad():
        ensemble.weight[1] += 0.5
    assert float(ensemble.anchor_loss(10).detach()) == pytest.approx(3.0 / 10 * 0.25 * D * V / 3)
    with pytest.raises(InputError, match="decoder is an ensemble"):
        read(model, tokens(), Recoding("ensemble"))


def test_step_sizes_start_where_they_are_told_and_learn() -> None:
    h = torch.randn(4, D)
    assert StepSize("constant", 0.3)(h) == 0.3
    assert float(StepSize("learned", 0.3)(h)) == pytest.approx(0.3, rel=1e-5)
    steps = StepSize("mlp", 0.3, D)(h)
    assert isinstance(steps, Tensor) and steps.shape == (4, 1) and float((steps - 0.3).abs().max()) < 0.1
    for size in ("learned", "mlp"):
        model, recoding = RecurrentLM(V, D), Recoding("target_nll", 0.1, size=size, width=D)
        before = [p.detach().clone() for p in recoding.parameters()]
        fit_recurrent(model, tokens(1, 400)[0], steps=3, recoding=recoding, batch=4, length=10)
        assert any(not torch.equal(a, b) for a, b in zip(before, recoding.parameters(), strict=True))


@pytest.mark.parametrize("decoder", ["linear", "ensemble"])
def test_training_with_recoding_learns(decoder: str) -> None:
    text = torch.tensor([1, 2, 3, 4, 5, 6] * 100)
    model = RecurrentLM(V, D, decoder=decoder)  # type: ignore[arg-type]
    signal = "target_nll" if decoder == "linear" else "ensemble"
    losses = fit_recurrent(
        model,
        text,
        steps=40,
        recoding=Recoding(signal, 0.05),
        batch=8,
        length=12,
        rate=2e-2,  # type: ignore[arg-type]
    )
    assert losses[-1] < 0.5 * losses[0]


def test_the_random_control_is_as_long_as_the_gradient() -> None:
    model, ids = wide(), tokens()
    state = model.step(ids[:, 0], model.start(5))
    made = [Recoding("entropy", 1.0, random=r)(state, model.decode, ids[:, 1])[0] for r in (False, True)]
    lengths = [(state[0][0] - m[0][0]).norm(dim=-1) for m in made]
    torch.testing.assert_close(lengths[0], lengths[1])
    assert not torch.allclose(made[0][0][0], made[1][0][0])


def test_bad_input() -> None:
    with pytest.raises(InputError, match="negative step"):
        Recoding("entropy", -0.1)
    with pytest.raises(InputError, match="did you mean entropy"):
        Recoding("entropie")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no gradient"):
        read(wide(), tokens(), Recoding(lambda h, decode, y: y.double()))
    with pytest.raises(InputError, match="no gradient"):
        read(wide(), tokens(), Recoding(lambda h, decode, y: torch.ones(5, requires_grad=True)))
    with pytest.raises(InputError, match="cannot start from 0"):
        StepSize("learned", 0.0)
    with pytest.raises(InputError, match="states' width"):
        StepSize("mlp", 0.1)
    with pytest.raises(ShapeError, match=r"\[rows, 2 or more\]"):
        read(wide(), torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(InputError, match="need 1152, not 100"):
        fit_recurrent(wide(), tokens(1, 100)[0], steps=1)
