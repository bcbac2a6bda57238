"""What the reproduction of LR-QAT runs: the same model rounded by every method, and the bytes of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from actlas.core.edit import Edit
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.papers.reproductions import rounded_bytes as lab


class Arms:
    edits: dict[str, Edit]
    measured: list[Measurement]


def made_by_all(model: Model, learn: Any, steps: int, ranks: Sequence[int], spec: str, seed: int) -> Arms:
    """Return what every method makes of the model, and what is measured while it trains."""
    from actlas.core.numbers import QuantParams, QuantSpec, lp_search
    from actlas.core.quant_edit import QuantEdit
    from actlas.core.quant_linear import QuantLinear
    from actlas.measure.linear_layers import linear_layers
    from actlas.training.lr_qat_linear import LowRankQuantLinear
    from actlas.training.qat import TrainedQuantLinear, quantizing, step_groups, tune_quantized

    form = QuantSpec.parse(spec)
    warm = max(1, steps // 10)
    common: dict[str, Any] = {
        "steps": steps, "batch": 8, "context": lab.CONTEXT, "seed": seed,
        "rate": lambda t: min((t + 1) / warm, (steps - t) / max(1, steps - warm), 1.0),
    }  # fmt: skip
    arms = Arms()
    arms.edits, arms.measured = {}, []
    ids = torch.randint(256, (8, lab.CONTEXT), generator=torch.Generator().manual_seed(seed))

    def loss() -> torch.Tensor:
        found: torch.Tensor = model.module(input_ids=ids, labels=ids).loss
        return found

    best: dict[str, QuantParams] = {}
    for layer in linear_layers(model):
        best[layer.path] = lp_search(layer.weight(model), form, p=4.0)
    rtn = {
        layer.path: QuantLinear.of(layer.module(model), form, params=best[layer.path])
        for layer in linear_layers(model)
    }
    arms.edits["rtn"] = QuantEdit(rtn, method="rtn")
    arms.edits["gptq"] = _gptq(model, learn, form, seed)
    bytes_of: dict[str, dict[str, float]] = {}

    def full(layer: Any, linear: nn.Module) -> nn.Module:
        made = TrainedQuantLinear(linear, form, grad="lsq", where=layer.path)
        assert made.weight_quant is not None
        with torch.no_grad():
            made.weight_quant.scale.copy_(best[layer.path].scale)  # type: ignore[union-attr]
            made.weight_quant.ready.fill_(True)
        return made

    with quantizing(model, full) as layers:
        bytes_of["full"] = _bytes(model, layers, loss)
        tune_quantized(
            model, learn, layers, lr=1e-3, groups=step_groups(layers, 1e-3, 1e-4), what="full", **common
        )
        arms.edits["full"] = QuantEdit({p: m.frozen() for p, m in layers.items()}, method="full")
    for rank in ranks:
        for recompute in (True, False) if rank == ranks[-1] else (True,):

            def low(layer: Any, linear: nn.Module, rank: int = rank, again: bool = recompute) -> nn.Module:
                return LowRankQuantLinear(
                    linear,
                    form,
                    rank=rank,
                    params=best[layer.path],
                    recompute=again,
                    seed=seed,
                    where=layer.path,
                )

            with quantizing(model, low) as layers:
                bytes_of[f"lr-qat {rank}" + ("" if recompute else " kept")] = _bytes(model, layers, loss)
                if not recompute:
                    continue
                groups = [
                    {"params": [t for m in layers.values() for t in (m.up, m.down)], "lr": 1e-2},
                    {"params": [m.scale for m in layers.values()], "lr": 1e-4},
                ]
                tune_quantized(
                    model, learn, layers, lr=1e-2, groups=groups, what=f"lr-qat, rank {rank}", **common
                )
                edit = QuantEdit({p: m.merge() for p, m in layers.items()}, method="lr-qat")
                arms.edits[f"lr-qat {rank}"] = edit
                if rank == ranks[-1]:
                    with torch.no_grad():
                        before = model.module(input_ids=ids).logits
            if recompute and rank == ranks[-1]:
                with model.edit(edit), torch.no_grad():
                    after = model.module(input_ids=ids).logits
                arms.measured.append(
                    Measurement(
                        "logits that merging changes", float((before != after).sum()), "count", before.numel()
                    )
                )
    arms.edits["lora"] = _lora(model, learn, form, ranks[-1], common)
    arms.measured += _memory(bytes_of, model, ranks[-1])
    return arms


def _bytes(model: Model, layers: Mapping[str, nn.Module], loss: Any) -> dict[str, float]:
    """Return bytes of a step that trains the exchanged layers alone."""
    from actlas.measure.training_memory import training_memory

    own = {id(p) for m in layers.values() for p in m.parameters()}
    held = [(p, p.requires_grad) for p in model.module.parameters()]
    for p, _ in held:
        p.requires_grad_(id(p) in own)
    try:
        return {m.group["part"]: m.value for m in training_memory(model.module, loss)}
    finally:
        for p, wanted in held:
            p.requires_grad_(wanted)


def _memory(bytes_of: Mapping[str, Mapping[str, float]], model: Model, rank: int) -> list[Measurement]:
    from actlas.measure.linear_layers import linear_layers

    low, full, kept = (bytes_of[k] for k in (f"lr-qat {rank}", "full", f"lr-qat {rank} kept"))
    layers = linear_layers(model)
    predicted = sum(x.size for x in layers) / sum(rank * (x.rows + x.columns) for x in layers)
    out = [
        Measurement(
            "training bytes",
            parts["all"],
            "bytes",
            1,
            group={"arm": arm},
            details=dict(parts),
            better="lower",
        )
        for arm, parts in bytes_of.items()
    ]
    return [
        *out,
        Measurement(
            "optimiser state over the count's prediction", full["optimiser"] / low["optimiser"] / predicted,
            "ratio", 1,
            note=f"{full['optimiser']:,.0f} and {low['optimiser']:,.0f} bytes; "
            f"predicted {predicted:.2f} times less",
        ),
        Measurement("training bytes over full training", low["all"] / full["all"], "ratio", 1),
        Measurement("saved bytes over keeping the rounded weight", low["saved"] / kept["saved"], "ratio", 1),
    ]  # fmt: skip


def _lora(model: Model, learn: Any, form: Any, rank: int, common: Mapping[str, Any]) -> Edit:
    """Return LoRA on the float model, merged and rounded to nearest."""
    from actlas.core.numbers import lp_search
    from actlas.core.quant_edit import QuantEdit
    from actlas.core.quant_linear import QuantLinear
    from actlas.measure.linear_layers import linear_layers
    from actlas.training.adapters import LoRA
    from actlas.training.language_loop import corpus_tokens, train_language, windows

    mine = lab.copied(model)
    mine.module.requires_grad_(False)
    lora = LoRA(mine, rank, inside=(".self_attn.", ".mlp."), seed=common["seed"])
    steps, context = common["steps"], common["context"]
    drawn = windows(corpus_tokens(mine, learn, context), steps=steps, batch=common["batch"], context=context,
                    seed=common["seed"])  # fmt: skip
    with lora.installed():
        train_language(mine, drawn, lora.parameters, steps=steps, lr=1e-3, rate=common["rate"], what="lora")
    lora.edit().bake(mine)
    layers = {
        x.path: QuantLinear.of(x.module(mine), form, params=lp_search(x.weight(mine), form, p=4.0))
        for x in linear_layers(mine)
    }
    return QuantEdit(layers, method="lora, then rounding")


def _gptq(model: Model, learn: Any, form: Any, seed: int) -> Edit:
    from actlas.core.quant_edit import QuantEdit
    from actlas.quantize.gptq import solve_blocks
    from actlas.quantize.gptq_solver import solve
    from actlas.quantize.layers import WeightFormat, split_text, targets

    chosen = targets(model, WeightFormat(format=form.name))
    texts = split_text(model, learn, tokens=8192, context=lab.CONTEXT, seed=seed)

    def solver(weight: Any, gram: Any, group: Any) -> Any:
        return solve(weight, gram, group[0].spec, search=True, where=group[0].path)

    modules, errors = solve_blocks(model, chosen, texts, solver)
    return QuantEdit(modules, method="gptq", errors=errors)


def flips(model: Model, learn: Any, spec: str, seed: int) -> list[Measurement]:
    """Count the integers that three steps at the published rate (1e-3) change, with either phi."""
    from actlas.core.numbers import QuantSpec
    from actlas.training.lr_qat_linear import LowRankQuantLinear
    from actlas.training.qat import quantizing, tune_quantized

    out = []
    for downcast in ("fixed8", "int"):

        def low(layer: Any, linear: nn.Module, downcast: Any = downcast) -> nn.Module:
            return LowRankQuantLinear(linear, QuantSpec.parse(spec), rank=8, downcast=downcast, seed=seed)

        with quantizing(model, low) as layers:
            before = [m.integers() for m in layers.values()]
            tune_quantized(
                model, learn, layers, steps=3, lr=1e-3, batch=4, context=lab.CONTEXT, seed=seed,
                groups=[{"params": [t for m in layers.values() for t in (m.up, m.down)]}],
            )  # fmt: skip
            flipped = sum(
                int((m.integers() != b).sum()) for m, b in zip(layers.values(), before, strict=True)
            )
        out.append(
            Measurement(
                "integers that the first steps flip", float(flipped), "count", sum(b.numel() for b in before),
                group={"downcast": downcast},
            )
        )  # fmt: skip
    return out
