"""The fingerprint of a running model: its weights, its installed edits and its hooks, as hashes.

    known = fingerprint(model)              # when the model is known to be good
    known.save("model.fingerprint")
    differences(known, fingerprint(model))  # later: what is no longer the same, in words

One SHA-256 for every parameter and buffer (name, dtype, shape, bytes), one for every installed edit, one
for every hook and swapped function. What an artifact carries, `core.fingerprint`, says which models it
fits and does not look at weights; this one says whether it is the same model, to the last bit.

An attacker who can change the running model can change this code too: a fingerprint is worth what the
process that computes it and the place where the known one is kept are worth.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import ArtifactError, FingerprintError
from actlas.core.layout import plain_module
from actlas.security.inventory import inventory

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model


@dataclass(frozen=True)
class StateFingerprint:
    """Hashes of everything that decides what a model computes.

    Attributes:
        architecture: class name.
        tensors: SHA-256 of every parameter and buffer, by name.
        edits: SHA-256 of every installed edit, in order, with its description.
        functions: what `inventory` lists apart from edits, as text.
    """

    architecture: str
    tensors: Mapping[str, str] = field(repr=False)
    edits: tuple[tuple[str, str], ...] = ()
    functions: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """One SHA-256 (hexadecimal) of it all."""
        return _sha(json.dumps(self.to_json(), sort_keys=True).encode())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "architecture": self.architecture,
            "tensors": dict(self.tensors),
            "edits": [list(e) for e in self.edits],
            "functions": list(self.functions),
        }

    def save(self, path: str | Path) -> Path:
        """Save as a folder with a manifest."""
        return save_artifact(path, "state-fingerprint", {"fingerprint": self.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> StateFingerprint:
        """Load a saved fingerprint.

        Raises:
            ArtifactError: it is none, or is incomplete.
        """
        record: Any = load_artifact(path, "state-fingerprint")[0].get("fingerprint")
        try:
            return cls(
                str(record["architecture"]),
                {str(k): str(v) for k, v in record["tensors"].items()},
                tuple((str(a), str(b)) for a, b in record["edits"]),
                tuple(str(f) for f in record["functions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} holds no whole fingerprint ({error}); save it again") from error

    def check(self, model: Model) -> None:
        """Raise FingerprintError unless the model is the one that this was taken of, to the last bit."""
        found = differences(self, fingerprint(model))
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise FingerprintError(f"{model.name} is not the model of this fingerprint: {found[0]}{more}")


def fingerprint(model: Model) -> StateFingerprint:
    """Return the fingerprint of a model as it runs now, installed edits included."""
    module = plain_module(model.module)
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named |= dict(module.named_buffers(remove_duplicate=False))
    known: dict[int, str] = {}  # tied tensors are hashed once
    tensors = {}
    for name, tensor in named.items():
        tensors[name] = known.setdefault(id(tensor), tensor_hash(tensor))
    functions = tuple(sorted(str(f) for f in inventory(model) if f.kind != "edit"))
    edits = tuple((edit.describe(), edit_hash(edit)) for edit in model.installed)
    return StateFingerprint(type(module).__name__, tensors, edits, functions)


def differences(known: StateFingerprint, now: StateFingerprint) -> list[str]:
    """Return what differs from a known fingerprint, in words; empty if nothing does."""
    found = []
    if known.architecture != now.architecture:
        found.append(f"architecture {now.architecture}, not {known.architecture}")
    for name, value in now.tensors.items():
        if name not in known.tensors:
            found.append(f"tensor {name} is new")
        elif known.tensors[name] != value:
            found.append(f"tensor {name} has other values")
    found += [f"tensor {name} is gone" for name in known.tensors if name not in now.tensors]
    before, after = list(known.edits), list(now.edits)
    for edit in after:
        if edit in before:
            before.remove(edit)
        else:
            found.append(f"edit installed: {edit[0]}")
    found += [f"edit gone: {said}" for said, _ in before]
    rest = list(known.functions)
    for function in now.functions:
        if function in rest:
            rest.remove(function)
        else:
            found.append(f"new: {function}")
    found += [f"gone: {function}" for function in rest]
    return found


def edit_hash(edit: Edit) -> str:
    """Return the SHA-256 of an edit: its kind, fields and tensors, as it would be saved."""
    digest = hashlib.sha256(type(edit).__name__.encode())
    for part in edit.parts():
        record, tensors = part._record()
        digest.update(json.dumps([type(part).__name__, record], sort_keys=True, default=str).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor_hash(tensor)}".encode())
    return digest.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    if tensor.is_meta:
        return _sha(f"meta {tensor.dtype} {list(tensor.shape)}".encode())
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
