"""Run variants in processes of their own, interleaved, and say whether targets are met.

A benchmark module has `VARIANTS`, a dictionary from a name to a *setup* function. Setup runs once in a
fresh process and returns a *step*: a function without arguments that does the work once and returns a
dictionary of numbers, or `None` to have its run timed: `"seconds"`, and `"cpu"`, the processor seconds
of all threads, which other programs on a busy machine disturb less. All processes are started, each
does one unrecorded step to warm up, and then they take turns, one step each, so that a busy moment of
the machine falls on all variants alike. A ratio is the median of the ratios within the rounds.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Step = Callable[[], "dict[str, float] | None"]
Setup = Callable[[], Step]
Samples = dict[str, list[float]]


class Unavailable(Exception):
    """A variant that cannot run here; the message says what is missing."""


@dataclass
class Figure:
    """One line of the table: what was measured against which target.

    Attributes:
        what: a few words.
        measured: the number, or `None` where it could not be measured (`note` says why).
        unit: its unit; `"x"` for a ratio.
        most: the target: measured must not be above it. `None`: shown for comparison only.
        note: what a reader must know.
        samples: the values behind it, in the order of the rounds.
    """

    what: str
    measured: float | None
    unit: str
    most: float | None = None
    note: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.most is None:
            return ""
        return "met" if self.measured <= self.most else "MISSED"


# -- the worker's side --------------------------------------------------------------------------------


def worker(module: str, variant: str) -> None:
    """Set up a variant and do one step per line on standard input; one JSON line answers each."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not mix with the answers

    def say(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    try:
        step = importlib.import_module(module).VARIANTS[variant]()
        step()
    except Unavailable as missing:
        say({"unavailable": str(missing)})
        return
    except ImportError as missing:
        say({"unavailable": f"{missing.name or missing} is not installed"})
        return
    say({"ready": True})
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        numbers = step()
        timed = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        say(numbers if numbers is not None else timed)


# -- the parent's side --------------------------------------------------------------------------------


# glibc hands freed memory back to the system and takes it again, page by page, depending on what else is
# held; that alone makes a bare forward pass 8% slower than one whose activations are kept. Timed variants
# keep what they got, so that ratios compare work. (Memory benchmarks use `fresh`, with the default.)
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 40)}


class _Process:
    def __init__(self, module: str, variant: str) -> None:
        self.variant = variant
        code = f"from bench.harness import worker; worker({module!r}, {variant!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **_KEEP_MEMORY},
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of variant {self.variant!r} died; its message is above")
        record: dict[str, Any] = json.loads(line)
        return record

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def interleave(
    module: str, variants: Sequence[str], rounds: int, steps: Mapping[str, int] | None = None
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Return the samples of each variant by number name, and why the others could not run.

    Args:
        module: the benchmark module.
        variants: names in its `VARIANTS`, in the order of their turns.
        rounds: turns of each variant.
        steps: steps in a turn, for variants that are short beside the others; the sample is their mean.
    """
    samples: dict[str, Samples] = {}
    unavailable: dict[str, str] = {}
    running: list[_Process] = []
    try:
        for variant in variants:  # one at a time, so that they do not disturb each other's warm-up
            process = _Process(module, variant)
            running.append(process)
            first = process.answer()
            if "unavailable" in first:
                unavailable[variant] = first["unavailable"]
                running.remove(process)
                process.close()
        for done in range(rounds):
            for process in running:
                turn = [process.step() for _ in range((steps or {}).get(process.variant, 1))]
                for name in turn[0]:
                    mean = statistics.fmean(numbers[name] for numbers in turn)
                    samples.setdefault(process.variant, {}).setdefault(name, []).append(mean)
            say(f"round {done + 1} of {rounds}")
    finally:
        for process in running:
            process.close()
    return samples, unavailable


def fresh(module: str, variant: str) -> dict[str, Any]:
    """Run one step of a variant in a fresh process, without warming up; return its numbers."""
    code = (
        "import json, sys\n"
        f"from {module} import VARIANTS\n"
        "answers, sys.stdout = sys.stdout, sys.stderr\n"
        f"print(json.dumps(VARIANTS[{variant!r}]()()), file=answers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True, check=True
    )
    numbers: dict[str, Any] = json.loads(done.stdout)
    return numbers


def ratio(what: str, mine: Samples, base: Samples, most: float | None = None, note: str = "") -> Figure:
    """Return the median ratio of times within the rounds as a figure; the note tells their range."""
    ratios, cpu = ([a / b for a, b in zip(mine[of], base[of], strict=True)] for of in ("seconds", "cpu"))
    said = f"rounds {min(ratios):.3g} to {max(ratios):.3g} x; processor time {statistics.median(cpu):.3g} x"
    return Figure(what, statistics.median(ratios), "x", most, f"{note}; {said}" if note else said, ratios)


def median(what: str, samples: list[float], unit: str, most: float | None = None, note: str = "") -> Figure:
    """Return the median of the rounds as a figure."""
    return Figure(what, statistics.median(samples), unit, most, note, samples)


def say(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def report(name: str, title: str, figures: Sequence[Figure], details: dict[str, Any] | None = None) -> bool:
    """Print the table, write `results/<name>.json`; return whether every measured target is met."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column, justify in (("figure", "left"), ("target", "right"), ("measured", "right"), ("", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left", overflow="fold")
    for figure in figures:
        target = "" if figure.most is None else f"≤ {figure.most:g} {figure.unit}"
        measured = "-" if figure.measured is None else f"{figure.measured:.3g} {figure.unit}"
        style = {"MISSED": "red", "met": "green"}.get(figure.verdict, "")
        text = f"{figure.what}\n  {figure.note}" if figure.note else figure.what
        table.add_row(text, target, measured, f"[{style}]{figure.verdict}[/]" if style else figure.verdict)
    Console().print(table)

    record = {
        "benchmark": name,
        "title": title,
        "command": f"python -m bench {name}",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": _environment(),
        "figures": [{**asdict(figure), "verdict": figure.verdict} for figure in figures],
        **(details or {}),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return all(figure.verdict != "MISSED" for figure in figures)


def _environment() -> dict[str, Any]:
    import torch  # noqa: F401  so that the environment tells its thread count

    from actlas.papers.environment import environment

    busy = {"load_average": [round(x, 2) for x in os.getloadavg()]} if hasattr(os, "getloadavg") else {}
    return {**environment(), **busy}
