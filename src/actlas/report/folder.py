"""A model's folder as files: weights by their headers, config, tokenizer. Nothing in it is run."""

from __future__ import annotations

import json
import math
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

from actlas.report.content import plain

MAX_HEADER = 100_000_000
MAX_JSON = 100_000_000
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
)
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "U8": "uint8",
}


class ModelFolder:
    """What a folder says about its model.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        self.config_problem = ""

    @property
    def has_model(self) -> bool:
        """Whether there is a config or are weights."""
        return "config.json" in self.names or bool(self.safetensors or self.pickles)

    @property
    def safetensors(self) -> list[str]:
        """Names of the safetensors files."""
        return [n for n in self.names if n.endswith(".safetensors") and not n.startswith("adapter_")]

    @property
    def pickles(self) -> list[str]:
        """Weights that only run as Python pickles."""
        return [
            n
            for n in self.names
            if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) and n != "training_args.bin"
        ]

    def read_json(self, name: str) -> tuple[Any, str]:
        """Return the content of a JSON file and an empty text, or `None` and why it cannot be read."""
        file = self.path / name
        if not file.is_file():
            return None, f"{name} is missing"
        try:
            if file.stat().st_size > MAX_JSON:
                return None, f"{name} is larger than {MAX_JSON:,} bytes"
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return None, f"{name} is not readable JSON ({plain(error)[:120]})"
        return (data, "") if isinstance(data, dict) else (None, f"{name} is not a JSON object")

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The config, with a text model's own config lifted up; `None` if it cannot be read."""
        data, self.config_problem = self.read_json("config.json")
        if data is None:
            return None
        inner = data.get("text_config")
        return {**data, **inner} if isinstance(inner, dict) else data

    def _number(self, *names: str) -> int | None:
        for name in names:
            value = (self.config or {}).get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    @property
    def context_length(self) -> int | None:
        """The longest input by the config, in tokens."""
        return self._number("max_position_embeddings", "n_positions", "max_target_positions")

    @cached_property
    def headers(self) -> dict[str, dict[str, Any] | str]:
        """Per safetensors file its tensors' entries, or why the header cannot be read."""
        return {name: read_header(self.path / name) for name in self.safetensors}

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Entries (dtype, shape) of all tensors whose headers can be read."""
        return {k: v for h in self.headers.values() if isinstance(h, dict) for k, v in h.items()}

    @property
    def parameters(self) -> int | None:
        """Number of elements of all tensors; `None` if no header can be read."""
        if not self.tensors or any(isinstance(h, str) for h in self.headers.values()):
            return None
        return sum(math.prod(entry["shape"]) for entry in self.tensors.values())

    def weights_complete(self) -> tuple[bool | None, str]:
        """Whether every file that the index names is there and every header fits its file."""
        broken = [f"{name}: {h}" for name, h in self.headers.items() if isinstance(h, str)]
        if broken:
            return False, broken[0]
        index, _ = self.read_json("model.safetensors.index.json")
        if index is not None:
            named = index.get("weight_map")
            named = named if isinstance(named, dict) else {}
            lost = sorted({str(f) for f in named.values()} - set(self.names))
            if lost:
                return False, f"the index names {lost[0]}, which is missing"
            absent = [t for t in named if t not in self.tensors]
            return (
                (False, f"tensor {plain(absent[0])} is missing")
                if absent
                else (True, f"{len(self.tensors)} tensors")
            )
        if self.safetensors:
            return True, f"{len(self.tensors)} tensors"
        if self.pickles:
            return None, "pickle files are not opened"
        return False, "there are no weights (*.safetensors)"

    def tokenizer_fits(self) -> tuple[bool | None, str]:
        """Whether the tokenizer's ids fit the config's vocabulary."""
        data, problem = self.read_json("tokenizer.json")
        size = self._number("vocab_size")
        if data is None:
            return (None if problem.endswith("missing") else False), problem
        if size is None:
            return None, "the config names no vocab_size"
        model = data.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        ids: list[int] = []
        if isinstance(vocab, dict):
            ids = [i for i in vocab.values() if isinstance(i, int)]
        elif isinstance(vocab, list):
            ids = [len(vocab) - 1]
        added = data.get("added_tokens")
        ids += [t["id"] for t in added or () if isinstance(t, dict) and isinstance(t.get("id"), int)]
        if not ids:
            return None, "tokenizer.json has no vocabulary"
        return max(ids) < size, f"largest id {max(ids):,}, vocab_size {size:,}"

    def embedding_fits(self) -> tuple[bool | None, str]:
        """Whether the embedding has as many rows as the config's vocabulary."""
        size = self._number("vocab_size")
        rows = [e["shape"][0] for n, e in self.tensors.items() if n.endswith(_EMBEDDINGS) and e["shape"]]
        if size is None or not rows:
            return None, "no vocab_size" if size is None else "no embedding with a known name"
        return rows[0] == size, f"embedding has {rows[0]:,} rows, vocab_size is {size:,}"

    def dtype_fits(self) -> tuple[bool | None, str]:
        """Whether most weights have the dtype that the config names."""
        said = (self.config or {}).get("dtype") or (self.config or {}).get("torch_dtype")
        if not isinstance(said, str) or not self.tensors:
            return None, "the config names no dtype" if self.tensors else "no weights could be read"
        sizes: dict[str, int] = {}
        for entry in self.tensors.values():
            name = _DTYPES.get(entry["dtype"], str(entry["dtype"]))
            sizes[name] = sizes.get(name, 0) + math.prod(entry["shape"])
        most = max(sizes, key=lambda k: sizes[k])
        return most == said.removeprefix("torch."), f"config {plain(said)}, weights {most}"


def read_header(file: Path) -> dict[str, Any] | str:
    """Return the entries of a safetensors header, or one line that says what is wrong with the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            start = handle.read(8)
            if start.startswith(b"version "):
                return "it is a Git LFS pointer, not the weights; run: git lfs pull"
            if len(start) < 8:
                return "it is truncated"
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER, size - 8):
                return "it is no safetensors file, or truncated"
            header = json.loads(handle.read(length))
    except (OSError, ValueError, RecursionError) as error:
        return plain(error)[:120]
    if not isinstance(header, dict):
        return "its header is not a JSON object"
    header.pop("__metadata__", None)
    for name, entry in header.items():
        good = (
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and isinstance(entry.get("shape"), list)
            and all(isinstance(x, int) and x >= 0 for x in entry["shape"])
            and isinstance(entry.get("data_offsets"), list)
            and len(entry["data_offsets"]) == 2
            and all(isinstance(x, int) for x in entry["data_offsets"])
        )
        if not good:
            return f"its header has a bad entry for {plain(name)[:60]}"
        if entry["data_offsets"][1] > size - 8 - length:
            return f"it is truncated: tensor {plain(name)[:60]} lies beyond its end"
    return header
