"""The judges of draft-approx and pyra can say yes, no and open; their parts do what they say."""

from __future__ import annotations

import pytest
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Measured, verdict_of
from actlas.papers.reproductions import draft_approx, pyra
from actlas.papers.reproductions.code_tables import code_tables
from actlas.papers.reproductions.kept_caches import KeptCaches
from actlas.sparsity.kv_rules import RandomKV, SnapKV
from actlas.sparsity.spec_kv import SpecKV
from tests.core.tiny import tiny


def number(name: str, value: float, width: float = 0.001, **group: str) -> Measurement:
    return Measurement(name, value, "fraction", 8, value - width, value + width, group=group)


def drafted(oracle: float, good: float, bad_gap: float = 0.01, accuracy: float = 0.5) -> list[Check]:
    gain = "gain in recall over SnapKV"
    return draft_approx.judge(
        Measured(
            [
                number(gain, oracle, draft=draft_approx.ORACLE, capacity="smallest"),
                number(gain, good, draft="2 layers left out", capacity="smallest"),
                number(gain, -1.0, draft="2 layers left out", capacity="96"),
                number("gain of the oracle over the bad draft", bad_gap),
                number("gain of SnapKV over random", 0.2),
                number("answer accuracy", accuracy, arm="SnapKV"),
                number("answer accuracy", accuracy, arm="SpecKV, 2 layers left out"),
                number("change of accuracy, SpecKV against SnapKV", 0.0),
                number("change of accuracy, SpecPC against last tokens", 0.4),
            ]
        )
    )


def test_draft_approx_judge() -> None:
    assert verdict_of(drafted(0.02, 0.01)) == "holds"
    assert verdict_of(drafted(0.02, -0.01)) == "partly"
    assert verdict_of(drafted(-0.02, -0.01)) == "does not hold here"
    assert verdict_of(drafted(0.0, 0.0)) == "not testable here"
    assert verdict_of(drafted(0.02, 0.01, bad_gap=-0.01)) == "partly"
    floor = {c.name: c.passed for c in drafted(0.02, 0.01, accuracy=0.0)}
    assert floor["SpecKV answers no worse than SnapKV"] is None


def merged(high: float, low: float = 0.0, cost: float = 0.05, start: float = 0.0) -> list[Check]:
    gain = "accuracy of PYRA minus merging alone"
    return pyra.judge(
        Measured(
            [
                number(gain, high, compression="high"),
                number(gain, low, compression="low"),
                number("accuracy of LoRA minus LoRA with merging", cost, compression="high"),
                Measurement("largest difference at the start", start, "logits", 8),
            ]
        )
    )


def test_pyra_judge() -> None:
    assert verdict_of(merged(0.02)) == "holds"
    assert verdict_of(merged(-0.02)) == "does not hold here"
    assert verdict_of(merged(0.0)) == "not testable here"
    assert verdict_of(merged(0.02, low=-0.02)) == "partly"
    assert verdict_of(merged(0.02, start=1e-7)) == "partly"


def test_schedules_leave_the_share() -> None:
    assert pyra.spread(0.5, 4, 64) == (10, 9, 7, 6)
    for share in (0.5, 0.125):
        assert 36 - sum(pyra.spread(share, 4)) == round(36 * share)


def test_code_tables_ask_for_a_row() -> None:
    for table in code_tables(5, people=6, seed=1):
        name = table.prompt.rsplit("The code of ", 1)[1].removesuffix(" is")
        assert f"The code of {name} is {table.code}." in table.prompt
        assert table.prompt.count(table.code) == 1
    assert code_tables(2, 6, 1) == code_tables(5, 6, 1)[:2]


def test_the_runs_keep_what_the_edits_keep() -> None:
    """One pass per answer gives the same positions as the installed policies."""
    from actlas.measure.kv_cache import answer_mass, kept_positions, recall_of

    model = tiny("llama")
    runs = KeptCaches(model, {"one": range(1, 2)}, 4, (10,), 4, 3, 0)
    prompt = "The committee met on Tuesday"
    runs.add(prompt, "x", compress=True)
    ids = model.encode(prompt)["input_ids"]
    answer = model.generate(prompt, max_new_tokens=4).sequences[:, ids.shape[1] :]
    mass = answer_mass(model, ids, answer)
    edits = {
        "SnapKV": SnapKV(10, 4, 3),
        f"SpecKV, {draft_approx.ORACLE}": SpecKV(10, 4, 3, lookahead_tokens=4),
        "SpecKV, one": SpecKV(10, 4, 3, draft=runs.drafts["one"], lookahead_tokens=4),
    }
    for arm, edit in edits.items():
        with model.edit(edit):
            kept = kept_positions(model, ids)
        assert runs.recall[10, arm] == [pytest.approx(recall_of(mass, kept), abs=1e-6)]
        assert all(len(set(k[0].tolist())) == 10 for k in kept)
    with model.edit(RandomKV(10, 4)):
        assert torch.stack(kept_positions(model, ids)).shape == (3, 2, 10)
    assert runs.full_bytes * 10 == runs.kept_bytes * ids.shape[1]
