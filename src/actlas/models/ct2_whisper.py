"""Whisper from a CTranslate2 file (`model.bin`), as an ordinary transformers folder.

The file is little-endian: uint32 version, a name, uint32 revision, uint32 count, then for each variable a
name, uint8 rank, uint32 sizes, uint8 type, uint32 bytes and the data; a name is a uint16 length and its
characters. Queries, keys and values are one matrix there (keys and values one in cross-attention) and are
taken apart; the bias of keys is zero, as Whisper has none.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import ModelError

_TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}
_MOST = 1 << 31


def read_ct2(path: Path) -> dict[str, Tensor]:
    """Return the variables of a CTranslate2 file by name.

    Raises:
        ModelError: it is cut off, or holds types or sizes that do not fit together.
    """
    data = path.read_bytes()
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        if not 0 <= n <= len(data) - at:
            raise ModelError(f"{path} is cut off: {n} bytes are wanted at {at}, and it has {len(data)}")
        at += n
        return data[at - n : at]

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", take(struct.calcsize(kind)))[0])

    def name() -> str:
        return take(number("H")).rstrip(b"\0").decode("utf-8", "replace")

    version = number("I")
    if not 1 <= version <= 16:
        raise ModelError(f"{path} is no CTranslate2 file of a known version ({version})")
    spec = name()
    if spec != "WhisperSpec":
        raise ModelError(f"{path} holds a {spec}; this reader knows WhisperSpec")
    number("I")
    found: dict[str, Tensor] = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        dtype = _TYPES.get(kind)
        if dtype is None or size > _MOST:
            raise ModelError(f"{key} in {path} has type {kind} and {size} bytes; that is not known here")
        flat = torch.frombuffer(bytearray(take(size)), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        want = 1
        for n in shape:
            want *= n
        if flat.numel() != want:
            raise ModelError(f"{key} in {path} has {flat.numel()} values; {shape} wants {want}")
        found[key] = flat.view(shape)
    return found


def whisper_state(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' names and shapes of a Whisper model's weights, float32."""
    v = {name: t.float() for name, t in variables.items() if t.is_floating_point()}
    state: dict[str, Tensor] = {}

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = v[f"{theirs}/gamma"], v[f"{theirs}/beta"]

    def linear(ours: str, weight: Tensor, bias: Tensor | None) -> None:
        state[f"{ours}.weight"] = weight.contiguous()
        if bias is not None:
            state[f"{ours}.bias"] = bias.contiguous()

    def attention(ours: str, theirs: str, cross: bool) -> None:
        first, last = (("q",), ("k", "v")) if cross else (("q", "k", "v"), ())
        for index, names in enumerate((first, last)):
            if not names:
                continue
            weights = v[f"{theirs}/linear_{index}/weight"].chunk(len(names))
            biases = v[f"{theirs}/linear_{index}/bias"].chunk(len(names))
            for name, weight, bias in zip(names, weights, biases, strict=True):
                linear(f"{ours}.{name}_proj", weight, None if name == "k" else bias)
        out = 2 if cross else 1
        linear(f"{ours}.out_proj", v[f"{theirs}/linear_{out}/weight"], v[f"{theirs}/linear_{out}/bias"])

    for side in ("encoder", "decoder"):
        root = f"model.{side}"
        state[f"{root}.embed_positions.weight"] = v[f"{side}/position_encodings/encodings"]
        norm(f"{root}.layer_norm", f"{side}/layer_norm")
        for i in range(sum(name.endswith("/ffn/linear_0/weight") and name.startswith(side) for name in v)):
            ours, theirs = f"{root}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            attention(f"{ours}.self_attn", f"{theirs}/self_attention", cross=False)
            if side == "decoder":
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                attention(f"{ours}.encoder_attn", f"{theirs}/attention", cross=True)
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            for j in (0, 1):
                linear(
                    f"{ours}.fc{j + 1}",
                    v[f"{theirs}/ffn/linear_{j}/weight"],
                    v[f"{theirs}/ffn/linear_{j}/bias"],
                )
    for j in (1, 2):
        linear(f"model.encoder.conv{j}", v[f"encoder/conv{j}/weight"], v[f"encoder/conv{j}/bias"])
    state["model.decoder.embed_tokens.weight"] = v["decoder/embeddings/weight"]
    state["proj_out.weight"] = v["decoder/embeddings/weight"]
    return state


def from_ct2_whisper(unpacked: Path, made: Path) -> None:
    """Convert an unpacked CTranslate2 folder of an English Whisper model.

    Raises:
        ModelError: a damaged file, or variables that are not Whisper's.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    variables = read_ct2(unpacked / "model.bin")
    try:
        state = whisper_state(variables)
    except KeyError as missing:
        raise ModelError(f"{unpacked / 'model.bin'} lacks {missing}") from missing
    tokenizer: dict[str, Any] = json.loads((unpacked / "tokenizer.json").read_text(encoding="utf-8"))
    special = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    start, end = special["<|startoftranscript|>"], special["<|endoftext|>"]
    width = state["model.decoder.embed_tokens.weight"]
    layers = max(int(n.split(".")[3]) for n in state if n.startswith("model.encoder.layers.")) + 1
    heads = int(variables["encoder/num_heads"])
    config = WhisperConfig(
        vocab_size=width.shape[0], d_model=width.shape[1], encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=len(state["model.encoder.layers.0.fc1.weight"]),
        decoder_ffn_dim=len(state["model.decoder.layers.0.fc1.weight"]),
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=start,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    module = WhisperForConditionalGeneration(config)
    module.load_state_dict(state)
    module.generation_config.update(
        is_multilingual=False,
        no_timestamps_token_id=special["<|notimestamps|>"],
        begin_suppress_tokens=None,
        suppress_tokens=None,
        max_length=config.max_target_positions,
    )
    module.save_pretrained(made)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(made)
    (made / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (made / "tokenizer_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
