"""QuantEdit: layers exchanged for quantised ones, and the folds that belong to them, as one edit.

    edit = QuantEdit(model, {"model.layers.0.mlp.up_proj": QuantLinear.of(...)}, method="rtn")
    with model.edit(edit): ...          # afterwards the model has its own modules and parameters again
    edit.bits_per_weight, edit.stored_bytes

`parameters` are replaced as objects, not overwritten: a tied head that gets a weight of its own is untied
while the edit is installed, and what was there before returns untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit, WholeEdit, check_tensor, register_edit
from actlas.core.errors import ArtifactError, InputError, ShapeError, did_you_mean
from actlas.core.layout import find, plain_module, weight_matrix
from actlas.core.swap import MODULE_TYPES, SwapModule

if TYPE_CHECKING:
    from actlas.core.installation import Installation
    from actlas.core.model import Model


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class QuantEdit(WholeEdit):
    """Exchange modules and parameters.

    Attributes:
        modules: by path, the replacement (saveable: see `core.swap.register_module`).
        parameters: by name, the value that takes the place of a parameter; a bias that a layer has not got
            may be added. Same shape as what is there.
        method: what made it, e.g. `"awq"`.
        note: more for people.
        errors: by path, the relative error of the layer's output on the calibration text, if known.
    """

    whole: ClassVar[str] = "a quantised layer is in or out, for every token"

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    method: str = field(default="", kw_only=True)
    note: str = field(default="", kw_only=True)
    errors: Mapping[str, float] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not self.modules and not self.parameters:
            raise InputError("there is nothing to change: neither modules nor parameters were given")
        for name, value in self.parameters.items():
            check_tensor(value, f"the new value of {name}")

    @property
    def stored_bytes(self) -> int:
        """Bytes of the modules and parameters as they are stored."""
        own = sum(p.numel() * p.element_size() for p in self.parameters.values())
        return own + sum(_bytes(m) for m in self.modules.values())

    @property
    def weights(self) -> int:
        """How many weights the exchanged layers have."""
        return sum(_size(m) for m in self.modules.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (scales and all else) over weights of the exchanged layers; NaN without layers."""
        n = self.weights
        return 8 * sum(_bytes(m) for m in self.modules.values()) / n if n else float("nan")

    def describe(self) -> str:
        parts = []
        if self.modules:
            bits = self.bits_per_weight
            said = f" at {bits:.2f} bits a weight" if bits == bits else ""
            parts.append(f"{len(self.modules)} layers{said}")
        if self.parameters:
            parts.append(f"{len(self.parameters)} parameters")
        name = f"QuantEdit {self.method}".strip()
        return f"{name}: {', '.join(parts)}" + (f" ({self.note})" if self.note else "")

    def __add__(self, other: Edit) -> Edit:
        return super().__add__(other)

    def _attach(self, installation: Installation) -> None:
        root = plain_module(installation.model.module)
        for name, value in self.parameters.items():
            installation.keep(_Replaced(root, name, value))
        for path, module in self.modules.items():
            original = find(root, path)
            if original is None:
                known = dict(root.named_modules())
                raise InputError(
                    f"{installation.model.name} has no module {path!r}{did_you_mean(path, known)}"
                )
            _check_fits(path, original, module)
            installation.swap(SwapModule(path, module))
            if hasattr(module, "keep_dense"):
                installation.keep(_Dense(module))

    def bake(self, model: Model) -> Model:
        """Write the dequantised weights (and the folds) into the model's own layers, and return the model.

        Raises:
            InputError: a layer that rounds its inputs, which weights cannot do.
        """
        if self.fingerprint is not None:
            self.fingerprint.check(model.fingerprint, self.describe())
        root = plain_module(model.module)
        for path, module in self.modules.items():
            for name in ("act", "input_shift"):
                if getattr(module, name, None) is not None:
                    raise InputError(
                        f"{path} changes its inputs ({name}); that cannot be written into weights"
                    )
        for name, value in self.parameters.items():
            _Replaced(root, name, value)
        with torch.no_grad():
            for path, module in self.modules.items():
                layer = find(root, path)
                assert layer is not None
                _check_fits(path, layer, module)
                weight = module.weight
                assert isinstance(weight, Tensor)
                own_weight = layer.weight if isinstance(layer, nn.Conv2d) else weight_matrix(layer)
                own_weight.copy_(weight)
                bias = getattr(module, "bias", None)
                if isinstance(bias, Tensor):
                    own = getattr(layer, "bias", None)
                    if isinstance(own, Tensor):
                        own.copy_(bias)
                    else:
                        layer._parameters["bias"] = nn.Parameter(bias.clone(), requires_grad=False)
        return model

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"parameters/{n}": v.contiguous() for n, v in self.parameters.items()}
        modules = []
        for i, (path, module) in enumerate(self.modules.items()):
            name = type(module).__name__
            if name not in MODULE_TYPES:
                raise InputError(f"{name} cannot be saved: register it with actlas.core.swap.register_module")
            modules.append({"path": path, "type": name, "config": module.config()})  # type: ignore[operator]
            tensors |= {f"modules/{i}/{key}": value for key, value in module.state_dict().items()}
        record = {"modules": modules, "method": self.method, "note": self.note, "errors": dict(self.errors)}
        return record, tensors

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        modules: dict[str, nn.Module] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("modules/"):
                _, number, name = key.split("/", 2)
                parts.setdefault(number, {})[name] = value
        for i, entry in enumerate(record["modules"]):
            kind = entry["type"]
            if kind not in MODULE_TYPES:
                from actlas.core.methods import import_rooms

                import_rooms()
            if kind not in MODULE_TYPES:
                raise ArtifactError(f"the edit holds a module of unknown type {kind!r}; upgrade Actlas")
            module = MODULE_TYPES[kind].from_config(entry["config"])
            try:
                module.load_state_dict(parts.get(str(i), {}))
            except RuntimeError as error:
                raise ArtifactError(f"the tensors of {entry['path']} do not fit its configuration") from error
            modules[entry["path"]] = module.eval()
        parameters = {
            key.removeprefix("parameters/"): v for key, v in tensors.items() if key.startswith("parameters/")
        }
        return cls(
            modules,
            parameters,
            method=record["method"],
            note=record["note"],
            errors=dict(record["errors"]),
        )


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def _size(module: nn.Module) -> int:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if all(isinstance(s, int) for s in sizes):
        return int(sizes[0]) * int(sizes[1])  # type: ignore[arg-type]
    n = getattr(module, "n_weights", 0)
    return int(n) if isinstance(n, int) else 0


