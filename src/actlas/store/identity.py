"""Whether a store was made from this model, this text and these settings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from actlas.core.errors import ArtifactError, FingerprintError, InputError
from actlas.core.fingerprint import Fingerprint
from actlas.core.model import Model
from actlas.store.layout import HOW_TO_MEND, ShardRecord, damaged, fault_of
from actlas.store.making import Recipe
from actlas.store.planning import ShardPlan

_SAMPLE = 64


def weights_digest(model: Model) -> str:
    """Return SHA-256 over 64 evenly spread values of every parameter and buffer, names and dtypes.

    It tells fine-tunes, other precisions and edited weights apart, which share a fingerprint, without
    reading the model as a whole. (A change of a few single weights can go unseen.)
    """
    digest = hashlib.sha256()
    tensors = [*model.module.named_parameters(), *model.module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        step = max(len(flat) // _SAMPLE, 1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(flat[::step].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def check_settings(folder: Path, manifest: dict[str, Any], model: Model, settings: dict[str, Any]) -> None:
    """Raise if a store was made another way than what is asked for now."""
    Fingerprint.from_json(manifest.get("fingerprint"), folder).check(model.fingerprint, str(folder))
    for name, value in settings.items():
        if manifest.get(name) == value:
            continue
        if name == "weights":
            raise FingerprintError(
                f"{folder} was harvested from {manifest.get('model')} with other weights than those of "
                f"{model.name} now; give another folder"
            )
        raise InputError(other_settings(folder, name, manifest.get(name), value))


def other_settings(folder: Path, name: str, had: Any, value: Any) -> str:
    return (
        f"{folder} is a store with {name}={_short(had)}, and {_short(value)} was asked for; "
        f"ask for {_short(had)}, or give another folder"
    )


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def check_record(folder: Path, plan: ShardPlan, lenient: bool = False) -> bool:
    """Return whether a shard is there and whole, and made from the text that is planned for it.

    Raises:
        ArtifactError: it is damaged (unless `lenient`).
        InputError: it was made from another text.
    """
    if lenient and fault_of(folder, plan.index):
        return False
    record = ShardRecord.read(folder, plan.index)
    if record is None:
        return False
    if (record.first, record.rows, record.text) != (plan.first, plan.rows, plan.digest):
        raise InputError(
            f"shard {record.name} of {folder} was made from another text, or with another tokenizer; "
            "give the same corpus, in the same order, or another folder"
        )
    if fault := fault_of(folder, plan.index):
        raise ArtifactError(f"{damaged(folder, plan.index)}: {fault}; {HOW_TO_MEND}")
    return True


def recipe_of(manifest: dict[str, Any]) -> Recipe:
    return Recipe(
        dict(manifest["channels"]), manifest["dtype"], manifest["gradient"], manifest["batch_tokens"]
    )
