"""The catalogue of papers: what each one claims, where it lives in Actlas, and what came out here.

One data file, `papers.json`, lists all papers; a stored run under `results/` adds what was found.
Nothing here imports torch, so a listing is instant.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from actlas.core.errors import FailureError, InputError, did_you_mean

Status = Literal["reproduced", "planned"]
FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class Paper:
    """One paper of the catalogue.

    Attributes:
        slug: short name, e.g. `"void"`.
        number: its number in the list of papers, from 1.
        title: as published.
        room: the room of Actlas where its method lives.
        status: `"reproduced"` if `reproduce(slug)` runs it, else `"planned"`.
        claim: what it claims, in one sentence and in our words.
        command: the command line that reproduces it.
    """

    slug: str
    number: int
    title: str
    room: str
    status: Status
    claim: str
    command: str

    @property
    def module(self) -> str:
        """The Python module that reproduces it (it exists if the status is `reproduced`)."""
        return "actlas.papers.reproductions." + self.slug.replace("-", "_")

    @property
    def stored(self) -> Mapping[str, Any] | None:
        """The stored run as plain data, or `None` if none is stored."""
        return _stored(self.slug)

    @property
    def verdict(self) -> str:
        """The verdict of the stored run, or an empty string."""
        return str(self.stored["verdict"]) if self.stored else ""

    @property
    def result(self) -> str:
        """One line: the stored verdict and the number behind it; empty if nothing is stored."""
        return f"{self.stored['verdict']}: {self.stored['headline']}" if self.stored else ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary, with the stored verdict and result."""
        return {
            "slug": self.slug,
            "number": self.number,
            "title": self.title,
            "room": self.room,
            "status": self.status,
            "claim": self.claim,
            "command": self.command,
            "verdict": self.verdict or None,
            "result": self.result or None,
        }


def papers(room: str | None = None, status: str | None = None) -> list[Paper]:
    """Return the papers in the order of their numbers.

    Args:
        room: keep those of one room, e.g. `"quantize"`.
        status: keep `"reproduced"` or `"planned"` ones.

    Raises:
        InputError: a room or status that no paper has.
    """
    every = list(_all().values())
    if room is not None:
        rooms = sorted({p.room for p in every})
        if room not in rooms:
            guess = did_you_mean(room, rooms) or "; rooms: " + ", ".join(rooms)
            raise InputError(f"no paper is in a room called {room!r}{guess}")
        every = [p for p in every if p.room == room]
    if status is not None:
        if status not in get_args(Status):
            raise InputError(f"no paper has the status {status!r}; it is {' or '.join(get_args(Status))}")
        every = [p for p in every if p.status == status]
    return every


def paper(slug: str) -> Paper:
    """Return one paper.

    Raises:
        InputError: no paper has this slug; the message offers the nearest ones.
    """
    found = _all().get(slug)
    if found is None:
        guess = did_you_mean(slug, _all()) or "; 'actlas papers' lists them all"
        raise InputError(f"no paper is called {slug!r}{guess}")
    return found


@functools.cache
def _all() -> dict[str, Paper]:
    records = json.loads((FOLDER / "papers.json").read_text(encoding="utf-8"))
    return {r["slug"]: Paper(**r) for r in records}


@functools.cache
def _stored(slug: str) -> Mapping[str, Any] | None:
    file = RESULTS / f"{slug}.json"
    if not file.is_file():
        return None
    try:
        return cast("Mapping[str, Any]", json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise FailureError(
            f"{file} is not readable JSON ({error}); run 'actlas reproduce {slug} --store'"
        ) from error


def forget_stored() -> None:
    """Forget the stored results read so far, after one was written."""
    _stored.cache_clear()
