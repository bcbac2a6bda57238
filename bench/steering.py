"""What an installed steering edit costs while decoding, against transformers' own `generate`.

`smollm2`, float32, greedy, 32 new tokens after a prompt of 9, with a KV cache. The variants take turns in one
process, in another order each round, so that neither the layout of memory nor a busy moment favours one:

    plain        `module.generate`, nothing installed
    actlas       `model.generate`, nothing installed
    additive     one addition at blocks.15.resid_post
    gated        the same behind a lens at blocks.10.resid_post that decides on the prompt
    gated token  the same, deciding at every token
    three        additions at three blocks

What matters is the median over rounds of the ratio to `plain` in the same round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.harness import Figure, Step, interleave, report

PROMPT = "The weather in the mountains was cold and the"
TOKENS = 32
TARGETS = {"actlas": None, "additive": 1.02, "gated": 1.05, "gated token": 1.05, "three": None}


def _setup() -> Step:
    import torch

    import actlas
    from actlas.core.direction import Direction
    from actlas.core.edits import Add

    model: Any = actlas.load("smollm2", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def vector() -> torch.Tensor:
        return torch.randn(model.d_model, generator=generator) * 0.1

    lens = Direction(site="blocks.10.resid_post", vector=vector(), midpoint=-1e9)  # an open gate
    add = Add("blocks.15.resid_post", vector())
    edits = {
        "additive": add,
        "gated": add.when(lens, per="sequence"),
        "gated token": add.when(lens),
        "three": add + Add("blocks.8.resid_post", vector()) + Add("blocks.22.resid_post", vector()),
    }
    encoded = model.encode(PROMPT)
    own = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def plain() -> None:
        with torch.no_grad():
            model.module.generate(**encoded, **own)

    def ours() -> None:
        model.generate(PROMPT, max_new_tokens=TOKENS, min_new_tokens=TOKENS)

    def edited(name: str) -> Callable[[], None]:
        def run() -> None:
            with model.edit(edits[name]):
                ours()

        return run

    runs = {"plain": plain, "actlas": ours} | {name: edited(name) for name in edits}
    order = random.Random(0)

    def step() -> dict[str, float]:
        names = list(runs)
        order.shuffle(names)
        seconds = {}
        for name in names:
            start = time.perf_counter()
            runs[name]()
            seconds[name] = time.perf_counter() - start
        return seconds

    return step


VARIANTS: dict[str, Callable[[], Step]] = {"decoding": _setup}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    samples, unavailable = interleave("bench.steering", list(VARIANTS), max(rounds, 15))
    if unavailable:
        return report(
            "steering", "Steering while decoding", [Figure("decoding", None, "x", None, str(unavailable))]
        )
    found = samples["decoding"]
    figures = []
    for name, most in TARGETS.items():
        ratios = [a / b for a, b in zip(found[name], found["plain"], strict=True)]
        low, high = sorted(ratios)[len(ratios) // 4], sorted(ratios)[-1 - len(ratios) // 4]
        figures.append(
            Figure(
                f"{name}: time of decoding against transformers alone",
                statistics.median(ratios),
                "x",
                most,
                f"half of the rounds lie in {low:.3f} to {high:.3f} x",
                ratios,
            )
        )
    rate = TOKENS / statistics.median(found["plain"])
    title = f"Steering smollm2, decoding {TOKENS} tokens, float32 (transformers alone: {rate:.1f} tokens/s)"
    return report("steering", title, figures, {"samples": samples})
