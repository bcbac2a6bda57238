"""A benchmark for the tests of the harness: one variant counts, one cannot run, one is timed."""

from __future__ import annotations

from bench.harness import Step, Unavailable


def counting() -> Step:
    calls = 0

    def step() -> dict[str, float]:
        nonlocal calls
        calls += 1
        print("a library that prints")
        return {"calls": float(calls)}

    return step


def missing() -> Step:
    raise Unavailable("a library is not installed")


def timed() -> Step:
    def step() -> None:
        sum(range(1000))

    return step


VARIANTS = {"counting": counting, "missing": missing, "timed": timed}
