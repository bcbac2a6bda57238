"""A fingerprint says which model an artifact was made for: architecture, sizes and tokenizer.

Two fine-tunes of one base have the same fingerprint (a steering vector may be carried over); models
of other sizes, of another architecture or with another vocabulary do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from actlas.core.errors import ArtifactError, FingerprintError


@dataclass(frozen=True)
class Fingerprint:
    """What artifacts carry about their model.

    Attributes:
        architecture: class name, e.g. `"LlamaForCausalLM"`.
        model_type: the config's model type, or `""`.
        sizes: blocks, widths, heads and vocabulary, by name.
        parameters: number of parameters.
        shapes: SHA-256 over the names and shapes of all parameters.
        tokenizer: SHA-256 over the vocabulary, or `None` without a tokenizer.
    """

    architecture: str
    model_type: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    parameters: int = 0
    shapes: str = ""
    tokenizer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "sizes": dict(self.sizes)}

    @classmethod
    def from_json(cls, record: Any, path: Any = "the artifact") -> Fingerprint:
        """Rebuild from `to_json`.

        Raises:
            ArtifactError: fields are missing or unknown.
        """
        try:
            return cls(**record)
        except TypeError as error:
            raise ArtifactError(f"{path} has no readable fingerprint ({error}); save it again") from error

    def differences(self, other: Fingerprint) -> list[str]:
        """Return what differs, in words; empty if artifacts of one fit the other.

        A model without a layout has no sizes to compare, so there the parameter shapes decide.
        """
        found = []
        if _family(self) != _family(other):
            found.append(f"architecture {self.architecture} and {other.architecture}")
        for name in sorted(set(self.sizes) | set(other.sizes)):
            a, b = self.sizes.get(name), other.sizes.get(name)
            if a != b and name != "vocab_size":
                found.append(f"{name} {a} and {b}")
        if not self.sizes and self.shapes != other.shapes:
            found.append(f"parameter shapes ({self.parameters:,} and {other.parameters:,} parameters)")
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            found.append("tokenizer")
        return found

    def check(self, other: Fingerprint, what: str = "this artifact") -> None:
        """Raise FingerprintError unless an artifact made for `self` fits the model `other`."""
        found = self.differences(other)
        if found:
            raise FingerprintError(f"{what} was made for another model: {', '.join(found)}")


def _family(f: Fingerprint) -> str:
    return f.model_type or f.architecture


def fingerprint_of(
    module: nn.Module, tokenizer: Any = None, sizes: Mapping[str, int] | None = None
) -> Fingerprint:
    """Compute the fingerprint of a module and its tokenizer.

    Args:
        module: any module; weights are not read, only names and shapes.
        tokenizer: a transformers tokenizer, or `None`.
        sizes: sizes by name, from the layout.
    """
    shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters()]
    config = getattr(module, "config", None)
    return Fingerprint(
        type(module).__name__,
        str(getattr(config, "model_type", "") or ""),
        dict(sizes or {}),
        sum(p.numel() for p in module.parameters()),
        _sha256(shapes),
        _sha256(sorted(tokenizer.get_vocab().items())) if tokenizer is not None else None,
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
