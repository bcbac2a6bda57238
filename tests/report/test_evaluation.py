"""Disaggregated evaluation: identities, brute force, gaps, privacy, training data, before and after."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from actlas.core.errors import InputError
from actlas.measure.statistics import wilson
from actlas.report import changes, evaluate
from actlas.report.predictions import data_hash
from tests.measure.small_models import llama


@dataclass
class Item:
    label: int
    group: dict[str, str] = field(default_factory=dict)


def items_of(n: int, seed: int = 0) -> tuple[list[Item], np.ndarray]:
    rng = np.random.default_rng(seed)
    items = [
        Item(int(rng.integers(2)), {"a": f"a{rng.integers(3)}", "b": f"b{rng.integers(2)}"}) for _ in range(n)
    ]
    return items, rng.random(n)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_groups_partition_the_items_and_their_weighted_mean_is_the_whole(n: int, seed: int) -> None:
    items, scores = items_of(n, seed)
    result = evaluate(scores, items, "accuracy", ["a", "b"], 2, minimum=1)
    for keys in (("a",), ("b",), ("a", "b")):
        cells = [c for c in result.cells if tuple(c.group) == keys]
        assert sum(c.n for c in cells) == n == result.overall.n
        assert sum(c.value * c.n for c in cells) / n == pytest.approx(result.overall.value)


def test_rates_of_every_group_equal_brute_force() -> None:
    items, scores = items_of(200, 3)
    for rate, threshold in itertools.product(("fpr", "fnr", "fdr", "for"), (0.3, 0.5, 0.9)):
        result = evaluate(scores, items, rate, ["a"], threshold=threshold)
        for cell in result.cells:
            rows = [
                (i.label, s >= threshold)
                for i, s in zip(items, scores, strict=True)
                if i.group["a"] == cell.group["a"]
            ]
            tp, fp = sum(y and d for y, d in rows), sum((not y) and d for y, d in rows)
            fn, tn = sum(y and not d for y, d in rows), sum((not y) and not d for y, d in rows)
            hits, total = {
                "fpr": (fp, fp + tn),
                "fnr": (fn, fn + tp),
                "fdr": (fp, fp + tp),
                "for": (fn, fn + tn),
            }[rate]
            assert cell.value == pytest.approx(hits / total)
            assert cell.n == total
            assert (cell.low, cell.high) == pytest.approx(wilson(hits, total))


def test_an_empty_denominator_is_nan_and_says_so() -> None:
    items = [Item(1, {"a": "x"})] * 6 + [Item(0, {"a": "y"})] * 6
    result = evaluate([0.9] * 12, items, "fpr", ["a"])
    none = next(c for c in result.cells if c.group["a"] == "x")
    assert math.isnan(none.value) and none.n == 0 and none.note.startswith("n too small")
    assert "n too small" in str(result.table().rows)


def test_auc_of_a_group_and_pinned_auc() -> None:
    items, scores = items_of(300, 5)
    plain = evaluate(scores, items, "auc", ["a"])
    for cell in plain.cells:
        mine = [k for k, i in enumerate(items) if i.group["a"] == cell.group["a"]]
        assert cell.value == pytest.approx(roc_auc_score([items[k].label for k in mine], scores[mine]))
    # A group whose scores are all shifted keeps its own AUC, but not its pinned one.
    shifted = np.array(
        [
            s * 0.2 + (0.8 if i.group["a"] == "a0" else 0.1 * i.label)
            for i, s in zip(items, scores, strict=True)
        ]
    )
    pinned = evaluate(shifted, items, "pinned auc", ["a"])
    own = evaluate(shifted, items, "auc", ["a"])
    at = [c.group["a"] for c in own.cells].index("a0")
    others = [c.value for k, c in enumerate(pinned.cells) if k != at]
    assert min(others) < min(c.value for k, c in enumerate(own.cells) if k != at) + 1e-9


def test_weights_and_clusters() -> None:
    items, values = items_of(120, 7)
    weights = np.random.default_rng(1).random(120) + 0.1
    result = evaluate(values, items, "mean", ["a"], weights=list(weights))
    assert result.overall.value == pytest.approx((values * weights).sum() / weights.sum())
    for cell in result.cells:
        mine = np.array([i.group["a"] == cell.group["a"] for i in items])
        assert cell.value == pytest.approx((values * weights)[mine].sum() / weights[mine].sum())
    # Ten copies of every item are no more information, if their source is named.
    repeated = [i for i in items for _ in range(10)]
    names = {id(i): str(k) for k, i in enumerate(items)}
    honest = evaluate(np.repeat(values, 10), repeated, "mean", cluster=("source", lambda i: names[id(i)]))
    naive = evaluate(np.repeat(values, 10), repeated, "mean")
    width = lambda m: m.high - m.low  # noqa: E731
    assert width(honest.overall) > 2.5 * width(naive.overall)


def planted(seed: int, hurt: bool) -> tuple[list[Item], list[float]]:
    """Twelve cells of 60; in one of them six of ten answers are wrong, elsewhere one of twenty."""
    rng = np.random.default_rng(seed)
    items, right = [], []
    for a, b in itertools.product(range(4), range(3)):
        for _ in range(60):
            items.append(Item(1, {"digit": str(a), "stroke": str(b)}))
            chance = 0.4 if hurt and (a, b) == (2, 1) else 0.95
            right.append(float(rng.random() < chance))
    return items, right


def test_the_gap_line_names_a_planted_cell_and_keeps_quiet_without_one() -> None:
    named = flagged = 0
    for seed in range(10):
        items, right = planted(seed, hurt=True)
        gap = evaluate(right, items, "mean", ["digit", "stroke"], 2, seed=seed, better="higher").largest
        assert gap is not None
        named += gap.details["lowest"] == "digit=2 and stroke=1" and gap.details["p_holm"] < 0.05
        items, right = planted(seed, hurt=False)
        calm = evaluate(right, items, "mean", ["digit", "stroke"], 2, seed=seed, better="higher")
        flagged += any(g.details["p_holm"] < 0.05 for g in calm.gaps)
    assert named >= 9
    assert flagged <= 2
    assert "may be chance" in calm.gap_line()


@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_gap_agrees_with_the_unweighted_one_where_weights_are_equal(weighted: bool) -> None:
    items, right = planted(1, hurt=True)
    weights = [2.0] * len(items) if weighted else None
    gap = evaluate(right, items, "mean", ["digit", "stroke"], 2, weights=weights).largest
    assert gap is not None
    assert gap.value == pytest.approx(evaluate(right, items, "mean", ["digit", "stroke"], 2).gaps[0].value)
    assert gap.details["lowest"] == "digit=2 and stroke=1"


def test_small_groups_take_no_part_in_the_gap() -> None:
    items = [Item(1, {"a": "few"})] * 29 + [Item(1, {"a": "x"})] * 40 + [Item(1, {"a": "y"})] * 40
    result = evaluate([0.0] * 29 + [1.0] * 80, items, "mean", ["a"])
    assert result.gaps[0].value == 0
    alone = evaluate([0.0] * 29 + [1.0] * 40, items[:69], "mean", ["a"])
    assert math.isnan(alone.gaps[0].value) and alone.largest is None
    assert "two groups of at least 30" in alone.gap_line()


def test_private_cells_are_hidden_and_cannot_be_had_by_subtraction() -> None:
    items = [Item(1, {"a": name}) for name, n in (("big", 50), ("middle", 20), ("tiny", 3)) for _ in range(n)]
    result = evaluate([1.0] * 73, items, "accuracy", ["a"], minimum=5)
    assert [c.group["a"] for c in result.cells] == ["big"]
    assert result.hidden == {"a": 23}
    assert "tiny" not in str(result.measurements) + str(result.notes)
    everything = evaluate([1.0] * 73, items, "accuracy", ["a"], minimum=1)
    assert len(everything.cells) == 3 and not everything.hidden


def test_training_data_is_refused_unless_forced() -> None:
    items, scores = items_of(40)
    known = data_hash(items)
    with pytest.raises(InputError, match="hash of the training data"):
        evaluate(scores, items, "accuracy", trained_on=["0" * 64, known.upper()])
    forced = evaluate(scores, items, "accuracy", trained_on=known, force=True)
    assert "training data" in forced.overall.note and forced.notes
    assert data_hash(items[1:]) != known
    evaluate(scores[1:], items[1:], "accuracy", trained_on=known)


def test_a_change_that_helps_on_average_and_hurts_one_group_is_visible() -> None:
    rng = np.random.default_rng(0)
    items = [Item(1, {"a": "x" if k < 150 else "y"}) for k in range(200)]
    before = (rng.random(200) < 0.6).astype(float)
    after = before.copy()
    after[:150] = np.maximum(after[:150], rng.random(150) < 0.5)
    after[150:] = np.minimum(after[150:], rng.random(50) < 0.4)
    moved = changes(evaluate(before, items, "mean", ["a"]), evaluate(after, items, "mean", ["a"]))
    whole, x, y = moved
    assert whole.value > 0 and x.low > 0 and y.high < 0
    assert whole.value == pytest.approx(after.mean() - before.mean())
    assert y.baseline.value == pytest.approx(before[150:].mean())
    with pytest.raises(InputError, match="same items"):
        changes(evaluate(before, items, "mean", ["a"]), evaluate(after[:9], items[:9], "mean", ["a"]))


def test_functions_and_dictionaries_do_as_subject_metric_and_items() -> None:
    items = [{"label": k % 2, "place": "north" if k < 10 else "south", "x": k} for k in range(20)]
    result = evaluate(lambda i: i["x"] % 2, items, "accuracy", ["place", ("half", lambda i: i["x"] < 10)])
    assert result.overall.value == 1
    squared = evaluate([1.0, 2.0], items[:2], lambda p, i: (p - i["label"]) ** 2)
    assert squared.overall.value == pytest.approx(1.0)


def test_a_model_is_run_on_a_task_or_a_corpus() -> None:
    from actlas.core.edits import Zero
    from actlas.data import corpus, task
    from actlas.measure.language import loss_per_byte
    from actlas.measure.tasks import task_accuracy

    model = llama()
    made = task("agreement", model.tokenizer, n=24)
    result = evaluate(model, made, "accuracy", ["subject"], minimum=1)
    assert result.overall.value == task_accuracy(model, made).value
    assert sum(c.n for c in result.cells) == 24
    text = corpus(limit=6).characters(3000)
    loss = evaluate(model, text, "loss per byte", ["domain"], minimum=1)
    assert loss.overall.value == pytest.approx(loss_per_byte(model, text, tokens=None).value)
    with model.edit(Zero("blocks.0.mlp.out")):
        after = evaluate(model, text, "loss per byte", ["domain"], minimum=1)
    assert after.overall.under and not loss.overall.under
    assert changes(loss, after)[0].value == pytest.approx(after.overall.value - loss.overall.value)
    with pytest.raises(InputError, match="give a function"):
        evaluate(model, [{"label": 1}], "accuracy")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": []}, "no items"),
        ({"metric": "acuracy"}, "did you mean accuracy"),
        ({"subject": [1.0]}, "20 items but 1 predictions"),
        ({"factors": ["nope"]}, "no factor 'nope'"),
        ({"weights": [1.0]}, "20 items but 1 weights"),
        ({"weights": [-1.0] * 20}, "negative"),
        ({"intersections": 0}, "intersections=0"),
        ({"subject": [math.nan] * 20, "metric": "mean"}, "nan at item 0"),
        ({"subject": [object()] * 20, "metric": "fpr"}, "true, false or a score"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(change: dict, said: str) -> None:
    items, scores = items_of(20)
    arguments = {"subject": scores, "data": items, "metric": "accuracy", **change}
    with pytest.raises(InputError, match=said) as error:
        evaluate(**arguments)
    assert "\n" not in str(error.value)


def test_wilson_intervals_of_groups_cover() -> None:
    """95% intervals of simulated groups hold the truth 93 to 97 times in 100."""
    rng = np.random.default_rng(11)
    inside = total = 0
    for _ in range(40):
        truth = {f"g{k}": rng.uniform(0.1, 0.9) for k in range(10)}
        items = [Item(1, {"g": g}) for g in truth for _ in range(60)]
        hits = [float(rng.random() < truth[i.group["g"]]) for i in items]
        for cell in evaluate(hits, items, "mean", ["g"]).cells:
            inside += cell.low <= truth[cell.group["g"]] <= cell.high
            total += 1
    assert 0.93 <= inside / total <= 0.97
