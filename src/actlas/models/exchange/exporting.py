"""`export`: write an edited model for other programs, whole or not at all.

format                 what it holds
compressed-tensors     a folder of codes for vLLM and transformers
gguf                   one file for llama.cpp: int4 and lower as Q4_0 or Q4_1, int8 as Q8_0
hf                     a plain transformers folder with dequantised weights
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from actlas.core.artifact import _swap_in
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.layout import find
from actlas.core.quant_linear import QuantLinear
from actlas.models.exchange.compressed import quantization_config, tensors_of, why_not_compressed
from actlas.models.exchange.gguf_writing import why_not_gguf, write_gguf
from actlas.models.exchange.parts import Parts, one_dtype, parts_of

if TYPE_CHECKING:
    from actlas.core.model import Model

FORMATS = ("compressed-tensors", "gguf", "hf")


def _why_not_hf(layer: QuantLinear) -> str | None:
    if layer.act_spec is not None:
        return f"its inputs are rounded to {layer.act_spec.name}, which weights cannot say"
    return "it shifts its inputs" if layer.input_shift is not None else None


_CHECKS: Mapping[str, Callable[[QuantLinear], str | None]] = {
    "compressed-tensors": why_not_compressed,
    "gguf": why_not_gguf,
    "hf": _why_not_hf,
}


def holders(layer: QuantLinear) -> list[str]:
    """Return the formats that can hold a layer exactly as it is stored."""
    return [name for name, check in _CHECKS.items() if check(layer) is None]


def export(model: Model, edit: Edit, path: str | Path, format: str = "compressed-tensors") -> Path:
    """Write a quantised model.

    Args:
        model: the model that the edit was made for.
        edit: a `QuantEdit`, and weight edits beside it.
        path: the folder, or the `.gguf` file, to write.
        format: one of `FORMATS`.

    Returns:
        the path.

    Raises:
        InputError: a format that does not exist or cannot hold the edit (the message says which can), or an
            edit that is not about weights.
    """
    if format not in FORMATS:
        raise InputError(f"there is no exchange format {format!r}; there are {', '.join(FORMATS)}")
    parts = parts_of(model, edit)
    for name, layer in parts.layers.items():
        kind = type(find(model.module, name)).__name__
        if format != "hf" and kind != "Linear":
            raise InputError(f"{format} holds nn.Linear layers, and {name} is a {kind}; hf can hold it")
        reason = _CHECKS[format](layer)
        if reason is not None:
            able = [f for f in FORMATS if all(_CHECKS[f](held) is None for held in parts.layers.values())]
            instead = f"{' and '.join(able)} can" if able else "keep it as an Actlas edit"
            raise InputError(f"{format} cannot hold {name}: {reason}; {instead}")
    target = Path(path)
    if format == "gguf":
        return write_gguf(model, parts, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if format == "hf":
            _write_plain(model, parts, temporary)
        else:
            _write_compressed(model, parts, temporary)
        _swap_in(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _config(model: Model, parts: Parts, dtype: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model.module).__name__]
    if parts.untied:
        config["tie_word_embeddings"] = False
    return config


def _write(model: Model, config: dict[str, Any], tensors: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = getattr(model.module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _write_compressed(model: Model, parts: Parts, folder: Path) -> None:
    linears = [name for name, m in model.module.named_modules() if isinstance(m, nn.Linear)]
    dtype = one_dtype(parts.state.values())
    tensors = dict(parts.state)
    for path, layer in parts.layers.items():
        tensors |= tensors_of(path, layer, dtype)
    config = _config(model, parts, dtype)
    config["quantization_config"] = quantization_config(parts.layers, linears)
    _write(model, config, tensors, folder)


def _write_plain(model: Model, parts: Parts, folder: Path) -> None:
    dtype = one_dtype(parts.state.values())
    tensors = dict(parts.state)
    for path, layer in parts.layers.items():
        turned = type(find(model.module, path)).__name__ == "Conv1D"  # GPT-2 keeps its weights transposed
        tensors[f"{path}.weight"] = (layer.weight.T if turned else layer.weight).to(dtype)
        if layer.bias is not None:
            tensors[f"{path}.bias"] = layer.bias.to(dtype)
    _write(model, _config(model, parts, dtype), tensors, folder)
