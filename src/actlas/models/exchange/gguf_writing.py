"""Write a quantised model of the llama kind as one GGUF file for llama.cpp.

Blocks of 32 along the input, in the ggml types that hold a layer as it is stored:

    Q4_0    symmetric integers of 4 bits or fewer:    d (q - 8)
    Q4_1    asymmetric ones:                          d q + m, with m = -d z in float16
    Q8_0    symmetric integers of 8 bits or fewer:    d q
    F32     everything that is not quantised (norms, embeddings, ...)

Groups of more than 32 repeat their scale. Integers of 2 and 3 bits take 4 here. The rows of q and k are in
another order than in transformers, because llama.cpp rotates neighbouring pairs. Text is tokenized by
llama.cpp itself, so the vocabulary is written too: byte-level BPE only.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError
from actlas.core.quant_linear import QuantLinear
from actlas.models.exchange.parts import Parts, extras

if TYPE_CHECKING:
    from actlas.core.model import Model

BLOCK = 32
_TYPES = ("llama", "mistral")
_NORMAL, _CONTROL = 1, 3


def why_not_gguf(layer: QuantLinear) -> str | None:
    """Return why a layer cannot be written as GGUF, or `None`."""
    if more := extras(layer):
        return f"it has {more[0]}"
    spec = layer.spec
    if layer.act_spec is not None:
        return f"its inputs are {layer.act_spec.name}"
    if spec.grid != "int" or spec.centred or spec.bits > 8 or (spec.bits > 4 and not spec.symmetric):
        return f"its weights are {spec.name}; ggml's blocks hold int2 to int4, and symmetric int5 to int8"
    if layer.in_features % BLOCK or (spec.granularity == "group" and (spec.group_size or 0) % BLOCK):
        return f"its groups ({spec.name}) are not whole blocks of {BLOCK}"
    return None


def write_gguf(model: Model, parts: Parts, path: Path) -> Path:
    """Write the file, whole or not at all.

    Raises:
        ModelError: an architecture or tokenizer that cannot be written, or the gguf package is missing.
    """
    try:
        import gguf
    except ImportError as missing:
        raise ModelError("writing GGUF takes the package gguf: pip install gguf") from missing
    config = model.config
    if getattr(config, "model_type", None) not in _TYPES or model.tower is None:
        kind = getattr(config, "model_type", type(model.module).__name__)
        raise ModelError(
            f"{model.name} is {kind}; GGUF is written for {', '.join(_TYPES)} (take hf or compressed-tensors)"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(name, "llama")
        _metadata(writer, model)
        _vocabulary(writer, model)
        _tensors(writer, model, parts, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _metadata(writer: Any, model: Model) -> None:
    config, tower = model.config, model.tower
    assert tower is not None
    writer.add_name(model.name)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(tower.d_model)
    writer.add_block_count(tower.n_blocks)
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(tower.heads)
    writer.add_head_count_kv(tower.kv_heads)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_dimension_count(tower.head_dim)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type", "default") != "default":
        raise ModelError(
            f"{model.name} scales its rotary positions ({parameters['rope_type']}); "
            "GGUF is written for plain ones"
        )
    writer.add_rope_freq_base(float(parameters.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_file_type(0)


def _vocabulary(writer: Any, model: Model) -> None:
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    record = json.loads(backend.to_str()) if backend is not None else {}
    inner = record.get("model", {})
    if inner.get("type") != "BPE" or "ByteLevel" not in json.dumps(record.get("pre_tokenizer")):
        raise ModelError(
            f"the tokenizer of {model.name} is no byte-level BPE, the one kind that is written as GGUF"
        )
    by_id = {i: t for t, i in inner["vocab"].items()}
    special = {t["id"]: t for t in record.get("added_tokens", ())}
    size = int(model.config.vocab_size)
    tokens, types = [], []
    for i in range(size):
        added = special.get(i)
        tokens.append(added["content"] if added else by_id.get(i, f"[PAD{i}]"))
        types.append(_CONTROL if (added and added["special"]) or i not in by_id else _NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in inner["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if '"Digits"' in json.dumps(record["pre_tokenizer"]) else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    tokenizer = model.tokenizer
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        value = getattr(tokenizer, name, None)
        if value is not None:
            add(int(value))
    writer.add_add_bos_token(False)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _gguf_name(path: str) -> str:
    if path in _TOP:
        return _TOP[path]
    parts = path.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in _NAMES:
        return f"blk.{parts[2]}.{_NAMES[parts[3]]}"
    raise ModelError(f"{path} has no place in a GGUF file of the llama kind")


def _tensors(writer: Any, model: Model, parts: Parts, gguf: Any) -> None:
    tower = model.tower
    assert tower is not None
    heads = {"q_proj": tower.heads, "k_proj": tower.kv_heads}
    for path, layer in parts.layers.items():
        order = _rows(layer.out_features, heads.get(path.rsplit(".", 1)[-1]))
        data, kind = _blocks(layer, order)
        writer.add_tensor(
            f"{_gguf_name(path)}.weight", data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind)
        )
        if layer.bias is not None:
            writer.add_tensor(f"{_gguf_name(path)}.bias", layer.bias[order].float().numpy())
    for name, value in parts.state.items():
        path, _, leaf = name.rpartition(".")
        if path.endswith("rotary_emb"):
            continue
        order = _rows(len(value), heads.get(path.rsplit(".", 1)[-1]))
        writer.add_tensor(f"{_gguf_name(path)}.{leaf}", value[order].float().contiguous().numpy())


def _rows(n: int, heads: int | None) -> Tensor:
    """Return the order in which llama.cpp wants rows: within a head, first and second halves interleaved."""
    order = torch.arange(n)
    return order if heads is None else order.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _blocks(layer: QuantLinear, order: Tensor) -> tuple[Any, str]:
    """Return the bytes of ggml blocks `[rows, bytes]` and their type."""
    spec, rows = layer.spec, layer.out_features
    codes = layer.unpacked[order].int()
    n = layer.in_features // BLOCK
    params = layer.params
    scale = _spread(params.scale, rows, n)[order]
    half = _half(scale, "scale")
    if spec.symmetric:
        signed = codes - (1 << (spec.bits - 1))
        if spec.bits > 4:
            body = signed.to(torch.int8).view(rows, n, BLOCK).view(torch.uint8)
            return _joined(half, None, body), "Q8_0"
        return _joined(half, None, _nibbles((signed + 8).view(rows, n, BLOCK))), "Q4_0"
    assert params.zero is not None
    zero = _spread(params.zero.float(), rows, n)[order]
    minimum = zero if spec.zero_point == "float" else -scale.float() * zero
    return _joined(half, _half(minimum, "minimum"), _nibbles(codes.view(rows, n, BLOCK))), "Q4_1"


def _spread(value: Tensor, rows: int, blocks: int) -> Tensor:
    """[rows, groups] -> [rows, blocks], or one value for the tensor."""
    if value.numel() == 1:
        return value.reshape(1, 1).expand(rows, blocks)
    return value.repeat_interleave(blocks // value.shape[1], 1)


def _half(value: Tensor, what: str) -> Tensor:
    half = value.half()
    if not bool(torch.isfinite(half).all()):
        raise InputError(f"a {what} of {float(value.abs().max()):.3g} does not fit ggml's float16")
    return half.contiguous()


def _nibbles(codes: Tensor) -> Tensor:
    """ggml keeps entries 0 to 15 of a block in the low halves of its bytes, 16 to 31 in the high ones."""
    byte = codes.to(torch.uint8)
    return byte[..., : BLOCK // 2] | (byte[..., BLOCK // 2 :] << 4)


def _joined(scale: Tensor, minimum: Tensor | None, body: Tensor) -> Any:
    head = [t.unsqueeze(-1).view(torch.uint8) for t in (scale, minimum) if t is not None]
    whole = torch.cat([*head, body], -1).flatten(1).contiguous()
    return np.ascontiguousarray(whole.numpy())
