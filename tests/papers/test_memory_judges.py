"""The criteria of memos, recoding-rnn and activation-beacon on invented numbers, and their documents."""

from __future__ import annotations

import pytest
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, recipe, verdict_of


def m(name: str, value: float, half: float = 0.0, **group: str) -> Measurement:
    return Measurement(name, value, "", 10, value - half, value + half, group=group)


MEMOS = [
    m("greatest KL, stored prefix", 1e-7),
    m("greatest error of moved keys", 1e-5),
    m("speed-up of the first token", 7.0, 1.0),
    m("KL to the whole prompt", 1e-8, fix="recompute"),
    *(m("KL saved by a join", 2.0, 0.5, fix=f) for f in ("none", "shift", "shift+drop_first")),
    m("KL saved by moving", 0.2, 0.1),
    m("KL saved by dropping", 0.2, 0.1),
    m("hit rate above LRU", 0.1, 0.05, policy="benefit"),
]
RECODING = [
    *(m("signal falls", 1.0, signal=s, step="0.01") for s in ("target_nll", "entropy", "mc_dropout")),
    m("rise of the loss, trained with recoding", -0.002, 0.001, signal="target_nll"),
    m("rise of the loss, trained with recoding", 0.01, 0.005, signal="entropy"),
    m("rise of the loss, post hoc", 0.05, 0.01, signal="entropy", step="0.5", direction="gradient"),
    m("rise above random", 0.05, 0.01, signal="entropy"),
    *(m("fall above random", 0.3, 0.1, signal=s) for s in ("target_nll", "entropy")),
]
BEACON = [
    m("loss of keys saved, over no memory", 1.5, 0.2, way="beacons, r=4"),
    m("loss of keys saved, over untrained", 1.5, 0.2),
    m("keys named above no memory", 0.8, 0.1, way="beacons, r=4"),
    m("loss of keys saved by full attention", 0.1, 0.05),
    m("rise of the loss of prose", 0.0, 0.01, way="beacons, r=4"),
    m("loss of keys saved, ratio 2 over 8", 0.1, 0.05),
    m("greatest difference, first window", 1e-6),
]


@pytest.mark.parametrize(
    ("slug", "measured", "central"),
    [
        ("memos", MEMOS, "greatest error of moved keys"),
        ("recoding-rnn", RECODING, "rise of the loss, trained with recoding"),
        ("activation-beacon", BEACON, "keys named above no memory"),
    ],
)
def test_criteria(slug: str, measured: list[Measurement], central: str) -> None:
    judge = recipe(slug).judge
    assert verdict_of(judge(Measured(measured))) == "holds"
    flipped = [
        m(x.name, 5.0 if "error" in x.name else -5.0, **x.group) if x.name == central else x for x in measured
    ]
    assert verdict_of(judge(Measured(flipped))) == "partly"
    assert verdict_of(judge(Measured([]))) == "not testable here"


def test_beacon_documents_repeat_one_key_in_every_window() -> None:
    from actlas.papers.reproductions.activation_beacon import LETTERS, WINDOW, _documents, _weights

    rows, where = _documents(torch.full((500,), 20), 6, 3, 0)
    assert rows.shape == (6, 3 * WINDOW) and where.sum(1).tolist() == [2] * 6
    for row, late in zip(rows, where, strict=True):
        keys = row[(row >= 2) & (row < 2 + LETTERS)]
        assert len(keys) == 3 and len(set(keys.tolist())) == 1
        assert [int(i) // WINDOW for i in (row == 1).nonzero()] == [0, 1, 2]
        assert bool((row[late.nonzero()[:, 0] - 1] == 1).all())
    assert set(_weights(rows).unique().tolist()) == {1.0, 10.0}


def test_memory_facts_name_the_answer() -> None:
    from actlas.papers.reproductions.memos import _facts

    for i, (first, second, query) in enumerate(_facts(20, 3)):
        asked = query.split()[1]
        assert asked in (second if i % 2 == 0 else first) and asked not in (first if i % 2 == 0 else second)
