"""The criterion on invented numbers, and a run of seconds on a byte-level model."""

from __future__ import annotations

import json

import pytest

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, Reproduction, recipe, reproduce, verdict_of
from actlas.papers.reproductions.byte_models import byte_model

SLUG = "sae-dark-matter"


def m(name, value, low=None, high=None, **group):
    return Measurement(name, value, "", 10, low, high, group=group)


def invented(**changes):
    numbers = {"vector": (0.5, 0.45, 0.55), "norm": (0.93, 0.91, 0.95), "token": (0.3, 0.2, 0.4)}
    numbers |= {"across": (0.9, 0.85, 0.95), "fall": (0.1, 0.05, 0.15), "recovered": (0.5, 0.3, 0.7)}
    numbers |= {"noise": (0.01,), "projection": (1.0,)} | changes
    out = [m("vector_r2", 0.1, dictionary="random atoms", encoding="own")]  # a control, never judged
    for width in ("width 576", "width 1152"):
        own = {"dictionary": width, "encoding": "own"}
        out += [
            m("vector_r2", *numbers["vector"], **own),
            m("norm_r2", *numbers["norm"], **own),
            m("norm_r2_over_token_mean", *numbers["token"], **own),
            m("vector_r2 of isotropic noise", *numbers["noise"], **own),
            m("vector_r2 of a projection", *numbers["projection"], **own),
        ]
    out.append(m("vector_r2", 0.0, 0.0, 0.0, dictionary="width 1152", encoding="pursuit"))
    out.append(m("recovered_cross_entropy", *numbers["recovered"], dictionary="width 1152", part="linear"))
    out.append(m("error_norm_r2_across", *numbers["across"]))
    return [*out, m("fall of the total beyond the nonlinear", *numbers["fall"])]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"vector": (0.1, 0.05, 0.15)}, "partly"),
        ({"token": (-0.1, -0.2, -0.05)}, "partly"),
        ({"across": (0.2, 0.1, 0.3)}, "partly"),
        ({"norm": (0.8, 0.7, 0.85)}, "partly"),
        ({"fall": (0.0, -0.1, 0.1)}, "partly"),
        ({"noise": (0.4,)}, "partly"),
        ({"projection": (0.9,)}, "partly"),
        (
            {"vector": (0.1, 0.0, 0.15), "token": (-0.1, -0.2, -0.05), "across": (0.2, 0.1, 0.3)},
            "does not hold here",
        ),
        ({"vector": (0.3, 0.1, 0.5), "token": (0.0, -1, 1), "across": (0.5, 0.1, 0.9)}, "not testable here"),
    ],
)
def test_the_criterion(changes, verdict):
    made = recipe(SLUG)
    assert len(made.criterion) > 100 and made.claim.endswith(".")
    assert verdict_of(made.judge(Measured(invented(**changes)))) == verdict


TINY = {
    "site": "blocks.1.resid_post",
    "widths": (48, 96),
    "k": 6,
    "train_tokens": 4000,
    "test_tokens": 3000,
    "steps": 10,
    "downstream": 400,
}


def test_a_tiny_run(monkeypatch):
    import actlas.models

    monkeypatch.setattr(actlas.models, "load", lambda name: byte_model("silu", 0, width=32, layers=3))
    result = reproduce(SLUG, settings=TINY, seed=1)
    assert (
        Reproduction.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))).checks
        == result.checks
    )
    names = {x.name for x in result.measured}
    assert {
        "vector_r2",
        "norm_r2",
        "fvu_nonlinear",
        "recovered_cross_entropy",
        "error_norm_r2_across",
    } <= names
    dictionaries = {x.group.get("dictionary") for x in result.measured if x.name == "vector_r2"}
    assert dictionaries == {"width 48", "width 96", "random atoms"}
    passed = {c.name: c.passed for c in result.checks}
    assert passed["a projection is"] and "noise is not linear" in passed
    assert result.headline and result.plots[0].rows


def test_bad_widths():
    with pytest.raises(InputError, match="the narrowest first"):
        recipe(SLUG).run(seed=0, **{**recipe(SLUG).quick, "widths": (1152, 576)})
