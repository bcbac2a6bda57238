"""PackedWeights: a model's own weights in the packed formats that decoding runs on, as an edit.

    edit = PackedWeights({"model.layers.0.mlp.up_proj": "q4", "lm_head": "q8"})
    with model.edit(edit): ...                     # every layer multiplies with what its bytes stand for

The edit holds formats, not weights: they are rounded again where it is installed, so it is a few kilobytes
and belongs to every model of its fingerprint. In the ordinary model the dequantised weights take the place
of a layer's own while it is installed; the lean loop (`actlas.models.decoder`) runs on the bytes themselves,
so that what is measured here is what decoding does there. A tied output head that is packed gets a weight of
its own meanwhile: the embedding stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit, WholeEdit, register_edit
from actlas.core.errors import ArtifactError, InputError, did_you_mean
from actlas.core.layout import find, plain_module, weight_matrix
from actlas.core.swap import SwapModule
from actlas.kernels.packed import GROUP, Format, Packed, pack

if TYPE_CHECKING:
    from actlas.core.installation import Installation

FORMATS: tuple[Format, ...] = ("f32", "q8", "q4")


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class PackedWeights(WholeEdit):
    """Round the weights of layers to packed formats.

    Attributes:
        formats: by path of a linear layer, `"f32"` (as it is), `"q8"` or `"q4"`.
    """

    whole: ClassVar[str] = "packed weights are in or out, for every token"

    formats: Mapping[str, Format]

    def __post_init__(self) -> None:
        if not self.formats:
            raise InputError("there is no layer to pack; give the format of at least one, by path")
        for path, format in self.formats.items():
            if format not in FORMATS:
                raise InputError(
                    f"the format of {path} is {format!r}; it must be one of {', '.join(FORMATS)}"
                )

    def describe(self) -> str:
        counts: dict[str, int] = {}
        for format in self.formats.values():
            counts[format] = counts.get(format, 0) + 1
        said = ", ".join(f"{n} {'layer' if n == 1 else 'layers'} in {f}" for f, n in counts.items())
        return f"PackedWeights ({said})"

    def packed(self, root: nn.Module, path: str) -> Packed:
        """Return one layer of a model, packed.

        Raises:
            InputError: the model has no such linear layer, or it cannot be packed.
        """
        layer = find(root, path)
        if layer is None:
            known = dict(root.named_modules())
            raise InputError(f"the model has no layer {path!r}{did_you_mean(path, known)}")
        try:
            return pack(weight_matrix(layer).detach(), legal(self.formats[path], layer))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be packed: {error}") from error

    def _attach(self, installation: Installation) -> None:
        root = plain_module(installation.model.module)
        for path in self.formats:
            layer = find(root, path)
            if layer is not None and legal(self.formats[path], layer) == "f32":
                continue
            weight = self.packed(root, path).dequantised()
            assert layer is not None
            if layer._parameters.get("weight") is not None:
                installation.keep(_Rounded(layer, weight))
            else:  # a quantised layer, whose weight is made of codes
                installation.swap(SwapModule(path, _plain(path, layer, weight)))

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"formats": dict(self.formats)}, {}

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        formats = record["formats"]
        if not isinstance(formats, dict):
            raise ArtifactError("packed weights without formats; save the edit again")
        return cls(formats)


def legal(format: Format, layer: nn.Module) -> Format:
    """Return the format in which a layer can be: packed ones need a multiple of 32 inputs, else it stays."""
    return format if weight_matrix(layer).shape[1] % GROUP == 0 else "f32"


def _plain(path: str, layer: nn.Module, weight: Tensor) -> nn.Linear:
    """Return a linear layer of a weight, with the bias of the layer that it stands for."""
    if getattr(layer, "act_spec", None) is not None or getattr(layer, "input_shift", None) is not None:
        raise InputError(f"{path} rounds or shifts its inputs; it cannot be packed")
    bias = getattr(layer, "bias", None)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(bias, Tensor):
        made.bias = nn.Parameter(bias.detach().to(weight), requires_grad=False)
    return made.to(weight_matrix(layer).device).eval()


class _Rounded:
    """Puts a weight of its own into a layer, and the one from before back."""

    def __init__(self, owner: nn.Module, weight: Tensor) -> None:
        before = owner._parameters["weight"]
        assert before is not None
        self._owner, self._before = owner, before
        turned = weight.T.contiguous() if type(owner).__name__ == "Conv1D" else weight
        owner._parameters["weight"] = nn.Parameter(turned.to(before), requires_grad=False)

    def remove(self) -> None:
        self._owner._parameters["weight"] = self._before


def rounding_error(edit: PackedWeights, root: nn.Module) -> float:
    """Return |W_hat - W| / |W| over all layers together; 0 where the weights lie on the grids already."""
    off, whole = 0.0, 0.0
    with torch.no_grad():
        for path in edit.formats:
            layer = find(root, path)
            assert layer is not None
            weight = weight_matrix(layer).detach().float().cpu()
            whole += float(weight.double().square().sum())
            if legal(edit.formats[path], layer) != "f32":
                off += float((edit.packed(root, path).dequantised() - weight).double().square().sum())
    return (off / whole) ** 0.5 if whole else 0.0
