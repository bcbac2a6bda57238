"""Documents and corpora: text in pieces of a page or so, with labels to tell slices apart.

A `Corpus` is a plain immutable sequence of `Document`s. Everything that streams text (calibration,
measures, harvesting) takes one, counts documents as its independent items, and can record `hash`, which
changes whenever any text or its order changes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from actlas.core.errors import InputError


@dataclass(frozen=True)
class Document:
    """One piece of text.

    Attributes:
        id: unique within its corpus, and the same from run to run.
        text: never empty.
        group: labels to disaggregate by, e.g. `{"domain": "prose"}`.
    """

    id: str
    text: str
    group: Mapping[str, str] = field(default_factory=dict)


class Corpus(Sequence[Document]):
    """An immutable sequence of documents with a name and a hash.

    Indexing with a number gives a `Document`, with a slice a smaller `Corpus`.

    Args:
        name: what a report calls it.
        documents: at least one; a text that occurs twice is kept once, an id that occurs twice gets a
            number.
        source: where the text came from, for a report.

    Raises:
        InputError: there is no document with any text.
    """

    def __init__(self, name: str, documents: Iterable[Document], source: str = "") -> None:
        unique: dict[str, Document] = {}
        seen: dict[str, int] = {}
        for document in documents:
            if document.text in unique or not document.text.strip():
                continue
            times = seen[document.id] = seen.get(document.id, 0) + 1
            if times > 1:
                document = replace(document, id=f"{document.id}#{times}")
            unique[document.text] = document
        if not unique:
            raise InputError(f"the corpus {name!r} is empty; give at least one document with text in it")
        self.name = name
        self.source = source
        self._documents = tuple(unique.values())

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Corpus: ...
    def __getitem__(self, index: int | slice) -> Document | Corpus:
        if isinstance(index, slice):
            return Corpus(self.name, self._documents[index], self.source)
        return self._documents[index]

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._documents)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Corpus) and self._documents == other._documents

    def __hash__(self) -> int:
        return hash((self._documents[0].id, len(self)))

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self):,} documents, {self.size:,} characters)"

    @property
    def size(self) -> int:
        """The number of characters in all documents."""
        return sum(len(document.text) for document in self._documents)

    @property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of every document's id and text, in order."""
        digest = hashlib.sha256()
        for document in self._documents:
            for part in (document.id, document.text):
                data = part.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()

    @property
    def groups(self) -> dict[str, dict[str, int]]:
        """How many documents carry each value of each label."""
        counts: dict[str, dict[str, int]] = {}
        for document in self._documents:
            for label, value in document.group.items():
                values = counts.setdefault(label, {})
                values[value] = values.get(value, 0) + 1
        return counts

    def take(self, n: int) -> Corpus:
        """Return the first `n` documents (all of them if there are fewer).

        Raises:
            InputError: `n` is less than 1.
        """
        if n < 1:
            raise InputError(f"cannot take {n} documents; take at least 1")
        return self[:n]

    def characters(self, n: int) -> Corpus:
        """Return the first `n` characters of text; the last document is cut to fit.

        Raises:
            InputError: `n` is less than 1.
        """
        if n < 1:
            raise InputError(f"cannot take {n} characters; take at least 1")
        kept, left = [], n
        for document in self._documents:
            kept.append(Document(document.id, document.text[:left], document.group))
            left -= len(document.text)
            if left <= 0:
                break
        return Corpus(self.name, kept, self.source)

    def where(self, **group: str) -> Corpus:
        """Return the documents that carry all of these labels, e.g. `corpus.where(domain="code")`.

        Raises:
            InputError: no document does.
        """
        kept = [d for d in self._documents if all(d.group.get(k) == v for k, v in group.items())]
        if not kept:
            asked = ", ".join(f"{k}={v}" for k, v in group.items())
            raise InputError(f"the corpus {self.name!r} has no document with {asked}; it has {self.groups}")
        return Corpus(self.name, kept, self.source)

    def shuffle(self, seed: int = 0) -> Corpus:
        """Return the same documents in an order that depends only on `seed`."""
        documents = list(self._documents)
        random.Random(seed).shuffle(documents)
        return Corpus(self.name, documents, self.source)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Corpus, Corpus]:
        """Return two disjoint corpora, to fit on one and evaluate on the other.

        Documents are divided within each combination of labels, so that both parts hold every slice
        that has at least two documents; each part keeps the original order.

        Args:
            fraction: how much of the documents go to the first part, above 0 and below 1.
            seed: which documents go where.

        Raises:
            InputError: one part would be empty.
        """
        if not 0 < fraction < 1:
            raise InputError(f"cannot split a corpus at fraction {fraction}; give one between 0 and 1")
        if len(self) < 2:
            raise InputError(f"the corpus {self.name!r} has one document and cannot be split; give more text")
        slices: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for index, document in enumerate(self._documents):
            slices.setdefault(tuple(sorted(document.group.items())), []).append(index)
        generator = random.Random(seed)
        order: list[int] = []
        ranked: list[tuple[float, int]] = []
        for indices in slices.values():
            generator.shuffle(indices)
            offset = generator.random()
            ranked += [((rank + offset) / len(indices), index) for rank, index in enumerate(indices)]
        order = [index for _, index in sorted(ranked)]
        cut = min(max(round(fraction * len(order)), 1), len(order) - 1)
        first = set(order[:cut])
        parts = (
            [d for i, d in enumerate(self._documents) if i in first],
            [d for i, d in enumerate(self._documents) if i not in first],
        )
        return Corpus(f"{self.name} (fit)", parts[0], self.source), Corpus(
            f"{self.name} (eval)", parts[1], self.source
        )
