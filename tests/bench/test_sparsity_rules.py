"""The comparison of sparsity rules: equal budgets, and a target that only the whole interval meets."""

from __future__ import annotations

from math import nan

import pytest

import bench.__main__ as bench_main
from actlas.core.measurement import Measurement
from actlas.measure.sparsity_price import compare_rules
from bench import sparsity_rules
from bench.sparsity_rules import OWN, chess_share, figures
from tests.core.tiny import TEXTS, tiny


def measured(own: tuple[float, float, float]) -> list[Measurement]:
    found = []
    for name in ("WINA", OWN):
        group = {"rule": name}
        found.append(Measurement("weights-touched", 0.5, "fraction", 9, group=group))
        found.append(Measurement("perplexity-ratio", 1.5, "ratio", 9, 1.4, 1.6, group=group))
    value, low, high = own
    group = {"rule": OWN, "over": "WINA"}
    return [*found, Measurement("extra-loss", value, "nats/token", 9, low, high, group=group)]


@pytest.mark.parametrize(
    ("own", "verdict"),
    [((-0.2, -0.3, -0.1), "met"), ((-0.1, -0.3, 0.1), "MISSED"), ((nan, nan, nan), "not measured")],
)
def test_the_whole_interval_must_lie_below_0(own: tuple[float, float, float], verdict: str) -> None:
    *shown, last = figures(measured(own), ["WINA"])
    assert last.verdict == verdict
    assert [f.what.split(":")[0] for f in shown] == ["WINA", OWN] and not any(f.verdict for f in shown)


def test_chess_skips_half_of_all_weights() -> None:
    model = tiny("llama")
    share = chess_share(model, 0.3)
    blocks = model.module.model.layers
    saved = [share * m.weight.numel() for b in blocks for m in (b.mlp.up_proj, b.mlp.down_proj)]
    saved += [share * m.weight.numel() for b in blocks for m in (b.self_attn.q_proj, b.self_attn.o_proj)]
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    every = [m.weight.numel() for n, m in model.module.named_modules() if n.split(".")[-1] in parts]
    assert sum(saved) == pytest.approx(0.3 * sum(every))


def test_the_command_finds_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity_rules, "main", lambda rounds: rounds == 2)
    monkeypatch.setattr("sys.argv", ["bench", "sparsity-rules", "--rounds", "2"])
    assert bench_main.main() == 0


def test_all_rules_touch_half_of_a_models_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    for name, value in (("CALIBRATION", 600), ("GRADIENTS", 200), ("CONTEXT", 48)):
        monkeypatch.setattr(sparsity_rules, name, value)
    made = sparsity_rules.rules(model, TEXTS * 4)
    found = compare_rules(model, TEXTS, made, pairs=[(OWN, "WINA")], context=48)
    touched = {m.group["rule"]: m.value for m in found if m.name == "weights-touched"}
    assert touched.keys() == made.keys() and all(0.4 < share < 0.6 for share in touched.values()), touched
    assert len(figures(found, ["WINA"])) == 3