def _check_fits(path: str, original: nn.Module, module: nn.Module) -> None:
    want = getattr(module, "out_features", None), getattr(module, "in_features", None)
    weight = getattr(original, "weight", None)
    if None in want or not isinstance(weight, Tensor) or weight.ndim != 2:
        return
    have = tuple(weight_matrix(original).shape)
    if have != want:
        raise ShapeError(
            f"{path} is {have[0]} x {have[1]} in this model; its replacement is {want[0]} x {want[1]}"
        )


class _Replaced:
    """Puts a parameter object in the place of another, and that one back."""

    def __init__(self, root: nn.Module, name: str, value: Tensor) -> None:
        path, _, self._name = name.rpartition(".")
        owner = find(root, path) if path else root
        if owner is None or self._name not in owner._parameters:
            known = dict(root.named_parameters(remove_duplicate=False))
            raise InputError(f"the model has no parameter {name!r}{did_you_mean(name, known)}")
        self._owner, self._before = owner, owner._parameters[self._name]
        if self._before is not None:
            if self._before.shape != value.shape:
                raise ShapeError(
                    f"{name} is {list(self._before.shape)} in this model; "
                    f"its new value is {list(value.shape)}"
                )
            value = value.to(self._before)
        owner._parameters[self._name] = nn.Parameter(value.clone(), requires_grad=False)

    def remove(self) -> None:
        self._owner._parameters[self._name] = self._before


class _Dense:
    """Lets a module keep its dequantised weight while it is installed."""

    def __init__(self, module: Any) -> None:
        self._module, self._before = module, module.keep_dense
        module.keep_dense = True

    def remove(self) -> None:
        self._module.keep_dense = self._before
        if not self._before:
            self._module.drop()


def already_on_grid(weight: Tensor, rows: int = 32) -> tuple[int, int] | None:
    """Return (bits, group size) if a weight `[out, in]` already lies on an even grid by groups, else `None`.

    A group lies on a grid of b bits if its values are even steps between its least and its largest one. Such
    a checkpoint (GGUF's Q4_0 and Q4_1, for example) loses nothing in the same format, and other formats must
    be compared with that in mind.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        return None
    some = weight.detach()[:: max(1, len(weight) // rows)][:rows].double()
    for group in (32, 64, 128, 16, 256):
        if some.shape[1] % group:
            continue
        groups = some.reshape(-1, group)
        low, high = groups.aminmax(dim=1, keepdim=True)
        wide = (high - low).clamp_min(1e-30)
        for bits in range(2, 7):
            place = (groups - low) / wide * (2**bits - 1)
            off = (place - place.round()).abs().amax(1)
            if float((off < 0.02).double().mean()) > 0.98:
                return bits, group
    return None
