"""Text that is always there, without a network: prose, code and documentation.

- `prose`: chapters 1 to 54 of Moby-Dick, bundled (see `texts/SOURCES.md`).
- `code`: Python source, from fixed modules of the standard library that runs Actlas.
- `docs`: documentation strings with the signatures they belong to, from other modules than `code`, so
  that no text is in both.

Prose is the same everywhere; code and docs are the same for one version of Python, which the corpus
names as its source and whose text its hash covers.
"""

from __future__ import annotations

import ast
import inspect
import platform
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

from actlas.core.errors import FailureError
from actlas.data.chunks import definitions, gather, paragraphs
from actlas.data.documents import Document

DOMAINS = ("prose", "code", "docs")
_CODE = (
    "argparse", "asyncio/queues", "asyncio/tasks", "calendar", "cmd", "collections/__init__",
    "concurrent/futures/thread", "contextlib", "copy", "csv", "dataclasses", "enum", "functools", "heapq",
    "html/parser", "http/client", "json/decoder", "json/encoder", "pickle", "plistlib", "pprint", "random",
    "selectors", "shlex", "string", "subprocess", "tempfile", "textwrap", "tokenize", "urllib/parse",
    "weakref",
)  # fmt: skip
_DOCS = (
    "_pydecimal", "ast", "codecs", "configparser", "difflib", "doctest", "email/message", "http/cookiejar",
    "http/server", "imaplib", "inspect", "ipaddress", "logging/__init__", "logging/handlers", "optparse",
    "os", "shutil", "smtplib", "socketserver", "statistics", "threading", "typing", "unittest/case",
    "unittest/mock", "xml/etree/ElementTree",
)  # fmt: skip


def source_of(domain: str) -> str:
    """Return one line that says where a domain's text comes from."""
    python = f"standard library of Python {platform.python_version()}"
    return {
        "prose": "Herman Melville, Moby-Dick (1851), chapters 1 to 54; public domain",
        "code": f"source of the {python}",
        "docs": f"documentation strings of the {python}",
        "mixed": f"Moby-Dick, chapters 1 to 54; source and documentation strings of the {python}",
    }[domain]


@cache
def documents(domain: str) -> tuple[Document, ...]:
    """Return all documents of one domain, in reading order.

    Args:
        domain: `"prose"`, `"code"` or `"docs"`.

    Raises:
        FailureError: this Python was installed without the source of its standard library.
    """
    made = tuple({"prose": _prose, "code": _code, "docs": _docs}[domain]())
    if not made:
        raise FailureError(
            f"the corpus {domain!r} needs the source of Python's standard library, which this Python has not"
            f" got in {_stdlib()}; use corpus('prose') or give a file"
        )
    return made


def _prose() -> Iterator[Document]:
    text = files("actlas.data").joinpath("texts/moby-dick.txt").read_text(encoding="utf-8")
    for number, chapter in enumerate(text.split("\n\n\n"), start=1):
        for part, page in enumerate(paragraphs(chapter), start=1):
            yield Document(f"moby-dick/{number}/{part}", page, {"domain": "prose"})


def _code() -> Iterator[Document]:
    for name, source in _sources(_CODE):
        for part, page in enumerate(definitions(source), start=1):
            yield Document(f"code/{name}/{part}", page, {"domain": "code"})


def _docs() -> Iterator[Document]:
    for name, source in _sources(_DOCS):
        entries = list(_entries(ast.parse(source), name.replace("/__init__", "").replace("/", ".")))
        for part, page in enumerate(gather(entries, "\n\n\n"), start=1):
            yield Document(f"docs/{name}/{part}", page, {"domain": "docs"})


def _entries(node: ast.AST, name: str) -> Iterator[str]:
    """Yield "signature, blank line, documentation" for a module and everything defined in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node, clean=False)
        arguments = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
        if doc and doc.strip():
            yield f"{name}{arguments}\n\n{inspect.cleandoc(doc)}"
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _entries(child, f"{name}.{child.name}")


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield name and source of each module that this version of Python has as readable source."""
    for name in names:
        try:
            yield name, (_stdlib() / f"{name}.py").read_text(encoding="utf-8")
        except OSError:
            continue
