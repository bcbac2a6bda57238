"""Intervals and tests against brute force, against SciPy and scikit-learn, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from actlas.core.errors import InputError
from actlas.measure.statistics import (
    auc,
    binary_rates,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_statistic,
    cohen_kappa,
    holm,
    largest_gap,
    mann_kendall,
    mean_measurement,
    paired_difference,
    percentiles,
    permutation_test,
    pinned_auc,
    rate_measurement,
    spearman,
    wilson,
)

numbers = st.floats(-100, 100, allow_nan=False)
some_numbers = st.lists(numbers, min_size=2, max_size=20)


# Wilson


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_wilson_agrees_with_scipy(n: int) -> None:
    for k in range(n + 1):
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_covers_95_percent_on_simulated_rates() -> None:
    generator = np.random.default_rng(0)
    rates = generator.uniform(0.05, 0.95, 4000)
    hits = generator.binomial(40, rates)
    inside = [low <= r <= high for r, (low, high) in zip(rates, (wilson(k, 40) for k in hits), strict=True)]
    assert 0.93 <= np.mean(inside) <= 0.97


@given(st.integers(1, 500), st.data())
def test_wilson_contains_the_rate_and_stays_within_0_and_1(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_with_nothing_or_nonsense() -> None:
    assert all(map(math.isnan, wilson(0, 0)))
    with pytest.raises(InputError, match="between 0 and n=3, not 4"):
        wilson(4, 3)


# Bootstrap


def test_bootstrap_converges_to_the_enumeration_of_all_resamples() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    every = np.array([np.mean(draw) for draw in itertools.product(x, repeat=4)])
    assert bootstrap_mean(x, resamples=200_000, seed=1) == pytest.approx(percentiles(every, 4), abs=0.13)


def test_bootstrap_of_a_weighted_mean_is_that_of_the_ratio() -> None:
    x, w = np.array([1.0, 5.0, 2.0]), np.array([3.0, 1.0, 10.0])
    every = []
    for draw in itertools.product(range(3), repeat=3):
        i = list(draw)
        every.append((x[i] @ w[i]) / w[i].sum())
    expected = percentiles(np.array(every), 3)
    assert bootstrap_mean(x, w, resamples=100_000) == pytest.approx(expected, abs=0.05)
    assert bootstrap_mean(x, w) == bootstrap_ratio(x * w, w)


def test_expanded_percentiles_are_students_interval_for_normal_draws() -> None:
    """With draws from the bootstrap's limiting normal distribution the result must be the t interval."""
    n, mean, spread = 6, 3.0, 2.0
    draws = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000, mean, spread * math.sqrt((n - 1) / n))
    expected = stats.t.interval(0.95, n - 1, mean, spread)
    assert percentiles(draws, n) == pytest.approx(expected, rel=0.01)


def _coverage(rng: np.random.Generator, rounds: int, draw: object, truth: float, **options: object) -> float:
    inside = 0
    for i in range(rounds):
        low, high = bootstrap_mean(**draw(rng), seed=i, resamples=800, **options)  # type: ignore[operator,arg-type]
        inside += low <= truth <= high
    return inside / rounds


@pytest.mark.parametrize("n", [8, 40])
def test_bootstrap_covers_95_percent(n: int) -> None:
    rng = np.random.default_rng(n)
    assert 0.93 <= _coverage(rng, 1500, lambda g: {"values": g.normal(2, 3, n)}, 2.0) <= 0.97


def test_bootstrap_over_clusters_covers_where_one_over_items_does_not() -> None:
    labels = np.repeat(np.arange(30), 5)

    def draw(g: np.random.Generator) -> dict[str, np.ndarray]:
        return {"values": g.normal(size=30)[labels] + 0.3 * g.normal(size=150)}

    assert 0.93 <= _coverage(np.random.default_rng(1), 1000, draw, 0.0, clusters=labels) <= 0.97
    assert _coverage(np.random.default_rng(1), 300, draw, 0.0) < 0.75


def test_bootstrap_statistic_is_general() -> None:
    x = np.array([3.0, 1.0, 2.0, 9.0, 4.0])
    mean = bootstrap_statistic(lambda counts: counts @ x / len(x), len(x), seed=4)
    assert mean == bootstrap_mean(x, seed=4)


