"""The registry: what is registered, how it is found, and what the decorator adds to a call."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure import registry
from actlas.measure.registry import KINDS, find_measure, mark_under, measure, measures

MINE = (
    "perplexity",
    "loss-per-byte",
    "next-token-accuracy",
    "output-entropy",
    "kl-to-base",
    "top1-agreement",
    "task-accuracy",
    "task-top1",
    "task-logit-difference",
    "task-probability",
    "top1-accuracy",
    "top5-accuracy",
    "confidence",
    "class-entropy",
    "perturbation-agreement",
    "embedding-separation",
    "embedding-similarity",
    "embedding-anisotropy",
    "embedding-dimension",
    "forward-speed",
    "peak-memory",
    "decode-speed",
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    measures()
    kept = dict(registry._registry)
    yield
    registry._registry.clear()
    registry._registry.update(kept)


def one(model: Any, *, seed: int = 0, size: int = 3) -> Measurement:
    return Measurement("one", 1.0, "count", n=1)


def test_every_measure_is_there_and_fully_described() -> None:
    known = measures()
    assert set(MINE) <= set(known) and list(known) == sorted(known)
    for name, info in known.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9%.]+)*", name), name
        assert info.summary and info.unit and "\n" not in info.summary
        assert all(kind in (*KINDS, "any") for kind in info.needs)
        assert set(info.quick) <= set(info.options)
        assert "seed" in info.options
        assert info.to_json()["name"] == name


def test_a_registered_function_stays_a_function() -> None:
    decorated = measure("test-one", summary="s", unit="count", data="none", quick={"size": 1})(one)
    assert decorated(SimpleNamespace(installed=())) == one(None)
    assert decorated.__name__ == "one" and decorated.__wrapped__ is one
    info = find_measure("test-one")
    assert info.options == ("seed", "size") and info.applies_to("speech")


def test_measurements_say_which_edits_were_installed() -> None:
    edit = SimpleNamespace(describe=lambda: "add 4 to x")
    model = SimpleNamespace(installed=(edit, edit))
    marked = mark_under(one)
    assert marked(model).under == ("add 4 to x", "add 4 to x")
    assert marked(model=model).under == marked(model).under
    several = mark_under(lambda model: [one(model), Measurement("two", 2.0, "count", 1, under=("mine",))])
    assert [m.under for m in several(model)] == [("add 4 to x",) * 2, ("mine",)]
    assert marked(SimpleNamespace(installed=())).under == ()
    assert mark_under(marked) is marked


def test_wrong_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="no measure is called 'perplexty'; did you mean perplexity"):
        find_measure("perplexty")
    with pytest.raises(InputError, match="known: .*perplexity"):
        find_measure("zzzz")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"needs": ("causal",)}, "unknown model kind 'causal'"),
        ({"data": "text"}, "wants data 'text'"),
        ({"quick": {"tokens": 3}}, "quick option 'tokens' is none of its options seed, size"),
    ],
)
def test_wrong_registrations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure("test-two", summary="s", unit="u", **options)(one)


def test_a_name_belongs_to_one_function() -> None:
    with pytest.raises(InputError, match="'perplexity' is registered already, by actlas.measure.language"):
        measure("perplexity", summary="s", unit="u")(one)
    first = measure("test-three", summary="s", unit="u")(one)
    assert measure("test-three", summary="other", unit="u")(one).__wrapped__ is first.__wrapped__
