"""Cost of a forward pass: run time and cache size, beside the counts of `complexity`.

    cost(model, *, seed=0, tokens=256, attention="scores", repeats=7, example=None) -> list[Measurement]
    run_time(model, example=None, *, repeats=7, tokens=256) -> Measurement
    kv_cache_bytes(model, *, tokens=64) -> Measurement
    median_interval(values) -> (low, high)

A run time is reported beside the time of one dense matrix product with as many multiply-adds on
the same machine in the same minute, so that "slow" can be told from "large".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.passes import CACHES
from actlas.measure.complexity import Attention, Complexity, complexity, forward_arguments
from actlas.measure.family import Member, register_family

if TYPE_CHECKING:
    from actlas.core.model import Model


def run_time(
    model: Model | nn.Module,
    example: Any = None,
    *,
    repeats: int = 7,
    tokens: int = 256,
    seed: int = 0,
    counted: Complexity | None = None,
) -> Measurement:
    """Time the forward pass; the value is the median wall time of one pass, in seconds.

    The baseline is one dense float32 matrix product with as many multiply-adds, timed in turn with
    the passes. `details` hold the CPU time, the time per item and the number of threads.

    Args:
        model, example, tokens, seed: as in `complexity`.
        repeats: how many timed passes, after one that is not timed.
        counted: a `Complexity` of the same example, to save counting again.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, not {repeats}")
    module, args, kwargs = forward_arguments(model, example, tokens, seed)
    counted = counted or complexity(model, example, tokens=tokens, seed=seed)
    product = _product_timer(counted.macs)
    walls, cpus, products = [], [], []
    with torch.no_grad():
        module(*args, **kwargs)
        product()
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            module(*args, **kwargs)
            _wait(module)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            products.append(product())
    low, high = median_interval(products)
    base = Measurement(
        "matrix-product-time",
        statistics.median(products),
        "s",
        repeats,
        low,
        high,
        "order statistics",
        note="one dense float32 product with as many multiply-adds",
    )
    low, high = median_interval(walls)
    return Measurement(
        "forward-time",
        statistics.median(walls),
        "s",
        repeats,
        low,
        high,
        "order statistics",
        seed=seed,
        better="lower",
        baseline=base,
        note="median of wall times; read beside the matrix product",
        details={
            "cpu_seconds": statistics.median(cpus),
            "seconds_per_item": statistics.median(walls) / counted.items,
            "item": counted.item,
            "items": counted.items,
            "threads": torch.get_num_threads(),
            "times": walls,
        },
    )


def kv_cache_bytes(model: Model, *, tokens: int = 64, seed: int = 0) -> Measurement:
    """Measure how many bytes of key-value cache one more token takes, from the cache itself.

    The cache after `2 * tokens` positions minus the cache after `tokens`, so that fixed parts cancel.
    `nan` with a note for a model that keeps no cache.
    """
    sizes = []
    for length in (tokens, 2 * tokens):
        _, args, kwargs = forward_arguments(model, None, length, seed)
        with torch.no_grad():
            try:
                out = model.module(*args, **kwargs, use_cache=True)
            except TypeError:
                out = None
        cache = next((found for name in CACHES if (found := getattr(out, name, None)) is not None), None)
        if cache is None:
            return Measurement(
                "kv-cache", float("nan"), "bytes/token", 0, note="this model keeps no key-value cache"
            )
        sizes.append(_cache_bytes(cache))
    value = (sizes[1] - sizes[0]) / tokens
    return Measurement(
        "kv-cache", value, "bytes/token", 1, better="lower", details={"bytes_at": {str(2 * tokens): sizes[1]}}
    )


def cost(
    model: Model,
    *,
    seed: int = 0,
    tokens: int = 256,
    attention: Attention = "scores",
    repeats: int = 7,
    example: Any = None,
) -> list[Measurement]:
    """Return parameters, multiply-adds, activation elements, forward time and cache bytes together."""
    counted = complexity(model, example, attention=attention, tokens=tokens, seed=seed)
    out = counted.measurements()
    out.append(run_time(model, example, repeats=repeats, tokens=tokens, seed=seed, counted=counted))
    if getattr(model, "kind", None) == "causal-lm":
        out.append(kv_cache_bytes(model, tokens=min(tokens, 64), seed=seed))
    return out


register_family(
    cost,
    [
        Member("parameters", "elements of all parameters, tied ones once", "count"),
        Member("multiply-adds", "multiply-adds of one pass (FLOPs: twice that)", "multiply-adds/item"),
        Member("activation-elements", "elements that linear layers and attention write", "elements/item"),
        Member("forward-time", "wall time of a pass, beside an equal matrix product", "s"),
        Member("kv-cache", "bytes of key-value cache per token", "bytes/token", None, ("causal-lm",)),
    ],
    data="none",
    quick={"repeats": 5},
    source="Dollar, Singh, Girshick 2021, section 3",
)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the narrowest order-statistic interval of the median with at least this coverage.

    The range of the sample where even that covers less (fewer than 6 values at 95%).
    """
    from scipy.stats import binom

    x = sorted(values)
    n = len(x)
    if n < 2:
        return float("nan"), float("nan")
    k = 0
    while k + 1 < n / 2 and 1 - 2 * binom.cdf(k + 1, n, 0.5) >= level:
        k += 1
    return x[k], x[n - 1 - k]


def _product_timer(macs: int) -> Callable[[], float]:
    """Return a function that times a float32 matrix product, scaled to `macs` multiply-adds."""
    edge = max(16, min(512, round(max(macs, 1) ** (1 / 3))))
    a, b = torch.ones(edge, edge), torch.ones(edge, edge)
    rounds = max(1, min(64, round(macs / edge**3)))

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            torch.mm(a, b)
        return (time.perf_counter() - start) * macs / (rounds * edge**3)

    return timed


def _wait(module: nn.Module) -> None:
    """Wait for the device, so that a time is not only the time of queueing."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type == "cuda":
        torch.cuda.synchronize(parameter.device)


def _cache_bytes(cache: Any) -> int:
    if hasattr(cache, "layers"):
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    else:
        tensors = [t for t in tree_leaves(cache) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
