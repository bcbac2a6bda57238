"""Models: bundled ones, local folders, GGUF files, the hub, and any `nn.Module`.

    model = load("smollm2")                      # bundled: fetched once, then cached
    model = load("path/to/folder")               # transformers format
    model = load("model.gguf")
    model = load("openai-community/gpt2")        # from the hub, or its cache
    model = load(my_module)

Importing this room does not import torch, so that the bundled models can be listed at once.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from actlas.models.catalogue import BundledInfo, bundled, remove, verify
from actlas.models.quick_imports import quick_imports

if TYPE_CHECKING:
    import torch

    from actlas.core.model import Model

__all__ = ["BundledInfo", "bundled", "load", "remove", "verify", "wrap"]


def load(
    x: str | os.PathLike[str] | torch.nn.Module | Model,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    trust_remote_code: bool = False,
    offline: bool | None = None,
) -> Model:
    """Load a model.

    Args:
        x: a bundled name (`bundled()` lists them), a local folder in transformers' format, a GGUF file, a
            name on the Hugging Face hub, or a module (which is converted and moved in place). A bundled
            name wins over a folder of that name, for which `Path("smollm2")` or `"./smollm2"` stands.
        dtype: what the weights become, as a `torch.dtype` or its name. `None`: float32 for bundled models
            and GGUF files, as saved otherwise.
        device: where it goes; `None`: the CPU, or where a module already is.
        trust_remote_code: run Python code that comes with a checkpoint. Only for code you have read.
        offline: use no network; `None`: as `ACTLAS_OFFLINE` or `HF_HUB_OFFLINE` say.

    Returns:
        The model in evaluation mode, with its tokenizer or processor where it has one.

    Raises:
        ModelError: unknown, not to be had without a network, damaged, incomplete, or of a type that
            transformers does not know; the line says which and what would help.
        InputError: a dtype or a device that does not exist.
        FailureError: a download or the writing of the cache failed.
    """
    with quick_imports():
        from actlas.models.loading import load_model

        return load_model(x, dtype, device, trust_remote_code, offline)


def wrap(
    module: torch.nn.Module, tokenizer: Any = None, processor: Any = None, name: str | None = None
) -> Model:
    """Make a `Model` of a module that is already in memory; the module itself is used, not a copy.

    Args:
        module: any `nn.Module`; it is put into evaluation mode.
        tokenizer: a transformers tokenizer, if it reads text.
        processor: a callable that turns images or audio into `{"pixel_values": ...}` or the like.
        name: for people; the config's or the class's name by default.

    Raises:
        InputError: it is not a module.
    """
    with quick_imports():
        from actlas.models.loading import wrap_module

        return wrap_module(module, tokenizer, processor, name)
