"""From what a wheel carries to the folder that `load` reads: safetensors, JSON and a tokenizer.

A converter is a function of two folders: the unpacked files, and the new folder to make. torch is
imported inside, because listing the bundled models must not import it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actlas.core.errors import FailureError

CLASS_NAMES = "class_names.json"


def keep(unpacked: Path, made: Path) -> None:
    """The files are in the right form already."""
    unpacked.rename(made)


def from_gguf(unpacked: Path, made: Path) -> None:
    """Dequantise a GGUF file to float32, the smallest dtype that holds every value exactly.

    A Q4_1 weight is `scale * q + minimum` with scale and minimum in float16 and q in 0..15; the sum
    needs more digits than float16 or bfloat16 have.
    """
    import torch

    from actlas.models.gguf import load_gguf
    from actlas.models.quiet import quiet_transformers

    file = next(unpacked.glob("*.gguf"))
    module, tokenizer, _ = load_gguf(file, torch.float32)
    model: Any = module
    with quiet_transformers():
        model.save_pretrained(made, max_shard_size="1TB")
        tokenizer.save_pretrained(made)


def from_ct2_whisper(unpacked: Path, made: Path) -> None:
    """Read a CTranslate2 file of Whisper; see `ct2_whisper`."""
    from actlas.models.ct2_whisper import from_ct2_whisper as convert

    made.mkdir(parents=True, exist_ok=True)
    convert(unpacked, made)


def from_lite0_checkpoint(unpacked: Path, made: Path) -> None:
    """Read the published checkpoint as data (never as code), and name the classes where names are there.

    Raises:
        FailureError: the checkpoint is not the one of this architecture.
    """
    import torch

    from actlas.models.efficientnet_lite import EfficientNetLite0, EfficientNetLiteConfig

    names = unpacked / CLASS_NAMES
    labels = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else {}
    config = EfficientNetLiteConfig(
        id2label={i: labels.get(str(i), f"class {i}") for i in range(EfficientNetLiteConfig.num_labels)}
    )
    module = EfficientNetLite0(config)
    try:
        module.load_state_dict(torch.load(unpacked / "weights.pth", map_location="cpu", weights_only=True))
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise FailureError(f"the checkpoint does not fit EfficientNet-Lite0: {said}") from error
    module.save_pretrained(made)
