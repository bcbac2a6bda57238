"""How a store lies on disk.

    acts/manifest.json                 what was harvested: model, sites, dtype, corpus, settings
    acts/shards/00000.safetensors      activations of the first rows, [rows, channels] a site
    acts/shards/00000.parquet          what each of these rows is (the token table)
    acts/shards/00000.json             first row, number of rows, sizes and SHA-256: written last

A shard is visible when its `.json` is there, which is renamed into place after the other two. Row
numbers go through: shard 1 begins where shard 0 ends. In a `.safetensors` file each site is one tensor
`[rows, channels]`; a site stored as int8 has `<site>.scale` `[rows, 1]` beside it, a store with
gradients `<site>.gradient` `[rows, channels]` in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import ArtifactError, InputError, did_you_mean
from actlas.models.cache import sha256_of

SHARDS = "shards"
GRADIENT, SCALE = ".gradient", ".scale"
DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8"}
_NAMES = {code: dtype for dtype, code in _CODES.items()}
_ALIGN = 64  # a cache line: rows of whole lines then begin at a line
_MOST_HEADER = 1 << 24


def check_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name, or raise InputError."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; it must be {', '.join(DTYPES)}{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def shard_name(index: int) -> str:
    """Return the name of a shard, which is also the stem of its files."""
    return f"{index:05d}"


@dataclass(frozen=True)
class Piece:
    """Where a tensor `[rows, columns]` lies in a file."""

    dtype: torch.dtype
    rows: int
    columns: int
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.rows * self.row_bytes


def tensors_of(channels: Mapping[str, int], dtype: str, gradient: bool) -> dict[str, tuple[torch.dtype, int]]:
    """Return dtype and columns of each tensor of a shard, those with the widest numbers first.

    The order keeps each tensor aligned, so that it can be mapped as it is.
    """
    stored = check_dtype(dtype)
    found: dict[str, tuple[torch.dtype, int]] = {}
    for site, d in channels.items():
        found[site] = (stored, d)
        if stored == torch.int8:
            found[site + SCALE] = (torch.float32, 1)
        if gradient:
            found[site + GRADIENT] = (torch.float32, d)
    return dict(sorted(found.items(), key=lambda item: -item[1][0].itemsize))


def plan_file(tensors: Mapping[str, tuple[torch.dtype, int]], rows: int) -> tuple[bytes, dict[str, Piece]]:
    """Return the header of a safetensors file of `rows` rows, and where each tensor goes."""
    record: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, columns) in tensors.items():
        stop = start + rows * columns * dtype.itemsize
        record[name] = {"dtype": _CODES[dtype], "shape": [rows, columns], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    return header, {
        name: Piece(dtype, rows, columns, len(header) + record[name]["data_offsets"][0])
        for name, (dtype, columns) in tensors.items()
    }


def read_header(path: Path) -> dict[str, Piece]:
    """Return where the tensors of a safetensors file lie, after checking it against the file's size.

    Raises:
        ArtifactError: not a safetensors file of 2-D tensors, or one that was cut.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            record = json.loads(file.read(length))
        found = {}
        for name, entry in record.items():
            if name == "__metadata__":
                continue
            rows, columns = (int(n) for n in entry["shape"])
            start, stop = entry["data_offsets"]
            piece = Piece(_NAMES[entry["dtype"]], rows, columns, 8 + length + start)
            if min(rows, columns, start) < 0 or piece.end != 8 + length + stop or piece.end > size:
                raise ValueError(f"{name} lies outside the file")
            found[name] = piece
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file: {error}") from error
    return found


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 rows and the factor of each: `x ~ codes * scale`, `scale = max |x| / 127`.

    The error of a value is at most half a step, `max |x| / 254` of its row.

    Args:
        x: `[n, d]`, finite.

    Returns:
        int8 `[n, d]` and float32 `[n, 1]`.
    """
    x = x.to(torch.float32)
    scale = x.abs().amax(1, keepdim=True) / 127
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / safe).round_().clamp_(-127, 127).to(torch.int8), scale


@dataclass(frozen=True)
class ShardRecord:
    """What the `.json` of a shard says.

    Attributes:
        index: its number.
        first: its first row.
        rows: how many it has.
        text: SHA-256 over documents and token ids, which tells another corpus or tokenizer.
        massive: how many of the rows are massive activations at some site.
        files: size and SHA-256 of its files, by name.
    """

    index: int
    first: int
    rows: int
    text: str
    massive: int
    files: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The shard's name."""
        return shard_name(self.index)

    def to_text(self) -> str:
        """Return the content of its `.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path, index: int) -> ShardRecord | None:
        """Return the record of a shard, or `None` if there is none.

        Raises:
            ArtifactError: it is unreadable.
        """
        path = folder / SHARDS / f"{shard_name(index)}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**record)
            if found.index != index or found.rows < 1 or set(found.files) != set(file_names(index)):
                raise ValueError("it describes another shard")
            for entry in found.files.values():
                int(entry["bytes"]), str(entry["sha256"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{damaged(folder, index)}: its record is unreadable ({error}); {HOW_TO_MEND}"
            ) from error
        return found


HOW_TO_MEND = "make it again with Store.remake, or `actlas harvest ... --repair`"


def damaged(folder: Path, index: int) -> str:
    """Return how an error names a damaged shard."""
    return f"shard {shard_name(index)} of {folder} is damaged"


def file_names(index: int) -> tuple[str, str]:
    """Return the names of a shard's two data files: activations and token table."""
    return f"{shard_name(index)}.safetensors", f"{shard_name(index)}.parquet"


def fault_of(folder: Path, index: int, *, thorough: bool = False) -> str | None:
    """Say in a few words why a shard cannot be used, or return `None` if it can.

    Args:
        folder: the store.
        index: the shard's number.
        thorough: compare SHA-256 too, not only sizes.
    """
    try:
        record = ShardRecord.read(folder, index)
    except ArtifactError:
        return "its record is unreadable"
    if record is None:
        return "its record is missing"
    for name, known in record.files.items():
        path = folder / SHARDS / name
        try:
            size = path.stat().st_size
            if size != known["bytes"]:
                return f"{name} has {size:,} bytes instead of {known['bytes']:,}"
            if thorough and sha256_of(path) != known["sha256"]:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
