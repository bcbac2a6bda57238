"""MemoryCube: one piece of memory with what is known about it, whatever its kind.

    cube = MemoryCube("keys", "The keys are in the drawer.", owner="ann", readers=("bob",))
    newer = cube.revise("The keys are on the table.", by="ann")      # version 2, remembers version 1

The payload is text, a `KVBlock` (activations) or any `Edit` (parameters): a steering vector, a side memory
and an adapter are memories, too. A cube does not change: every change gives another one, so a snapshot is
only a list of cubes. Its life: generated -> activated -> merged -> archived; archived ones are kept and not
used, and may be activated again.

Rights: the owner may do everything; readers may read; writers may also revise. `"*"` means everybody.

Source: "MemOS" (2025), its memory cube.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.store.memory.kv_block import KVBlock

Kind = Literal["text", "activation", "parametric"]
State = Literal["generated", "activated", "merged", "archived"]
Payload = str | KVBlock | Edit

#: Which state may follow which.
NEXT: Mapping[str, tuple[str, ...]] = {
    "generated": ("activated", "archived"),
    "activated": ("merged", "archived"),
    "merged": ("activated", "archived"),
    "archived": ("activated",),
}


class NotAllowed(InputError):
    """Somebody asked for a memory that is not theirs to read or change."""


@dataclass(frozen=True, eq=False)
class MemoryCube:
    """One version of one memory.

    Attributes:
        name: what it is called; versions share it.
        payload: text, KV block or edit.
        owner: who made it.
        readers, writers: who else may read or revise it; `"*"` is everybody.
        state: where in its life it is.
        version: 1 for the first.
        parents: digests of the cubes it was made from (its earlier version, what was merged or converted).
        origin: how it came about, e.g. `"given"`, `"revised"`, `"converted from text"`.
        topic: what it is about, for people and policies.
        priority: the higher, the longer it is kept by policies.
        created: seconds (any clock, as long as it is the same one).
        lifespan: seconds until it expires; `None` for never.
    """

    name: str
    payload: Payload
    owner: str = "me"
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    state: State = "generated"
    version: int = 1
    parents: tuple[str, ...] = ()
    origin: str = "given"
    topic: str = ""
    priority: float = 0.0
    created: float = 0.0
    lifespan: float | None = None
    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise InputError(f"a memory's name is {self.name!r}; it must not be empty or hold '/'")
        if isinstance(self.payload, str) and not self.payload.strip():
            raise InputError(f"the text of memory {self.name!r} is empty")
        if not isinstance(self.payload, (str, KVBlock, Edit)):
            kind = type(self.payload).__name__
            raise InputError(
                f"the payload of {self.name!r} is a {kind}; it must be text, a KVBlock or an Edit"
            )
        if self.lifespan is not None and not self.lifespan > 0:
            raise InputError(f"lifespan is {self.lifespan}; it is a number of seconds above 0, or None")
        if self.state not in NEXT:
            raise InputError(f"state is {self.state!r}; it must be one of {', '.join(NEXT)}")
        object.__setattr__(self, "digest", self._digest())

    @property
    def kind(self) -> Kind:
        """`"text"`, `"activation"` or `"parametric"`."""
        if isinstance(self.payload, str):
            return "text"
        return "activation" if isinstance(self.payload, KVBlock) else "parametric"

    def may_read(self, who: str) -> bool:
        """Whether `who` may read it."""
        return who == self.owner or bool({who, "*"} & {*self.readers, *self.writers})

    def may_write(self, who: str) -> bool:
        """Whether `who` may revise it."""
        return who == self.owner or bool({who, "*"} & set(self.writers))

    def read(self, by: str) -> Payload:
        """Return the payload.

        Raises:
            NotAllowed: it is not theirs to read.
        """
        if not self.may_read(by):
            raise NotAllowed(f"{by!r} may not read the memory {self.name!r} of {self.owner!r}")
        return self.payload

    def expired(self, now: float) -> bool:
        """Whether its lifespan is over."""
        return self.lifespan is not None and now >= self.created + self.lifespan

    def revise(
        self, payload: Payload, *, by: str, now: float | None = None, origin: str = "revised"
    ) -> MemoryCube:
        """Return the next version, with another payload.

        Raises:
            NotAllowed: it is not theirs to change.
        """
        self._writable(by)
        return replace(
            self,
            payload=payload,
            version=self.version + 1,
            parents=(self.digest,),
            origin=origin,
            created=self.created if now is None else now,
        )

    def become(self, state: State, *, by: str) -> MemoryCube:
        """Return the same version in another state of its life.

        Raises:
            NotAllowed: it is not theirs to change.
            InputError: a state that does not follow (the ones that do are named).
        """
        self._writable(by)
        if state not in NEXT[self.state]:
            after = " or ".join(NEXT[self.state])
            raise InputError(f"memory {self.name!r} is {self.state}; it can become {after}, not {state!r}")
        return replace(self, state=state)

    def _writable(self, by: str) -> None:
        if not self.may_write(by):
            raise NotAllowed(f"{by!r} may not change the memory {self.name!r} of {self.owner!r}")

    def _digest(self) -> str:
        """Return SHA-256 of payload and place in the version chain."""
        record, tensors = payload_record(self.payload)
        digest = hashlib.sha256()
        about = [self.name, self.version, list(self.parents), record]
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()


def payload_record(payload: Payload) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a payload as JSON-able fields and tensors."""
    if isinstance(payload, str):
        return {"text": payload}, {}
    if isinstance(payload, KVBlock):
        return payload.record()
    records: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(payload.parts()):
        record, held = part._record()
        records.append({"type": type(part).__name__, **record})
        tensors |= {f"{i}.{n}": t for n, t in held.items()}
    return {"edits": records}, tensors
