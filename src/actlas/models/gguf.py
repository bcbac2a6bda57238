"""Load a GGUF file as an ordinary, unquantised transformers model with a tokenizer that matches it.

transformers does the work; three things are mended afterwards:

- The weights are plain tensors, yet the model still calls itself quantised and therefore refuses
  `save_pretrained`. `forget_quantization` drops that mark.
- Some vocabularies were learned on text whose digits were cut apart first (llama.cpp calls the scheme
  by the model that introduced it: `smollm`, `starcoder`, ...). transformers does not know these names
  and leaves the digits in, which gives other tokens for, say, two spaces before a number.
- The context length is in the file, but the tokenizer is not told.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from actlas.core.errors import ModelError
from actlas.core.progress import progress
from actlas.models.kinds import class_for
from actlas.models.quiet import one_line, quiet_transformers

_MAGIC = b"GGUF"
# llama.cpp, src/llama-vocab.cpp: the schemes whose expressions are a single digit, then GPT-2's
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any, str]:
    """Load a GGUF file.

    Args:
        path: the file.
        dtype: what the weights become. Only float32 holds every dequantised value exactly.

    Returns:
        The model, in evaluation mode on the CPU, its tokenizer, and its kind.

    Raises:
        ModelError: not a GGUF file, a damaged one, an architecture that transformers cannot read from
            GGUF, or a package for reading it is missing.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not start with the letters GGUF")
    _need_packages(path)
    with quiet_transformers(), progress(f"reading {path.name}", total=3, unit="steps") as advance:
        import transformers

        where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        plain: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):  # where weights could stay packed, ask for plain ones
            plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
        try:
            config = transformers.AutoConfig.from_pretrained(str(path.parent), **where)
            advance()
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path.parent), **where)
            advance()
            model_class, kind = class_for(config, str(path))
            with redirect_stderr(StringIO()):  # transformers shows a bar of its own here
                module = model_class.from_pretrained(
                    str(path.parent), config=config, dtype=dtype, **where, **plain
                )
            advance()
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{path} cannot be loaded: {one_line(error)}") from error
    forget_quantization(module)
    if _scheme(path) in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.model_max_length = getattr(module.config, "max_position_embeddings", tokenizer.model_max_length)
    return module.eval(), tokenizer, kind


def forget_quantization(module: Any) -> None:
    """Make a model whose weights are plain tensors say so, so that `save_pretrained` writes it."""
    module.is_quantized = False
    module.hf_quantizer = None
    module.__dict__.pop("quantization_method", None)
    for name in ("quantization_config", "_model_name_or_path"):
        module.config.__dict__.pop(name, None)


def _scheme(path: Path) -> str | None:
    """llama.cpp's name for how text is cut before byte pairs are merged."""
    try:
        from transformers.integrations.gguf import read_gguf_metadata
    except ImportError:  # an earlier transformers
        from gguf import GGUFReader

        field = GGUFReader(path).get_field("tokenizer.ggml.pre")
        return None if field is None else str(field.contents())
    return read_gguf_metadata(str(path))[0].get("tokenizer.ggml.pre")


def _need_packages(path: Path) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading {path.name} takes the package {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
