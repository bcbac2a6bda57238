"""From the runs of a task evaluation to measurements with intervals.

share_measure        a ratio of two sums over prompts (sufficiency, necessity, edit effect)
edit_measures        success, effect and weight of one edit
f1_measures          how well the best feature tells each value of an attribute, on other prompts
structure_measures   how many features are interpretable, how big an attribute is, into how many it splits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.intervals import Array, bootstrap_ratio, bootstrap_statistic, divide
from actlas.core.measurement import Measurement
from actlas.dictionaries.attribute_f1 import F1Table, Sign, attribute_f1, best_union
from actlas.dictionaries.task_runs import Outcome
from actlas.measure.samples import mean_measurement, missing, rate_measurement

INTERPRETABLE = 0.8  # F1 above which a feature counts as standing for a value
_PURE = 0.9  # precision from which a feature counts as one part of a value that was split
_COVERED = 0.9  # share of a value's prompts that its parts must cover


def share_measure(
    name: str, part: Tensor, whole: Tensor, seed: int, group: Mapping[str, str], note: str = ""
) -> Measurement:
    """Return sum(part) / sum(whole) over prompts, with a bootstrap interval over prompts.

    Where the interval of sum(whole) covers 0 there is nothing to take a share of, and the value is NaN.
    """
    a, b = part.double().numpy(), whole.double().numpy()
    low, high = bootstrap_ratio(b, np.ones_like(b), seed=seed)
    if not (low > 0 or high < 0):
        return missing(
            name, "fraction", "the effect that this is a share of is not distinguishable from 0", group=group
        )
    low, high = bootstrap_ratio(a, b, seed=seed)
    return Measurement(
        name=name, value=float(a.sum() / b.sum()), unit="fraction", n=len(a), low=low, high=high,
        interval="bootstrap over prompts", seed=seed, group=dict(group), note=note,
        samples=a / b.mean(),
    )  # fmt: skip


def edit_measures(
    clean: Outcome,
    full: Outcome,
    edited: Outcome,
    weight: Tensor | None,
    count: Tensor | None,
    seed: int,
    group: Mapping[str, str],
) -> list[Measurement]:
    """Return the success and effect of an edit, and the weight that it removes.

    Args:
        clean, full, edited: runs with the prompts' own, the counterfactual's and the edited activations.
        weight, count: weight removed and features exchanged, by prompt.
    """
    moved = full.token != clean.token
    same = (edited.token == full.token).numpy()
    out = [
        rate_measurement(
            "edit success", same, seed=seed, better="higher", group=group,
            details={"prompts that the full patch changes": int(moved.sum())},
        ),
        rate_measurement(
            "edit success where the full patch changes the prediction", same[moved.numpy()], seed=seed,
            better="higher", group=group,
        ),
        share_measure(
            "edit effect", clean.difference - edited.difference, clean.difference - full.difference,
            seed, group,
        ),
    ]  # fmt: skip
    if weight is not None and count is not None:
        out.append(
            mean_measurement(
                "weight removed", "fraction", weight.double().numpy(), seed=seed, over="prompts", group=group,
                details={"features exchanged": float(count.double().mean())},
            )
        )  # fmt: skip
    return out


def f1_measures(
    fit: Codes,
    fit_labels: Sequence[str],
    test: Codes,
    test_labels: Sequence[str],
    *,
    sign: Sign,
    seed: int,
    shuffle: bool,
    group: Mapping[str, str],
) -> list[Measurement]:
    """Return the F1 of the best feature of each value, averaged over values, on other prompts.

    With `shuffle` the same with shuffled labels follows: choosing among thousands of features finds some
    that fit any labels, and only the prompts that did not choose them tell.
    """
    found = [_mean_f1("attribute F1", fit, fit_labels, test, test_labels, sign, seed, group)]
    if shuffle:
        generator = np.random.default_rng(seed)
        labels, truth = (list(generator.permutation(np.asarray(some))) for some in (fit_labels, test_labels))
        found.append(_mean_f1("attribute F1, shuffled labels", fit, labels, test, truth, sign, seed, group))
    return found


def _mean_f1(
    name: str,
    fit: Codes,
    fit_labels: Sequence[str],
    test: Codes,
    test_labels: Sequence[str],
    sign: Sign,
    seed: int,
    group: Mapping[str, str],
) -> Measurement:
    table = attribute_f1(fit, fit_labels, sign=sign)
    z = test.dense()
    on = (z > 0 if sign == "positive" else z != 0).numpy()
    both, either, chosen = [], [], {}
    for value in table.values:
        if value not in test_labels:
            continue
        truth = np.array([label == value for label in test_labels], dtype=np.float64)
        best = table.best(value)
        active = on[:, best[0][0]].astype(np.float64) if best else np.zeros(len(truth))
        chosen[value] = best[0][0] if best else None
        both.append(2 * active * truth)
        either.append(active + truth)
    a, b = np.stack(both, 1), np.stack(either, 1)

    def f1(counts: Array) -> Array:
        return np.asarray(np.nanmean(divide(counts @ a, counts @ b), axis=1))

    low, high = bootstrap_statistic(f1, len(a), seed=seed)
    return Measurement(
        name=name, value=float(f1(np.ones((1, len(a))))[0]), unit="fraction", n=len(a), low=low, high=high,
        interval="bootstrap over prompts", seed=seed, better="higher", group=dict(group),
        note=f"mean over {len(chosen)} values", details={"features": chosen},
    )  # fmt: skip


def structure_measures(
    tables: Mapping[str, F1Table],
    codes: Codes,
    x: Tensor,
    attributes: Sequence[Mapping[str, str]],
    sign: Sign,
    group: Mapping[str, str],
) -> list[Measurement]:
    """Return counts that describe the dictionary on the fitting prompts (no intervals).

    * `interpretable features`: share of the active ones with F1 above 0.8 for a value, or for a union of up
      to 10 values of one attribute.
    * `attribute size`: share of the variance between an attribute's values. A small attribute beside a large
      one is what occlusion hides.
    * `values with a feature`: share of an attribute's values that some feature tells with F1 above 0.8.
    * `features per value`: how many features of precision 0.9 it takes to cover 90% of a value's prompts,
      averaged over the values that can be covered. Above 1, the value is split.
    """
    active = codes.counts() > 0
    single, union = (
        torch.zeros(codes.features, dtype=torch.bool),
        torch.zeros(codes.features, dtype=torch.bool),
    )
    out = []
    on = codes.dense()
    on = on > 0 if sign == "positive" else on != 0
    centre = x.double().mean(0)
    total = float((x.double() - centre).square().sum())
    for attribute, table in tables.items():
        labels = [a[attribute] for a in attributes]
        own = {**group, "attribute": attribute}
        single |= table.interpretable(INTERPRETABLE)
        for found in best_union(table):
            union[found.feature] |= found.f1 > INTERPRETABLE
        between = 0.0
        for value in table.values:
            rows = torch.tensor([label == value for label in labels])
            between += int(rows.sum()) * float((x[rows].double().mean(0) - centre).square().sum())
        out.append(_count("attribute size", between / total, "fraction", len(x), own))
        told = (table.f1 > INTERPRETABLE).any(0).double().mean()
        out.append(_count("values with a feature", float(told), "fraction", len(table.values), own))
        parts = [
            p for v in range(len(table.values)) if (p := parts_of_value(table, v, on, labels)) is not None
        ]
        said = f"{len(parts)} of {len(table.values)} values can be covered"
        if parts:
            out.append(_count("features per value", float(np.mean(parts)), "count", len(parts), own, said))
        else:
            out.append(missing("features per value", "count", said, group=own))
    n = max(int(active.sum()), 1)
    for name, which in (("interpretable features", single), ("interpretable features, with unions", union)):
        share = float((which & active).sum()) / n
        out.append(_count(name, share, "fraction", n, group, f"of {n} features that are active in the task"))
    return out


def parts_of_value(table: F1Table, value: int, on: Tensor, labels: Sequence[str]) -> int | None:
    """Return how many pure features cover a value's prompts (greedily), or `None` if they cannot."""
    pure = ((table.precision[:, value] >= _PURE) & (table.joint[:, value] >= 2)).nonzero().squeeze(1)
    rows = torch.tensor([label == table.values[value] for label in labels])
    covers = on[rows][:, pure]
    left = torch.ones(len(covers), dtype=torch.bool)
    used = 0
    while float(left.double().mean()) > 1 - _COVERED + 1e-12:
        if not covers.numel():
            return None
        gain = (covers & left.unsqueeze(1)).sum(0)
        if int(gain.max()) == 0:
            return None
        left &= ~covers[:, int(gain.argmax())]
        used += 1
    return used


def _count(
    name: str, value: float, unit: str, n: int, group: Mapping[str, str], note: str = ""
) -> Measurement:
    return Measurement(
        name=name, value=value, unit=unit, n=n, interval="none: it describes these prompts",
        group=dict(group), note=note,
    )  # fmt: skip
