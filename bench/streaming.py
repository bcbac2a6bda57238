"""How much memory a calibration pass needs above the loaded model, and that it does not grow.

Each size runs in a fresh process: load, read every weight once (they may be mapped lazily), reset the
peak resident size that the kernel keeps, calibrate, read the peak. To keep the run short only
`blocks.5.resid_post` is read, so each forward pass stops after block 5 of 30; the memory of a pass is
that of one batch of tokens, whichever site is read.
"""

from __future__ import annotations

from pathlib import Path

from bench.harness import Figure, Step, fresh, median, report, say

SITE = "blocks.5.resid_post"
STATS = ("moments", "absmax", "quantiles")
SIZES = (5_000, 50_000)


def _calibrate(tokens: int) -> Step:
    def step() -> dict[str, float]:
        import time

        import torch

        import actlas
        from actlas.data import corpus

        model = actlas.load("smollm2")
        text = corpus("mixed")
        with torch.no_grad():
            float(sum(p.sum() for p in model.module.parameters()))
        _reset_peak()
        before = _status("VmRSS")
        start = time.perf_counter()
        calibration = actlas.calibrate(model, text, SITE, stats=STATS, max_tokens=tokens)
        seconds = time.perf_counter() - start
        return {
            "tokens": float(calibration.tokens),
            "peak above loaded": _status("VmHWM") - before,
            "loaded": before,
            "seconds": seconds,
        }

    return step


VARIANTS = {f"{tokens} tokens": (lambda tokens=tokens: _calibrate(tokens)) for tokens in SIZES}


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> float:
    """Return a memory field of this process in megabytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    title = f"Streaming through calibrate({SITE}, {', '.join(STATS)})"
    if not Path("/proc/self/clear_refs").exists():
        return report("streaming", title, [Figure("peak memory", None, "MB", 300, "needs Linux's /proc")])
    rounds = min(rounds, 3)  # each takes about a minute, and memory varies little
    runs: dict[int, list[dict[str, float]]] = {tokens: [] for tokens in SIZES}
    for done in range(rounds):
        for tokens in SIZES:
            runs[tokens].append(fresh("bench.streaming", f"{tokens} tokens"))
        say(f"round {done + 1} of {rounds}")
    few, many = ([run["peak above loaded"] for run in runs[tokens]] for tokens in SIZES)
    rates = [run["tokens"] / run["seconds"] for run in runs[SIZES[1]]]
    figures = [
        median(f"peak above the loaded model, {SIZES[1]:,} tokens", many, "MB", 300.0),
        median(f"peak above the loaded model, {SIZES[0]:,} tokens", few, "MB", 300.0),
        median(
            "difference between the two",
            [b - a for a, b in zip(few, many, strict=True)],
            "MB",
            10.0,
            "no higher, to within what allocators vary",
        ),
        median("tokens/s while streaming", rates, "tokens/s", note="stops after block 5"),
        median("resident size of the loaded model", [run["loaded"] for run in runs[SIZES[1]]], "MB"),
    ]
    return report("streaming", title, figures, {"runs": {str(k): v for k, v in runs.items()}})
