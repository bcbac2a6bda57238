"""Control vectors of other libraries: llama.cpp and repeng (GGUF), steering-vectors (tensors by layer).

    write_control_vector(edit, "happy.gguf", model)      # llama-cli --control-vector happy.gguf
    edit = read_control_vector("happy.gguf", model)      # also what repeng's export_gguf writes

A control vector is one direction a layer, added to what block k puts out, at every token. llama.cpp and
repeng keep it in a GGUF file of architecture `controlvector`: float32 tensors `direction.k`, where k is the
number of the block counted from 0, and the first block has none (`llama-adapter.cpp`). So an edit can be
written if it is made of additions at `blocks.k.resid_post`, k >= 1, without scope, gate or norm keeping.

The library steering-vectors holds `{layer: tensor}` and a layer type, and leaves the file to its users. Its
objects are taken as they are (`from_steering_vectors`), and a safetensors file with one tensor a layer,
named by its number, is read as `decoder_block`. Pickles (`.pt`, `.pkl`) are refused: they are programs.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.artifact import atomic_write
from actlas.core.edit import Edit, compose
from actlas.core.edits import Add
from actlas.core.errors import ArtifactError, InputError, ShapeError, SiteError
from actlas.core.scope import Scope

if TYPE_CHECKING:
    from actlas.core.model import Model

ARCHITECTURE = "controlvector"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".joblib")
_SITE_OF_LAYER_TYPE = {
    "decoder_block": "resid_post",
    "self_attn": "attn.out",
    "mlp": "mlp.out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}


def write_control_vector(edit: Edit, path: str | Path, model: Model) -> Path:
    """Write an edit as a llama.cpp control vector.

    Args:
        edit: additions at `blocks.k.resid_post`; several at one block are summed, strengths multiplied in.
        path: the `.gguf` file.
        model: the model it is for; gives the width, the number of blocks and the architecture's name.

    Raises:
        InputError: the edit holds something that a control vector cannot, with what could hold it.
        FailureError: the file cannot be written.
    """
    from gguf import GGUFWriter

    layers = layer_vectors(edit, model)
    kind = str(getattr(model.config, "model_type", "") or "unknown")
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "vector.gguf"
        writer = GGUFWriter(str(temporary), ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", kind)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
        for k, vector in sorted(layers.items()):
            writer.add_tensor(f"direction.{k}", vector.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return atomic_write(path, temporary.read_bytes())


def layer_vectors(edit: Edit, model: Model) -> dict[int, Tensor]:
    """Return what an edit adds to each block's output, `{block: float32 [d]}`.

    Raises:
        InputError: a part is not a plain addition to a block's output, or nothing is added at all.
    """
    found: dict[int, Tensor] = {}
    for part in edit.parts():
        if not isinstance(part, Add) or part.keep_norm or part.scope != Scope() or part.condition is not None:
            raise InputError(
                f"a control vector holds only additions to whole sequences, not {part.describe()}; "
                "save it as an Actlas edit (edit.save), which keeps scopes, gates and other kinds"
            )
        for site in model.resolve(part.site):
            if site.kind != "resid_post" or site.block is None or site.block < 1 or site.selector is not None:
                raise InputError(
                    f"a control vector is added at blocks.k.resid_post with k from 1 on, not at {site.name}; "
                    "fit the direction there, or save it as an Actlas edit"
                )
            added = (part.strength * part.vector.detach().float().cpu()).expand(model.d_model or 0)
            found[site.block] = found.get(site.block, 0) + added
    if not any(bool(v.any()) for v in found.values()):
        raise InputError("the edit adds nothing (its strength or its vector is 0); there is nothing to write")
    return found


def read_control_vector(path: str | Path, model: Model) -> Edit:
    """Read a control vector: GGUF of llama.cpp or repeng, or safetensors with a tensor for each layer.

    Args:
        path: the file.
        model: the model it is for; sizes and layers are checked against it.

    Raises:
        InputError: no such file, or a kind of file that would have to be executed.
        ArtifactError: not a control vector, or a damaged one.
        ShapeError: vectors of another width. SiteError: layers that the model has not got.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a control vector, e.g. happy.gguf")
    if path.suffix.lower() in _PICKLES:
        raise InputError(
            f"{path} is a pickle, which can run any program when it is opened; save one tensor a "
            "layer with safetensors: save_file({str(k): v for k, v in layers.items()}, 'v.safetensors')"
        )
    layers = _safetensors(path) if path.suffix.lower() == ".safetensors" else _gguf(path)
    return from_layers(layers, model, kind="resid_post")


