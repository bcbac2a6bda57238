"""GPTQ and AWQ of `smollm2` at 3 bits in groups of 64: time, peak memory, and llm-compressor on the same
recipe.

Every run is a fresh process. Time and memory are those of the method alone: the model is loaded and every
weight read once, the kernel's peak is reset, and then it runs. Peak memory is the fp32 weights and what
comes on top of the loaded model, over the fp32 weights. All get the same calibration texts (8 windows of
256 tokens; AWQ 4 of 128); the perplexity of each result is measured by Actlas on the same held-out text,
against the model as it is.

llm-compressor wants a transformers version of its own, so it may live in another environment: set
LLMCOMPRESSOR_PYTHON to its interpreter (default: this one). Both GPTQs: 3 bits, groups of 64, asymmetric, no
activation order, damping 0.1, blocks of 128, two threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Figure, Step, fresh, median, report, say
from bench.streaming import _reset_peak, _status

BITS, GROUP, TOKENS, CONTEXT, DAMP = 3, 64, 2048, 256, 0.1
AWQ_TOKENS, AWQ_CONTEXT = 512, 128
EVALUATED, THREADS = 2048, 2
WORK = "ACTLAS_BENCH_QUANTIZE"  # folder in which the variants leave their results


def _documents() -> list[Any]:
    from actlas.data import corpus

    return list(corpus("prose", seed=0))


def _timed(fit: Callable[[Any, list[Any]], Any], name: str) -> Step:
    def step() -> dict[str, float]:
        import torch

        import actlas
        from actlas.core.methods import import_rooms

        torch.set_num_threads(THREADS)
        import_rooms()
        model = actlas.load("smollm2", dtype=torch.float32)
        documents = _documents()
        with torch.no_grad():
            float(sum(p.sum() for p in model.module.parameters()))
        weights = sum(p.numel() * 4 for p in model.module.parameters()) / 2**20
        _reset_peak()
        before, start = _status("VmRSS"), time.perf_counter()
        edit = fit(model, documents)
        seconds = time.perf_counter() - start
        peak = _status("VmHWM") - before
        edit.save(Path(os.environ[WORK]) / name, model)
        return {"seconds": seconds, "peak": (weights + peak) / weights, "bits": edit.bits_per_weight}

    return step


def _gptq(model: Any, documents: list[Any]) -> Any:
    from actlas.quantize.gptq import fit_gptq

    options: dict[str, Any] = {"bits": BITS, "group_size": GROUP, "damp": DAMP, "evaluate": 0}
    return fit_gptq(model, documents, tokens=TOKENS, context=CONTEXT, **options)


def _same_recipe(model: Any, documents: list[Any]) -> Any:
    """GPTQ with the ends of each group's values as its range, as llm-compressor takes it."""
    from actlas.quantize.gptq import fit_gptq

    options: dict[str, Any] = {
        "bits": BITS,
        "group_size": GROUP,
        "damp": DAMP,
        "evaluate": 0,
        "search": False,
    }
    return fit_gptq(model, documents, tokens=TOKENS, context=CONTEXT, **options)


def _awq(model: Any, documents: list[Any]) -> Any:
    from actlas.quantize.awq import fit_awq

    options: dict[str, Any] = {"bits": BITS, "group_size": GROUP, "evaluate": 0}
    return fit_awq(model, documents, tokens=AWQ_TOKENS, context=AWQ_CONTEXT, **options)


