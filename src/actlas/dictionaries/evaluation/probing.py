"""k-sparse probing: is a concept held by few features, or only by many together?

For each label against the others (as many texts of either side): the k features whose mean codes differ
most on the training texts, then a logistic regression on those k alone; accuracy on held-out texts.

    sae_top_k_test_accuracy     k features of the dictionary
    llm_top_k_test_accuracy     k channels of the activation itself, chosen the same way
    sae_test_accuracy, llm_test_accuracy     all features, all channels

A good dictionary needs few features where single channels fail. Names and rule: SAEBench (after Gurnee
et al. 2023), with scikit-learn's logistic regression throughout. Intervals: bootstrap over texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.dictionaries.evaluation.texts import Labelled, Pooled, pool_texts
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
KS = (1, 2, 5)
TEST = 0.3


def sparse_probing(
    model: Model,
    texts: Labelled,
    lenses: Mapping[str, Dictionary],
    *,
    dataset: str = "texts",
    ks: Sequence[int] = KS,
    everything: bool = True,
    seed: int = 0,
) -> list[Measurement]:
    """Probe for every label of a set of texts.

    Args:
        model: whose activations are read.
        texts: `(text, label)`, two or more labels.
        lenses: dictionaries of one site, by name; the first is the one that is evaluated.
        dataset: name of the texts, for the groups.
        ks: how many features or channels a probe may use.
        everything: also the probes on all features and channels.
        seed: of the split and the bootstrap.

    Raises:
        InputError: fewer than two labels, or fewer than 10 texts of one.
    """
    return probing_of(
        pool_texts(model, texts, lenses), dataset=dataset, ks=ks, everything=everything, seed=seed
    )


def probing_of(
    pooled: Pooled, *, dataset: str = "texts", ks: Sequence[int] = KS, everything: bool = True, seed: int = 0
) -> list[Measurement]:
    """The same on texts that are pooled already; see `sparse_probing`."""
    spaces: dict[str, tuple[str, dict[str, str], NDArray[np.float32]]] = {
        "llm": ("llm", {"dataset": dataset}, pooled.x)
    }
    for name, codes in pooled.codes.items():
        spaces[name] = ("sae", {"dataset": dataset, "dictionary": name}, codes)
    out = []
    for prefix, group, x in spaces.values():
        if any(k < 1 or k > x.shape[1] for k in ks):
            raise InputError(f"k must be between 1 and {x.shape[1]}, not {list(ks)}")
        hits: dict[int, list[tuple[NDArray[np.int64], Array]]] = {}
        for train, test, y in one_against_rest(pooled, seed):
            for k in (*ks, *([0] if everything else [])):
                chosen = np.arange(x.shape[1]) if k == 0 else by_mean_difference(x[train], y[train], k)
                probe = fit_probe_on(x[train][:, chosen], y[train])
                right = probe.predict(x[test][:, chosen]) == y[test]
                hits.setdefault(k, []).append((test, right.astype(np.float64)))
        for k, found in hits.items():
            name = f"{prefix}_test_accuracy" if k == 0 else f"{prefix}_top_{k}_test_accuracy"
            out.append(_accuracy(name, found, group, seed))
    return out


def one_against_rest(
    pooled: Pooled, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield, for each label, indices for training and testing (balanced) and the answers `[texts]`.

    A label of two is asked once, since the other is its opposite.

    Raises:
        InputError: fewer than two labels, or fewer than 10 texts of one.
    """
    classes = pooled.classes()
    if len(classes) < 2:
        raise InputError(f"every text is labelled {classes[0]!r}; a probe needs two labels or more")
    for label in classes if len(classes) > 2 else classes[1:]:
        yield (*balanced(pooled.label == label, seed, label), pooled.label == label)


def balanced(
    positive: NDArray[np.bool_], seed: int, label: str = ""
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices for training and testing with as many positive as negative items in each.

    Raises:
        InputError: fewer than 10 of one kind.
    """
    generator = np.random.default_rng(seed)
    sides = [generator.permutation(np.flatnonzero(positive == side)) for side in (True, False)]
    n = min(map(len, sides))
    if n < 10:
        raise InputError(
            f"{n} texts are too few to probe for {label or 'a label'}; give at least 10 of each side"
        )
    cut = round(n * (1 - TEST))
    train = np.concatenate([s[:cut] for s in sides])
    test = np.concatenate([s[cut:n] for s in sides])
    return train, test


def by_mean_difference(x: NDArray[Any], y: NDArray[np.bool_], k: int) -> NDArray[np.int64]:
    """Return the k columns whose means differ most between the two classes, the first on ties."""
    gap = np.abs(x[y].mean(0, dtype=np.float64) - x[~y].mean(0, dtype=np.float64))
    return np.argsort(-gap, kind="stable")[:k]


def fit_probe_on(x: NDArray[Any], y: NDArray[np.bool_]) -> Any:
    """Fit scikit-learn's logistic regression on columns brought to one common scale."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)


def _accuracy(
    name: str, hits: Sequence[tuple[NDArray[np.int64], Array]], group: dict[str, str], seed: int
) -> Measurement:
    """Average over labels; a text that is tested for several labels is one item of the bootstrap."""
    items = np.concatenate([test for test, _ in hits])
    weights = np.concatenate([np.full(len(test), 1 / len(test)) for test, _ in hits])
    return mean_measurement(
        name,
        "fraction",
        np.concatenate([right for _, right in hits]),
        weights / weights.sum() * len(weights),
        seed=seed,
        over="texts",
        clusters=items,
        better="higher",
        group=group,
    )
