"""Exact folds: scales, shifts and rotations moved from one weight into another; the function stays the same.

Row vectors, y = x W^T + b. With a slot's value v read by W:

    scale s      v / s at the producer (its rows, or a norm's weight and bias)       W diag(s)
    shift z      v - z at the producer (its bias)                                     b + W z
    norms        a norm's weight w becomes 1, its bias b becomes b / w                W diag(w)
    rotate R     tables E R, writers R^T W (b R), norms' biases b R                   readers W R
    v-o R        rows of each value head R^T W_v (b R), columns of its query heads    W_o R

A rotation passes through an RMSNorm whose weight is one, since the length of a row does not change. LayerNorm
also takes the mean away: that is folded into tables and writers first, and the norm becomes a `PlainNorm`.

Everything is computed in float64 and rounded once. Sources: SmoothQuant (Xiao et al. 2023), SliceGPT
(Ashkboos et al. 2024), QuaRot (Ashkboos et al. 2024), OSTQuant (Hu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.layout import find, join, plain_module, weight_matrix
from actlas.core.model import Model
from actlas.core.quant_edit import QuantEdit
from actlas.core.transforms.dataflow import cache_off, probe_inputs
from actlas.core.transforms.norms import PlainNorm
from actlas.core.transforms.probing import final_output
from actlas.core.transforms.slots import TOLERANCE, Slot
from actlas.core.transforms.weights import Weights


@dataclass(frozen=True)
class Fold:
    """Exact replacement parameters (and norms) that leave the function as it is.

    Attributes:
        parameters: by name, in the parameter's dtype.
        modules: norms that take another form, by path.
        note: which folds, for people.
    """

    parameters: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    note: str = ""

    def edit(self) -> QuantEdit:
        """Return the fold as an edit; installed, it changes no output beyond rounding."""
        return QuantEdit(dict(self.modules), dict(self.parameters), method="fold", note=self.note)

    def linear(self, model: Model, path: str) -> nn.Linear:
        """Return a linear map of the model as the fold has it, as an `nn.Linear` of its own.

        Raises:
            InputError: there is no linear map of this path.
        """
        module = find(plain_module(model.module), path)
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            raise InputError(f"{model.name} has no linear map {path!r}")
        held = self.parameters.get(join(path, "weight"))
        weight = weight_matrix(module) if held is None else held
        weight = weight.T if held is not None and type(module).__name__ == "Conv1D" else weight
        bias = self.parameters.get(join(path, "bias"), getattr(module, "bias", None))
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return made

    def without(self, paths: Collection[str]) -> Fold:
        """Return the fold less the parameters of some modules (which are replaced as a whole)."""
        kept = {n: v for n, v in self.parameters.items() if n.rpartition(".")[0] not in paths}
        return Fold(kept, self.modules, self.note)

    def moved(self, model: Model, inputs: Mapping[str, Any] | None = None) -> float:
        """Return by how much the fold changes the model's output, relative to its largest value."""
        inputs = probe_inputs(model) if inputs is None else inputs
        options = cache_off(plain_module(model.module))
        with torch.no_grad():
            before = final_output(model._call(dict(inputs), **options)).double()
            with model.edit(self.edit()):
                after = final_output(model._call(dict(inputs), **options)).double()
        return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))