@given(some_numbers, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_bootstrap_stays_within_the_values_and_repeats(values: list[float], seed: int) -> None:
    low, high = bootstrap_mean(values, seed=seed, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap_mean(values, seed=seed, resamples=200) == (low, high)


@pytest.mark.parametrize(
    "values, message",
    [([], "empty"), ([1.0, math.nan], "nan at item 1"), ([[1.0]], "one-dimensional")],
)
def test_bootstrap_says_what_is_wrong(values: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bootstrap_mean(values)


def test_bootstrap_refuses_sizes_that_differ() -> None:
    with pytest.raises(InputError, match="2 numbers, not 1"):
        bootstrap_mean([1, 2], [1])
    with pytest.raises(InputError, match="2 items but 3 cluster labels"):
        bootstrap_mean([1, 2], clusters=["a", "b", "c"])
    with pytest.raises(InputError, match="resamples"):
        bootstrap_mean([1, 2], resamples=0)
    assert all(map(math.isnan, bootstrap_mean([1.0])))


# Differences


def test_paired_difference_by_enumeration() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.5, 3.0, 7.0])
    every = [np.mean((b - a)[list(i)]) for i in itertools.product(range(4), repeat=4)]
    found = paired_difference(a, b, resamples=100_000)
    assert found.value == pytest.approx(1.125)
    assert (found.low, found.high) == pytest.approx(percentiles(np.array(every), 4), abs=0.05)
    flips = [abs(np.mean((b - a) * s)) for s in itertools.product((1, -1), repeat=4)]
    assert found.p == pytest.approx(np.mean(np.array(flips) >= 1.125 - 1e-12), abs=0.01)


def test_pairing_is_worth_something() -> None:
    g = np.random.default_rng(0)
    items = g.normal(0, 10, 60)
    a, b = items + g.normal(0, 0.1, 60), items + 0.2 + g.normal(0, 0.1, 60)
    found = paired_difference(a, b)
    assert found.low > 0.1 and found.high < 0.3 and found.p < 0.01
    assert permutation_test(b, a) > 0.5


def test_paired_difference_of_perplexities_and_of_weights() -> None:
    a, b, w = np.array([1.0, 2.0]), np.array([1.5, 2.5]), np.array([1.0, 3.0])
    found = paired_difference(a, b, w, transform=np.exp)
    assert found.value == pytest.approx(math.exp(2.25) - math.exp(1.75))
    other = paired_difference(a, a, w, np.array([3.0, 1.0]))
    assert other.value == pytest.approx(1.25 - 1.75)


@given(some_numbers)
@settings(max_examples=30, deadline=None)
def test_a_run_does_not_differ_from_itself(values: list[float]) -> None:
    found = paired_difference(values, values, resamples=100)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_paired_difference_of_rates_covers() -> None:
    g = np.random.default_rng(5)
    inside, rounds = 0, 800
    for i in range(rounds):
        a = g.random(150) < 0.6
        b = np.where(g.random(150) < 0.25, g.random(150) < 0.9, a)
        found = paired_difference(a.astype(float), b.astype(float), resamples=300, seed=i)
        inside += found.low <= 0.25 * (0.9 - 0.6) <= found.high
    assert 0.93 <= inside / rounds <= 0.97


def test_one_item_has_no_interval() -> None:
    found = paired_difference([1.0], [3.0])
    assert found.value == 2 and math.isnan(found.low) and found.note


def test_permutation_test_by_enumeration() -> None:
    a, b = [1.0, 3.0, 4.0], [2.0, 6.0, 7.0, 8.0]
    pool, observed = a + b, abs(np.mean(a) - np.mean(b))
    every = []
    for chosen in itertools.combinations(range(7), 3):
        rest = [pool[i] for i in range(7) if i not in chosen]
        every.append(abs(np.mean([pool[i] for i in chosen]) - np.mean(rest)) >= observed - 1e-12)
    assert permutation_test(a, b) == pytest.approx(np.mean(every), abs=0.03)
    assert permutation_test(a, b, alternative="less") < permutation_test(a, b, alternative="greater")


def test_permutation_test_finds_nothing_as_often_as_it_should() -> None:
    g = np.random.default_rng(2)
    p = [permutation_test(g.normal(size=12), g.normal(size=15), resamples=199, seed=i) for i in range(400)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.08


def test_permutation_test_edges() -> None:
    with pytest.raises(InputError, match="one length, not 2 and 3"):
        permutation_test([1, 2], [1, 2, 3], paired=True)
    assert math.isnan(permutation_test([1.0], [2.0]))


def test_holm_by_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = holm([0.01, math.nan, 0.02])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.02]) and math.isnan(adjusted[1])
    assert len(holm([])) == 0
    with pytest.raises(InputError, match="between 0 and 1, not 2"):
        holm([0.5, 2.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_p_value_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all() and (
        adjusted <= np.minimum(1, np.array(p) * len(p)) + 1e-12
    ).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


def test_the_largest_gap_names_a_planted_group_and_only_that() -> None:
    g = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c", "small"], [100, 100, 100, 5])
    rates = np.where(groups == "c", 0.6, 0.9)
    rates[groups == "small"] = 0.0
    found = largest_gap((g.random(305) < rates).astype(float), list(groups), seed=1)
    assert found.lowest == "c" and found.estimate.p < 0.01
    assert found.estimate.low < found.estimate.value < found.estimate.high and found.estimate.low > 0.1


def test_the_largest_gap_of_equal_groups_is_not_called_one() -> None:
    g = np.random.default_rng(3)
    groups = [str(i % 6) for i in range(240)]
    flagged = [
        largest_gap((g.random(240) < 0.8).astype(float), groups, resamples=200, seed=i).estimate.p < 0.05
        for i in range(200)
    ]
    assert np.mean(flagged) < 0.09


def test_the_largest_gap_needs_two_groups_that_are_large_enough() -> None:
    found = largest_gap([1.0, 0.0], ["a", "b"])
    assert math.isnan(found.estimate.value) and "at least 30" in found.estimate.note


# Association


def test_spearman_agrees_with_scipy_and_covers() -> None:
    g = np.random.default_rng(0)
    x = g.integers(0, 5, 40).astype(float)
    y = x + g.normal(0, 2, 40)
    found = spearman(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high and found.p < 0.05
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]).value)


