"""How long the second load of `smollm2` takes beyond importing torch, each time in a fresh process."""

from __future__ import annotations

from bench.harness import Step, fresh, median, report, say


def _load() -> Step:
    def step() -> dict[str, float]:
        import time

        start = time.perf_counter()
        import torch

        imported = time.perf_counter()
        import actlas

        model = actlas.load("smollm2")
        loaded = time.perf_counter()
        # The weights may be mapped lazily: reading them all once shows what the first use still costs.
        with torch.no_grad():
            float(sum(p.sum() for p in model.module.parameters()))
        return {
            "import torch": imported - start,
            "load": loaded - imported,
            "read every weight": time.perf_counter() - loaded,
        }

    return step


VARIANTS = {"second load": _load}


def main(rounds: int) -> bool:
    """Measure and report; return whether the target is met."""
    fresh("bench.loading", "second load")  # fetches and converts if this is the first load on this machine
    runs = []
    for done in range(rounds):
        runs.append(fresh("bench.loading", "second load"))
        say(f"round {done + 1} of {rounds}")
    figures = [
        median(
            "actlas.load('smollm2') after import torch",
            [run["load"] for run in runs],
            "s",
            2.0,
            "importing transformers is in it",
        ),
        median("import torch", [run["import torch"] for run in runs], "s", note="the baseline"),
        median("reading every weight once afterwards", [run["read every weight"] for run in runs], "s"),
    ]
    return report("loading", "Second load of smollm2, medians of fresh processes", figures)
