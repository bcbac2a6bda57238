"""Sparse autoencoders: the base of all kinds.

    z     = activate(W_enc (s x - b_dec) + b_enc)          sparse, [m]
    x_hat = (z W_dec + b_dec) / s

`s` brings inputs to a mean norm of sqrt(d), so that one learning rate and one sparsity weight serve
every site. Rows of `W_dec` have unit norm. Both weight matrices are stored `[features, channels]`, so
that everything about a feature lies together, which is what the sparse kernels and most questions need
(SAELens stores the encoder the other way round).

A kind of autoencoder is a subclass in a file of its own that says how codes are chosen (`activate`), what
is minimised (`objective`), and, where it has more parameters, how they start (`create`). Training is
`training.py`; it knows nothing about kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError, did_you_mean
from actlas.core.lens import check_finite
from actlas.dictionaries.objective import Batch, Objective, TrainState
from actlas.kernels.sparse_codes import sparse_decode

if TYPE_CHECKING:
    from typing_extensions import Self

ARCHITECTURES: dict[str, type[SAE]] = {}
#: Adam's two moments of every trainable tensor.
Moments = dict[str, tuple[Tensor, Tensor]]


@dataclass(kw_only=True, eq=False)
class SAE(Dictionary):
    """A sparse autoencoder.

    Attributes:
        W_enc: float32 `[m, d]`. b_enc: `[m]`.
        W_dec: float32 `[m, d_out]`, unit rows. b_dec: `[d_out]`.
        scale: what inputs are multiplied by.
        centred: whether `b_dec` is subtracted from the input.
        trained_rows: rows that it was trained on.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    scale: float = 1.0
    centred: bool = True
    trained_rows: int = 0

    #: The name under which `fit_sae(architecture=...)` finds the kind; empty for a base.
    architecture: ClassVar[str] = ""
    #: Names of the tensors that are trained.
    trainable: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec")
    #: Whether training needs dL/dx beside every row; whether the kind reads several sites at once.
    needs_gradient: ClassVar[bool] = False
    several_sites: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.architecture:
            ARCHITECTURES[cls.architecture] = cls

    def __post_init__(self) -> None:
        m, d = self.W_enc.shape if self.W_enc.ndim == 2 else (0, 0)
        if m == 0 or self.b_enc.shape != (m,) or self.W_dec.shape != (m, *self.b_dec.shape):
            raise ShapeError(
                f"{type(self).__name__} needs W_enc [m, d], b_enc [m], W_dec [m, d_out], b_dec [d_out], not "
                f"{[list(t.shape) for t in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)]}"
            )
        if self.centred and self.b_dec.shape != (d,):
            raise ShapeError(
                f"{type(self).__name__} reads {d} channels and writes {len(self.b_dec)}; it cannot be centred"
            )

    # -- what a kind defines ------------------------------------------------------------------------

    @classmethod
    def create(
        cls, site: str, d: int, width: int, *, d_out: int | None = None, seed: int = 0, **options: Any
    ) -> Self:
        """Return an untrained autoencoder: random unit atoms, the encoder their transpose, biases 0.

        Raises:
            InputError: sizes or options that do not fit.
        """
        if d < 1 or width < 1:
            raise InputError(
                f"a dictionary needs at least one channel and one feature, not d={d}, width={width}"
            )
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.randn(width, d_out or d, generator=generator)
        atoms /= atoms.norm(dim=1, keepdim=True)
        W_enc = atoms.clone() if d_out in (None, d) else torch.randn(width, d, generator=generator) / d**0.5
        options.setdefault("centred", d_out in (None, d))
        b_enc, b_dec = torch.zeros(width), torch.zeros(d_out or d)
        return cls(site=site, W_enc=W_enc, b_enc=b_enc, W_dec=atoms, b_dec=b_dec, **options)

    def activate(self, pre: Tensor) -> Codes:
        """Return the codes of pre-activations `[n, m]`, as at inference."""
        raise NotImplementedError

    def objective(self, batch: Batch, state: TrainState) -> Objective:
        """Return what a training step minimises, on autograd; `batch` is in scaled units."""
        raise NotImplementedError

    def gradients(self, batch: Batch, state: TrainState) -> tuple[Objective, dict[str, Tensor]]:
        """Return the objective and its gradient for every trainable tensor; `batch` is in scaled units."""
        leaves = {name: getattr(self, name).detach().requires_grad_() for name in self.trainable}
        objective = replace(self, **leaves).objective(batch, state)
        found = torch.autograd.grad(objective.loss, list(leaves.values()), allow_unused=True)
        whole = {
            n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)
        }
        free = state.settings.decoder_norm == "free"
        return replace(objective, loss=objective.loss.detach()), whole if free else self.constrain(whole)

    def step(self, batch: Batch, state: TrainState, moments: Moments, rate: float) -> Objective | None:
        """Do a whole step of Adam in place, if the kind has a quicker way than `gradients`; else `None`."""
        return None

    def constrain(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take out of the decoder's gradient what would only change the atoms' norms."""
        g = gradients["W_dec"]
        g -= (g * self.W_dec).sum(1, keepdim=True) * self.W_dec
        return gradients

    def after_step(self, state: TrainState) -> None:
        """Bring the atoms back to unit norm."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def prepared(self, sample: Batch) -> None:
        """Called once before the first step, after scale and `b_dec` are set; rows in the site's units."""

    def finish(self, state: TrainState) -> None:
        """Called once after the last step, e.g. to fix a threshold."""

    # -- as a dictionary ----------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        return self.W_enc.shape[1]

    @property
    def features(self) -> int:
        return self.W_enc.shape[0]

    @property
    def atoms(self) -> Tensor:
        return self.W_dec / self.scale

    @property
    def offset(self) -> Tensor:
        return self.b_dec / self.scale

    def direction(self, feature: int) -> Tensor:
        return self.W_dec[self.check_feature(feature)] / self.scale

    def pre(self, x: Tensor) -> Tensor:
        """Return pre-activations `[n, m]` of scaled rows `[n, d]`."""
        bias = self.b_enc - self.W_enc @ self.b_dec if self.centred else self.b_enc
        return torch.addmm(bias, x, self.W_enc.T)

    def encode_rows(self, x: Tensor) -> Codes:
        pre = self.pre(x.to(self.W_enc) * self.scale)
        if not pre.requires_grad:
            return self.activate(pre)
        # Values are chosen outside of autograd; their derivative is that of the pre-activation.
        codes = self.activate(pre.detach())
        moving = pre.gather(1, codes.indices) * self.slope[codes.indices]
        values = codes.values + (moving - moving.detach()) * codes.active
        return Codes(codes.indices, values, codes.features)

    @property
    def slope(self) -> Tensor:
        """By how much an active feature's value grows with its pre-activation, `[m]`."""
        return torch.ones_like(self.b_enc)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        if not isinstance(codes, Codes):
            return (codes.to(self.W_dec) @ self.W_dec + self.b_dec) / self.scale
        return self.decode_scaled(codes) / self.scale

    def decode_scaled(self, codes: Codes) -> Tensor:
        """Return reconstructions `[..., d_out]` in the units that the autoencoder works in."""
        if codes.features != self.features:
            raise ShapeError(
                f"{type(self).__name__} has {self.features} features; the codes have {codes.features}"
            )
        flat = codes.flatten()
        values = flat.values.to(self.W_dec)
        if values.requires_grad:
            x = embedding_bag(flat.indices, self.W_dec, per_sample_weights=values, mode="sum")
        else:
            x = sparse_decode(flat.indices, values, self.W_dec)
        return (x + self.b_dec).reshape(*codes.shape, len(self.b_dec))

    def check(self) -> None:
        """Raise NonFiniteError if training went wrong."""
        check_finite(type(self).__name__, **{name: getattr(self, name) for name in self.trainable})


def architecture(name: str) -> type[SAE]:
    """Return the class of a kind of autoencoder.

    Raises:
        InputError: there is none of that name.
    """
    from actlas.core.methods import import_rooms

    import_rooms()
    if name not in ARCHITECTURES:
        hint = did_you_mean(name, ARCHITECTURES) or f"; there are {', '.join(sorted(ARCHITECTURES))}"
        raise InputError(f"there is no dictionary architecture {name!r}{hint}")
    return ARCHITECTURES[name]


def parse_width(width: int | str, d: int) -> int:
    """Return a number of features from a number or a multiple of the channels such as `"8x"`.

    Raises:
        InputError: neither.
    """
    text = str(width).strip().lower()
    try:
        found = int(float(text[:-1]) * d) if text.endswith("x") else int(text)
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise InputError(f"width is {width!r}; it must be a number of features or a multiple such as '8x'")
    return found
