"""Subspace activation patching: move only some directions of an activation to another prompt's values.

    x' = x + P (x_src - x)          P = Q Q^T the projector on the span of the directions
    one direction v:  x' = x + ((x_src - x) . v / |v|^2) v

Use it to ask whether a few directions hold a variable; that a patch works does not yet show it, see
`circuits.illusion`. Source: "Is This the Subspace You Are Looking for? An Interpretability Illusion for
Subspace Activation Patching" (Makelov, Lange and Nanda 2023), section 2; Geiger et al. 2023 (DAS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actlas.core.edit import ActivationEdit, Here, check_tensor, register_edit, replace_edit
from actlas.core.edits import Replace
from actlas.core.errors import InputError, ShapeError

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace


def orthonormal(directions: Tensor) -> Tensor:
    """Return an orthonormal basis `[d, r]` of directions `[d]` or `[r, d]`; gradients pass through.

    Raises:
        InputError: a direction that is zero or depends on the others.
    """
    rows = directions.reshape(-1, directions.shape[-1])
    lengths = rows.norm(dim=1)
    if not bool((lengths > 0).all()):
        raise InputError(f"direction {int(lengths.argmin())} is zero; give one of some length")
    if len(rows) == 1:
        return (rows / lengths.unsqueeze(1)).T
    if len(rows) > rows.shape[1]:
        raise InputError(f"{len(rows)} directions in {rows.shape[1]} dimensions depend on one another")
    basis, triangle = torch.linalg.qr((rows / lengths.unsqueeze(1)).T)
    smallest = triangle.detach().diagonal().abs()
    if float(smallest.min()) < 1e-5:
        raise InputError(f"direction {int(smallest.argmin())} depends on the ones before it; leave it out")
    return basis


def interchange(x: Tensor, source: Tensor, directions: Tensor) -> Tensor:
    """Return `x` with its component in the span of `directions` taken from `source`.

    Args:
        x, source: `[..., d]`.
        directions: `[d]` or `[r, d]`, of any length, not necessarily orthogonal.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    basis = orthonormal(directions.to(device=x.device, dtype=wide))
    moved = (source.to(device=x.device, dtype=wide) - x.to(wide)) @ basis @ basis.T
    return (x.to(wide) + moved).to(x.dtype)


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class SubspacePatch(ActivationEdit):
    """Patch the component of an activation in a subspace.

    Attributes:
        directions: `[d]` or `[r, d]`; at sites with heads, heads and their channels are one axis.
        source: where the component is taken from: `[...features]` for every token, `[rows, 1, ...features]`
            for every token of a row (with `.at(positions=-1)`: of each prompt's last token), or
            `[rows, pos, ...features]` token by token. `None` until `with_source` or `from_inputs`.
    """

    directions: Tensor
    source: Tensor | None = None
    feature_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def rank(self) -> int:
        """Number of directions."""
        return 1 if self.directions.ndim == 1 else self.directions.shape[0]

    def with_source(self, source: Tensor) -> SubspacePatch:
        """Return the same patch that takes its component from these activations."""
        made = replace_edit(self, source=source)
        assert isinstance(made, SubspacePatch)
        return made

    def from_trace(self, trace: Trace) -> SubspacePatch:
        """Return the same patch with what a trace read at its site, token by token."""
        return self.with_source(Replace.from_trace(trace, self.site).with_value)

    def from_inputs(self, model: Model, inputs: Any) -> SubspacePatch:
        """Return the patch, limited to the last prompt token, with the last-token values of these inputs."""
        trace = model.trace(model.encode(inputs, padding_side="left"), self.site)
        made = self.with_source(trace.last(self.site).unsqueeze(1)).at(positions=-1)
        assert isinstance(made, SubspacePatch)
        return made

    def check(self, site: Site) -> None:
        check_tensor(self.directions, "SubspacePatch.directions")
        if self.source is None:
            raise InputError(
                f"{self.describe()} has no source; give it one: patch.from_inputs(model, prompts)"
            )
        check_tensor(self.source, "SubspacePatch.source")
        if self.directions.ndim not in (1, 2):
            raise ShapeError(f"directions are [d] or [r, d], not {list(self.directions.shape)}")
        orthonormal(self.directions.float())
        if site.features is None:
            return
        width = 1
        for size in site.features:
            width *= size
        if self.directions.shape[-1] != width:
            raise ShapeError(
                f"SubspacePatch.directions has shape {list(self.directions.shape)}, but {site.name} has "
                f"{width} channels a token"
            )
        Replace(self.site, self.source).check(site)

    def value(self, x: Tensor, here: Here) -> Tensor:
        assert self.source is not None
        new, run = self.source, here.run
        if new.ndim == x.ndim and new.shape[1] == 1:
            rows = run.rows(x.device)
            if new.shape[0] not in (1, int(rows[-1]) + 1):
                raise ShapeError(f"the source has {new.shape[0]} rows, but the batch has {int(rows[-1]) + 1}")
            picked = new.to(x)[rows if new.shape[0] > 1 else torch.zeros_like(rows)]
            other = picked.expand_as(x)
        else:
            longest = int(run.positions(x.device).max()) + 1 if run.length is not None else 0
            if new.ndim == x.ndim and run.past == 0 and longest and new.shape[1] != longest:
                raise ShapeError(
                    f"the source has {new.shape[1]} tokens, the prompt {longest}; they must align one by one"
                )
            other = Replace(self.site, new).value(x, here)
        axes = len(here.site.features or (1,))
        flat, source = (t.flatten(-axes) if axes > 1 else t for t in (x, other))
        return interchange(flat, source, self.directions).reshape(x.shape)


def rank_one_edit(weight: Tensor, u: Tensor, u_source: Tensor, v: Tensor, second_moment: Tensor) -> Tensor:
    """Return the weights whose output on `u` is the 1-D patch's, and that change others little.

        W' = W + a b^T      a = ((u_src - u) . v / |v|^2) W v      b = S^-1 u / (u^T S^-1 u)

    b . u = 1, so W' u = W (u + ((u_src - u) . v / |v|^2) v); of all such b this one has the least expected
    |b . x| over activations x with second moment S. (Makelov et al. 2023, section 7: a subspace patch of a
    fact and a rank-one edit of it are two views of one thing.)

    Args:
        weight: `[out, d]`, what reads the site (`W_out`).
        u, u_source: `[d]`, activation of the prompt and of the one that is patched in.
        v: `[d]`, the direction.
        second_moment: `[d, d]`, mean of x x^T, positive definite.
    """
    a = ((u_source - u) @ v / (v @ v)) * (weight @ v)
    b = torch.linalg.solve(second_moment, u)
    return weight + torch.outer(a, b / (u @ b))