def test_spearman_by_enumeration_of_permutations() -> None:
    """The p-value of the coefficient at n = 8 is near that of all 8! orders."""
    g = np.random.default_rng(1)
    x, y = np.arange(8.0), g.permutation(8) + np.arange(8) * 0.8
    rank = stats.rankdata(y)
    observed = spearman(x, y)
    every = np.array([np.dot(np.arange(1, 9), p) for p in itertools.permutations(rank)])
    centre = 8 * 4.5**2
    exact = np.mean(np.abs(every - centre) >= abs(np.dot(np.arange(1, 9), rank) - centre) - 1e-9)
    assert observed.p == pytest.approx(exact, abs=0.02)


def test_mann_kendall_by_enumeration_with_ties() -> None:
    values = np.array([1.0, 2.0, 2.0, 3.0, 3.0, 3.0])

    def s_of(x: tuple[float, ...]) -> float:
        return sum(np.sign(x[j] - x[i]) for i, j in itertools.combinations(range(len(x)), 2))

    every = np.array([s_of(order) for order in itertools.permutations(values)])
    found = mann_kendall(values)
    assert found.s == s_of(tuple(values))
    assert found.z == pytest.approx((found.s - 1) / every.std())
    assert found.tau == pytest.approx(stats.kendalltau(np.arange(6), values).statistic)
    exact = np.mean(np.abs(every) >= abs(found.s))
    assert found.p == pytest.approx(exact, abs=0.02)


def test_mann_kendall_finds_no_trend_in_flat_series() -> None:
    g = np.random.default_rng(0)
    p = [mann_kendall(g.normal(size=20)).p for _ in range(500)]
    assert 0.025 <= np.mean(np.array(p) < 0.05) <= 0.075


def test_mann_kendall_edges() -> None:
    assert mann_kendall([1, 1, 1]).p == 1 and mann_kendall([1, 1, 1]).note
    assert math.isnan(mann_kendall([1, 2]).p)
    assert mann_kendall(range(10)).tau == 1
    assert mann_kendall(range(10)).z == -mann_kendall(range(10)[::-1]).z


def test_kappa_agrees_with_scikit_learn() -> None:
    g = np.random.default_rng(0)
    a = g.choice(["x", "y", "z"], 50)
    b = np.where(g.random(50) < 0.6, a, g.choice(["x", "y", "z"], 50))
    found = cohen_kappa(a, b)
    assert found.value == pytest.approx(cohen_kappa_score(a, b))
    assert found.low < found.value < found.high
    assert math.isnan(cohen_kappa(["a", "a"], ["a", "a"]).value)
    assert math.isnan(cohen_kappa([], []).value)
    with pytest.raises(InputError, match="same items"):
        cohen_kappa(["a"], ["a", "b"])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[bool, int]]) -> None:
    y, s = [int(a) for a, _ in rows], [float(b) for _, b in rows]
    pairs = [(p > q) + 0.5 * (p == q) for a, p in rows if a for b, q in rows if not b]
    found = auc(y, s, resamples=50)
    if pairs:
        assert found.value == pytest.approx(np.mean(pairs))
        if min(sum(y), len(y) - sum(y)) > 1:
            assert 0 <= found.low <= found.value <= found.high <= 1
        else:
            assert math.isnan(found.low) and "one item" in found.note
    else:
        assert math.isnan(found.value) and found.note == "one class only"


