"""compressed-tensors folders, which vLLM and transformers read: written, and read back as codes.

    format                weights                                        tensors of a layer
    pack-quantized        integers of 2 to 8 bits, by channel or group   weight_packed int32, weight_scale,
                                                                         weight_zero_point, weight_shape
    int-quantized         symmetric int8, with int8 inputs               weight int8, weight_scale
    float-quantized       fp8 e4m3, by channel or tensor                 weight float8, weight_scale
    mxfp4-, nvfp4-pack-   e2m1 pairs in a byte                           weight_packed uint8, weight_scale,
    quantized                                                            weight_global_scale (nvfp4)

Codes are written as they are stored, so that nothing is rounded a second time. Written from the format's
description; tests load the result with the compressed-tensors package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find
from actlas.core.numbers import QuantParams, QuantSpec, pack, unpack
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.models.exchange.parts import extras

if TYPE_CHECKING:
    from actlas.core.model import Model

WORD = 32


def why_not_compressed(layer: QuantLinear) -> str | None:
    """Return why a layer cannot be written in this format, or `None`."""
    if more := extras(layer):
        return f"it has {more[0]}"
    spec, act = layer.spec, layer.act_spec
    whole = spec.grid == "int" and spec.bits <= 8 and not spec.centred and spec.granularity != "tensor"
    known = (
        (whole and (spec.symmetric or spec.zero_point == "int"))
        or (spec.grid == "float" and spec.bits == 8 and spec.exp_bits == 4 and spec.granularity != "group")
        or (spec.grid == "mx" and spec.bits == 4)
        or spec.grid == "nvfp4"
    )
    if not known:
        return f"its weights are {spec.name}"
    if act is not None and (_act_args(layer) is None or (spec.grid in ("mx", "nvfp4"))):
        return f"its inputs are {act.name}" + (" with static scales" if layer.act_scale is not None else "")
    return None


def _act_args(layer: QuantLinear) -> dict[str, Any] | None:
    """Return the description of a layer's inputs, `{}` for none, `None` where the format has no such."""
    spec = layer.act_spec
    if spec is None:
        return {}
    if layer.act_scale is not None or layer.act_clip != 1 or spec.granularity != "channel":
        return None
    if spec.grid == "int" and spec.bits == 8 and spec.symmetric:
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if spec.grid == "float" and spec.bits == 8 and spec.exp_bits == 4:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return None


def _format(layer: QuantLinear) -> str:
    spec = layer.spec
    if spec.grid == "mx":
        return "mxfp4-pack-quantized"
    if spec.grid == "nvfp4":
        return "nvfp4-pack-quantized"
    if spec.grid == "float":
        return "float-quantized"
    return (
        "int-quantized"
        if spec.bits == 8 and spec.symmetric and layer.act_spec is not None
        else "pack-quantized"
    )


def _weight_args(spec: QuantSpec) -> dict[str, Any]:
    strategy = {"nvfp4": "tensor_group"}.get(spec.grid, spec.granularity)
    args: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if spec.grid == "int" else "float",
        "symmetric": spec.grid != "int" or spec.symmetric,
        "strategy": strategy,
        "dynamic": False,
    }
    if spec.granularity == "group":
        args["group_size"] = spec.group_size
    if spec.grid == "mx":
        args["scale_dtype"] = "torch.uint8"
    if spec.grid == "nvfp4":
        args["scale_dtype"] = "torch.float8_e4m3fn"
    return args


