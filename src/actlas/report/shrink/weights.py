"""The formats in which a model's weights may be held: packed ones of the lean loop.

    f32   as they are           q8   8 bits in groups of 32            q4   4 bits in groups of 32

The output head is `q8` beside packed blocks: every token reads it, and it minds rounding most. A layer whose
inputs are not a multiple of 32 stays as it is. Sizes are those of the linear layers and the output head: what
a token reads. The embedding table, of which a token reads a row, is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import ActlasError, InputError, ModelError
from actlas.core.layout import weight_matrix
from actlas.core.packed_weights import FORMATS, PackedWeights, legal
from actlas.core.quant_edit import already_on_grid
from actlas.kernels.packed import ROWS, Format
from actlas.measure.linear_layers import linear_layers
from actlas.models.fast_generate import reason_against
from actlas.report.shrink.rows import ORIGINAL, Mix

if TYPE_CHECKING:
    from actlas.core.model import Model

BITS: Mapping[str, tuple[float, float]] = {"f32": (32, 32), "q8": (8, 8.5), "q4": (4, 5)}
"""Bits of a code, and bits a weight with its share of the scales."""


class Layers:
    """The linear layers of a model's blocks, and its output head.

    Raises:
        ModelError: no layout, no linear layers, or weights that are packed already.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.blocks = linear_layers(model)
        names = {id(module): path for path, module in model.module.named_modules()}
        head = model.unembed_module if model.kind == "causal-lm" else None
        self.head: str | None = names.get(id(head)) if head is not None else None
        paths = [layer.path for layer in self.blocks] + ([self.head] if self.head else [])
        self.modules: dict[str, nn.Module] = {path: model.module.get_submodule(path) for path in paths}
        for path, module in self.modules.items():
            if not isinstance(getattr(module, "weight", None), nn.Parameter):
                raise ModelError(f"{model.name} is quantised already (at {path}); shrink the original")

    def formats(self, weights: Format) -> dict[str, Format]:
        """Return the format of every layer that can be in it."""
        found: dict[str, Format] = {}
        for path, module in self.modules.items():
            wanted: Format = "q8" if path == self.head and weights != "f32" else weights
            found[path] = legal(wanted, module)
        return found

    def bytes(self, formats: Mapping[str, str] | None = None) -> int:
        """Return the size of all these layers in formats; default: as the model holds them."""
        total = 0.0
        for path, module in self.modules.items():
            rows, columns = weight_matrix(module).shape
            if formats is None:
                total += rows * columns * module.weight.element_size()  # type: ignore[operator]
            elif formats[path] == "f32":
                total += rows * columns * 4
            else:
                total += -(-rows // ROWS) * ROWS * columns * BITS[formats[path]][1] / 8
        return round(total)

    def bits(self, formats: Mapping[str, str]) -> float:
        """Return the mean bits of a code over the blocks' weights."""
        size = sum(layer.size for layer in self.blocks)
        return sum(layer.size * BITS[formats[layer.path]][0] for layer in self.blocks) / size

    @property
    def native_bits(self) -> float:
        """Bits of the numbers that the model holds."""
        module = self.modules[self.blocks[0].path]
        assert isinstance(module.weight, Tensor)
        return 8.0 * module.weight.element_size()


def original(layers: Layers) -> Mix:
    """Return the model as it was given, in transformers."""
    bits = layers.native_bits
    kind = f"f{bits:.0f}" if bits > 8 else "as given"
    return Mix(ORIGINAL, kind, (), layers.bytes(), bits, why_not="the original, for comparison")


def packed_mixes(layers: Layers, wanted: Sequence[str] = FORMATS) -> list[Mix]:
    """Return one mix for each format, and for float32 where the lean loop runs it.

    Raises:
        InputError: an unknown format.
    """
    for name in wanted:
        if name not in FORMATS:
            raise InputError(f"there is no weight format {name!r}; there are {', '.join(FORMATS)}")
    mixes = []
    for weights in FORMATS:
        formats = layers.formats(weights)
        if weights not in wanted or (weights != "f32" and set(formats.values()) == {"f32"}):
            continue
        edits: tuple[Edit, ...] = () if weights == "f32" else (PackedWeights(formats),)
        reason = lean_reason(layers.model, edits)
        if weights == "f32" and reason is not None:
            continue
        mixes.append(
            Mix(
                weights,
                weights,
                edits,
                layers.bytes(formats),
                layers.bits(formats),
                0.0,
                reason is None,
                reason or "",
            )
        )
    return mixes


def lean_reason(model: Model, edits: Sequence[Edit]) -> str | None:
    """Return why the lean loop cannot run a mix, or `None`."""
    try:
        return reason_against(model, "a", edits)
    except ActlasError as error:
        return str(error)


def grid(layers: Layers, samples: int = 6) -> tuple[int, int] | None:
    """Return (bits, group size) if the blocks' weights lie on one even grid already, else `None`."""
    step = max(1, len(layers.blocks) // samples)
    some = layers.blocks[::step]
    found = {already_on_grid(layer.weight(layers.model)) for layer in some}
    return found.pop() if len(found) == 1 else None
