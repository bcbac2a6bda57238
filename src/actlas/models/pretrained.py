"""Load a folder in transformers' format: a config, weights, and whatever tokenizer or processor is there.

What transformers would do silently is an error here: weights that the checkpoint lacks are not made up,
and a tokenizer that is not in the folder is not invented.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actlas.core.artifact import inside
from actlas.core.errors import ModelError, did_you_mean
from actlas.models.kinds import class_for, model_types
from actlas.models.quiet import one_line, quiet_transformers

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "vocab.txt",
    "vocab.json", "vocab.model", "tekken.json",
)  # fmt: skip
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
_OWN_CODE = "needs Python code of its own; read that code, and if you trust it pass trust_remote_code=True"
# Heads that checkpoints leave out because the task they were trained for did not use them.
_MAY_BE_MISSING = re.compile(r"(^|\.)pooler\.|position_ids$")


@dataclass
class Loaded:
    """What a folder held."""

    module: torch.nn.Module
    tokenizer: Any
    processor: Any
    kind: str


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's `config.json`.

    Raises:
        ModelError: there is none, it is not JSON, or it names no model type.
    """
    file = folder / "config.json"
    if not file.is_file():
        is_adapter = (folder / "adapter_config.json").exists()
        advice = (
            "it holds a PEFT adapter, load its base model" if is_adapter else "so it is no transformers model"
        )
        raise ModelError(f"{folder} has no config.json; {advice}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} is not readable JSON ({one_line(error)}); copy or download it again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} has no model_type, so there is no telling what model it is")
    return config


def lacking_weights(folder: Path) -> str | None:
    """Return the first file of weights that should be in a folder and is not, or `None`."""
    form = next((weights for weights in WEIGHTS if (folder / weights).is_file()), None)
    if form is None:
        return WEIGHTS[0]
    if not form.endswith(".index.json"):
        return None
    try:
        shards = set(json.loads((folder / form).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"readable {form}"
    return next((shard for shard in sorted(shards) if not inside(folder, shard).is_file()), None)


def load_folder(
    folder: Path, name: str, dtype: torch.dtype | None, *, trust_remote_code: bool = False
) -> Loaded:
    """Load a folder in transformers' format; nothing is fetched from a network.

    Args:
        folder: where `config.json` and the weights are.
        name: what the user asked for, for messages.
        dtype: what the weights become; `None` leaves them as they were saved.
        trust_remote_code: run the Python code that comes with the checkpoint, if it needs that.

    Raises:
        ModelError: anything that keeps it from being loaded whole, in one line.
    """
    given = read_config(folder)
    _know_type(given, folder, trust_remote_code)
    if (lacking := lacking_weights(folder)) is not None:
        raise ModelError(f"{folder} has no whole weights: there must be a {lacking} beside config.json")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with quiet_transformers():
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), **options)
            model_class, kind = class_for(config, name)
            module, report = model_class.from_pretrained(
                str(folder), config=config, dtype=dtype or "auto", output_loading_info=True, **options
            )
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(_reason(folder, error)) from error
        _refuse_made_up_weights(name, report)
        tokenizer, processor = _companions(folder, kind, options)
    return Loaded(module, tokenizer, processor, kind)


def _know_type(given: dict[str, Any], folder: Path, trust_remote_code: bool) -> None:
    model_type, known_types = given["model_type"], model_types()
    if given.get("auto_map") and model_type not in known_types and not trust_remote_code:
        raise ModelError(f"{folder} {_OWN_CODE}")
    if not given.get("auto_map") and model_type not in known_types:
        import transformers

        raise ModelError(
            f"{folder} has the model type {model_type!r}, which transformers {transformers.__version__}"
            f" does not know{did_you_mean(model_type, known_types)}"
        )


def _refuse_made_up_weights(name: str, report: dict[str, Any]) -> None:
    missing = sorted(key for key in report.get("missing_keys", ()) if not _MAY_BE_MISSING.search(key))
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{name} lacks weights of its architecture, which would have to be random: {some}")


def _companions(folder: Path, kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The tokenizer and the processor, each only where its files are."""
    import transformers

    tokenizer = processor = None
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER)
    has_processor = any((folder / file).is_file() for file in PROCESSOR)
    try:
        if has_tokenizer:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        if has_processor and has_tokenizer:
            processor = transformers.AutoProcessor.from_pretrained(str(folder), **options)
        elif has_processor and kind.startswith("image-"):
            processor = transformers.AutoImageProcessor.from_pretrained(str(folder), **options)
        elif has_processor:
            processor = transformers.AutoFeatureExtractor.from_pretrained(str(folder), **options)
    except Exception as error:
        raise ModelError(
            f"the tokenizer or processor of {folder} cannot be loaded: {one_line(error)}"
        ) from error
    return tokenizer, processor


def _reason(folder: Path, error: Exception) -> str:
    """One line for what transformers or safetensors said."""
    said, what = one_line(error), type(error).__name__
    if what in ("SafetensorError", "UnpicklingError") or "deserializ" in said:
        return f"{folder} has damaged weights ({said}); copy or download them again"
    if "mismatch" in said:
        return f"{folder} has weights whose shapes are not those of its config.json: {said}"
    if "trust_remote_code" in said:
        return f"{folder} {_OWN_CODE}"
    return f"{folder} cannot be loaded: {said}"
