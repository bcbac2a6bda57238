"""The native statistics kernels against their PyTorch references, on the shape of a real batch.

2048 rows (8 documents of 256 tokens) by 576 channels, the residual stream of SmolLM2-135M.
"""

from __future__ import annotations

from bench.harness import Figure, Step, Unavailable, interleave, ratio, report

ROWS, CHANNELS = 2048, 576
REPEATS = 20  # a step must last long enough to be timed


def _moments(native: bool) -> Step:
    import torch

    from actlas.kernels import statistics

    if native and not statistics.native_available():
        raise Unavailable("the native kernels are not built")
    add = statistics.accumulate if native else statistics.accumulate_reference
    rows = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(0))
    state = [torch.zeros(CHANNELS, dtype=torch.float64) for _ in range(5)]

    def step() -> None:
        for _ in range(REPEATS):
            add(rows, *state)

    return step


def _histogram(native: bool) -> Step:
    import torch

    from actlas.kernels import statistics

    if native and not statistics.native_available():
        raise Unavailable("the native kernels are not built")
    add = statistics.log_histogram if native else statistics.log_histogram_reference
    rows = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2 * 2048 + 1, dtype=torch.int64)

    def step() -> None:
        for _ in range(max(1, REPEATS // 10)):
            add(rows, counts, 1.02, 1e-6)

    return step


VARIANTS = {
    "moments, native": lambda: _moments(True),
    "moments, reference": lambda: _moments(False),
    "histogram, native": lambda: _histogram(True),
    "histogram, reference": lambda: _histogram(False),
}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    samples, unavailable = interleave("bench.kernels", list(VARIANTS), rounds)
    figures = []
    for kernel in ("moments", "histogram"):
        native, reference = f"{kernel}, native", f"{kernel}, reference"
        what = f"{kernel}: native against PyTorch reference (time)"
        if native in unavailable:
            figures.append(Figure(what, None, "x", 1.0, unavailable[native]))
        else:
            figures.append(ratio(what, samples[native], samples[reference], most=1.0))
    return report("kernels", f"Native kernels, float32 [{ROWS}, {CHANNELS}]", figures, {"samples": samples})