def test_auc_of_perfect_separation_is_not_certain() -> None:
    found = auc([0] * 9 + [1] * 5, range(14))
    assert (found.value, found.high) == (1, 1) and found.low == wilson(5, 5)[0]
    worst = auc([1] * 9 + [0] * 5, range(14))
    assert (worst.value, worst.low) == (0, 0) and worst.high == wilson(0, 5)[1]


def test_auc_interval_covers() -> None:
    g = np.random.default_rng(7)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    y = np.repeat([0, 1], 30)
    found = [auc(y, g.normal(size=60) + y, seed=i, resamples=300) for i in range(400)]
    assert 0.92 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.98


def test_pinned_auc_shows_a_group_whose_scores_are_shifted() -> None:
    g = np.random.default_rng(0)
    y = g.integers(0, 2, 2000)
    group = g.random(2000) < 0.2
    scores = g.normal(size=2000) + 2 * y + 3 * group
    inside = auc(y[group], scores[group], resamples=50).value
    pinned = pinned_auc(y, scores, group, resamples=50).value
    assert inside > 0.9 and pinned < inside - 0.1
    fair = pinned_auc(y, scores - 3 * group, group, resamples=50).value
    assert fair == pytest.approx(inside, abs=0.05)
    assert math.isnan(pinned_auc(y, scores, np.zeros(2000)).value)


def test_auc_refuses_labels_and_scores_that_are_none() -> None:
    with pytest.raises(InputError, match="0 or 1, not 2"):
        auc([0, 2], [0.1, 0.2])
    with pytest.raises(InputError, match="scores hold nan"):
        auc([0, 1], [0.1, math.nan])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_binary_rates_by_counting(rows: list[tuple[bool, bool]]) -> None:
    found = binary_rates([a for a, _ in rows], [b for _, b in rows])
    conditions = {
        "fpr": (lambda y, d: d, lambda y, d: not y),
        "fnr": (lambda y, d: not d, lambda y, d: y),
        "fdr": (lambda y, d: not y, lambda y, d: d),
        "for": (lambda y, d: y, lambda y, d: not d),
    }
    for name, (wrong, of) in conditions.items():
        chosen = [wrong(y, d) for y, d in rows if of(y, d)]
        assert found[name].n == len(chosen)
        if chosen:
            assert found[name].value == pytest.approx(np.mean(chosen))
            assert found[name].low <= found[name].value <= found[name].high
        else:
            assert math.isnan(found[name].value) and found[name].note


# From items to measurements


def test_a_mean_measurement_knows_its_items() -> None:
    m = mean_measurement("x", "nats", [1.0, 2.0, 3.0], [1, 1, 2], transform="exp", seed=3, over="documents")
    assert m.value == pytest.approx(math.exp(2.25)) and m.n == 3 and m.interval == "bootstrap over documents"
    assert m.low is not None and m.high is not None and m.low < m.value < m.high
    assert m.details == {"transform": "exp"} and list(m.samples) == [1, 2, 3]


def test_measurements_of_nothing_say_so() -> None:
    assert mean_measurement("x", "nats", []).note == "no documents"
    assert mean_measurement("x", "nats", [1.0], [0.0]).note == "all weights are 0"
    assert mean_measurement("x", "nats", [1.0]).low is None
    assert rate_measurement("r", []).note == "no items" and math.isnan(rate_measurement("r", []).value)
    with pytest.raises(InputError, match="unknown transform 'log'"):
        mean_measurement("x", "nats", [1.0], transform="log")
    with pytest.raises(InputError, match="true or false"):
        rate_measurement("r", [0.5])


def test_a_rate_measurement_has_wilsons_interval() -> None:
    m = rate_measurement("r", [True, False, True, True], seed=2)
    assert (m.value, m.n, m.interval) == (0.75, 4, "wilson") and (m.low, m.high) == wilson(3, 4)
