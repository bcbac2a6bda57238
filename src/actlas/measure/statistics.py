"""Every statistic of the measure room, in one place to import from.

| file | what |
| --- | --- |
| `intervals` | bootstrap and Wilson intervals |
| `differences` | paired differences, permutation tests, Holm's correction, the largest gap |
| `association` | correlation, trend, agreement, ROC, error rates |
| `samples` | from per-item values to a Measurement |
"""

from __future__ import annotations

from actlas.core.intervals import (
    Estimate,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_statistic,
    percentiles,
    wilson,
)
from actlas.measure.association import (
    Trend,
    auc,
    binary_rates,
    cohen_kappa,
    mann_kendall,
    pinned_auc,
    spearman,
)
from actlas.measure.differences import Gap, holm, largest_gap, paired_difference, permutation_test
from actlas.measure.samples import mean_measurement, rate_measurement

__all__ = [
    "Estimate",
    "Gap",
    "Trend",
    "auc",
    "binary_rates",
    "bootstrap_mean",
    "bootstrap_ratio",
    "bootstrap_statistic",
    "cohen_kappa",
    "holm",
    "largest_gap",
    "mann_kendall",
    "mean_measurement",
    "paired_difference",
    "percentiles",
    "permutation_test",
    "pinned_auc",
    "rate_measurement",
    "spearman",
    "wilson",
]
