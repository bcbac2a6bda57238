"""How fast a model runs and how much memory a pass takes, always beside the bare model.

    forward_speed(model)     tokens (or images) per second of one forward pass: the prefill
    decode_speed(model)      new tokens per second of greedy decoding with a key-value cache
    peak_memory(model)       bytes that one forward pass takes above what was there before it

The *baseline* is the same module, called directly and without the installed edits, in turn with the
measured runs and in the same process (ABBA order, so that a drift of the machine cancels). A value
without its baseline says little: it depends on the machine, its load and the number of threads, which
`details` name. `details["ratio"]` is this speed (or memory) over the baseline's, the median over
paired repeats, with its interval.

How peak memory is read is told in `memory`.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Better, Measurement
from actlas.core.progress import progress
from actlas.measure.complexity import forward_arguments
from actlas.measure.cost import median_interval
from actlas.measure.memory import PeakMemory
from actlas.measure.registry import mark_under, measure

if TYPE_CHECKING:
    from actlas.core.model import Model

TOKENS = 256
NEW_TOKENS = 24
REPEATS = 7  # six are the fewest whose range covers the median with 95%
Call = Callable[[], Any]


@mark_under
def forward_measures(
    model: Model, *, tokens: int = TOKENS, repeats: int = REPEATS, example: Any = None, seed: int = 0
) -> list[Measurement]:
    """Measure the speed and the peak memory of one forward pass, in the same passes.

    Args:
        model: any model; one that is neither for text nor for images needs `example`.
        tokens: length of the random text, cut to the model's context.
        repeats: timed passes of each variant, after one that is not timed.
        example: what to run instead (see `complexity`).
        seed: seed of the random input.

    Returns:
        `forward-speed` and `peak-memory`.
    """
    _check(repeats=repeats, tokens=tokens)
    module, args, kwargs = forward_arguments(model, example, tokens, seed)
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
    text = first is not None and not first.is_floating_point() and first.dim() == 2
    items = 1 if first is None else first.numel() if text else len(first)
    unit = "tokens" if text else "images" if model.kind == "image-classifier" else "inputs"

    @torch.no_grad()
    def run() -> None:
        module(*args, **kwargs)

    meter = PeakMemory(model.device)
    seconds, peaks = _interleave(model, [run, run], repeats, f"{unit} per second", meter)
    note = f"{items} {unit} in one pass"
    speeds = [[items / s for s in column] for column in seconds]
    speed = _beside("forward-speed", f"{unit}/s", speeds, "higher", note, seed)
    memory = _beside("peak-memory", "bytes", peaks, "lower", f"{note}; {meter.note}", seed)
    return [speed, memory]


@measure(
    "forward-speed",
    summary="tokens or images per second of one forward pass (prefill), beside the bare model",
    unit="items/s",
    data="none",
    quick={"tokens": 128, "repeats": 6},
    together=forward_measures,
)
def forward_speed(
    model: Model, *, tokens: int = TOKENS, repeats: int = REPEATS, example: Any = None, seed: int = 0
) -> Measurement:
    """Return the items per second of one forward pass; arguments as `forward_measures`."""
    return forward_measures(model, tokens=tokens, repeats=repeats, example=example, seed=seed)[0]


@measure(
    "peak-memory",
    summary="bytes that one forward pass takes at its peak, beside the bare model",
    unit="bytes",
    data="none",
    quick={"tokens": 128, "repeats": 6},
    together=forward_measures,
)
def peak_memory(
    model: Model, *, tokens: int = TOKENS, repeats: int = REPEATS, example: Any = None, seed: int = 0
) -> Measurement:
    """Return the peak memory of one forward pass; arguments as `forward_measures`."""
    return forward_measures(model, tokens=tokens, repeats=repeats, example=example, seed=seed)[1]


@measure(
    "decode-speed",
    summary="new tokens per second of greedy decoding, beside the bare model",
    unit="tokens/s",
    needs=("causal-lm",),
    data="none",
    quick={"new_tokens": 12, "repeats": 6},
)
def decode_speed(
    model: Model,
    *,
    prompt_tokens: int = 16,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Measurement:
    """Return new tokens per second of greedy decoding with a key-value cache.

    The time of a generation of one token is taken off that of `new_tokens`, so the prompt's pass does
    not count. The baseline is the module's own `generate` without edits.

    Args:
        model: a causal language model.
        prompt_tokens: length of the random prompt.
        new_tokens: tokens that are decoded, at least 2.
        repeats: timed generations of each variant.
        seed: seed of the prompt.
    """
    _check(repeats=repeats, tokens=prompt_tokens)
    if new_tokens < 2:
        raise InputError(f"new_tokens must be at least 2, not {new_tokens}")
    if not callable(getattr(model.module, "generate", None)):
        raise ModelError(f"{model.name} ({model.kind}) does not generate text")
    _, _, kwargs = forward_arguments(model, None, prompt_tokens, seed)
    ids = kwargs["input_ids"]

    def ours(n: int) -> Call:
        return lambda: model.generate(ids, max_new_tokens=n, min_new_tokens=n)

    @torch.no_grad()
    def generate(n: int) -> None:
        mask = torch.ones_like(ids)
        options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n}
        generation: Any = model.module
        generation.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)

    def bare(n: int) -> Call:
        return lambda: generate(n)

    calls = [ours(1), bare(1), ours(new_tokens), bare(new_tokens)]
    (short, bare_short, long, bare_long), _ = _interleave(model, calls, repeats, "decoding speed")
    speeds = [
        [(new_tokens - 1) / max(b - a, 1e-9) for a, b in zip(*pair, strict=True)]
        for pair in ((short, long), (bare_short, bare_long))
    ]
    return _beside("decode-speed", "tokens/s", speeds, "higher", f"{new_tokens} tokens, greedy, cached", seed)


def _interleave(
    model: Model, calls: Sequence[Call], repeats: int, what: str, meter: PeakMemory | None = None
) -> tuple[list[list[float]], list[list[float]]]:
    """Time the calls in turn, every other repeat in reverse order; odd calls run without edits.

    Returns:
        Seconds, and bytes of peak memory, each as one list a call.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    peaks: list[list[float]] = [[] for _ in calls]
    with progress(what, total=(repeats + 1) * len(calls), unit="runs") as advance:
        for repeat in range(repeats + 1):
            order = range(len(calls))
            for i in order if repeat % 2 else reversed(order):
                with _bare(model) if i % 2 else nullcontext():
                    if meter is not None:
                        meter.start()
                    _wait(model)
                    start = time.perf_counter()
                    calls[i]()
                    _wait(model)
                    spent = time.perf_counter() - start
                    peak = 0 if meter is None else meter.stop()
                if repeat:  # the first round warms up
                    seconds[i].append(spent)
                    peaks[i].append(float(peak))
                advance()
    return seconds, peaks