def quantization_config(layers: Mapping[str, QuantLinear], all_linears: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a model's config: one group for each pair of formats."""
    groups: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        entry = {
            "weights": _weight_args(layer.spec),
            "input_activations": _act_args(layer) or None,
            "output_activations": None,
            "format": _format(layer),
        }
        key = json.dumps(entry, sort_keys=True)
        groups.setdefault(key, {"targets": [], **entry})["targets"].append(path)
    formats = {entry["format"] for entry in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": entry for i, entry in enumerate(groups.values())},
        "ignore": [path for path in all_linears if path not in layers],
        "kv_cache_scheme": None,
    }


def tensors_of(path: str, layer: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a layer's tensors as the format stores them."""
    spec, codes, params = layer.spec, layer.unpacked, layer.params
    out: dict[str, Tensor] = {}
    kind = _format(layer)
    if kind == "pack-quantized":
        out["weight_packed"] = _words(codes, spec.bits)
        out["weight_scale"] = params.scale.float()
        out["weight_shape"] = torch.tensor(codes.shape)
        if not spec.symmetric:
            assert params.zero is not None
            out["weight_zero_point"] = _words(params.zero.T.contiguous(), spec.bits).T.contiguous()
    elif kind == "int-quantized":
        out["weight"] = (codes.int() - 128).to(torch.int8)
        out["weight_scale"] = params.scale.float()
    elif kind == "float-quantized":
        out["weight"] = codes.view(torch.float8_e4m3fn)
        out["weight_scale"] = params.scale.float()
    else:
        out["weight_packed"] = (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()
        out["weight_scale"] = layer.scale
        if kind.startswith("nvfp4"):
            out["weight_global_scale"] = torch.tensor([1.0 / layer.outer])
    if layer.bias is not None:
        out["bias"] = layer.bias.to(dtype)
    return {f"{path}.{name}": value for name, value in out.items()}


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return rows of codes as rows of int32 words, low bits first, each row padded to whole words."""
    rows, columns = codes.shape
    words = -(-columns * bits // WORD)
    padded = torch.zeros(rows, -(-columns // WORD) * WORD, dtype=torch.uint8)
    padded[:, :columns] = codes.to(torch.uint8)
    stream = pack(padded, bits).view(rows, -1)
    return stream.contiguous().view(torch.int32)[:, :words].contiguous()


def _codes(words: Tensor, bits: int, columns: int) -> Tensor:
    rows = words.shape[0]
    whole = -(-columns // WORD) * bits
    padded = torch.nn.functional.pad(words, (0, whole - words.shape[1])).contiguous()
    stream = padded.view(torch.uint8).flatten()
    return unpack(stream, bits, (rows, -(-columns // WORD) * WORD))[:, :columns].contiguous()


# -- reading ------------------------------------------------------------------------------------------


def read_compressed(folder: str | Path) -> tuple[Model, QuantEdit]:
    """Return a compressed-tensors folder as a model with dequantised weights and the edit of its codes.

    The model without the edit computes in float32 what the weights stand for; with the edit installed it also
    rounds its inputs, where the folder says so, and the codes can be read, measured and exported again.

    Raises:
        ModelError: no such folder, or a format that this reader has not got.
    """
    from safetensors.torch import load_file

    from actlas.core.model import Model
    from actlas.models.kinds import class_for
    from actlas.models.pretrained import read_config
    from actlas.models.quiet import quiet_transformers

    folder = Path(folder)
    config = read_config(folder)
    said = config.get("quantization_config") or {}
    if said.get("quant_method") != "compressed-tensors":
        raise ModelError(f"{folder} is no compressed-tensors folder: its config.json does not say so")
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    with quiet_transformers():
        import transformers

        plain = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        plain.__dict__.pop("quantization_config", None)
        model_class, kind = class_for(plain, str(folder))
        module = model_class._from_config(plain, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    layers = {}
    paths = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    for group in said["config_groups"].values():
        for path in _targets(group["targets"], paths, said.get("ignore", [])):
            layers[path] = _layer(path, module, tensors, group)
    state = {n: t for n, t in tensors.items() if not n.startswith(tuple(f"{p}." for p in layers))}
    for path, layer in layers.items():
        state[f"{path}.weight"] = layer.weight
        if layer.bias is not None:
            state[f"{path}.bias"] = layer.bias
    missing, unexpected = module.load_state_dict(state, strict=False)
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    absent = [n for n in missing if n not in tied]
    if absent or unexpected:
        wrong = (absent or unexpected)[0]
        raise ModelError(
            f"{folder} does not fit its config: {'it lacks' if absent else 'it has a stray'} {wrong}"
        )
    module.tie_weights()
    model = Model(module.eval(), tokenizer, name=folder.name, kind=kind, source=str(folder))
    return model, QuantEdit(layers, method="compressed-tensors", note=folder.name)


def _targets(targets: list[str], paths: list[str], ignore: list[str]) -> list[str]:
    import re

    def matches(path: str, pattern: str) -> bool:
        if pattern.startswith("re:"):
            return re.match(pattern[3:], path) is not None
        return pattern in ("Linear", path)

    return [
        p for p in paths if any(matches(p, t) for t in targets) and not any(matches(p, i) for i in ignore)
    ]


def _layer(
    path: str, module: nn.Module, tensors: Mapping[str, Tensor], group: Mapping[str, Any]
) -> QuantLinear:
    weights, inputs = group["weights"], group.get("input_activations")
    here = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
    linear = find(module, path)
    assert isinstance(linear, nn.Linear)
    shape = (linear.out_features, linear.in_features)
    bits, symmetric = int(weights["num_bits"]), bool(weights.get("symmetric", True))
    strategy, size = weights["strategy"], weights.get("group_size")
    grain: dict[str, Any] = (
        {"granularity": "group", "group_size": int(size)} if strategy in ("group", "tensor_group")
        else {"granularity": "tensor" if strategy == "tensor" else "channel"}
    )  # fmt: skip
    scale = here.get("weight_scale")
    if scale is None:
        raise ModelError(f"{path} has no weight_scale; this reader knows compressed layers only")
    zero = None
    if weights["type"] == "int":
        spec = QuantSpec(bits, symmetric=symmetric, **grain)
        half = 1 << (bits - 1)
        if "weight_packed" in here:
            codes = _codes(here["weight_packed"], bits, shape[1])
        elif "weight" in here:
            codes = (here["weight"].int() + half).to(torch.uint8)
        else:
            raise ModelError(f"{path} has neither weight_packed nor weight")
        if not symmetric:
            packed = here["weight_zero_point"]
            zero = _codes(packed.T.contiguous(), bits, shape[0]).T.float().contiguous()
        params = QuantParams(scale.float().reshape(-1, scale.shape[-1] if scale.ndim > 1 else 1), zero)
    elif "weight" in here and here["weight"].dtype == torch.float8_e4m3fn:
        spec = QuantSpec(8, "float", exp_bits=4, **grain)
        codes, params = here["weight"].view(torch.uint8), QuantParams(scale.float().reshape(-1, 1))
    elif "weight_packed" in here:
        packed = here["weight_packed"]
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape(shape)
        if "weight_global_scale" in here:
            outer = 1.0 / float(here["weight_global_scale"])
            spec, params = QuantSpec(4, "nvfp4"), QuantParams(scale.float() * outer, None, outer)
        else:
            spec = QuantSpec(4, "mx")
            params = QuantParams(torch.ldexp(torch.ones(scale.shape), scale.int() - 127))
    else:
        raise ModelError(f"{path}: {weights['type']} of {bits} bits in {sorted(here)} is not known here")
    act = None
    if inputs:
        act = ActQuant(_input_spec(path, inputs))
    bias = here.get("bias")
    with torch.no_grad():
        if bias is not None and linear.bias is not None:
            linear.bias.copy_(bias)
    return QuantLinear.of(linear, spec, params=params, codes=codes, act=act, where=path)


def _input_spec(path: str, inputs: Mapping[str, Any]) -> QuantSpec:
    if not inputs.get("dynamic") or inputs.get("strategy") != "token":
        raise InputError(
            f"{path} rounds its inputs by {inputs.get('strategy')} with static scales; "
            "this reader knows dynamic ones by token"
        )
    if inputs["type"] == "float":
        return QuantSpec(8, "float", exp_bits=4, granularity="channel")
    return QuantSpec(
        int(inputs["num_bits"]), symmetric=bool(inputs.get("symmetric", True)), granularity="channel"
    )
