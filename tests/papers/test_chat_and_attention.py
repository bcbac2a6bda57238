"""attention-output-sae and fast-sae: criteria on invented numbers, and both from end to end in seconds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.papers.reproduction import Measured, Reproduction, recipe, reproduce, verdict_of
from actlas.papers.reproductions.byte_models import byte_model
from actlas.papers.reproductions.fast_sae import ALONE, BLOCKS, TEXT
from tests.dictionaries.test_conversations import CHATML, toy


def m(
    name: str, value: float, low: float | None = None, high: float | None = None, **group: str
) -> Measurement:
    return Measurement(name, value, "", 10, low, high, group=group)


def judged(slug: str, measured: list[Measurement]) -> tuple[str, dict[str, bool | None]]:
    checks = recipe(slug).judge(Measured(measured))
    return verdict_of(checks), {c.name: c.passed for c in checks}


def replaced(measured: list[Measurement], new: Measurement) -> list[Measurement]:
    kept = [x for x in measured if (x.name, x.group) != (new.name, new.group)]
    assert len(kept) == len(measured) - 1
    return [*kept, new]


ATTENTION = [
    *(m("largest relative gap", 2e-6, by=by) for by in ("source", "head", "feature")),
    m("relative gap, value heads matched wrongly", 0.9, 0.5, 1.4),
    m("heads a latent, against a rotated decoder", 0.6, 0.58, 0.62),
    m("heads a latent, against activations", 0.9, 0.88, 0.92),
    m("ce_loss_score", 0.8, 0.7, 0.9, dictionary="trained", ablation="mean"),
    m("loss saved over a control", 0.1, 0.05, 0.2, control="random atoms"),
    m("loss saved over a control", 0.3, 0.2, 0.4, control="random directions"),
    m("short-prefix ratio, highest over lowest", 5.0, 3.0, 9.0),
    m("attention kept", -0.1, -0.2, 0.0, overwritten="prefix minus elsewhere", kind="short"),
    m("attention kept", -0.6, -0.7, -0.5, overwritten="prefix minus elsewhere", kind="long"),
]


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (None, "holds"),
        (m("largest relative gap", 2e-3, by="feature"), "partly"),
        (m("relative gap, value heads matched wrongly", 0.01, 0.0, 0.02), "partly"),
        (m("heads a latent, against a rotated decoder", 0.9, 0.85, 0.95), "partly"),
        (m("short-prefix ratio, highest over lowest", 1.2, 1.0, 1.4), "partly"),
        (m("attention kept", -0.3, -0.6, -0.1, overwritten="prefix minus elsewhere", kind="short"), "partly"),
    ],
)
def test_attention_verdicts(new: Measurement | None, verdict: str) -> None:
    assert (
        judged("attention-output-sae", ATTENTION if new is None else replaced(ATTENTION, new))[0] == verdict
    )


def test_attention_without_the_test_on_text() -> None:
    verdict, passed = judged("attention-output-sae", ATTENTION[:-2])
    assert verdict == "partly" and passed["the long-prefix head loses more on text"] is None


def difference(
    first: str, second: str, tokens: str, low: float, high: float, sink: str = "left out"
) -> Measurement:
    group = {"first": first, "second": second, "tokens": tokens, "sink": sink}
    return m("difference", (low + high) / 2, low, high, **group)


FAST = [
    difference(TEXT, BLOCKS, "all", 0.2, 0.3),
    difference(TEXT, ALONE, "all", 0.2, 0.3),
    difference(ALONE, BLOCKS, "all", -0.01, 0.005),
    difference(ALONE, BLOCKS, "special", -0.1, -0.05),
    difference(ALONE, BLOCKS, "special, in turns", -0.05, -0.02),
    difference(ALONE, BLOCKS, "massive", -0.9, -0.8, "trained on"),
    m("nmse", 0.2, data=BLOCKS, tokens="all", sink="left out"),
    m("nmse", 0.95, data=BLOCKS, tokens="massive", sink="trained on"),
    *(m("random atoms minus trained", 0.1, 0.05, 0.15, data=d) for d in (TEXT, BLOCKS, ALONE)),
    m("next-token KL", 0.3, 0.1, 0.5, direction="latents minus random", alpha="50"),
]


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (None, "holds"),
        (difference(ALONE, BLOCKS, "special", 0.01, 0.05), "partly"),
        (difference(ALONE, BLOCKS, "all", -0.1, 0.005), "partly"),
        (difference(ALONE, BLOCKS, "massive", -0.2, -0.1, "trained on"), "partly"),
        (m("random atoms minus trained", -0.1, -0.15, -0.05, data=TEXT), "partly"),
    ],
)
def test_fast_verdicts(new: Measurement | None, verdict: str) -> None:
    assert judged("fast-sae", FAST if new is None else replaced(FAST, new))[0] == verdict


def test_fast_falls_when_nothing_differs() -> None:
    flat = [
        difference(x.group["first"], x.group["second"], x.group["tokens"], 0.0, 0.01, x.group["sink"])
        if x.name == "difference" and x.group["first"] == ALONE
        else difference(x.group["first"], x.group["second"], x.group["tokens"], -0.1, -0.05)
        if x.name == "difference"
        else x
        for x in FAST
    ]
    assert judged("fast-sae", flat)[0] == "does not hold here"


def run(slug: str, settings: dict[str, Any]) -> Reproduction:
    result = reproduce(slug, settings=settings)
    text = json.dumps(result.to_json(), allow_nan=False)
    assert Reproduction.from_json(json.loads(text)).checks == result.checks
    assert result.criterion in result.to_markdown() and len(result.criterion) > 100
    return result


def test_attention_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(*_: Any, **__: Any) -> Model:
        return byte_model("silu", 0, width=32, layers=24)

    monkeypatch.setattr("actlas.models.load", small)
    tiny = {
        "read": 1500,
        "train": 2048,
        "width": 64,
        "evaluate": 256,
        "probes": 2,
        "sequences": 2,
        "length": 31,
    }
    result = run("attention-output-sae", {**tiny, "pairs": 0})
    passed = {c.name: c.passed for c in result.checks}
    assert all(passed[f"attribution by {by} is exact"] for by in ("source", "head", "feature"))
    assert passed["a wrong match of heads is noticed"]
    assert passed["latents keep to few heads"] is False  # an untrained model's heads are alike


def test_fast_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actlas.models.load", lambda *_: toy(CHATML, layers=16))
    result = run("fast-sae", {"conversations": 8, "train": 1024, "seeds": 2, "prompts": 1})
    found = Measured(result.measured)
    rows = found.every("nmse", sink="left out", tokens="special")
    assert {x.group["data"] for x in rows} == {TEXT, BLOCKS, ALONE}
    assert all(2 ** x.details["log2"] == pytest.approx(x.value) for x in rows)
