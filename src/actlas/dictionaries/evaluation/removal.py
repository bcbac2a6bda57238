"""Targeted concept removal: switch off a concept's features, and see what else goes with them.

TPP (targeted probe perturbation). A probe w_c is trained for each label c on pooled activations. The n
features with the largest effect on it,  max(0, mean z | c - mean z | not c) * (d_j . w_c),  are set to
zero, the error kept:

    tpp_threshold_n_total_metric = mean over c of [ A_c - A_c(S_c off) ] - mean over c' != c of
                                   [ A_c' - A_c'(S_c off) ]

SCR (spurious correlation removal). A probe is trained where two attributes go together (positive film
reviews, negative food reviews), so it reads both. Features of the spurious attribute, largest
|mean difference * (d_j . w_spurious)|, are switched off, and the probe is tested on balanced texts:

    scr = (A_off - A_biased) / (A_clean - A_biased)

`scr_dir1` removes the first attribute's cue for the second's sake, `scr_dir2` the other way round;
`scr_metric` is the direction in which the biased probe was worse, as in SAEBench.

Source: Karvonen et al. 2024, "Evaluating Sparse Autoencoders on Targeted Concept Removal Tasks", and
SAEBench's code. There the probes are trained with Adam for a few epochs; here by scikit-learn. Control:
as many features drawn at random among those that are active.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.intervals import bootstrap_ratio
from actlas.core.measurement import Better, Measurement
from actlas.dictionaries.evaluation.probing import balanced
from actlas.dictionaries.evaluation.texts import Labelled, Pooled, pool_texts
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
Index = NDArray[np.int64]
THRESHOLDS = (2, 5, 10, 20, 50)
RANDOM = "random features"


@dataclass(frozen=True)
class LinearProbe:
    """`weight . x + bias > 0`."""

    weight: Array
    bias: float

    def right(self, x: NDArray[np.floating], y: NDArray[np.bool_]) -> Array:
        """Return whether each answer is right, as 0 or 1."""
        return ((x @ self.weight + self.bias > 0) == y).astype(np.float64)


def train_probe(x: NDArray[np.floating], y: NDArray[np.bool_]) -> LinearProbe:
    """Fit a logistic regression in the activations' own space, all channels on one scale."""
    from sklearn.linear_model import LogisticRegression

    centre = x.mean(0, dtype=np.float64)
    scale = max(float(np.sqrt(np.mean((x - centre) ** 2))), 1e-12)
    found = LogisticRegression(max_iter=2000).fit((x - centre) / scale, y)
    weight = found.coef_[0].astype(np.float64) / scale
    return LinearProbe(weight, float(found.intercept_[0]) - float(weight @ centre))


def switch_off(
    pooled: Pooled, name: str, atoms: NDArray[np.floating], features: Index
) -> NDArray[np.floating]:
    """Return the pooled activations with features set to zero and the error kept, `[texts, d]`."""
    if not len(features):
        return pooled.x
    return pooled.x - pooled.codes[name][:, features] @ atoms[features]


def targeted_probe_perturbation(
    model: Model,
    texts: Labelled,
    lenses: Mapping[str, Dictionary],
    *,
    dataset: str = "texts",
    thresholds: Sequence[int] = THRESHOLDS,
    seed: int = 0,
) -> list[Measurement]:
    """Return TPP for every dictionary and threshold, beside random features of the first dictionary.

    Args:
        model: whose activations are read.
        texts: `(text, label)`, three or more labels (with two, removing one is removing the other).
        lenses: dictionaries of one site; the first is the one that is evaluated.
        dataset: name of the texts.
        thresholds: how many features are switched off.
        seed: of splits, random features and the bootstrap.

    Raises:
        InputError: fewer than three labels, or fewer than 10 texts of one.
    """
    return tpp_of(pool_texts(model, texts, lenses), lenses, dataset=dataset, thresholds=thresholds, seed=seed)


