"""What reads a site: the linear map through which the rest of the model sees an activation.

    readers = readers_of(model, "blocks.19.mlp.act")       # W_out
    readable, unreadable = readers.split(direction)        # v = v_row + v_null

| site | readers |
| --- | --- |
| `mlp.act` | `W_out`, the down projection |
| `attn.z` (or one head of it) | `W_O`, the output projection (the head's columns) |
| residual stream, `attn.out`, `mlp.out` | q, k, v and MLP inputs of later blocks, norms' gains included |

The rows of that map span what can be read; what is orthogonal to all of them is invisible to these readers
at first order. A norm before the readers scales whole rows, which moves no row space; LayerNorm's centring
is part of the map. Everything that lies behind the residual stream together reads every direction of it, so
for these sites name a few readers (`"blocks.23.attn.q[head=4]"`, `"blocks.20.mlp"`); `circuits.illusion`
finds the heads that matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ShapeError, SiteError
from actlas.core.layout import find, weight_matrix

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

_RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out")


@dataclass(frozen=True, eq=False)
class Readers:
    """A linear map that reads a site.

    Attributes:
        matrix: float64 `[out, d]`; heads and their channels are one axis of d.
        names: what it is made of.
    """

    matrix: Tensor
    names: tuple[str, ...]

    @cached_property
    def basis(self) -> Tensor:
        """An orthonormal basis of the row space, float64 `[d, rank]`.

        Singular values below max(out, d) times float32's resolution of the largest count as zero: weights
        are known to that precision at best.
        """
        _, values, rows = torch.linalg.svd(self.matrix, full_matrices=False)
        limit = values.max() * max(self.matrix.shape) * torch.finfo(torch.float32).eps
        kept: Tensor = rows[values > limit].T
        return kept

    @property
    def hidden(self) -> int:
        """Dimensions of the null space: how many directions nothing here reads."""
        return self.matrix.shape[1] - self.basis.shape[1]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the readable and the unreadable component of `[..., d]`, float64; they add up to `x`.

        Raises:
            ShapeError: another width than the readers'.
        """
        if x.shape[-1] != self.matrix.shape[1]:
            raise ShapeError(f"the readers have {self.matrix.shape[1]} channels, the vectors {x.shape[-1]}")
        wide = x.double().to(self.basis.device)
        seen = wide @ self.basis @ self.basis.T
        return seen, wide - seen


def readers_of(model: Model, site: str, names: Sequence[str] | None = None) -> Readers:
    """Return the map that reads a site.

    Args:
        model: a model with a layout.
        site: one site; see the module docstring for those whose readers are known.
        names: which later readers of the residual stream: `"blocks.23.attn.q[head=4]"` (or `k`, `v`; all
            heads without a selector) and `"blocks.20.mlp"`. `None`: all of them.

    Raises:
        InputError: a site whose readers are not linear, readers named for a site that has only one, or a
            reader that comes before the site.
    """
    where = _one(model, site)
    if where.kind in ("mlp.act", "attn.z"):
        if names is not None:
            raise InputError(f"{site} is read by its output projection alone; name no readers")
        return _projection(model, where)
    if where.kind not in _RESIDUAL:
        raise InputError(
            f"what reads {site} is not known as a linear map; use mlp.act, attn.z, attn.out, mlp.out or a "
            "residual site"
        )
    wanted = list(_later(model, where)) if names is None else list(names)
    if not wanted:
        raise InputError(f"no attention head or MLP comes after {site}; only the output head reads it")
    parts = [_reader(model, where, name) for name in wanted]
    return Readers(torch.cat(parts), tuple(wanted))


def later_blocks(model: Model, site: str) -> list[int]:
    """Return the blocks whose attention reads the residual stream after a site."""
    where = _one(model, site)
    return [b for b in range(model.n_blocks or 0) if _after(model, where, b, "attn")]


def _one(model: Model, site: str) -> Site:
    sites = model.resolve(site)
    if len(sites) != 1:
        raise SiteError(f"{site!r} names {len(sites)} sites; readers are found for one")
    if model.tower is None:
        raise InputError(f"{model.name} has no layout, so what reads {site} is not known")
    return sites[0]