class Folding(Weights):
    """Collects folds of one model, in the order in which they are asked for.

    Args:
        model: it is not changed.
        found: its slots, if known.
        untie: whether parameters that two layers share (embedding and head) may become two; without it such a
            fold is refused.
        dtype: of the arithmetic. Scales and rotations may require gradients: `values` are then functions of
            them.
    """

    # -- the folds ----------------------------------------------------------------------------

    def scale(self, slot: Slot, s: Tensor) -> Folding:
        """Divide the slot's value by s `[width]` and multiply what its readers make of it by s.

        Raises:
            ShapeError: another length. InputError: zeros, or a residual stream. NonFiniteError.
        """
        s = self._factors(slot, s)
        if slot.kind in ("residual", "single"):
            raise InputError(f"{slot.name} takes rotations, not a scale for each channel")
        if slot.kind == "qk":
            assert slot.tied is not None
            key = s[slot.tied]
            self._rows(slot.producer, lambda w: w / key[slot.index, None], lambda b: b / key[slot.index])
            self._rows(slot.readers[0], lambda w: w * key[:, None], lambda b: b * key)
        else:
            if slot.norm is not None:
                offset = self._offset(slot)
                self._set(slot.producer, "weight", (offset + self._get(slot.producer, "weight")) / s - offset)
                if (bias := self._bias(slot.producer)) is not None:
                    self._set(slot.producer, "bias", bias / s)
            else:
                factor = self._spread(slot, 1 / s, 1.0)
                self._rows(slot.producer, lambda w: w * factor[:, None], lambda b: b * factor)
            for path in slot.readers:
                self._set_matrix(path, self._matrix(path) * s[slot.index])
        self._said.append(f"scale {slot.kind}")
        return self

    def scale_rows(self, path: str, factor: Tensor) -> Folding:
        """Multiply the outputs of one linear map by factors `[out]`, with nothing to make up for it.

        Alone it changes the function; use `scale` unless its counterpart is known.
        """
        factor = factor.to(self.model.device, self.dtype)
        self._rows(path, lambda w: w * factor[:, None], lambda b: b * factor)
        self._said.append(f"scale rows of {path}")
        return self

    def shift(self, slot: Slot, z: Tensor, *, add_bias: bool = False) -> Folding:
        """Subtract z `[width]` from the slot's value and add what its readers make of z to their biases.

        Args:
            slot: a norm or v-o slot.
            z: the shift.
            add_bias: let an RMSNorm without bias become a `PlainNorm` with one.

        Raises:
            InputError: a slot through which a shift does not pass, or a producer without bias.
        """
        if slot.kind not in ("norm", "head", "v_o"):
            raise InputError(f"a shift passes through norm and v_o slots, not {slot.kind} ({slot.producer})")
        z = self._vector(slot, z)
        bias = self._bias(slot.producer)
        if slot.norm is not None:
            if bias is None and not slot.norm.bias:
                if not add_bias or slot.norm.centres:
                    raise InputError(
                        f"{slot.producer} has no bias to take a shift; allow one to be added (add_bias=True)"
                    )
                self._make_plain(slot, bias=True)
                bias = self._get(slot.producer, "bias")
            assert bias is not None
            self._set(slot.producer, "bias", bias - z)
        else:
            whole = self._spread(slot, z, 0.0)
            self._set(slot.producer, "bias", -whole if bias is None else bias - whole)
        for path in slot.readers:
            added = self._matrix(path) @ z[slot.index]
            own = self._bias(path)
            self._set(path, "bias", added if own is None else own + added)
        self._said.append(f"shift {slot.kind}")
        return self

    def norms(self, among: Iterable[Slot] | None = None) -> Folding:
        """Multiply the weights of norms into their readers and set them to one.

        Args:
            among: norm and head slots; default: all that are found.

        Raises:
            InputError: a norm with a bias and a zero weight (named).
        """
        for slot in self.slots.of("norm", "head") if among is None else among:
            assert slot.norm is not None
            gain = self._offset(slot) + self._get(slot.producer, "weight")
            bias = self._bias(slot.producer)
            if bias is not None and bool((gain.abs() < 1e-8 * gain.abs().max()).logical_and(bias != 0).any()):
                raise InputError(f"{slot.producer} has a weight of zero with a bias; it cannot be folded")
            if bias is not None:
                self._set(slot.producer, "bias", torch.where(gain == 0, bias, bias / gain))
            self._set(slot.producer, "weight", torch.ones_like(gain) - self._offset(slot))
            for path in slot.readers:
                self._set_matrix(path, self._matrix(path) * gain[slot.index])
        self._said.append("norms")
        return self

    def rotate_residual(self, rotation: Tensor, slot: Slot | None = None, *, norms: bool = True) -> Folding:
        """Rotate a residual stream.

        Args:
            rotation: orthogonal `[d, d]`, R.
            slot: the stream; default: the only one.
            norms: fold the weights of its norms first; `False` where that has been done.

        Raises:
            InputError: several streams and none named, or no rotation passes (with the reason).
            ShapeError: another size. NonFiniteError.
        """
        slot = self._stream() if slot is None else slot
        rotation = self._orthogonal(rotation, (slot.width, slot.width))
        reading = [s for s in self.slots if s.norm is not None and s.producer in slot.readers]
        reading = [s for s in reading if s.kind != "residual"]
        if norms and (weighted := [s for s in reading if s.kind != "single"]):
            self.norms(weighted)
        centre = any(s.norm is not None and s.norm.centres for s in reading)
        for name in (alias for table in slot.tables for alias in self._aliases(table)):
            path, _, own = name.rpartition(".")
            table = self._get(path, own)
            self._set(path, own, (table - table.mean(-1, keepdim=True) if centre else table) @ rotation)
        for path in slot.writers:
            self._rows(
                path,
                lambda w: rotation.T @ (w - w.mean(0, keepdim=True) if centre else w),
                lambda b: (b - b.mean() if centre else b) @ rotation,
            )
        for norm in reading:
            if centre:
                self._make_plain(norm, bias=norm.norm is not None and norm.norm.bias)
            if (bias := self._bias(norm.producer)) is not None:
                self._set(norm.producer, "bias", bias @ rotation)
            for path in norm.readers:
                self._set_matrix(path, self._matrix(path) @ rotation)
        self._said.append("rotate residual")
        return self

    def rotate_v_o(self, slot: Slot, rotation: Tensor) -> Folding:
        """Rotate the channels of each value head.

        Args:
            slot: a v-o slot.
            rotation: orthogonal, `[head, head]` for all or `[groups, head, head]`.

        Raises:
            InputError: another kind of slot, or channels of a head that do not lie together.
            ShapeError: another size. NonFiniteError.
        """
        if slot.kind != "v_o":
            raise InputError(f"value heads are rotated in v_o slots, not {slot.kind} ({slot.producer})")
        head = slot.width // slot.groups
        whole = rotation.expand(slot.groups, head, head) if rotation.ndim == 2 else rotation
        whole = self._orthogonal(whole, (slot.groups, head, head))
        blocks = slot.index.view(-1, head)
        if not bool((blocks == blocks[:, :1] + torch.arange(head)).all()) or bool(
            (blocks[:, 0] % head).any()
        ):
            raise InputError(f"{slot.producer}: the channels of a head do not lie together")
        rows = slot.rows

        def turn_rows(w: Tensor) -> Tensor:
            part = w[rows].reshape(slot.groups, head, -1)
            turned = (whole.transpose(1, 2) @ part).reshape(slot.width, -1)
            return w.index_copy(0, rows.to(w.device), turned)

        self._rows(slot.producer, turn_rows, lambda b: turn_rows(b[:, None])[:, 0])
        matrix = self._matrix(slot.readers[0])
        by_head = matrix.view(len(matrix), -1, head).transpose(0, 1)
        turned = by_head @ whole[blocks[:, 0] // head]
        self._set_matrix(slot.readers[0], turned.transpose(0, 1).reshape(matrix.shape))
        self._said.append("rotate v_o")
        return self

    def fold(self, *, verify: bool = True) -> Fold:
        """Round everything to the model's dtype and return the fold.

        Args:
            verify: run a small input with and without, and refuse a fold that changes the output.

        Raises:
            InputError: a fold would give two layers that share a parameter different ones, and `untie` is
                off; or the output changes. NonFiniteError.
        """
        if not self.values:
            raise InputError("nothing was folded; call scale, shift, norms or a rotation first")
        made: dict[str, Tensor] = {}
        modules: dict[str, nn.Module] = {}
        for path, eps in self._plain.items():
            weight, bias = (self.values.get(join(path, n)) for n in ("weight", "bias"))
            like = self._known[join(path, "weight")]
            norm = PlainNorm(like.numel(), eps, bias is not None).to(like)
            with torch.no_grad():
                norm.weight.copy_(weight if weight is not None else like)
                if bias is not None:
                    assert norm.bias is not None
                    norm.bias.copy_(bias)
            modules[path] = norm.eval().requires_grad_(False)
        for name, value in self.values.items():
            if name.rpartition(".")[0] in modules:
                continue
            own = self._known.get(name)
            like = own if own is not None else self._known[join(name.rpartition(".")[0], "weight")]
            value = value.detach().to(like)
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"the fold makes {name} NaN or infinite in {like.dtype}")
            made[name] = value
        self._check_ties(made)
        fold = Fold(made, modules, ", ".join(dict.fromkeys(self._said)))
        if verify:
            limit = 5 * TOLERANCE * (50 if self.model.dtype in (torch.float16, torch.bfloat16) else 1)
            if not (moved := fold.moved(self.model)) <= limit:
                raise InputError(
                    f"folding ({fold.note}) would change the output of {self.model.name} by {moved:.2g}; "
                    "something reads what was folded in another way"
                )
        return fold


