"""Suites of `actlas measure --suite`: several measures of several variants that belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actlas.cli.output import Output
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.measure.quantization_suite import Suite

SUITES = ("quantization",)
_SIZES: dict[bool, dict[str, int]] = {
    False: {"items": 24, "tokens": 1024, "context": 128, "prompts": 5},
    True: {"items": 64, "tokens": 8192, "context": 256, "prompts": 20},
}


def check_suite(name: str, edits: Sequence[str] | None) -> None:
    """Raise unless there is such a suite and something to compare.

    Raises:
        InputError: a suite that does not exist, or no edits.
    """
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; there is {', '.join(SUITES)}")
    if not edits:
        raise InputError(
            "the suite compares variants with the model as it is; give at least one, e.g. --edit awq3/"
        )


def run_suite(
    out: Output, model: Model, variants: Mapping[str, Edit], corpus: Any, *, full: bool, seed: int
) -> None:
    """Measure the variants and print one column for each."""
    from actlas.measure.quantization_suite import proxy_agreement, quantization_suite

    suite = quantization_suite(model, variants, corpus=corpus, seed=seed, **_SIZES[full])  # type: ignore[arg-type]
    proxies = proxy_agreement(suite, seed=seed)
    out.document["suite"] = [*suite.measurements, *proxies]
    _show(out, suite)
    for m in proxies:
        if m.value == m.value:
            out.say(f"{m.group['proxy']} ranks the variants as their mean accuracy does: {m}")


def _show(out: Output, suite: Suite) -> None:
    from actlas.core.measurement import format_number

    lines: dict[tuple[str, str], dict[str, str]] = {}
    units: dict[tuple[str, str], str] = {}
    for m in suite.measurements:
        key = m.name, m.group.get("task", "")
        interval = "" if m.low is None or m.high is None else f" [{m.low:.3g}, {m.high:.3g}]"
        lines.setdefault(key, {})[m.group["variant"]] = f"{format_number(m.value)}{interval}"
        units[key] = m.unit
    rows = [
        [name, task, *(cells.get(v, "-") for v in suite.variants), units[name, task]]
        for (name, task), cells in lines.items()
    ]
    out.table(["measure", "task", *suite.variants, "unit"], rows)
