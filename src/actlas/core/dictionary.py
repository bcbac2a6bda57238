"""A Dictionary reads an activation as a sparse sum of directions:  x ~ b + sum_j z_j d_j.

Sparse autoencoders, ITDA, supervised dictionaries and the wide view of a mixture of experts are
dictionaries. Over a lens they add sparse codes, atoms, and edits of single features:

    codes = sae.encode(x)                       # Codes: which features, how strongly
    sae.decode(codes)                           # [..., d]
    sae.edit(417, 6.0)                          # add 6 of feature 417's atom
    sae.edit({417: 0.0, 90: ("scale", 2)})      # switch 417 off, double 90; the error stays as it was
    sae.substitute()                            # put the reconstruction in the activation's place
    sae.substitute(error="keep", without=[417]) # ... with the error added back, one feature left out

Massive activations. Residual streams have a few tokens (often the first) whose norm is a hundred times
the others'. No dictionary is fitted on them, and putting a reconstruction in their place breaks the
model for reasons that have nothing to do with the dictionary. A dictionary knows the norm above which
it was not fitted (`skip_above`); its edits let such rows through untouched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from actlas.core.codes import Codes
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens

if TYPE_CHECKING:
    from actlas.core.edit import Edit

#: What `Dictionary.edit` can do with a feature: set it to a number, scale it, or add to it.
Operation = float | tuple[Literal["scale", "add", "set"], float]
ErrorPart = Literal["drop", "keep", "linear", "nonlinear"]
_CHUNK = 4096  # tokens encoded at a time: what a dictionary of 32k features needs stays below 1 GB


@dataclass(kw_only=True, eq=False)
class Dictionary(Lens):
    """Base of all dictionaries. A kind defines `channels`, `features`, `atoms`, `offset` and `encode_rows`.

    Attributes:
        skip_above: rows whose norm is larger are massive: they were not fitted, and edits pass them by.
    """

    skip_above: float | None = None

    # -- what a kind of dictionary defines --------------------------------------------------------

    @property
    def atoms(self) -> Tensor:
        """The features' directions `[features, d]`, in the units of the site: x ~ b + codes @ atoms."""
        raise NotImplementedError

    @property
    def offset(self) -> Tensor | None:
        """What is added to every reconstruction, `[d]`; `None` for nothing."""
        return None

    def encode_rows(self, x: Tensor) -> Codes:
        """Return the codes of rows `[n, d]`."""
        raise NotImplementedError

    # -- what every dictionary can do -------------------------------------------------------------

    def encode(self, x: Tensor) -> Codes:  # type: ignore[override]
        """Return the sparse codes of activations `[..., d]` (or `[..., heads, head_dim]`).

        Raises:
            ShapeError: the channels are not the dictionary's.
        """
        flat = self.flat(x)
        rows = flat.reshape(-1, flat.shape[-1])
        parts = [self.encode_rows(rows[i : i + _CHUNK]) for i in range(0, max(1, len(rows)), _CHUNK)]
        codes = parts[0] if len(parts) == 1 else Codes.cat(parts)
        return codes.reshape(*flat.shape[:-1])

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Return the activations `[..., d]` that sparse codes, or dense ones `[..., features]`, stand for."""
        if not isinstance(codes, Codes):
            codes = Codes.from_dense(codes)
        if codes.features != self.features:
            raise ShapeError(
                f"{type(self).__name__} has {self.features} features; the codes have {codes.features}"
            )
        atoms, flat = self.atoms, codes.flatten()
        values = flat.values.to(atoms.dtype)
        x = embedding_bag(flat.indices, atoms, per_sample_weights=values, mode="sum")
        return (x if self.offset is None else x + self.offset).reshape(*codes.shape, atoms.shape[1])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return `decode(encode(x))`, `[..., d]` (heads joined)."""
        return self.decode(self.encode(x))

    def direction(self, feature: int) -> Tensor:
        return self.atoms[self.check_feature(feature)]

    def massive(self, x: Tensor) -> Tensor:
        """Return which activations `[..., d]` are above `skip_above`, bool `[...]`."""
        norm = self.flat(x).to(torch.float32).norm(dim=-1)
        return (
            norm > self.skip_above
            if self.skip_above is not None
            else torch.zeros_like(norm, dtype=torch.bool)
        )

    def edit(self, feature: int | Mapping[int, Operation] = 0, strength: float = 1.0) -> Edit:
        """Return an edit of one or several features.

        Args:
            feature: a feature's number, to add `strength` times its atom; or `{feature: operation}`, to
                change codes and leave the rest of the activation as it is. An operation is a number
                (the code becomes it), `("scale", f)` or `("add", v)`.
            strength: how far; 0 changes nothing.

        Raises:
            InputError: there is no such feature, or an operation is none of these.
        """
        if not isinstance(feature, Mapping):
            return super().edit(feature, strength)
        from actlas.core.dictionary_edits import FeatureEdit

        operations = {self.check_feature(int(f)): as_operation(o) for f, o in feature.items()}
        if not operations:
            raise InputError("no feature was given; give {feature: operation}")
        edit = FeatureEdit(self.site, self, operations) * strength
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)

    def substitute(
        self,
        error: ErrorPart = "drop",
        *,
        keep_error: bool = False,
        error_map: Tensor | None = None,
        only: Collection[int] | None = None,
        without: Collection[int] = (),
    ) -> Edit:
        """Return the edit that puts the reconstruction in the activation's place.

        Args:
            error: what becomes of the reconstruction error x - x_hat: `"drop"` it, `"keep"` it (the
                activation changes only where `only` and `without` change the codes), keep its
                `"linear"` part x @ error_map, or its `"nonlinear"` part.
            keep_error: the same as `error="keep"`.
            error_map: `[d, d]`, the least-squares map from activation to error.
            only, without: features to keep, or to leave out.

        Raises:
            InputError: an error part without its map, or features that do not exist.
        """
        from actlas.core.dictionary_edits import DictionarySubstitute

        error = "keep" if keep_error else error
        if error not in ("drop", "keep", "linear", "nonlinear"):
            raise InputError(f"error is {error!r}; it must be 'drop', 'keep', 'linear' or 'nonlinear'")
        if (error_map is None) == (error in ("linear", "nonlinear")):
            raise InputError(f"error={error!r} {'needs' if error_map is None else 'takes no'} error_map")
        edit: Edit = DictionarySubstitute(
            self.site,
            self,
            error=error,
            error_map=error_map,
            only=None if only is None else tuple(self.check_feature(int(f)) for f in only),
            without=tuple(self.check_feature(int(f)) for f in without),
        )
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)


def as_operation(given: Any) -> tuple[str, float]:
    """Return an operation as `(kind, number)`.

    Raises:
        InputError: it is neither a finite number nor such a pair.
    """
    kind, number = given if isinstance(given, (tuple, list)) and len(given) == 2 else ("set", given)
    if kind in ("scale", "add", "set") and isinstance(number, (int, float)) and abs(number) < float("inf"):
        return str(kind), float(number)
    raise InputError(f"{given!r} is no operation on a feature; use a number, ('scale', f) or ('add', v)")
