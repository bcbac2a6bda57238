"""Comparisons: the same data for all, paired differences, honest where nothing pairs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from actlas.core.edits import Scale
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure import Comparison, compare, registry
from actlas.measure.compare import difference
from actlas.measure.language import nll
from actlas.measure.statistics import holm, mean_measurement, rate_measurement

from .small_models import WORDS, llama

TEXTS = [f"{WORDS} {i} the cat and dog {i}" for i in range(10)]
EDIT = Scale("blocks.0.mlp.out", 0.5)


def test_values_and_differences_of_a_real_edit() -> None:
    model = llama()
    found = compare(model, {"base": [], "half": [EDIT]}, ["perplexity", "next-token-accuracy"], TEXTS)
    base, half = found["perplexity"]
    assert (base.variant, half.variant) == ("base", "half")
    assert base.difference is None and half.measurement.under == (EDIT.describe(),)
    before = nll(model, TEXTS)
    with model.edit(EDIT):
        after = nll(model, TEXTS)
    expected = math.exp(after.nll.sum() / after.tokens.sum()) - math.exp(
        before.nll.sum() / before.tokens.sum()
    )
    gap = half.difference
    assert gap.value == pytest.approx(expected) == half.measurement.value - base.measurement.value
    assert gap.low < gap.value < gap.high and gap.interval == "paired bootstrap over documents"
    assert 0 < gap.details["p"] <= 1 and not model.installed


def test_a_variant_equal_to_the_base_does_not_differ() -> None:
    found = compare(llama(), {"base": [EDIT], "same": [EDIT]}, ["perplexity", "output-entropy"], TEXTS)
    for row in found.rows:
        if row.difference is not None:
            assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)
            assert row.difference.details["p"] == row.difference.details["p_holm"] == 1


def test_the_paired_interval_is_narrower_than_the_unpaired() -> None:
    found = compare(
        llama(), {"base": [], "slight": [Scale("blocks.1.mlp.out", 1.02)]}, ["output-entropy"], TEXTS
    )
    base, other = found["output-entropy"]
    assert other.difference.high - other.difference.low < (base.measurement.high - base.measurement.low) / 2


def test_kl_of_the_base_is_zero_and_the_difference_keeps_its_interval() -> None:
    found = compare(llama(), {"base": [], "half": [EDIT]}, ["kl-to-base"], TEXTS)
    base, half = found["kl-to-base"]
    assert base.measurement.value == 0
    assert (half.difference.low, half.difference.high) == (half.measurement.low, half.measurement.high)


def test_holm_over_all_differences() -> None:
    variants = {"base": [], "a": [EDIT], "b": [EDIT * 2]}
    found = compare(llama(), variants, ["perplexity", "output-entropy"], TEXTS)
    details = [row.difference.details for row in found.rows if row.difference]
    assert len(details) == 4
    assert [d["p_holm"] for d in details] == pytest.approx(holm([d["p"] for d in details]))


def test_a_single_edit_needs_no_list() -> None:
    found = compare(llama(), {"base": [], "half": EDIT}, ["perplexity"], TEXTS)
    assert found["perplexity"][1].measurement.under == (EDIT.describe(),)


@pytest.mark.filterwarnings("ignore:Scale at")
def test_several_seeds_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(model: object, *, seed: int = 0) -> Measurement:
        shift = np.random.default_rng(seed).normal(0, 10)
        return Measurement("noisy", shift + len(model.installed) * (1 + 0.01 * seed), "count", n=1, seed=seed)

    monkeypatch.setattr(registry, "_registry", {})
    registry.measure("noisy", summary="s", unit="count", data="none")(noisy)
    found = compare(llama(), {"base": [], "half": [EDIT]}, ["noisy"], seed=range(6))
    gap = found["noisy"][1].difference
    assert gap.value == pytest.approx(1.025) and 1 < gap.low < gap.high < 1.05
    assert gap.interval == "paired bootstrap over seeds" and found.seeds == tuple(range(6))
    alone = compare(llama(), {"base": [], "half": [EDIT]}, ["noisy"])["noisy"][1].difference
    assert alone.interval == "exact" and alone.value == pytest.approx(1)


def test_json_and_table_say_the_same() -> None:
    found = compare(llama(), {"base": [], "half": [EDIT]}, ["perplexity", "top1-accuracy"], TEXTS)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    again = Comparison.from_json(record)
    assert again.to_json() == found.to_json() and again.table() == found.table()
    table = found.table()
    assert len(table) == len(found.rows) == 4
    assert table[1]["variant"] == "half" and "[" in table[1]["difference"] and table[1]["p"].endswith(")")
    assert table[2]["value"] == "-"
    text = str(found)
    assert text.splitlines()[0].split() == list(table[0]) and len(text.splitlines()) == 5


def test_rates_are_paired_by_item() -> None:
    g = np.random.default_rng(0)
    a = g.random(80) < 0.5
    b = a.copy()
    b[:6] = True
    found = difference(rate_measurement("r", a), rate_measurement("r", b))
    assert found.value == pytest.approx(b.mean() - a.mean()) and found.high < 0.1
    assert found.interval == "paired bootstrap over items"


def test_differences_that_cannot_be_paired_say_so() -> None:
    many, few = mean_measurement("m", "u", [1.0, 2.0, 3.0]), mean_measurement("m", "u", [1.0, 2.0])
    other = difference(many, few)
    assert other.low is None and "different items" in other.note
    rate = Measurement("speed", 5.0, "tokens/s", n=6, low=4.0, high=6.0, interval="order statistics")
    assert "not paired" in difference(rate, rate).note
    count = Measurement("parameters", 5.0, "count", n=1)
    exact = difference(count, Measurement("parameters", 3.0, "count", n=1))
    assert (exact.value, exact.interval, exact.low) == (-2, "exact", None)
    shifted = difference(rate, count)
    assert (shifted.value, shifted.low, shifted.high) == (0, -1, 1)
    gone = difference(count, Measurement("parameters", math.nan, "count", n=0, note="no parameters"))
    assert math.isnan(gone.value) and gone.note == "no parameters"


def test_weights_that_change_are_said() -> None:
    a = mean_measurement("m", "u", [1.0, 2.0], [1, 1])
    b = mean_measurement("m", "u", [1.0, 2.0], [1, 3])
    assert "other weights" in difference(a, b).note and difference(a, b).value == pytest.approx(0.25)


def test_bad_comparisons_are_said() -> None:
    with pytest.raises(InputError, match="at least two variants, not 1"):
        compare(llama(), {"base": []}, ["perplexity"], TEXTS)
    with pytest.raises(InputError, match="at least one seed"):
        compare(llama(), {"base": [], "half": [EDIT]}, ["perplexity"], TEXTS, seed=())
    found = compare(llama(), {"base": [], "half": [EDIT]}, ["perplexity"], TEXTS)
    with pytest.raises(InputError, match="has no 'loss'; it has perplexity"):
        found["loss"]