# One fold at a time ---------------------------------------------------------------------------


def fold_scale(model: Model, slot: Slot, s: Tensor, *, untie: bool = False) -> Fold:
    """Return the fold of one scale; see `Folding.scale`."""
    return Folding(model, untie=untie).scale(slot, s).fold()


def fold_shift(model: Model, slot: Slot, z: Tensor, *, add_bias: bool = False, untie: bool = False) -> Fold:
    """Return the fold of one shift; see `Folding.shift`."""
    return Folding(model, untie=untie).shift(slot, z, add_bias=add_bias).fold()


def fold_norms(model: Model, *, untie: bool = False) -> Fold:
    """Return the fold of all norms' weights into what reads them; see `Folding.norms`."""
    return Folding(model, untie=untie).norms().fold()


def rotate_residual(model: Model, rotation: Tensor, *, slot: Slot | None = None, untie: bool = False) -> Fold:
    """Return the rotation of a residual stream; see `Folding.rotate_residual`."""
    return Folding(model, untie=untie).rotate_residual(rotation, slot).fold()


def rotate_v_o(model: Model, slot: Slot, rotation: Tensor) -> Fold:
    """Return the rotation of one layer's value heads; see `Folding.rotate_v_o`."""
    return Folding(model).rotate_v_o(slot, rotation).fold()
