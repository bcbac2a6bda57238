"""What lies in a SAELens folder: `cfg.json` and `sae_weights.safetensors`, read and checked as data.

The configuration names the architecture, sizes and hook; the weights must be exactly the tensors of that
architecture. Folders of SAELens before version 6 are brought to the names of version 6.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import ArtifactError, InputError
from actlas.core.sites import ALIASES

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT = "6.0.0"  # the SAELens version whose folder format is written
_BASE = ("W_enc", "b_enc", "W_dec", "b_dec")
#: Architecture -> the tensors that its folder holds.
TENSORS = {
    "standard": _BASE,
    "topk": _BASE,
    "jumprelu": (*_BASE, "threshold"),
    "batchtopk": (*_BASE, "topk_threshold"),
    "matryoshka_batchtopk": (*_BASE, "topk_threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
    "transcoder": _BASE,
    "jumprelu_transcoder": (*_BASE, "threshold"),
    "skip_transcoder": (*_BASE, "W_skip"),
    "jumprelu_skip_transcoder": (*_BASE, "threshold", "W_skip"),
}
#: Metadata of version 6 -> the name that it had before.
_OLD_HOOKS = {
    "hook_name": "hook_point",
    "hook_head_index": "hook_point_head_index",
    "hook_name_out": "hook_name_out",
}


def read_config(folder: Path) -> dict[str, Any]:
    """Read and complete `cfg.json`; older folders are brought to the names of version 6."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ArtifactError(f"{folder} is not a SAELens folder: it has no {file}")
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{folder / CONFIG} is not readable JSON ({error})") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{folder / CONFIG} must hold a JSON object, not a {type(found).__name__}")
    metadata = found.get("metadata")
    if metadata is None:
        found["metadata"] = {key: found.get(key, found.get(old)) for key, old in _OLD_HOOKS.items()}
    elif not isinstance(metadata, dict) or not isinstance(metadata.get("actlas", {}), dict):
        raise ArtifactError(f"{folder / CONFIG} has metadata that is not a JSON object")
    activation = found.get("activation_fn_str", found.get("activation_fn", "relu"))
    if "architecture" not in found:
        found["architecture"] = "topk" if activation == "topk" else "standard"
    if activation == "topk":
        found["architecture"] = "topk"
        found.setdefault("k", (found.get("activation_fn_kwargs") or {}).get("k"))
    elif activation != "relu":
        raise ArtifactError(
            f"{folder} has the activation function {activation!r}; Actlas reads relu and topk"
        )
    return found


def read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the folder's tensors in float32, each of the shape that the configuration says.

    Raises:
        ArtifactError: a damaged file, a tensor too many or too few, or one of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        held = load((folder / WEIGHTS).read_bytes())  # not mapped: a file that is replaced stays whole
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} is not a whole safetensors file ({error})") from error
    if "scaling_factor" in held and bool((held["scaling_factor"] == 1).all()):
        del held["scaling_factor"]
    name = config["architecture"]
    wanted = TENSORS[name]
    if wrong := sorted(set(held) ^ set(wanted)):
        what = "lacks" if wrong[0] in wanted else "holds"
        raise ArtifactError(f"{folder} {what} the tensor {wrong[0]!r}; a {name} has {', '.join(wanted)}")
    d, m = integer(config, "d_in"), integer(config, "d_sae")
    d_out = integer(config, "d_out") if name.endswith("transcoder") else d
    shapes = {
        "W_enc": (d, m),
        "W_dec": (m, d_out),
        "b_dec": (d_out,),
        "W_skip": (d_out, d),
        "topk_threshold": (),
    }
    for key, tensor in held.items():
        shape = shapes.get(key, (m,))
        if tuple(tensor.shape) != shape:
            raise ArtifactError(
                f"{folder}: {key} has shape {list(tensor.shape)}; cfg.json says {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise ArtifactError(f"{folder}: {key} has dtype {tensor.dtype}; it must be floating point")
    return {key: tensor.to(torch.float32) for key, tensor in held.items()}


def input_scale_of(folder: Path, config: dict[str, Any], given: float | None) -> float:
    """Return the factor that inputs are multiplied by.

    Raises:
        InputError: normalisation that cannot be folded, or a factor that is missing or not wanted.
    """
    how = config.get("normalize_activations") or "none"
    if how is True:  # before version 3
        how = "expected_average_only_in"
    if how == "expected_average_only_in":
        if given is None:
            raise InputError(
                f"{folder} was trained on scaled inputs (expected_average_only_in), and the factor is not in "
                "the folder; give it as input_scale (1.0 if it is folded in already)"
            )
        return float(given)
    if how != "none":
        raise InputError(f"{folder} normalises its inputs with {how!r}, which cannot be folded into weights")
    if given is not None and given != 1:
        raise InputError(f"{folder} does not scale its inputs; leave out input_scale")
    return 1.0


def integer(config: dict[str, Any], key: str) -> int:
    """Return a positive whole number of the configuration."""
    value: Any = config.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtifactError(f"{CONFIG} has {key} = {value!r}; it must be a positive whole number")
    return value


def site_of(config: dict[str, Any], key: str = "hook_name") -> str:
    """Return the site that a SAELens configuration's hook means; a name that is unknown stays as it is."""
    metadata = config["metadata"]
    hook = metadata.get(key) or ("unknown" if key == "hook_name" else "")
    head = metadata.get("hook_head_index") if key == "hook_name" else None
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", str(hook))
    prefix, kind = match.groups() if match else ("", str(hook))
    site = prefix + ALIASES.get(kind, kind)
    return site if not isinstance(head, int) else f"{site}[head={head}]"


def hook_of(site: str) -> str:
    """Return the TransformerLens hook of a site; a site that has none stays as it is."""
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", site)
    prefix, kind = match.groups() if match else ("", site)
    hooks = {kind: hook for hook, kind in ALIASES.items()}
    return prefix + hooks.get(kind, kind)
