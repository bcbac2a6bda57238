"""What reading activations costs, against the bare forward pass and against other libraries.

`smollm2`, float32, 8 x 256 random tokens, no KV cache, no gradients. Every variant reads the same sites
of the same weights: all residual streams `blocks.*.resid_post`, or that of block 5 (of 30) only.

nnsight wraps the same transformers module. TransformerLens wraps it too (`TransformerBridge`), but
forces eager attention and its own bookkeeping; its time is shown as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.harness import Figure, Samples, Step, interleave, ratio, report

if TYPE_CHECKING:
    from torch import Tensor

BATCH, POSITIONS = 8, 256
BLOCK = 5
ALL, ONE = "blocks.*.resid_post", f"blocks.{BLOCK}.resid_post"


def _model_and_tokens() -> tuple[Any, Tensor]:
    import torch

    import actlas

    model = actlas.load("smollm2", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(0, model.vocab_size, (BATCH, POSITIONS), generator=generator)


def _bare() -> Step:
    import torch

    model, tokens = _model_and_tokens()
    module = model.module

    def step() -> None:
        with torch.no_grad():
            module(input_ids=tokens, use_cache=False)

    return step


def _actlas(sites: str, stop: bool) -> Callable[[], Step]:
    def setup() -> Step:
        model, tokens = _model_and_tokens()

        def step() -> None:
            trace = model.trace(tokens, sites, stop=stop)
            assert trace[ONE].shape == (BATCH, POSITIONS, model.d_model)

        return step

    return setup


def _nnsight_all() -> Step:
    import torch
    from nnsight import NNsight, save

    model, tokens = _model_and_tokens()
    wrapped = NNsight(model.module)

    def step() -> None:
        with torch.no_grad(), wrapped.trace(input_ids=tokens, use_cache=False):
            read = save([layer.output for layer in wrapped.model.layers])
        assert read[BLOCK].shape == (BATCH, POSITIONS, model.d_model)

    return step


def _nnsight_one() -> Step:
    import torch
    from nnsight import NNsight

    model, tokens = _model_and_tokens()
    wrapped = NNsight(model.module)

    def step() -> None:
        with torch.no_grad(), wrapped.trace(input_ids=tokens, use_cache=False) as tracer:
            read = wrapped.model.layers[BLOCK].output.save()
            tracer.stop()
        assert read.shape == (BATCH, POSITIONS, model.d_model)

    return step


def _transformer_lens(one: bool) -> Callable[[], Step]:
    def setup() -> Step:
        import torch
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        model, tokens = _model_and_tokens()
        module = model.module
        bridge = build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
        name = f"blocks.{BLOCK}.hook_out"
        wanted = [name] if one else [f"blocks.{i}.hook_out" for i in range(model.n_blocks)]
        stop = {"stop_at_layer": BLOCK + 1} if one else {}

        def step() -> None:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(tokens, names_filter=wanted, **stop)
            assert cache[name].shape == (BATCH, POSITIONS, model.d_model)

        return step

    return setup


VARIANTS: dict[str, Callable[[], Step]] = {
    "bare forward": _bare,
    "actlas, all blocks, whole forward": _actlas(ALL, stop=False),
    "actlas, all blocks": _actlas(ALL, stop=True),
    "actlas, block 5": _actlas(ONE, stop=True),
    "nnsight, all blocks": _nnsight_all,
    "nnsight, block 5": _nnsight_one,
    "TransformerLens, all blocks": _transformer_lens(one=False),
    "TransformerLens, block 5": _transformer_lens(one=True),
}


SHORT = {name: 4 for name in VARIANTS if name.endswith("block 5")}  # a sixth of the time of the others


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    samples, unavailable = interleave("bench.reading", list(VARIANTS), rounds, SHORT)
    bare = samples["bare forward"]

    def against_bare(variant: str, most: float | None = None, note: str = "") -> Figure:
        what = f"{variant}: time against the bare forward pass"
        if variant in unavailable:
            return Figure(what, None, "x", None, unavailable[variant])
        return ratio(what, samples[variant], bare, most, note)

    figures = [
        against_bare("actlas, all blocks, whole forward", 1.05, "stop=False: the logits are computed too"),
        against_bare("actlas, all blocks", 1.05, "default: stops after the last block, before the logits"),
        against_bare("actlas, block 5", 0.18),
        *(against_bare(variant) for variant in VARIANTS if not variant.startswith(("bare", "actlas"))),
        *_against_others(samples),
    ]
    title = f"Reading resid_post of smollm2, {BATCH} x {POSITIONS} tokens, float32"
    return report("reading", title, figures, {"samples": samples})


def _against_others(samples: dict[str, Samples]) -> list[Figure]:
    figures = []
    for other in ("nnsight", "TransformerLens"):
        for reads, mine in (
            ("all blocks", "actlas, all blocks, whole forward"),
            ("block 5", "actlas, block 5"),
        ):
            theirs = samples.get(f"{other}, {reads}")
            if theirs:
                what = f"{mine}: time against {other}, {reads}"
                figures.append(ratio(what, samples[mine], theirs, 1.0))
    return figures
