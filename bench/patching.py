"""Exact activation patching of every head and MLP, against one naive forward pass per component.

One batch of indirect-object identification (32 pairs), `smollm2`, float32: 270 heads and 30 MLPs, each
patched from the clean into the corrupted run, judged by the logit difference at the last token. "naive" is
what a hook does: the whole model on the whole batch for each component. It costs the same for each, so it is
timed on every fifty-fifth component and multiplied. "naive, last logits only" lets the model leave out the
output head at all tokens but the last, the one saving that a flag gives.

Attribution patching estimates all components at once; its cost is counted in naive forward passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.harness import Figure, Samples, Step, interleave, median, ratio, report

if TYPE_CHECKING:
    from torch import Tensor

PAIRS, EVERY = 32, 55


def _setup() -> tuple[Any, Any, list[Any]]:
    import torch

    import actlas
    from actlas.circuits import PromptPairs
    from actlas.circuits.nodes import nodes

    model = actlas.load("smollm2", dtype=torch.float32)
    return model, PromptPairs.from_task(model, "ioi", n=PAIRS), nodes(model, "components")


def _naive_run(model: Any, pairs: Any, options: dict[str, int]) -> Callable[[Any], Tensor]:
    """Return a function from a component to the logit differences `[n]`, with plain PyTorch hooks."""
    import torch

    module, blocks = model.module, model.module.model.layers
    width = model.head_dim
    clean: dict[tuple[int, str], Tensor] = {}

    def place(block: int, kind: str) -> Any:
        return blocks[block].self_attn.o_proj if kind == "attn.z" else blocks[block].mlp.down_proj

    def keep(key: tuple[int, str]) -> Any:
        if key[1] == "attn.z":
            return place(*key).register_forward_pre_hook(lambda m, a: clean.__setitem__(key, a[0]))
        return place(*key).register_forward_hook(lambda m, a, y: clean.__setitem__(key, y))

    hooks = [keep((b, kind)) for b in range(len(blocks)) for kind in ("attn.z", "mlp.out")]
    with torch.no_grad():
        module(**pairs.clean, use_cache=False)
    for hook in hooks:
        hook.remove()

    def run(node: Any) -> Tensor:
        key = node.block, node.kind
        if node.kind == "attn.z":
            part = slice(node.index * width, (node.index + 1) * width)

            def change(m: Any, args: Any) -> Any:
                z = args[0].clone()
                z[..., part] = clean[key][..., part]
                return (z,)

            hook = place(*key).register_forward_pre_hook(change)
        else:
            hook = place(*key).register_forward_hook(lambda m, a, y: clean[key])
        with torch.no_grad():
            logits = module(**pairs.corrupt, use_cache=False, **options).logits[:, -1]
        hook.remove()
        right, wrong = (logits.gather(1, i[:, None])[:, 0] for i in (pairs.answer_ids, pairs.wrong_ids))
        return right - wrong

    return run


def _naive(options: dict[str, int]) -> Callable[[], Step]:
    def setup() -> Step:
        model, pairs, components = _setup()
        run, some = _naive_run(model, pairs, options), components[::EVERY]
        scale = len(components) / len(some)

        def step() -> dict[str, float]:
            start, cpu = time.perf_counter(), time.process_time()
            for node in some:
                run(node)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            return {"seconds": seconds * scale, "cpu": cpu * scale}

        return step

    return setup


def _forward() -> Step:
    import torch

    model, pairs, _ = _setup()

    def step() -> None:
        with torch.no_grad():
            model.module(**pairs.corrupt, use_cache=False)

    return step


def _exact() -> Step:
    import torch

    from actlas.circuits import agreement, attribute, patch

    model, pairs, components = _setup()
    run = _naive_run(model, pairs, {})
    naive = torch.stack([run(node) for node in components[::EVERY]])

    def step() -> dict[str, float]:
        start, cpu = time.perf_counter(), time.process_time()
        found = patch(model, pairs, components, mode="denoise")
        numbers = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        numbers["difference"] = float((found.patched[::EVERY] - naive).abs().max())
        for name, steps in (("attribution", 0), ("ig", 5)):
            agreed = agreement(found, attribute(model, pairs, components, steps=steps))
            numbers |= {
                name: agreed.value,
                f"{name} low": agreed.low or 0.0,
                f"{name} high": agreed.high or 0.0,
            }
            numbers[f"{name} shared"] = float(agreed.details["shared_top"])
        return numbers

    return step


def _attribution(steps: int) -> Callable[[], Step]:
    def setup() -> Step:
        from actlas.circuits import attribute

        model, pairs, components = _setup()

        def step() -> None:
            attribute(model, pairs, components, steps=steps)

        return step

    return setup


VARIANTS: dict[str, Callable[[], Step]] = {
    "naive": _naive({}),
    "naive, last logits only": _naive({"logits_to_keep": 1}),
    "forward": _forward,
    "exact": _exact,
    "attribution": _attribution(0),
    "integrated gradients": _attribution(5),
}
SHORT = {"forward": 4, "attribution": 4}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    samples, _ = interleave("bench.patching", list(VARIANTS), rounds, SHORT)
    title = f"Activation patching of smollm2 on ioi, {PAIRS} pairs, every head and MLP"
    return report("patching", title, figures_of(samples), {"samples": samples})


def figures_of(samples: dict[str, Samples]) -> list[Figure]:
    """Return the lines of the table."""
    exact = samples["exact"]
    forward = samples["forward"]
    figures = [
        ratio("exact patching of 300 components against naive passes", exact, samples["naive"], 1 / 5),
        ratio("the same against naive passes, last logits only", exact, samples["naive, last logits only"]),
        median(
            "largest difference from naive patching",
            exact["difference"],
            "logits",
            1e-4,
            f"on every {EVERY}th component",
        ),
        ratio("attribution patching against one forward pass", samples["attribution"], forward, 3.0),
        ratio("integrated gradients (5 steps) against it", samples["integrated gradients"], forward),
    ]
    for name, said in (("attribution", "attribution patching"), ("ig", "integrated gradients (5 steps)")):
        low, high, shared = (exact[f"{name} {k}"][0] for k in ("low", "high", "shared"))
        note = f"95% interval {low:.2f} to {high:.2f} over pairs; {shared:.0f} of the 10 largest are shared"
        what = f"rank correlation of {said} with exact patching, 300 components"
        figures.append(Figure(what, exact[name][0], "", None, note))
    return figures
