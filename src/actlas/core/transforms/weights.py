"""The weights of a model while folds are being collected: read as `[out, in]`, changed, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.layout import find, join, plain_module
from actlas.core.model import Model
from actlas.core.transforms.dataflow import is_linear
from actlas.core.transforms.slots import Slot, Slots, slots


class Weights:
    """See `Folding`, whose arguments these are."""

    def __init__(
        self,
        model: Model,
        found: Slots | None = None,
        *,
        untie: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.model, self.untie, self.dtype = model, untie, dtype
        self.slots = found if found is not None else slots(model)
        self._root = plain_module(model.module)
        self._known = dict(self._root.named_parameters(remove_duplicate=False))
        #: Values of the parameters that changed, by name, in `dtype`.
        self.values: dict[str, Tensor] = {}
        self._plain: dict[str, float] = {}
        self._said: list[str] = []

    # -- parameters ---------------------------------------------------------------------------

    def _get(self, path: str, name: str) -> Tensor:
        key = join(path, name)
        if key not in self.values:
            return self._known[key].detach().to(self.dtype)
        return self.values[key]

    def _set(self, path: str, name: str, value: Tensor) -> None:
        self.values[join(path, name)] = value

    def _aliases(self, name: str) -> list[str]:
        """Return the names under which a table is held, those of linear maps that share it left out."""
        own = self._known[name]
        held = [n for n, p in self._known.items() if p is own]
        return [n for n in held if not is_linear(find(self._root, n.rpartition(".")[0]) or self._root)]

    def _bias(self, path: str) -> Tensor | None:
        key = join(path, "bias")
        return self._get(path, "bias") if key in self.values or key in self._known else None

    def _flipped(self, path: str) -> bool:
        return type(find(self._root, path)).__name__ == "Conv1D"

    def _matrix(self, path: str) -> Tensor:
        weight = self._get(path, "weight")
        return weight.T if self._flipped(path) else weight

    def _set_matrix(self, path: str, value: Tensor) -> None:
        self._set(path, "weight", value.T if self._flipped(path) else value)

    def _rows(self, path: str, weight: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor]) -> None:
        self._set_matrix(path, weight(self._matrix(path)))
        if (own := self._bias(path)) is not None:
            self._set(path, "bias", bias(own))

    def _spread(self, slot: Slot, values: Tensor, rest: float) -> Tensor:
        rows = len(self._matrix(slot.producer))
        return values.new_full((rows,), rest).index_copy(0, slot.rows.to(values.device), values)

    def _offset(self, slot: Slot) -> float:
        assert slot.norm is not None
        return 0.0 if slot.producer in self._plain else slot.norm.offset

    def _make_plain(self, slot: Slot, *, bias: bool) -> None:
        assert slot.norm is not None
        if slot.producer in self._plain:
            return
        weight = self._get(slot.producer, "weight") + slot.norm.offset
        self._plain[slot.producer] = slot.norm.eps
        self._set(slot.producer, "weight", weight)
        if bias and self._bias(slot.producer) is None:
            self._set(slot.producer, "bias", torch.zeros_like(weight))

    # -- checks -------------------------------------------------------------------------------

    def _vector(self, slot: Slot, value: Tensor) -> Tensor:
        if tuple(value.shape) != (slot.width,):
            raise ShapeError(f"{slot.name} takes [{slot.width}], not {list(value.shape)}")
        if not bool(torch.isfinite(value.detach()).all()):
            raise NonFiniteError(f"the numbers for {slot.name} hold NaN or infinity")
        return value.to(self.model.device, self.dtype)

    def _factors(self, slot: Slot, value: Tensor) -> Tensor:
        value = self._vector(slot, value)
        if not bool((value.detach() != 0).all()):
            raise InputError(f"the scale for {slot.name} holds zeros; all factors must differ from 0")
        return value

    def _orthogonal(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(value.shape) != shape:
            raise ShapeError(f"the rotation must be {list(shape)}, not {list(value.shape)}")
        wide = value.detach().double()
        if not bool(torch.isfinite(wide).all()):
            raise NonFiniteError("the rotation holds NaN or infinity")
        off = (
            wide.transpose(-1, -2) @ wide - torch.eye(shape[-1], dtype=wide.dtype, device=wide.device)
        ).abs()
        if float(off.max()) > 1e-4:
            raise InputError(f"the rotation is not orthogonal: R^T R is off by {float(off.max()):.2g}")
        return value.to(self.model.device, self.dtype)

    def _stream(self) -> Slot:
        found = self.slots.of("residual")
        if len(found) > 1:
            names = ", ".join(s.producer for s in found)
            raise InputError(
                f"{self.model.name} has {len(found)} residual streams (read by {names}); name one"
            )
        return found[0]

    def _check_ties(self, made: dict[str, Tensor]) -> None:
        shared: dict[int, list[str]] = {}
        for name, parameter in self._known.items():
            shared.setdefault(id(parameter), []).append(name)
        for names in (n for n in shared.values() if len(n) > 1):
            changed = [n for n in names if n in made]
            if not changed:
                continue
            values = [made.get(n, self._known[n].detach()) for n in names]
            if all(torch.equal(values[0], v) for v in values[1:]):
                continue
            if not self.untie:
                raise InputError(
                    f"{' and '.join(names)} are one parameter, and the fold needs two; allow it: untie=True"
                )
