"""A mixture of experts as a dictionary: its neurons are the features, its decoder rows the atoms.

    z_i = a(W_enc_j x + b_j)_m for i = j D + m if expert j was chosen, else 0

A dictionary that was trained with the model, not fitted to it. It reads where the layer reads (the MLP's
input) and its atoms write where the layer writes (the MLP's output), as a transcoder does.

Which features. The default codes are *not* multiplied by the router's gates: they say what a neuron saw.
With `gated=True` they are, and `decode(encode(x))` is exactly the layer. Without, `decode` overstates each
expert by the inverse of its gate; use such codes to read, and gated ones to reconstruct.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary, ErrorPart, Operation
from actlas.core.errors import ArtifactError, InputError
from actlas.core.lens import check_finite
from actlas.core.swap import MODULE_TYPES
from actlas.nn.experts import MixtureOfExperts

if TYPE_CHECKING:
    from actlas.core.edit import Edit


@dataclass(kw_only=True, eq=False)
class ExpertDictionary(Dictionary):
    """The wide view of a mixture of experts.

    Attributes:
        target: the site where the atoms write.
        gated: whether codes are multiplied by the router's gates.
        layer: the mixture's class name and configuration.
        w_enc, w_dec, b_enc, b_dec, w_up, b_up: see `MixtureOfExperts`.
        w_route: weights of a learned router, `[M, d]`.
    """

    target: str
    gated: bool = False
    layer: Mapping[str, Any] = field(default_factory=dict)
    w_enc: Tensor
    w_dec: Tensor
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    w_up: Tensor | None = None
    b_up: Tensor | None = None
    w_route: Tensor | None = None

    def __post_init__(self) -> None:
        held = self._tensors()
        check_finite("ExpertDictionary", **held)
        cls = MODULE_TYPES.get(str(self.layer.get("type")))
        if not (isinstance(cls, type) and issubclass(cls, MixtureOfExperts)):
            raise ArtifactError(f"{self.layer.get('type')!r} is no mixture of experts; upgrade Actlas")
        mixture = cls.from_config(self.layer["config"]).eval().requires_grad_(False)
        state = {("router.weight" if n == "w_route" else n): t for n, t in held.items()}
        try:
            mixture.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ArtifactError(f"the tensors do not fit a {cls.__name__} of this configuration") from error
        self._mixture = mixture

    @classmethod
    def of(
        cls, mixture: MixtureOfExperts, site: str, *, target: str = "", gated: bool = False
    ) -> ExpertDictionary:
        """Return the wide view of a layer; see `MixtureOfExperts.as_dictionary`.

        Raises:
            InputError: no target was given and `site` is not an `mlp_norm`.
        """
        if not target:
            if not site.endswith(".mlp_norm"):
                raise InputError(f"the layer reads {site!r}; say where it writes with target=")
            target = site.removesuffix("mlp_norm") + "mlp.out"
        state = {n.replace("router.weight", "w_route"): t for n, t in mixture.state_dict().items()}
        copied: dict[str, Any] = {n: t.detach().clone() for n, t in state.items()}
        layer = {"type": type(mixture).__name__, "config": mixture.config()}
        return cls(site=site, target=target, gated=gated, layer=layer, **copied)

    @property
    def channels(self) -> int:
        return self.w_enc.shape[2]

    @property
    def features(self) -> int:
        return self.w_enc.shape[0] * self.w_enc.shape[1]

    @property
    def atoms(self) -> Tensor:
        return self._mixture.atoms

    @property
    def offset(self) -> Tensor | None:
        return self.b_dec

    def expert_of(self, feature: int) -> int:
        """Return the expert that a feature belongs to."""
        return self.check_feature(feature) // self.w_enc.shape[1]

    def encode_rows(self, x: Tensor) -> Codes:
        with torch.no_grad():
            return Codes.from_dense(self._mixture.features(x.to(self.w_enc), gated=self.gated))

    def edit(self, feature: int | Mapping[int, Operation] = 0, strength: float = 1.0) -> Edit:
        """Return the edit that adds `strength` times a feature's atom where the layer writes.

        Raises:
            InputError: there is no such feature, or operations on codes were asked for.
        """
        if isinstance(feature, Mapping):
            raise InputError(
                f"a mixture of experts reads {self.site} and writes {self.target}, so its codes cannot be "
                "set by an edit at one site; steer along an atom: edit(feature, strength)"
            )
        from actlas.core.edits import Add

        added = Add(self.target, self.direction(self.check_feature(feature)).detach()) * strength
        return added if self.fingerprint is None else added.bind(self.fingerprint)

    def substitute(
        self,
        error: ErrorPart = "drop",
        *,
        keep_error: bool = False,
        error_map: Tensor | None = None,
        only: Collection[int] | None = None,
        without: Collection[int] = (),
    ) -> Edit:
        """Raise InputError: the layer computes its own reconstruction already."""
        raise InputError(
            f"a mixture of experts is the model's own {self.target}; there is nothing to substitute"
        )