def _bare(model: Model) -> AbstractContextManager[Any]:
    return model.without_edits() if model.installed else nullcontext()


def _beside(
    name: str, unit: str, values: list[list[float]], better: Better, note: str, seed: int
) -> Measurement:
    """Return the median of `values[0]` with that of `values[1]` as its baseline."""
    ours, bare = values
    ratios = [a / b for a, b in zip(ours, bare, strict=True) if b > 0]
    details: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "repeats": ours,
    }
    if ratios:
        low, high = median_interval(ratios)
        details |= {"ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high}
    base = _median(f"{name} (bare)", unit, bare, better, "the module itself, no edits", seed, {})
    threads = f"{note}; {torch.get_num_threads()} threads"
    return _median(name, unit, ours, better, threads, seed, details, base)


def _median(
    name: str,
    unit: str,
    values: list[float],
    better: Better,
    note: str,
    seed: int,
    details: dict[str, Any],
    baseline: Measurement | None = None,
) -> Measurement:
    low, high = median_interval(values)
    return Measurement(
        name,
        statistics.median(values),
        unit,
        n=len(values),
        low=low,
        high=high,
        interval="order statistics of the repeats" if len(values) >= 6 else "range of the repeats",
        seed=seed,
        better=better,
        note=note,
        baseline=baseline,
        details=details,
    )


def _check(*, repeats: int, tokens: int) -> None:
    if repeats < 2:
        raise InputError(f"repeats must be at least 2, not {repeats}")
    if tokens < 1:
        raise InputError(f"the number of tokens must be at least 1, not {tokens}")


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
