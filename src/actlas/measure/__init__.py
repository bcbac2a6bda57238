"""Measures: numbers about a model, each with its interval, its n, its unit and its seed.

    from actlas.measure import compare, measure, measures
    measure(model, ["perplexity", "task-accuracy"])
    compare(model, {"base": [], "steered": [edit]}, ["perplexity"])

`registry` lists what can be measured, `runner` runs it, `compare` pairs variants, `statistics` makes
the intervals. Importing this package imports no torch; the measures' own modules do.
"""

# These are imported here and not on demand, so that `compare` is the function and not its module.
from __future__ import annotations

from actlas.core.measurement import Measurement
from actlas.measure.compare import Comparison, Row, compare
from actlas.measure.registry import MeasureInfo, find_measure, measures
from actlas.measure.runner import measure

__all__ = [
    "Comparison",
    "MeasureInfo",
    "Measurement",
    "Row",
    "compare",
    "find_measure",
    "measure",
    "measures",
]
