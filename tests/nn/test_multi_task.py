"""MMoE, PLE and HoME against the equations written out, and the diagnostics on planted illnesses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.measure.expert_health import (
    expert_collapse,
    expert_degradation,
    expert_health,
    expert_underfitting,
)
from actlas.nn.multi_task import GatedExpert, GateRecord, HoME, MultiTaskExperts
from tests.core.tiny import TEXTS, tiny

GROUPS = {"watch": ["long", "end"], "react": ["like"]}


def test_home_is_its_equations() -> None:
    torch.manual_seed(0)
    m = HoME(6, GROUPS, hidden=5, out=4, shared=2, own=1).double().eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(7, 6, dtype=torch.float64)

    def expert(name: str, v: torch.Tensor) -> torch.Tensor:
        e = m.experts[name]
        v = v * (2 * torch.sigmoid(v @ e.view_down.weight.T @ e.view_up.weight.T))
        h = F.relu(v @ e.mlp[0].weight.T + e.mlp[0].bias) @ e.mlp[2].weight.T + e.mlp[2].bias
        h = (h - e.norm.running_mean) / (e.norm.running_var + e.norm.eps).sqrt() * e.norm.weight + e.norm.bias
        return h * torch.sigmoid(h)

    def mix(key: str, names: list[str], v: torch.Tensor, own: str = "") -> torch.Tensor:
        g = torch.softmax(v @ m.gates[key].weight.T, -1)
        z = sum(g[:, [i]] * expert(n, v) for i, n in enumerate(names))
        if own:
            s = m.self_gates[key]
            z = z + torch.sigmoid(v @ s.weight.T + s.bias) * expert(own, v)
        return z

    one = ["1/shared/0", "1/shared/1"]
    w, r = "1/group watch/0", "1/group react/0"
    common = mix("1/shared", [*one, w, r], x)
    watch = torch.cat([mix("1/group watch", [*one, w], x, w), common], 1)
    react = torch.cat([mix("1/group react", [*one, r], x, r), common], 1)
    logits = m(x)
    for task, group, view in (("long", "watch", watch), ("end", "watch", watch), ("like", "react", react)):
        names = ["2/shared/0", "2/shared/1", f"2/group {group}/0", f"2/task {task}/0"]
        z = mix(f"2/task {task}", names, view, names[-1])
        torch.testing.assert_close(logits[task], m.towers[task](z).squeeze(-1))


def test_tasks_do_not_see_other_groups() -> None:
    m = HoME(6, GROUPS)
    x = torch.randn(32, 6)
    m(x)["like"].sum().backward()
    touched = {
        n for n, e in m.experts.items() if any(p.grad is not None and p.grad.any() for p in e.parameters())
    }
    assert "2/group react/0" in touched and "2/task like/0" in touched
    assert not any(n.startswith(("2/group watch", "2/task long")) for n in touched)


def test_private_views_begin_as_the_input_and_own_experts_always_learn() -> None:
    e = GatedExpert(6, 5, 4, rank=3)
    x = torch.randn(8, 6)
    assert torch.equal(e.view(x), x)
    for self_gate in (True, False):
        m = MultiTaskExperts(6, GROUPS, self_gate=self_gate)
        for task in m.tasks:  # a gate that ignores the task's own expert
            with torch.no_grad():
                m.gates[f"2/task {task}"].weight.zero_()
        records, _ = m.record(x)
        own = {v.group["reader"]: v.value for v in expert_underfitting([g for g in records if g.level == 2])}
        assert own["task like"] == pytest.approx(0.25, abs=1e-6) if not self_gate else own["task like"] > 0.3


@pytest.mark.parametrize("kind", ["mmoe", "ple", "home"])
def test_kinds_have_the_experts_they_should_and_learn(kind: str) -> None:
    torch.manual_seed(1)
    m = MultiTaskExperts(4, GROUPS, kind=kind, shared=2, own=1)  # type: ignore[arg-type]
    assert len(m.experts) == {"mmoe": 5, "ple": 5, "home": 4 + 2 + 2 + 3}[kind]
    x = torch.randn(256, 4)
    labels = {"long": x[:, 0] > 0, "end": x[:, 1] > 0.5, "like": x[:, 2] > 1}
    optimiser = torch.optim.Adam(m.parameters(), 1e-2)
    first = m.loss(x, labels).item()
    for _ in range(40):
        optimiser.zero_grad()
        m.loss(x, labels).backward()
        optimiser.step()
    assert m.loss(x, labels).item() < 0.6 * first
    assert m.training
    m.record(x)
    assert m.training


def test_diagnostics_find_planted_illnesses() -> None:
    x = torch.randn(500, 3)
    found = {
        m.name: m.value for m in expert_collapse({"a": x, "b": 10 * x, "dead": torch.zeros(500, 3) + 0 * x})
    }
    assert found["dead-experts"] == pytest.approx(1 / 3) and found["zero-rate"] == pytest.approx(
        1 / 3, abs=1e-3
    )
    assert found["scale-dispersion"] == float("inf")
    assert {m.name: m.value for m in expert_collapse({"a": x, "b": 10 * x})}[
        "scale-dispersion"
    ] == pytest.approx(10, rel=1e-5)

    def gate(reader: str, *w: float) -> GateRecord:
        own = (False, False, True)
        return GateRecord(1, reader, ("s0", "s1", f"own {reader}"), torch.tensor([w] * 5), own)

    even = expert_degradation([gate("a", 0.4, 0.4, 0.2), gate("b", 0.4, 0.4, 0.2)])
    taken = expert_degradation([gate("a", 0.9, 0.05, 0.05), gate("b", 0.05, 0.9, 0.05)])
    assert even[0].value == pytest.approx(0.5) and taken[0].value == pytest.approx(0.9 / 0.95)
    assert taken[1].value < even[1].value
    starved = expert_underfitting([gate("a", 0.4, 0.4, 0.2), gate("b", 0.5, 0.5, 0.0)], {"a": 0.5, "b": 0.05})
    assert {m.group["reader"]: m.value for m in starved} == pytest.approx(
        {"a": 0.2, "b": 0.0, "all": 0.1, "sparse": 0.0}
    )


def test_health_of_a_language_model() -> None:
    found = expert_health(tiny("mixtral"), TEXTS)
    assert {m.name for m in found} >= {"zero-rate", "scale-dispersion", "unused-experts", "gate-entropy"}
    assert all(0 <= m.value <= 1 for m in found if m.name == "gate-entropy")
    with pytest.raises(ModelError, match="no block with stacked experts"):
        expert_health(tiny("llama"), TEXTS)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="kind is 'moe'"):
        MultiTaskExperts(4, GROUPS, kind="moe")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="each once"):
        HoME(4, {"a": ["t"], "b": ["t"]})
    with pytest.raises(InputError, match="cannot name"):
        HoME(4, {"a": ["t.1"]})
    with pytest.raises(InputError, match="shared is 0"):
        HoME(4, GROUPS, shared=0)
    with pytest.raises(InputError, match="kind of experts is 'gelu'"):
        HoME(4, GROUPS, expert="gelu")
    with pytest.raises(ShapeError, match="reads"):
        HoME(4, GROUPS)(torch.randn(3, 5))
    with pytest.raises(InputError, match="at least one"):
        expert_collapse({})
    with pytest.raises(InputError, match="own"):
        expert_underfitting([])
