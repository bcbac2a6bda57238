"""`corpus(...)`: one way to get text, bundled or your own.

    from actlas.data import corpus

    corpus()                        # prose, code and documentation in turn, without a network
    corpus("prose", limit=20)
    corpus("notes.md")              # also .jsonl, .parquet, a folder, a Hugging Face dataset on disk
    fit, evaluation = corpus("code").split()

Documents are pages of about 2,000 characters, never empty, with labels to disaggregate by.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from os import PathLike
from pathlib import Path

from actlas.core.errors import InputError, did_you_mean
from actlas.data import bundled
from actlas.data.documents import Corpus, Document
from actlas.data.loaders import load_path

NAMES = ("mixed", *bundled.DOMAINS)


def corpus(
    name_or_path: str | PathLike[str] = "mixed",
    *,
    seed: int | None = 0,
    limit: int | None = None,
    field: str = "text",
    split: str | None = None,
) -> Corpus:
    """Return a corpus: bundled text by name, or text from disk.

    Args:
        name_or_path: `"prose"`, `"code"`, `"docs"`, or `"mixed"` (one document of each in turn, so that
            any first part of it is balanced); else a path: a text file, `.jsonl`, `.parquet`, `.arrow`,
            a folder (searched recursively) or a dataset that Hugging Face's `datasets` saved to disk.
            A folder of your own called `docs` is `"./docs"` or `Path("docs")`.
        seed: documents come in an order drawn with this seed, so that a small first part stands for the
            whole; `None` keeps reading order.
        limit: keep at most this many documents.
        field: the JSON field or table column that holds the text.
        split: which split of a dataset that has several; default `train`.

    Raises:
        InputError: unknown name, missing or unreadable path, text that is not UTF-8, nothing but white
            space, a missing field.
        FailureError: `code` or `docs` on a Python without the source of its standard library.
    """
    name = str(name_or_path)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} documents makes no corpus; give at least 1")
    if isinstance(name_or_path, str) and name in NAMES:
        return _bundled(name, seed, limit)
    path = Path(name_or_path).expanduser()
    if not name or not path.exists():
        raise InputError(
            f"there is no corpus {name!r}: it is neither bundled ({', '.join(NAMES)}) nor a file or folder"
            f"{did_you_mean(name, NAMES)}"
        )
    whole = Corpus(path.name or str(path), load_path(path, field=field, split=split), source=str(path))
    ordered = whole if seed is None else whole.shuffle(seed)
    return ordered if limit is None else ordered.take(limit)


def _bundled(name: str, seed: int | None, limit: int | None) -> Corpus:
    domains = bundled.DOMAINS if name == "mixed" else (name,)
    parts: list[Corpus] = []
    for domain in domains:
        part = Corpus(domain, bundled.documents(domain))
        parts.append(part if seed is None else part.shuffle(seed))
    turns = chain.from_iterable(zip_longest(*parts))
    documents: list[Document] = [document for document in turns if document is not None]
    return Corpus(name, documents[:limit], source=bundled.source_of(name))