def _llm_compressor() -> Step:
    def step() -> dict[str, Any]:
        import actlas
        from actlas.quantize.layers import split_text

        work = Path(os.environ[WORK])
        model = actlas.load("smollm2")
        texts = split_text(model, _documents(), tokens=TOKENS, context=CONTEXT)
        ids = [model.tokenizer(t, add_special_tokens=False)["input_ids"][:CONTEXT] for t in texts.fit]
        folder = work / "plain"
        if not folder.exists():
            module: Any = model.module
            module.config.__dict__.pop("quantization_config", None)  # GGUF's, or it refuses to be saved
            module.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
        settings = {
            "model": str(folder),
            "ids": ids,
            "bits": BITS,
            "group": GROUP,
            "damp": DAMP,
            "threads": THREADS,
            "out": str(work / "llm-compressor.safetensors"),
        }
        (work / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        python = os.environ.get("LLMCOMPRESSOR_PYTHON", sys.executable)
        # Given as text: as a file it would have this folder on its path, whose kernels.py hides a package.
        script = (ROOT / "bench" / "llm_compressor_recipe.py").read_text(encoding="utf-8")
        done = subprocess.run(
            [python, "-c", script, str(work / "settings.json")], stdout=subprocess.PIPE, text=True, cwd=work
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            return {"unavailable": f"{python} did not run the recipe (exit status {done.returncode})"}
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    return step


def _evaluate() -> Step:
    def step() -> dict[str, Any]:
        import torch
        from safetensors.torch import load_file

        import actlas
        from actlas.core.edit import Edit
        from actlas.core.quant_edit import QuantEdit
        from actlas.measure.quant_price import extra, losses_of, prices_of
        from actlas.quantize.awq import fit_awq
        from actlas.quantize.gptq import fit_gptq
        from actlas.quantize.rtn import fit_rtn

        torch.set_num_threads(THREADS)
        work = Path(os.environ[WORK])
        model = actlas.load("smollm2", dtype=torch.float32)
        variants: dict[str, Edit] = {"rtn": fit_rtn(model, bits=BITS, group_size=GROUP, evaluate=0)}
        for name in ("gptq", "same-recipe", "awq"):
            if (work / name).exists():
                variants[name] = Edit.load(work / name, model)
        theirs = work / "llm-compressor.safetensors"
        if theirs.exists():
            variants["llm-compressor"] = QuantEdit({}, load_file(theirs), method="llm-compressor")
        documents = _documents()
        two: dict[str, Any] = {"bits": 2, "group_size": GROUP, "evaluate": 0}
        variants["rtn, 2 bits"] = fit_rtn(model, **two)
        variants["gptq, 2 bits"] = fit_gptq(model, documents, tokens=TOKENS, context=CONTEXT, **two)
        variants["awq, 2 bits"] = fit_awq(model, documents, tokens=AWQ_TOKENS, context=AWQ_CONTEXT, **two)
        held_out = documents[60:]
        base, losses = losses_of(model, held_out, variants, tokens=EVALUATED, context=CONTEXT)
        found = prices_of(base, losses, variants)
        out = {f"{m.group['variant']} {m.name}": m.to_json() for m in found}
        for name, bits in (("gptq", ""), ("awq", ""), ("gptq", ", 2 bits"), ("awq", ", 2 bits")):
            for m in extra(losses[f"{name}{bits}"], losses[f"rtn{bits}"]):
                out[f"{name}{bits} over rtn {m.name}"] = m.to_json()
        if "llm-compressor" in losses and "gptq" in losses:
            for name in ("gptq", "same-recipe"):
                for m in extra(losses[name], losses["llm-compressor"]):
                    out[f"{name} over llm-compressor {m.name}"] = m.to_json()
        return out

    return step


def _encoder() -> Step:
    """Rounding, GPTQ and AWQ of `minilm`, whose weights lie on no grid, at 4, 3 and 2 bits."""

    def step() -> dict[str, Any]:
        import torch

        import actlas
        from actlas.measure.quant_price import output_prices
        from actlas.quantize.awq import fit_awq
        from actlas.quantize.gptq import fit_gptq
        from actlas.quantize.rtn import fit_rtn

        torch.set_num_threads(THREADS)
        model = actlas.load("minilm")
        documents = _documents()
        items = [d.text[:400] for d in documents[60:156]]
        out = {}
        for bits in (4, 3, 2):
            options: dict[str, Any] = {"bits": bits, "group_size": GROUP, "evaluate": 0}
            variants = {
                "rtn": fit_rtn(model, **options),
                "gptq": fit_gptq(model, documents, tokens=2048, context=128, **options),
                "awq": fit_awq(model, documents, tokens=512, context=128, **options),
            }
            pairs = [("gptq", "rtn"), ("awq", "rtn")]
            for m in output_prices(model, items, variants, pairs=pairs):
                out[f"{bits} {m.group['variant']} {m.name}"] = m.to_json()
        return out

    return step


VARIANTS: dict[str, Callable[[], Step]] = {
    "gptq": lambda: _timed(_gptq, "gptq"),
    "same-recipe": lambda: _timed(_same_recipe, "same-recipe"),
    "awq": lambda: _timed(_awq, "awq"),
    "llm-compressor": _llm_compressor,
    "evaluate": _evaluate,
    "minilm": _encoder,
}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    title = f"GPTQ and AWQ of smollm2, {BITS} bits in groups of {GROUP}, {THREADS} threads"
    if not Path("/proc/self/clear_refs").exists():
        return report("quantize", title, [Figure("peak memory", None, "x", 1.5, "needs Linux's /proc")])
    rounds = min(rounds, 2)  # each takes minutes
    runs: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("gptq", "same-recipe", "awq", "llm-compressor")
    }
    with tempfile.TemporaryDirectory() as work:
        os.environ[WORK] = work
        for done in range(rounds):
            for name in runs:
                runs[name].append(fresh("bench.quantize", name))
            say(f"round {done + 1} of {rounds}")
        prices = fresh("bench.quantize", "evaluate")
    encoder = fresh("bench.quantize", "minilm")
    figures = []
    for name in ("gptq", "awq"):
        figures += [
            median(f"{name}: time", [run["seconds"] for run in runs[name]], "s", 120.0),
            median(f"{name}: peak memory over fp32 weights", [run["peak"] for run in runs[name]], "x", 1.5),
        ]
    figures += _compared(runs, prices)
    for name in ("rtn", "awq"):
        figures.append(Figure(f"{name}: perplexity ratio", prices[f"{name} perplexity-ratio"]["value"], "x"))
    for bits, said in ((3, ""), (2, ", 2 bits")):
        for name in ("gptq", "awq"):
            m = prices[f"{name}{said} over rtn extra-kl"]
            figures.append(
                Figure(
                    f"smollm2, {bits} bits: {name} less rounding",
                    m["value"],
                    "nats/token of KL",
                    0.0,
                    f"95% interval {m['low']:.3f} to {m['high']:.3f}; rounding alone "
                    f"{prices[f'rtn{said} kl-to-base']['value']:.3f}",
                )
            )
    for bits in (4, 3, 2):
        for name in ("gptq", "awq"):
            m = encoder[f"{bits} {name} extra-distance"]
            figures.append(
                Figure(
                    f"minilm, {bits} bits: {name} less rounding",
                    m["value"],
                    "1 - cosine",
                    0.0,
                    f"95% interval {m['low']:.4f} to {m['high']:.4f}; rounding alone "
                    f"{encoder[f'{bits} rtn output-distance']['value']:.4f}",
                )
            )
    return report("quantize", title, figures, {"runs": runs, "prices": prices, "minilm": encoder})


def _compared(runs: dict[str, list[dict[str, Any]]], prices: dict[str, Any]) -> list[Figure]:
    missing = next((run["unavailable"] for run in runs["llm-compressor"] if "unavailable" in run), "")
    if missing:
        note = f"{missing}; pip install llmcompressor, or set LLMCOMPRESSOR_PYTHON"
        return [Figure("gptq against llm-compressor: time", None, "x", 1.0, note)]
    found = []
    for name, label, most in (
        ("same-recipe", "gptq on the same recipe", 1.0),
        ("gptq", "gptq with its range search", None),
    ):
        pairs = list(zip(runs[name], runs["llm-compressor"], strict=True))
        rise = prices[f"{name} over llm-compressor extra-loss"]
        found += [
            median(
                f"{label} against llm-compressor: time",
                [a["seconds"] / b["seconds"] for a, b in pairs],
                "x",
                most,
            ),
            median(
                f"{label} against llm-compressor: peak memory", [a["peak"] / b["peak"] for a, b in pairs], "x"
            ),
            Figure(
                f"{label} against llm-compressor: extra loss",
                rise["value"],
                "nats/token",
                0.0,
                f"95% interval {rise['low']:.3f} to {rise['high']:.3f}; perplexity ratios "
                f"{prices[f'{name} perplexity-ratio']['value']:.3f} and "
                f"{prices['llm-compressor perplexity-ratio']['value']:.3f}",
            ),
        ]
    return found
