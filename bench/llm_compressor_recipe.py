"""llm-compressor's GPTQ on given windows; run by `bench.quantize` with an interpreter that has
llm-compressor.

Prints one line of JSON with seconds and peak memory, and writes the dequantised weights as safetensors. It
does not import Actlas.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def main(settings: dict[str, Any]) -> None:
    """Quantise, measure, save."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    data = Dataset.from_list(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in settings["ids"]]
    )
    weights = QuantizationArgs(
        num_bits=settings["bits"],
        type="int",
        strategy="group",
        group_size=settings["group"],
        symmetric=False,
        actorder=None,
    )
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        dampening_frac=settings["damp"],
        block_size=128,
    )
    with torch.no_grad():
        float(sum(p.sum() for p in model.parameters()))
    size = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = _status("VmRSS"), time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        processor=AutoTokenizer.from_pretrained(settings["model"]),
        recipe=recipe,
        max_seq_length=max(map(len, settings["ids"])),
        num_calibration_samples=len(settings["ids"]),
    )
    seconds = time.perf_counter() - start
    peak = _status("VmHWM") - before
    held = {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    save_file(held, settings["out"])
    print(json.dumps({"seconds": seconds, "peak": (size + peak) / size}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
