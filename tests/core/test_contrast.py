"""Contrasts, directions, and the edits that come of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actlas.core.contrast import Contrast, Readings, read_contrast, read_rows
from actlas.core.direction import Direction
from actlas.core.edit import Edit
from actlas.core.edits import Add, Rotate
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from tests.core.tiny import tiny

SITE = "blocks.1.resid_post"
PAIRS = [("one two three", "one two four"), ("two one five", "two one six"), ("six two", "six one five")]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


def test_pairs_in_any_form_are_the_same_contrast() -> None:
    records = [{"positive": p, "negative": n, "prompt": "", "y": 1.0} for p, n in PAIRS]
    assert Contrast.of(PAIRS).texts == Contrast.of(records).texts
    assert Contrast.of(records).y == (1.0, 1.0, 1.0)
    assert Contrast.of(Contrast.of(PAIRS)).hash == Contrast.of(PAIRS).hash


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "at least one pair"),
        ([("a", "")], "negative side"),
        ([{"positive": "a"}], "no negative side"),
        ([("same", "same")], "must differ"),
        ("a text", "not str"),
        ([("a", "b", "c")], "no positive side"),
        ([{"positive": "a", "negative": "b", "y": math.nan}], "NaN"),
    ],
)
def test_bad_pairs_are_named(data: object, said: str) -> None:
    with pytest.raises((InputError, NonFiniteError), match=said):
        Contrast.of(data)


@given(st.integers(4, 40), st.floats(0.1, 0.9), st.integers(0, 5))
def test_a_split_keeps_shared_texts_together(n: int, share: float, seed: int) -> None:
    pairs = [(f"p{i // 2}", f"n{i}") for i in range(n)]
    fit, test = Contrast.of(pairs).split(share, seed)
    assert sorted(fit.negative + test.negative) == sorted(p[1] for p in pairs)
    assert not set(fit.positive) & set(test.positive)
    assert len(test) >= 1 and len(fit) >= 1


def test_a_shuffle_swaps_half_of_the_pairs() -> None:
    contrast = Contrast.of([(f"p{i}", f"n{i}") for i in range(11)])
    swapped = sum(p.startswith("n") for p in contrast.shuffled(3).positive)
    assert swapped == 5
    assert contrast.flipped().positive == contrast.negative


@pytest.mark.parametrize("position", ["last", "first", -2, "mean", "last3"])
def test_readings_are_those_of_each_text_alone(model: Model, position: str) -> None:
    readings = read_contrast(model, Contrast.of(PAIRS), [SITE, "blocks.0.attn.z"], position=position)
    for name, found in readings.items():
        for texts, rows in ((0, found.positive), (1, found.negative)):
            for i, pair in enumerate(PAIRS):
                alone = model.trace(pair[texts], name)[name][0].flatten(1)
                want = {
                    "last": alone[-1],
                    "first": alone[0],
                    -2: alone[-2],
                    "mean": alone.mean(0),
                    "last3": alone[-3:].mean(0),
                }[position]
                assert torch.allclose(rows[i], want.float(), atol=1e-5)
    assert readings["blocks.0.attn.z"].heads == model.n_heads


def test_the_reference_is_the_median_norm_of_token_rows(model: Model) -> None:
    _, references = read_rows(model, ["one two three", "four"], SITE)
    norms = torch.cat([model.trace(t, SITE)[SITE][0].norm(dim=-1) for t in ("one two three", "four")])
    assert references[SITE] == pytest.approx(float(norms.median()), rel=1e-5)


def _direction(model: Model) -> Direction:
    readings = read_contrast(model, Contrast.of(PAIRS), SITE)[SITE]
    return Direction.of(readings, readings.difference.mean(0), "mean_diff", fingerprint=model.fingerprint)


def test_a_direction_reads_and_steers(model: Model, tmp_path: object) -> None:
    found = _direction(model)
    readings = read_contrast(model, Contrast.of(PAIRS), SITE)[SITE]
    assert float(found.score(readings.positive).mean()) == pytest.approx(
        -float(found.score(readings.negative).mean()), abs=1e-5
    )
    assert float(found.score(readings.positive).mean()) > 0
    edit = found.steer(0.5)
    x = model.trace("one two", SITE)[SITE]
    with model.edit(edit):
        moved = model.trace("one two", SITE)[SITE]
    assert torch.allclose(moved - x, (0.5 * found.reference * found.unit).expand_as(x), atol=1e-5)
    assert torch.allclose(found.steer(2.0, unit="raw").strength * found.vector, 2 * found.vector)
    path = found.save(f"{tmp_path}/d", model)
    again = Direction.load(path, model)
    assert torch.equal(again.vector, found.vector) and again.midpoint == pytest.approx(found.midpoint)


def test_controls_of_a_direction(model: Model) -> None:
    found = _direction(model)
    drawn = found.random(1)
    assert drawn.norm == pytest.approx(found.norm, rel=1e-5) and abs(found.cosine(drawn)) < 0.9
    assert torch.equal(found.random(1).vector, drawn.vector)
    assert found.cosine(found.flipped()) == pytest.approx(-1.0, abs=1e-5)


def test_a_direction_of_nothing_is_refused() -> None:
    readings = Readings(SITE, torch.ones(2, 4), torch.ones(2, 4), 2.0)
    with pytest.raises(InputError, match="is zero"):
        Direction.of(readings, torch.zeros(4), "mean_diff")
    with pytest.raises(InputError, match="unit is 'cm'"):
        Direction.of(readings, torch.ones(4), "x").steer(1.0, unit="cm")  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        Direction(site=SITE, vector=torch.ones(2, 2))


def test_keeping_the_norm_changes_only_the_direction(model: Model) -> None:
    vector = torch.randn(model.d_model or 0)
    x = model.trace("one two three", SITE)[SITE]
    with model.edit(Add(SITE, vector, keep_norm=True) * 3):
        moved = model.trace("one two three", SITE)[SITE]
    assert torch.allclose(moved.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    want = x + 3 * vector
    assert torch.allclose(
        moved, want / want.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True), atol=1e-5
    )
    with pytest.raises(InputError, match="keeping the norm"):
        Add("blocks.0.mlp.out", vector, keep_norm=True).bake(model)


def test_a_rotation_turns_by_its_angle(model: Model) -> None:
    vector = torch.randn(model.d_model or 0)
    x = model.trace("one two three", SITE)[SITE]

    def angle(y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(y, vector.expand_as(y), dim=-1).acos().rad2deg()

    for degrees in (20.0, -15.0, 400.0):
        with model.edit(Rotate(SITE, vector, degrees=degrees)):
            turned = model.trace("one two three", SITE)[SITE]
        assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
        want = (angle(x) - degrees).clamp(0, 180)
        assert torch.allclose(angle(turned), want, atol=0.1)
    with model.edit(Rotate(SITE, vector, degrees=20.0) * 0):
        assert torch.equal(model.trace("one two three", SITE)[SITE], x)


def test_an_edit_keeps_what_was_measured_about_it(model: Model, tmp_path: object) -> None:
    price = Measurement("KL", 0.1, "nat", 4)
    edit = _direction(model).steer(0.2).with_measurements([price])
    loaded = Edit.load(edit.save(f"{tmp_path}/e", model), model)
    assert [m.name for m in loaded.measurements] == ["KL"]
    assert (edit * 2).measurements == () and edit.at(phase="generated").measurements == ()