def _projection(model: Model, site: Site) -> Readers:
    assert model.tower is not None and site.block is not None
    path = model.tower.down_proj if site.kind == "mlp.act" else model.tower.out_proj
    module = find(model.block(site.block, site.tower), path)
    if module is None:
        raise InputError(f"{site.name} has no output projection in this model")
    weight = weight_matrix(module).detach().double()
    if site.selector is not None:
        whole = weight.unflatten(1, _one(model, site.name.split("[")[0]).features or (weight.shape[1],))
        weight = site.selector.read(whole.unsqueeze(0))[0].flatten(1)
    return Readers(weight, (f"{'W_out' if site.kind == 'mlp.act' else 'W_O'} of {site.name}",))


def _after(model: Model, site: Site, block: int, part: str) -> bool:
    """Whether a block's attention or MLP reads what is written at a site."""
    if site.block is None:
        return True
    if block != site.block:
        return block > site.block
    if site.kind == "resid_pre":
        return True
    parallel = model.tower is not None and model.tower.parallel
    return part == "mlp" and site.kind in ("resid_mid", "attn.out") and not parallel


def _later(model: Model, site: Site) -> Iterator[str]:
    for block in range(model.n_blocks or 0):
        if _after(model, site, block, "attn"):
            yield from (f"blocks.{block}.attn.{kind}" for kind in "qkv")
        if _after(model, site, block, "mlp"):
            yield f"blocks.{block}.mlp"


def _reader(model: Model, site: Site, name: str) -> Tensor:
    """Return one reader's map `[out, d_model]`, with the gain and centring of the norm before it."""
    if name.endswith(".mlp"):
        every = [s for s in model.sites() if s.name in (f"{name}.gate", f"{name}.up")]
        inputs = [s for s in every if s.absent is None]
        if not inputs:
            raise SiteError(f"there is no reader {name!r} here; write e.g. 'blocks.5.mlp'")
    else:
        inputs = model.resolve(name)
        if inputs[0].kind not in ("attn.q", "attn.k", "attn.v"):
            raise InputError(f"{name!r} reads no residual stream; name attn.q, attn.k, attn.v or mlp")
    block = inputs[0].block
    assert block is not None
    part = "mlp" if name.endswith(".mlp") else "attn"
    if not _after(model, site, block, part):
        raise InputError(f"{name} does not read {site.name}: it comes before it")
    rows = torch.cat([_weight(model, s) for s in inputs])
    norms = [s for s in model.sites() if s.name == f"blocks.{block}.{part}_norm" and s.absent is None]
    if norms and model.tower is not None and not model.tower.post_norm:
        module = find(model.module, norms[0].module)
        assert module is not None
        rows = through_norm(rows, module)
    return rows


def _weight(model: Model, site: Site) -> Tensor:
    """Return the linear map whose output the site is, float64 `[out, in]`."""
    module = find(model.module, site.module)
    assert module is not None
    columns = weight_matrix(module).detach().double().T  # [in, raw out], cut as the site's value is
    return site.read(columns.unsqueeze(0))[0].flatten(1).T


def through_norm(rows: Tensor, norm: nn.Module) -> Tensor:
    """Return the functionals `rows` of a norm's output as functionals of its input, up to its scale.

    The gain is found by asking the norm itself: an input of entries +-1 has mean 0 and root mean square 1.
    A norm that maps a constant input to its bias alone centres (LayerNorm).
    """
    d = rows.shape[1]
    like = next(norm.parameters(), rows)
    probe = torch.ones(2, d, device=like.device, dtype=like.dtype)
    probe[1, 1::2] = -1
    with torch.no_grad():
        out = norm(torch.cat([probe, -probe])).double().to(rows.device)
    odd = (out[:2] - out[2:]) / 2
    gain = odd[1] * probe[1].double().to(rows.device)
    scaled = rows * gain
    centred = bool(odd[0].abs().max() < 1e-3 * gain.abs().max() / math.sqrt(d))
    return scaled - scaled.mean(1, keepdim=True) if centred else scaled


__all__ = ["Readers", "later_blocks", "readers_of", "through_norm"]
