"""Whisper from CTranslate2 files: written here byte by byte, read back, and damaged ones refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from actlas.core.errors import ModelError
from actlas.models.ct2_whisper import read_ct2, whisper_state
from tests.core.families import BY_NAME


def written(path: Path, variables: dict[str, torch.Tensor], name: str = "WhisperSpec") -> Path:
    def text(s: str) -> bytes:
        return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"

    kinds = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}
    out = struct.pack("<I", 6) + text(name) + struct.pack("<II", 3, len(variables))
    for key, value in variables.items():
        data = value.contiguous().numpy().tobytes()
        out += text(key) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", kinds[value.dtype], len(data)) + data
    path.write_bytes(out)
    return path


def as_ct2(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The inverse of what is tested, written independently."""
    v: dict[str, torch.Tensor] = {}

    def copy(theirs: str, ours: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        for name, own in zip(names, ("weight", "bias"), strict=True):
            v[f"{theirs}/{name}"] = state[f"{ours}.{own}"]

    for side in ("encoder", "decoder"):
        root = f"model.{side}"
        v[f"{side}/position_encodings/encodings"] = state[f"{root}.embed_positions.weight"]
        copy(f"{side}/layer_norm", f"{root}.layer_norm", ("gamma", "beta"))
        for i in range(layers):
            a, b = f"{side}/layer_{i}", f"{root}.layers.{i}"
            copy(f"{a}/self_attention/layer_norm", f"{b}.self_attn_layer_norm", ("gamma", "beta"))
            copy(f"{a}/ffn/layer_norm", f"{b}.final_layer_norm", ("gamma", "beta"))
            copy(f"{a}/ffn/linear_0", f"{b}.fc1")
            copy(f"{a}/ffn/linear_1", f"{b}.fc2")
            fuse = {"self_attention": ("self_attn", [["q", "k", "v"]])}
            if side == "decoder":
                fuse["attention"] = ("encoder_attn", [["q"], ["k", "v"]])
                copy(f"{a}/attention/layer_norm", f"{b}.encoder_attn_layer_norm", ("gamma", "beta"))
            for theirs, (ours, groups) in fuse.items():
                for j, names in enumerate(groups):
                    q = state[f"{b}.{ours}.q_proj.bias"]
                    v[f"{a}/{theirs}/linear_{j}/weight"] = torch.cat(
                        [state[f"{b}.{ours}.{n}_proj.weight"] for n in names]
                    )
                    v[f"{a}/{theirs}/linear_{j}/bias"] = torch.cat(
                        [
                            torch.zeros_like(q) if n == "k" else state[f"{b}.{ours}.{n}_proj.bias"]
                            for n in names
                        ]
                    )
                copy(f"{a}/{theirs}/linear_{len(groups)}", f"{b}.{ours}.out_proj")
    for j in (1, 2):
        copy(f"encoder/conv{j}", f"model.encoder.conv{j}")
    v["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return v


def test_weights_find_their_places(tmp_path: Path) -> None:
    model = BY_NAME["whisper"].model()
    module = model.module
    state = {n: t.detach().clone() for n, t in module.state_dict().items()}
    layers = model.config.encoder_layers
    file = written(tmp_path / "model.bin", as_ct2(state, layers))
    found = whisper_state(read_ct2(file))
    missing = {n for n in state if n not in found}
    assert missing == set() and all(torch.equal(found[n], state[n]) for n in state if n != "proj_out.weight")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-3], "cut off"),
        (lambda b: b[:40], "cut off"),
        (lambda b: struct.pack("<I", 99) + b[4:], "no CTranslate2 file of a known version"),
        (lambda b: b.replace(b"WhisperSpec", b"SomeoneElse"), "holds a SomeoneElse"),
    ],
)
def test_damaged_files_are_one_line(damage: object, said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "model.bin", {"a": torch.ones(2, 3), "b": torch.ones(4)})
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ModelError, match=said):
        read_ct2(file)