def tpp_of(
    pooled: Pooled,
    lenses: Mapping[str, Dictionary],
    *,
    dataset: str = "texts",
    thresholds: Sequence[int] = THRESHOLDS,
    seed: int = 0,
) -> list[Measurement]:
    """The same on texts that are pooled already; see `targeted_probe_perturbation`."""
    classes = pooled.classes()
    if len(classes) < 3:
        raise InputError(f"targeted probe perturbation needs three labels or more, not {len(classes)}")
    parts = {c: balanced(pooled.label == c, seed, c) for c in classes}
    probes = {c: train_probe(pooled.x[parts[c][0]], pooled.label[parts[c][0]] == c) for c in classes}
    clean = {c: probes[c].right(pooled.x[parts[c][1]], pooled.label[parts[c][1]] == c) for c in classes}
    first = next(iter(lenses))
    out = []
    for name in (*lenses, RANDOM):
        own = first if name == RANDOM else name
        atoms = lenses[own].atoms.detach().cpu().double().numpy()
        for n in thresholds:
            intended: list[tuple[Index, Array]] = []
            unintended: list[tuple[Index, Array]] = []
            for c in classes:
                train = parts[c][0]
                effects = _effects(pooled.codes[own], train, pooled.label == c, atoms @ probes[c].weight)
                chosen = _top(effects, n)
                if name == RANDOM:
                    chosen = _random(pooled.codes[own], len(chosen), seed)
                x = switch_off(pooled, own, atoms, chosen)
                for other in classes:
                    test = parts[other][1]
                    lost = clean[other] - probes[other].right(x[test], pooled.label[test] == other)
                    (intended if other == c else unintended).append((test, lost))
            group = {"dataset": dataset, "dictionary": name}
            out.append(_tpp(f"tpp_threshold_{n}_total_metric", intended, unintended, group, seed))
            out.append(_tpp(f"tpp_threshold_{n}_intended_diff_only", intended, [], group, seed))
            out.append(_tpp(f"tpp_threshold_{n}_unintended_diff_only", [], unintended, group, seed))
    return out


def _effects(
    codes: NDArray[np.floating], rows: Index, positive: NDArray[np.bool_], along: Array, *, both: bool = False
) -> Array:
    """Return each feature's effect on a probe; with `both` its magnitude, whichever class it marks."""
    z, y = codes[rows], positive[rows]
    gap = z[y].mean(0, dtype=np.float64) - z[~y].mean(0, dtype=np.float64)
    effect: Array = np.abs(gap * along) if both else np.maximum(gap, 0.0) * along
    return effect


def _top(effects: Array, n: int) -> Index:
    """Return the n features of largest effect, leaving out those without any."""
    order = np.argsort(-effects, kind="stable")[:n]
    return order[effects[order] != 0]


def _random(codes: NDArray[np.floating], n: int, seed: int) -> Index:
    active = np.flatnonzero((codes != 0).any(0))
    return np.random.default_rng(seed).permutation(active)[:n]


def _tpp(
    name: str,
    plus: list[tuple[Index, Array]],
    minus: list[tuple[Index, Array]],
    group: dict[str, str],
    seed: int,
) -> Measurement:
    """Mean over `plus` minus mean over `minus`, each set of texts weighing the same."""
    items, values = [], []
    for sets, sign in ((plus, 1.0), (minus, -1.0 if plus else 1.0)):
        for test, lost in sets:
            items.append(test)
            values.append(sign * lost / (len(test) * len(sets)))
    flat = np.concatenate(values)
    better: Better = "higher" if plus else "lower"
    return mean_measurement(
        name, "accuracy", flat * len(flat), seed=seed, over="texts", clusters=np.concatenate(items),
        better=better, group=group,
    )  # fmt: skip


def spurious_correlation_removal(
    model: Model,
    texts: Sequence[tuple[str, str, str]],
    lenses: Mapping[str, Dictionary],
    *,
    dataset: str = "texts",
    thresholds: Sequence[int] = THRESHOLDS,
    seed: int = 0,
) -> list[Measurement]:
    """Return SCR for every dictionary and threshold, beside random features of the first dictionary.

    Args:
        model: whose activations are read.
        texts: `(text, first attribute, second attribute)`; each attribute has two values, and all four
            combinations occur.
        lenses: dictionaries of one site; the first is the one that is evaluated.
        dataset, thresholds, seed: as of `targeted_probe_perturbation`.

    Raises:
        InputError: attributes that do not have two values, or fewer than 10 texts of a combination.
    """
    pooled = pool_texts(model, [(text, a) for text, a, _ in texts], lenses)
    second = np.array([b for _, _, b in texts])
    return scr_of(pooled, second, lenses, dataset=dataset, thresholds=thresholds, seed=seed)


