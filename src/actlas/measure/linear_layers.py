"""The linear layers of a model's blocks: what activation sparsity skips inputs of, and counts.

    layers = linear_layers(model)            # every block, in forward order
    layers[0].input_site                     # "module:model.layers.0.self_attn.q_proj.input"

A layer that reads the same tensor as another one (k and v beside q, up beside gate) names the same
`reads`, so that one calibration of each shared input is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find, join, weight_matrix
from actlas.core.quant_linear import QuantLinear

if TYPE_CHECKING:
    from actlas.core.model import Model

_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a block.

    Attributes:
        path: dotted path of the module.
        block: number of its block.
        name: last part of the path, e.g. `"up_proj"`.
        rows, columns: outputs and inputs.
        reads: site of its input, named after the first layer that reads the same tensor.
    """

    path: str
    block: int
    name: str
    rows: int
    columns: int
    reads: str

    @property
    def input_site(self) -> str:
        """The site of this layer's own input."""
        return f"module:{self.path}.input"

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def module(self, model: Model) -> nn.Module:
        """Return the module itself."""
        found = find(model.module, self.path)
        assert found is not None
        return found

    def weight(self, model: Model) -> Tensor:
        """Return its weights `[rows, columns]`, detached, in float32 or wider."""
        weight = weight_matrix(self.module(model)).detach()
        return weight if weight.dtype.itemsize >= 4 else weight.float()

    def column_norms(self, model: Model) -> Tensor:
        """Return the L2 norm of each column, float32 `[columns]`."""
        return self.weight(model).double().norm(dim=0).float()


def linear_layers(model: Model, names: tuple[str, ...] | None = None) -> list[LinearLayer]:
    """Return the linear layers of every block of the predicting tower.

    Args:
        model: a model with a layout.
        names: only layers of these names; default: all.

    Raises:
        ModelError: no layout, or no linear layers in its blocks.
        InputError: a name that no block has.
    """
    tower = model.tower
    if tower is None:
        raise ModelError(f"{model.name} has no known layout, so its linear layers cannot be listed by block")
    found: list[LinearLayer] = []
    for block in range(tower.n_blocks):
        root = join(tower.blocks, str(block))
        inside = find(model.module, root)
        assert inside is not None
        linear = {
            path: module
            for path, module in inside.named_modules()
            if isinstance(module, nn.Linear | QuantLinear)
            or type(module).__name__ == "Conv1D"
            or hasattr(module, "weights_touched")  # a sparse layer in a linear layer's place
        }
        for path, module in linear.items():
            rows, columns = weight_matrix(module).shape
            stem, _, name = path.rpartition(".")
            first = join(stem, _SHARED.get(name, name))
            reads = join(root, first if first in linear else path)
            found.append(LinearLayer(join(root, path), block, name, rows, columns, f"module:{reads}.input"))
    if not found:
        raise ModelError(f"the blocks of {model.name} hold no linear layers (quantised or fused experts?)")
    if names is None:
        return found
    known = {layer.name for layer in found}
    for name in names:
        if name not in known:
            raise InputError(f"no block has a linear layer {name!r}; they have {', '.join(sorted(known))}")
    return [layer for layer in found if layer.name in names]