def from_steering_vectors(vector: Any, model: Model) -> Edit:
    """Return the edit that an object of the library steering-vectors stands for.

    Args:
        vector: anything with `layer_activations` (`{layer: tensor}`) and `layer_type`.
        model: the model it is for.

    Raises:
        InputError: not such an object, or a layer type that is not known here.
    """
    layers = getattr(vector, "layer_activations", None)
    if not isinstance(layers, Mapping):
        raise InputError(f"a {type(vector).__name__} is not a steering vector: it has no layer_activations")
    kind = str(getattr(vector, "layer_type", "decoder_block"))
    if kind not in _SITE_OF_LAYER_TYPE:
        raise InputError(f"layer_type is {kind!r}; it must be one of {', '.join(_SITE_OF_LAYER_TYPE)}")
    tensors = {int(k): torch.as_tensor(v).detach().float().cpu().flatten() for k, v in layers.items()}
    return from_layers(tensors, model, kind=_SITE_OF_LAYER_TYPE[kind])


def from_layers(layers: Mapping[int, Tensor], model: Model, *, kind: str = "resid_post") -> Edit:
    """Return the edit that adds a vector at each layer's site, bound to the model.

    Raises:
        ArtifactError: no layers, or values that are not finite.
        ShapeError, SiteError: sizes or layers that are not the model's.
    """
    if not layers:
        raise ArtifactError("this control vector has no layers; write it again")
    parts = []
    for k, vector in sorted(layers.items()):
        if model.n_blocks is not None and not 0 <= k < model.n_blocks:
            raise SiteError(f"the control vector has a direction for block {k}; {model.name} has blocks "
                            f"0 to {model.n_blocks - 1}")  # fmt: skip
        if model.d_model is not None and vector.shape != (model.d_model,):
            raise ShapeError(
                f"direction {k} has shape {list(vector.shape)}; {model.name} has a residual stream of "
                f"{model.d_model} channels"
            )
        if not bool(torch.isfinite(vector).all()):
            raise ArtifactError(f"direction {k} holds NaN or infinity; write the control vector again")
        parts.append(Add(f"blocks.{k}.{kind}", vector))
    return compose(parts).bind(model.fingerprint)


def _gguf(path: Path) -> dict[int, Tensor]:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        kind = "" if field is None else str(field.contents())
        tensors = {
            t.name: t.data.copy()
            if t.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
            else dequantize(t.data, t.tensor_type)
            for t in reader.tensors
        }
    except Exception as error:  # the reader raises whatever the damaged bytes lead it to
        raise ArtifactError(
            f"{path} is not a readable GGUF file ({error}); write or copy it again"
        ) from error
    if kind != ARCHITECTURE:
        raise ArtifactError(
            f"{path} holds {kind or 'something without an architecture'}, not a control vector"
        )
    layers: dict[int, Tensor] = {}
    for name, data in tensors.items():
        number = re.fullmatch(r"direction\.(\d+)", name)
        if number is None:
            raise ArtifactError(
                f"{path} holds a tensor {name!r}; control vectors have direction.1, direction.2, ..."
            )
        layers[int(number[1])] = torch.from_numpy(data).float().flatten()
    return layers


def _safetensors(path: Path) -> dict[int, Tensor]:
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:
        raise ArtifactError(f"{path} is not a readable safetensors file ({error})") from error
    layers: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        number = re.search(r"(?:^|[._])(\d+)$", name)
        if number is None:
            raise ArtifactError(
                f"{path} holds a tensor {name!r} without a layer number; name them by layer, e.g. '15'"
            )
        layers[int(number[1])] = tensor.float().flatten()
    return layers
