"""MemoryVault: all memories of one place, with versions, snapshots and roll-back.

    vault = MemoryVault()
    vault.add(MemoryCube("keys", "The keys are in the drawer.", owner="ann"))
    before = vault.snapshot()
    vault.revise("keys", "The keys are on the table.", by="ann")
    vault.roll_back(before)                     # the drawer again
    vault.save("memory/", model)

Cubes are values, so a snapshot costs a list. `lineage` follows a memory back through versions, merges and
conversions. On disk a vault is a folder: `vault.json` names folders of texts, KV blocks and edits, each with
its own checksums (JSON and safetensors only).

Source: "MemOS" (2025): MemVault, MemLifecycle and MemGovernance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from actlas.core.artifact import inside, load_artifact, save_artifact
from actlas.core.edit import Edit
from actlas.core.errors import ArtifactError, InputError, did_you_mean
from actlas.store.memory.cube import MemoryCube, NotAllowed, Payload, State
from actlas.store.memory.kv_block import KVBlock

if TYPE_CHECKING:
    from actlas.core.model import Model


class MemoryVault:
    """Memories by name; the newest version of each is the current one."""

    def __init__(self) -> None:
        self._current: dict[str, MemoryCube] = {}
        self._known: dict[str, MemoryCube] = {}  # every cube ever held, by digest
        self._snapshots: list[dict[str, MemoryCube]] = []

    def __len__(self) -> int:
        return len(self._current)

    def __contains__(self, name: str) -> bool:
        return name in self._current

    @property
    def names(self) -> list[str]:
        """Names of all memories, in the order in which they came."""
        return list(self._current)

    def add(self, cube: MemoryCube) -> MemoryCube:
        """Take a new memory in.

        Raises:
            InputError: the name is taken (revise it instead).
        """
        if cube.name in self._current:
            raise InputError(f"there is a memory {cube.name!r} already; use revise, or another name")
        return self._put(cube)

    def cube(self, name: str) -> MemoryCube:
        """Return the current version.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self._current:
            raise InputError(f"there is no memory {name!r}{did_you_mean(name, self._current)}")
        return self._current[name]

    def read(self, name: str, *, by: str, now: float | None = None) -> Payload:
        """Return a memory's payload for use.

        Raises:
            NotAllowed: it is not theirs to read.
            InputError: it is unknown, archived or has expired.
        """
        cube = self.cube(name)
        payload = cube.read(by)
        if cube.state == "archived":
            raise InputError(f"the memory {name!r} is archived; activate it first")
        if now is not None and cube.expired(now):
            raise InputError(f"the memory {name!r} expired at {cube.created + (cube.lifespan or 0):g}")
        return payload

    def revise(
        self, name: str, payload: Payload, *, by: str, origin: str = "revised", **about: Any
    ) -> MemoryCube:
        """Make the next version of a memory current; see `MemoryCube.revise`."""
        return self._put(self.cube(name).revise(payload, by=by, origin=origin, **about))

    def become(self, name: str, state: State, *, by: str) -> MemoryCube:
        """Move a memory on in its life; see `MemoryCube.become`."""
        return self._put(self.cube(name).become(state, by=by))

    def merge(self, names: Sequence[str], into: str, *, by: str) -> MemoryCube:
        """Make one memory of several of a kind; the sources become merged and stay.

        Texts are joined by lines, edits are composed, and KV blocks are joined behind each other with
        `fix="shift+drop_first"` (not what a prefill of both would give: their `exact` is False).

        Raises:
            InputError: fewer than two, memories of several kinds or not activated ones, or a name in use.
            NotAllowed: they may not change one of them.
        """
        cubes = [self.cube(n) for n in dict.fromkeys(names)]
        if len(cubes) < 2 or len({c.kind for c in cubes}) > 1:
            kinds = ", ".join(f"{c.name} ({c.kind})" for c in cubes)
            raise InputError(
                f"merging takes two or more memories of one kind, not {kinds}; convert them first"
            )
        if into in self._current:
            raise InputError(f"there is a memory {into!r} already; merge into another name")
        moved = [c.become("merged", by=by) for c in cubes]
        whole = _joined([c.payload for c in cubes])
        made = MemoryCube(
            into,
            whole,
            owner=by,
            readers=tuple(sorted(set.intersection(*(set(c.readers) for c in cubes)))),
            state="activated",
            parents=tuple(c.digest for c in cubes),
            origin="merged",
            created=max(c.created for c in cubes),
            lifespan=_earliest_end(cubes),
        )
        for cube in moved:
            self._put(cube)
        return self._put(made)

    def expire(self, now: float) -> list[str]:
        """Archive everything whose lifespan is over; return the names."""
        gone = [c for c in self._current.values() if c.expired(now) and c.state != "archived"]
        for cube in gone:
            self._put(replace(cube, state="archived"))
        return [c.name for c in gone]

    def lineage(self, name: str) -> list[MemoryCube]:
        """Return a memory and everything that it was made from, newest first."""
        found: dict[str, MemoryCube] = {}
        todo = [self.cube(name).digest]
        while todo:
            digest = todo.pop(0)
            if digest in self._known and digest not in found:
                found[digest] = self._known[digest]
                todo += found[digest].parents
        return list(found.values())

    def snapshot(self) -> int:
        """Remember how everything is now; return a number for `roll_back`."""
        self._snapshots.append(dict(self._current))
        return len(self._snapshots) - 1

    def roll_back(self, snapshot: int, name: str | None = None) -> None:
        """Make everything, or one memory, what it was at a snapshot.

        Raises:
            InputError: there is no such snapshot, or the memory was not in it.
        """
        if not 0 <= snapshot < len(self._snapshots):
            raise InputError(f"there is no snapshot {snapshot}; there are {len(self._snapshots)}")
        then = self._snapshots[snapshot]
        if name is None:
            self._current = dict(then)
        elif name in then:
            self._current[name] = then[name]
        else:
            raise InputError(f"the memory {name!r} is not in snapshot {snapshot}{did_you_mean(name, then)}")

    def _put(self, cube: MemoryCube) -> MemoryCube:
        self._current[cube.name] = cube
        self._known[cube.digest] = cube
        return cube

    # -- disk -----------------------------------------------------------------------------------

    def save(self, path: str | Path, model: Model | None = None) -> Path:
        """Save all versions that are known and the current state (snapshots are of this session only).

        Args:
            path: the folder; an earlier vault there is replaced piece by piece, its index last.
            model: needed if an edit is held that knows no model.
        """
        path = Path(path)
        held = self._known | {c.digest: c for c in self._current.values()}  # states as they are now
        for digest, cube in held.items():
            folder = path / digest[:32]
            if isinstance(cube.payload, KVBlock):
                cube.payload.save(folder)
            elif isinstance(cube.payload, Edit):
                cube.payload.save(folder, model)
        rows = [_about(c) for c in held.values()]
        manifest = {"memories": rows, "current": {n: c.digest for n, c in self._current.items()}}
        save_artifact(path / "index", "memory-vault", manifest)
        return path

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> MemoryVault:
        """Load a vault; blocks and edits are checked against `model` if it is given.

        Raises:
            ArtifactError: something is missing, damaged or does not match its digest.
            FingerprintError: a block or an edit was made for another model.
        """
        path = Path(path)
        manifest, _ = load_artifact(path / "index", "memory-vault")
        vault = cls()
        try:
            for row in manifest["memories"]:
                given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
                digest, kind, text = given.pop("digest"), given.pop("kind"), given.pop("text")
                folder = inside(path, digest[:32])
                payload: Payload = text
                if kind == "activation":
                    payload = KVBlock.load(folder, model)
                elif kind == "parametric":
                    payload = Edit.load(folder, model)
                cube = MemoryCube(payload=payload, **given)
                if cube.digest != digest:
                    raise ArtifactError(f"{path}: the memory {cube.name!r} does not match its digest")
                vault._known[digest] = cube
            vault._current = {n: vault._known[d] for n, d in manifest["current"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} has an unreadable index ({error}); save it again") from error
        return vault


def _about(cube: MemoryCube) -> dict[str, Any]:
    row = {f.name: getattr(cube, f.name) for f in fields(cube) if f.name != "payload"}
    return {**row, "kind": cube.kind, "text": cube.payload if isinstance(cube.payload, str) else None}


def _joined(payloads: Sequence[Payload]) -> Payload:
    first = payloads[0]
    if isinstance(first, str):
        return "\n".join(cast("Sequence[str]", payloads))
    for other in payloads[1:]:
        if isinstance(first, KVBlock):
            first = first.join(cast("KVBlock", other), "shift+drop_first")
        else:
            first = first + cast("Edit", other)
    return first


def _earliest_end(cubes: Sequence[MemoryCube]) -> float | None:
    """Return a lifespan after which the first source would have expired."""
    ends = [c.created + c.lifespan for c in cubes if c.lifespan is not None]
    if not ends:
        return None
    return max(min(ends) - max(c.created for c in cubes), 1e-9)


__all__ = ["MemoryVault", "NotAllowed"]
