"""A model of our own as a folder that `actlas.load` reads: a registered module's sizes and weights, as data.

    save_module(network, "digits-unet/")
    model = actlas.load("digits-unet/")

The folder holds `config.json` (the class's registered name and its `config()`) and `model.safetensors`. Only
classes that Actlas itself registers with `register_module` are built, from plain numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actlas.core.artifact import write_folder
from actlas.core.errors import InputError, ModelError
from actlas.core.swap import MODULE_TYPES

MODEL_TYPE = "actlas-module"


def save_module(module: nn.Module, folder: str | Path) -> Path:
    """Save a registered module as a folder.

    Raises:
        InputError: the class is not registered, or the folder holds something else.
        FailureError: it could not be written.
    """
    from safetensors.torch import save

    name = type(module).__name__
    if MODULE_TYPES.get(name) is not type(module):
        known = ", ".join(sorted(n for n in MODULE_TYPES))
        raise InputError(f"{name} cannot be saved as a model folder; only registered modules can: {known}")
    config = {"model_type": MODEL_TYPE, "module": name, "sizes": module.config()}  # type: ignore[operator]
    tensors = {n: t.detach().cpu().contiguous() for n, t in module.state_dict().items()}
    files: dict[str, str | bytes] = {
        "config.json": json.dumps(config, indent=1) + "\n",
        "model.safetensors": save(tensors),
    }
    return write_folder(folder, files, marker="config.json")


def read_module(folder: str | Path, config: dict[str, Any] | None = None) -> nn.Module:
    """Build the module that `save_module` wrote, in evaluation mode.

    Args:
        folder: where it is.
        config: the content of `config.json`, if it was read already.

    Raises:
        ModelError: no such folder, an unknown class, sizes that make no sense, or weights that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from actlas.core.methods import import_rooms

    folder = Path(folder)
    try:
        config = config or json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no whole model: {error}") from error
    name = str(config.get("module"))
    if name not in MODULE_TYPES:
        import_rooms()
    if name not in MODULE_TYPES:
        raise ModelError(f"{folder} holds a module of unknown type {name!r}; upgrade Actlas")
    try:
        module: nn.Module = MODULE_TYPES[name].from_config(config["sizes"])
        module.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"{folder}: the weights of {name} do not fit its sizes ({said})") from error
    bad = [n for n, t in weights.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ModelError(f"{folder}: {bad[0]} holds NaN or infinity")
    return module.eval()