def scr_of(
    pooled: Pooled,
    second: Sequence[str] | NDArray[np.str_],
    lenses: Mapping[str, Dictionary],
    *,
    dataset: str = "texts",
    thresholds: Sequence[int] = THRESHOLDS,
    seed: int = 0,
) -> list[Measurement]:
    """The same on texts that are pooled already; `second` is the second attribute, `[texts]`."""
    second = np.asarray(second)
    values = [sorted(set(of.tolist())) for of in (pooled.label, second)]
    if [len(v) for v in values] != [2, 2]:
        raise InputError(f"each attribute needs two values; they have {values[0]} and {values[1]}")
    y = [pooled.label == values[0][1], second == values[1][1]]
    train, test = _four_corners(y, seed)
    biased = train[y[0][train] == y[1][train]]
    probe = train_probe(pooled.x[biased], y[0][biased])
    clean = [train_probe(pooled.x[train], t[train]) for t in y]
    base = [probe.right(pooled.x[test], t[test]) for t in y]
    best = [c.right(pooled.x[test], t[test]) for c, t in zip(clean, y, strict=True)]
    first = next(iter(lenses))
    out = []
    for name in (*lenses, RANDOM):
        own = first if name == RANDOM else name
        atoms = lenses[own].atoms.detach().cpu().double().numpy()
        group = {"dataset": dataset, "dictionary": name}
        for n in thresholds:
            scores = []
            for wanted, spurious in ((1, 0), (0, 1)):  # dir1 removes the first attribute, dir2 the second
                along = atoms @ clean[spurious].weight
                chosen = _top(_effects(pooled.codes[own], train, y[spurious], along, both=True), n)
                if name == RANDOM:
                    chosen = _random(pooled.codes[own], len(chosen), seed)
                after = probe.right(switch_off(pooled, own, atoms, chosen)[test], y[wanted][test])
                label = f"scr_dir{2 - wanted}_threshold_{n}"
                scores.append(_scr(label, after - base[wanted], best[wanted] - base[wanted], group, seed))
            worse = 0 if base[1].mean() < base[0].mean() else 1
            chosen_score = scores[worse]
            fields = {k: getattr(chosen_score, k) for k in Measurement.__dataclass_fields__}
            out += [*scores, Measurement(**{**fields, "name": f"scr_metric_threshold_{n}"})]
    return out


def _four_corners(y: Sequence[NDArray[np.bool_]], seed: int) -> tuple[Index, Index]:
    """Return training and test indices with as many texts of each combination of the two attributes."""
    parts = []
    for a in (False, True):
        for b in (False, True):
            corner = (y[0] == a) & (y[1] == b)
            if corner.sum() < 10:
                raise InputError(
                    f"{int(corner.sum())} texts of one combination of attributes are too few; give 10"
                )
            parts.append(np.flatnonzero(corner))
    n = min(map(len, parts))
    cut = round(n * 0.6)
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(p)[:n] for p in parts]
    return np.concatenate([p[:cut] for p in shuffled]), np.concatenate([p[cut:] for p in shuffled])


def _scr(name: str, top: Array, bottom: Array, group: dict[str, str], seed: int) -> Measurement:
    if bottom.mean() < 1e-3:
        return missing(name, "fraction", "the biased probe is as good as the clean one", group=group)
    low, high = bootstrap_ratio(top, bottom, seed=seed)
    return Measurement(
        name,
        float(top.sum() / bottom.sum()),
        "fraction",
        len(top),
        low,
        high,
        "bootstrap over texts",
        seed,
        group=group,
        better="higher",
        samples=top / bottom.mean(),  # what is paired with a control has the same denominator
    )
