"""What a harvest costs beside the bare forward pass, how much memory it takes, and how fast a store is read.

`smollm2`, float32, `blocks.15.resid_post`, the middle of 30 blocks. The bare pass runs the very batches
of the harvest (tokens ready, windows of like length together) through the module, and a plain hook ends
it behind block 15; the harvest cuts, tokenizes, runs, converts, writes, syncs and checks. Reading is
measured on a store of embeddings, once it is in the system's cache: shuffled batches of 2,048 rows in
float32, against a copy of the same bytes in the order in which they lie on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Figure, Step, fresh, interleave, median, ratio, report, say
from bench.streaming import _reset_peak, _status

BLOCK = 15
SITE = f"blocks.{BLOCK}.resid_post"
TOKENS = 8_192
MEMORY_TOKENS = 24_576
READ_ROWS = 131_072
BATCH = 2_048


def _model_and_text() -> tuple[Any, Any]:
    import torch

    import actlas
    from actlas.data import corpus

    return actlas.load("smollm2", dtype=torch.float32), corpus("prose")


def _bare() -> Step:
    import torch

    from actlas.core.streaming import batches, encode_windows
    from actlas.store.planning import plan_shards

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    model, text = _model_and_text()
    encoded = []
    for plan in plan_shards(model, text, context=None, rows=TOKENS, shard_rows=16_384):
        cuts = sorted(plan.cuts, key=lambda cut: -len(cut))
        encoded += [encode_windows(model, held) for held in batches((c.window for c in cuts), 2048)]
    model.module.model.layers[BLOCK].register_forward_hook(stop)

    def step() -> None:
        with torch.no_grad():
            for arguments in encoded:
                try:
                    model.module(**arguments, use_cache=False)
                except Stop:
                    continue

    return step


def _harvest(dtype: str) -> Callable[[], Step]:
    def setup() -> Step:
        from actlas.store import harvest

        model, text = _model_and_text()
        folder = tempfile.TemporaryDirectory()
        made = 0

        def step() -> None:
            nonlocal made
            made += 1
            out = Path(folder.name) / str(made)
            assert harvest(model, text, SITE, out, rows=TOKENS, dtype=dtype).rows == TOKENS

        return step

    return setup


def _memory() -> Step:
    def step() -> dict[str, float]:
        import torch

        from actlas.store import harvest

        model, text = _model_and_text()
        with torch.no_grad():
            float(sum(p.sum() for p in model.module.parameters()))
        _reset_peak()
        before = _status("VmRSS")
        with tempfile.TemporaryDirectory() as folder:
            harvest(model, text, SITE, Path(folder) / "acts", rows=MEMORY_TOKENS)
        return {"peak above loaded": _status("VmHWM") - before, "loaded": before}

    return step


def _store(dtype: str) -> tuple[Any, Any]:
    """Return a store of embeddings, and the folder that it lies in."""
    from actlas.store import harvest

    model, text = _model_and_text()
    folder = tempfile.TemporaryDirectory()
    return harvest(model, text, "embed", Path(folder.name) / "acts", rows=READ_ROWS, dtype=dtype), folder


def _shuffled(dtype: str) -> Callable[[], Step]:
    def setup() -> Step:
        store, folder = _store(dtype)
        seed = 0

        def step() -> None:
            nonlocal seed
            seed += 1
            rows = 0
            for batch in store.batches(BATCH, seed=seed):
                rows += len(batch["row"])
            assert rows == store.rows and folder.name

        return step

    return setup


def _copy(dtype: str) -> Callable[[], Step]:
    def setup() -> Step:
        import numpy as np

        from actlas.store.layout import read_header

        store, folder = _store(dtype)
        parts = []
        for name in store.shards:
            path = Path(folder.name) / "acts" / "shards" / f"{name}.safetensors"
            piece = read_header(path)["embed"]
            shape = (piece.rows, piece.row_bytes)
            parts.append(np.memmap(path, np.uint8, mode="r", offset=piece.offset, shape=shape))

        def step() -> None:
            batch = None
            for part in parts:
                for start in range(0, len(part), BATCH):
                    batch = np.array(part[start : start + BATCH])  # held while the next is made, as above
            assert batch is not None

        return step

    return setup


VARIANTS: dict[str, Callable[[], Step]] = {
    "bare forward": _bare,
    "harvest, float16": _harvest("float16"),
    "harvest, int8": _harvest("int8"),
    "memory": _memory,
    "shuffled, float16": _shuffled("float16"),
    "copy, float16": _copy("float16"),
    "shuffled, float32": _shuffled("float32"),
    "copy, float32": _copy("float32"),
}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    running = ["bare forward", "harvest, float16", "harvest, int8"]
    samples, _ = interleave("bench.harvest", running, rounds)
    bare = samples["bare forward"]
    most = round(1 / 0.9, 3)
    figures = [
        ratio("harvest, float16: time against the bare forward pass", samples[running[1]], bare, most),
        ratio("harvest, int8: time against the bare forward pass", samples[running[2]], bare, most),
        median("bare forward pass", [TOKENS / s for s in bare["seconds"]], "tokens/s"),
    ]
    if Path("/proc/self/clear_refs").exists():
        say("memory")
        peak = fresh("bench.harvest", "memory")["peak above loaded"]
        figures.append(Figure(f"peak above the loaded model, {MEMORY_TOKENS:,} tokens", peak, "MB", 500.0))
    else:
        figures.append(Figure("peak memory", None, "MB", 500.0, "needs Linux's /proc"))
    for dtype, note in (("float16", "widened to float32, twice the bytes"), ("float32", "")):
        reading = [f"shuffled, {dtype}", f"copy, {dtype}"]
        found, _ = interleave("bench.harvest", reading, rounds, dict.fromkeys(reading, 4))
        samples |= found
        what = f"shuffled batches, {dtype}: time against a sequential copy"
        figures.append(ratio(what, found[reading[0]], found[reading[1]], 2.0, note))
    title = f"Harvest of smollm2, {SITE}, {TOKENS:,} tokens of prose; {READ_ROWS:,} rows read"
    return report("harvest", title, figures, {"samples": samples})
