"""Reading text that a user has: a file, JSON lines, a folder, Parquet, a Hugging Face dataset on disk.

A dataset that was written with `datasets.Dataset.save_to_disk` is Arrow files beside a `state.json`, so
it is read with pyarrow and needs no other package. Every reader raises `InputError` with the file and the
place in it (byte, line, column) where something is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actlas.core.errors import InputError, did_you_mean
from actlas.data.chunks import definitions, paragraphs
from actlas.data.documents import Document

_TEXT = (
    ".txt .md .markdown .rst .text .tex .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .css .html .sh"
    " .toml .yaml .yml .cfg .ini"
)
TEXT_SUFFIXES = frozenset(_TEXT.split())
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".feather"})


def read_text(path: Path, empty: bool = False) -> str:
    """Return a file's text, which must be UTF-8 (a byte-order mark is dropped), with `\\n` line ends.

    Args:
        path: the file.
        empty: whether a file without any text is all right.

    Raises:
        InputError: the file cannot be read, is empty, or is not UTF-8 (names the byte offset).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start:,};"
            f" save it as UTF-8 (or convert it with iconv)"
        ) from error
    if not empty and not text.strip():
        raise InputError(f"{path} is empty; give a file with text in it")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def load_path(path: Path, *, field: str = "text", split: str | None = None) -> Iterator[Document]:
    """Yield the documents of a file or folder, in order.

    Args:
        path: what to read; the suffix says how.
        field: the column or JSON field that holds the text.
        split: which split of a dataset on disk that has several.

    Raises:
        InputError: nothing readable is there, or what is there is malformed.
    """
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _dataset(path, field, split)
        return _folder(path, field)
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return _jsonl(path, field)
    if suffix in TABLE_SUFFIXES:
        return _table(path, field, path.stem)
    return _text(path, path.name)


def _text(path: Path, label: str, empty: bool = False) -> Iterator[Document]:
    text = read_text(path, empty)
    try:
        pages = definitions(text) if path.suffix == ".py" else paragraphs(text)
    except SyntaxError:
        pages = paragraphs(text)
    for part, page in enumerate(pages, start=1):
        yield Document(f"{label}/{part}", page, {"file": label})


def _folder(path: Path, field: str) -> Iterator[Document]:
    known = TEXT_SUFFIXES | JSONL_SUFFIXES | TABLE_SUFFIXES
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in known
        and file.is_file()
        and file.stat().st_size
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise InputError(f"the folder {path} holds no text; put {', '.join(sorted(known))} files in it")
    for file in files:
        label = file.relative_to(path).as_posix()
        suffix = file.suffix.lower()
        if suffix in TEXT_SUFFIXES:
            yield from _text(file, label, empty=True)
            continue
        rows = _jsonl(file, field, empty=True) if suffix in JSONL_SUFFIXES else _table(file, field, label)
        for row in rows:
            yield Document(f"{label}/{row.id}", row.text, {**row.group, "file": label})


def _jsonl(path: Path, field: str, empty: bool = False) -> Iterator[Document]:
    for number, line in enumerate(read_text(path, empty).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: a {type(record).__name__} where an object belongs")
        if field not in record:
            raise InputError(
                f"{path}, line {number}: no field {field!r}, only {', '.join(map(repr, record)) or 'none'};"
                f" name the field with the text{did_you_mean(field, record)}"
            )
        text = record[field]
        if not isinstance(text, str):
            raise InputError(
                f"{path}, line {number}: the field {field!r} is a {type(text).__name__}, not text"
            )
        if text.strip():
            yield Document(_id(record, path.stem, number), text, _labels(record))


def _id(record: dict[str, Any], stem: str, number: int) -> str:
    given = record.get("id")
    return str(given) if isinstance(given, str | int) and str(given) else f"{stem}/{number}"


def _labels(record: dict[str, Any]) -> dict[str, str]:
    group = record.get("group")
    return {str(k): str(v) for k, v in group.items()} if isinstance(group, dict) else {}


def _dataset(path: Path, field: str, split: str | None) -> Iterator[Document]:
    """Read what `save_to_disk` of Hugging Face's datasets wrote: Arrow streams listed in state.json."""
    index = path / "dataset_dict.json"
    if index.is_file():
        names = _json(index).get("splits")
        if not isinstance(names, list) or not names or any(Path(str(n)).name != n for n in names):
            raise InputError(f"{index} names no splits, or splits outside its folder: {names!r}")
        if split is None and len(names) > 1 and "train" not in names:
            raise InputError(f"{path} has the splits {', '.join(names)}; say which one with split=")
        chosen = split or ("train" if "train" in names else names[0])
        if chosen not in names:
            raise InputError(f"{path} has no split {chosen!r}, only {', '.join(names)}")
        path = path / chosen
    elif split is not None:
        raise InputError(f"{path} has no splits; leave out split={split!r}")
    state = _json(path / "state.json")
    data = [_beside(path, entry) for entry in state.get("_data_files") or []]
    if not data:
        raise InputError(f"{path} lists no data files in state.json; save the dataset again")
    rows = [text for file in data for text in _column(file, field)]
    order: list[int] = list(range(len(rows)))
    indices = state.get("_indices_files") or []
    if indices:
        order = [i for entry in indices for i in _column(_beside(path, entry), "indices", whole=True)]
    for i in order:
        if not 0 <= i < len(rows):
            raise InputError(f"{path}: row {i} is asked for and {len(rows)} rows are there; save it again")
        if rows[i].strip():
            yield Document(f"{path.name}/{i}", rows[i], {})


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON ({error}); save the dataset again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; save the dataset again")
    return content


def _beside(folder: Path, entry: Any) -> Path:
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(f"{folder / 'state.json'} names the file {name!r}, which is not in its folder")
    return folder / name


def _table(path: Path, field: str, label: str) -> Iterator[Document]:
    for number, text in enumerate(_column(path, field)):
        if text.strip():
            yield Document(f"{label}/{number}", text, {})


def _column(path: Path, field: str, whole: bool = False) -> list[Any]:
    """Return one column of a Parquet or Arrow file: text, or whole numbers where `whole`."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            with pa.memory_map(str(path)) as source:
                try:
                    table = pa.ipc.open_stream(source).read_all()
                except pa.ArrowInvalid:
                    source.seek(0)
                    table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read {path} as an Arrow or Parquet table: {reason}") from error
    if field not in table.column_names:
        raise InputError(
            f"{path} has no column {field!r}, only {', '.join(table.column_names)};"
            f" name the column with the text{did_you_mean(field, table.column_names)}"
        )
    column = table.column(field)
    kind = column.type
    right = pa.types.is_integer(kind) if whole else pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not right:
        raise InputError(f"{path}: the column {field!r} holds {kind}, not {'numbers' if whole else 'text'}")
    return [("" if value is None else value) for value in column.to_pylist()]
