"""The native kernels against their PyTorch references, on the shape of a real batch.

2048 rows (8 documents of 256 tokens) by 576 channels, the residual stream of SmolLM2-135M; sparse codes of
32 of 4608 latents, as in a TopK autoencoder. `select` keeps half of 4608 scores, `gated` is a q4 MLP of
1536 neurons for one token; products against the memory's bandwidth are in `bench/columns.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.harness import Figure, Step, Unavailable, interleave, ratio, report

ROWS, CHANNELS = 2048, 576
LATENTS, K = 4608, 32
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


def _codes(kernel: str, native: bool) -> Step:
    import torch

    from actlas.kernels import fused_step, gated, pursuit, selection, sparse_codes, statistics

    if native and not statistics.native_available():
        raise Unavailable("the native kernels are not built")
    g = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(ROWS, CHANNELS, generator=g), torch.randn(LATENTS, CHANNELS, generator=g)
    weight /= weight.norm(dim=1, keepdim=True)
    pre = rows @ weight.T
    values, indices = sparse_codes.topk(pre, K)
    gram = weight @ weight.T
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    gradient = torch.randn(LATENTS, CHANNELS, generator=g)
    codes = (indices, values, rows)
    mlp = gated.pack_gated(weight[:1536], weight[1536:3072], weight[:1536].T, "q4")
    least = torch.full((1536,), 0.3)

    def of(module: Any, name: str) -> Any:
        return getattr(module, name if native else f"{name}_reference")

    calls: dict[str, Callable[[], Any]] = {
        "topk": lambda: of(sparse_codes, "topk")(pre, K),
        "decode": lambda: of(sparse_codes, "sparse_decode")(indices, values, weight),
        "dot": lambda: of(sparse_codes, "gather_dot")(indices, rows, weight),
        "outer": lambda: of(sparse_codes, "scatter_outer")(*codes, LATENTS),
        "adam": lambda: of(sparse_codes, "adam_rows")(weight, gradient, m, v, step=9, lr=1e-9),
        "fused": lambda: of(fused_step, "fused_row_step")(
            weight, m, v, *codes, step=9, lr=1e-9, remove_parallel=True, renormalise=True
        ),
        "select": lambda: of(selection, "topk_mask")(pre[:256], LATENTS // 2),
        "gated": lambda: [
            of(gated, "gated_mlp")(mlp, row, threshold=least, activation="relu") for row in rows[:4]
        ],
        "pursuit": lambda: of(pursuit, "matching_pursuit")(rows[:64], weight, K, gram),
    }

    def step() -> None:
        for _ in range(2):
            calls[kernel]()

    return step


CODES = ("topk", "decode", "dot", "outer", "adam", "fused", "pursuit", "select", "gated")
VARIANTS = {
    "moments, native": lambda: _moments(True),
    "moments, reference": lambda: _moments(False),
    "histogram, native": lambda: _histogram(True),
    "histogram, reference": lambda: _histogram(False),
    **{f"{k}, native": partial(_codes, k, True) for k in CODES},
    **{f"{k}, reference": partial(_codes, k, False) for k in CODES},
}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    figures, samples = [], {}
    for kernel in ("moments", "histogram", *CODES):
        native, reference = f"{kernel}, native", f"{kernel}, reference"
        found, unavailable = interleave("bench.kernels", [native, reference], rounds)
        samples |= found
        what = f"{kernel}: native against PyTorch reference (time)"
        if native in unavailable:
            figures.append(Figure(what, None, "x", 1.0, unavailable[native]))
        else:
            # The reference of `decode` is a kernel of FBGEMM for just this: nothing to be won, only kept.
            most = 1.5 if kernel == "decode" else 1.0
            figures.append(ratio(what, found[native], found[reference], most=most))
    return report("kernels", f"Native kernels, float32 [{ROWS}, {CHANNELS}]", figures, {"samples": samples})
