"""Attention-output dictionaries: latents of the joined heads z, and where their activation comes from.

A dictionary at `blocks.{i}.attn.z` reads the outputs of all heads before the output projection, joined.
With the attention pattern A held as it is, z is linear in the values, so a latent's pre-activation splits
exactly (Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders", sections 3
and 4):

    pre_i(t) = sum_h sum_s A_h(t, s) v_h(s) . w_i[h]  +  c_i      w_i: the encoder's row, in the site's units

    dfa(sae, trace, i, t, by="source")    one number a source position s (direct feature attribution)
    dfa(sae, trace, i, t, by="head")      one a head: z_h(t) . w_i[h]
    dfa(sae, trace, i, t, by="feature", upstream=residual_sae)

The last one is recursive: with the norm's scale held too, v(s) = W_V (g * x(s) / rms) + b_V is linear in
the residual stream, and an upstream feature j of value f_j and atom d_j contributes

    sum_h A_h(t, s) f_j(s) (g * d_j / rms(s)) W_V^h . w_i[h]

What belongs to no feature (upstream error and offset, biases of norm and values) is in `rest`, so that all
parts always sum to the pre-activation. Heads that share keys and values (grouped queries) are repeated
first.

`head_weights.py` attributes latents to heads by their decoder alone, without any text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, SiteError
from actlas.core.layout import apply_linear, find
from actlas.dictionaries.frozen_norm import FrozenNorm

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace

By = Literal["source", "head", "head-source", "feature"]


@dataclass(frozen=True)
class Attribution:
    """Where one latent's pre-activation at one token comes from; float64.

    Attributes:
        latent: the latent.
        dest: its token's position among the real tokens of the row.
        by: what it was split by.
        preactivation: the whole, read from z itself.
        contributions: the parts, `[n]`.
        sources, heads, features: of each part, its source position, head or upstream feature; empty where the
            parts are not told apart by it.
        rest: parts that belong to no source, head or feature: `encoder` (biases), and for features also
            `upstream error`, `upstream offset`, `norm bias` and `value bias`.
        tokens: the row's real tokens as text, where there is a tokenizer.
    """

    latent: int
    dest: int
    by: By
    preactivation: float
    contributions: Tensor
    sources: Tensor
    heads: Tensor
    features: Tensor
    rest: Mapping[str, float]
    tokens: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """The sum of all parts; equal to `preactivation` up to rounding."""
        return float(self.contributions.sum()) + sum(self.rest.values())

    def top(self, n: int = 10) -> list[dict[str, Any]]:
        """Return the `n` parts of largest magnitude as records, largest first."""
        order = self.contributions.abs().argsort(descending=True)[:n].tolist()
        found = []
        for i in order:
            record: dict[str, Any] = {"contribution": float(self.contributions[i])}
            for name in ("sources", "heads", "features"):
                labels = getattr(self, name)
                if len(labels):
                    record[name[:-1]] = int(labels[i])
            if "source" in record and self.tokens:
                record["token"] = self.tokens[record["source"]]
            found.append(record)
        return found


def dfa_sites(lens: Dictionary, by: By = "source") -> list[str]:
    """Return the sites that a trace must hold for `dfa`."""
    kinds = ["attn.z", "attn.pattern", "attn.v"] + (["resid_pre"] if by == "feature" else [])
    return [_sibling(lens.site, kind) for kind in kinds]


@torch.no_grad()
def dfa(
    lens: Dictionary,
    trace: Trace,
    latent: int,
    dest: int = -1,
    by: By = "source",
    *,
    row: int = 0,
    upstream: Dictionary | None = None,
) -> Attribution:
    """Split a latent's pre-activation by source, head or upstream feature (direct feature attribution).

    Args:
        lens: a dictionary with an encoder, at `blocks.{i}.attn.z`.
        trace: holds `dfa_sites(lens, by)`.
        latent: which.
        dest: position of the token among the real tokens of its row; negative ones count from the end.
        by: `"source"`, `"head"`, `"head-source"` (both at once) or `"feature"`.
        row: of the batch.
        upstream: for features, a dictionary of the residual stream that enters the block (its `resid_pre`, or
            `resid_post` of the block before).

    Raises:
        SiteError: the lens is not at `attn.z`, or the trace lacks a site.
        InputError: no such latent, token or row, or an upstream dictionary at another place.
    """
    if by not in ("source", "head", "head-source", "feature"):
        raise InputError(f"by is {by!r}; it must be 'source', 'head', 'head-source' or 'feature'")
    if (by == "feature") != (upstream is not None):
        raise InputError("by='feature' needs upstream=dictionary, and nothing else takes it")
    model: Model = trace._model
    where = z_site(lens, model)
    z, pattern, v = (trace[name] for name in dfa_sites(lens)[:3])
    columns, position, tokens = _token(trace, row, dest)
    direction, constant = reading_direction(lens, latent)
    heads, size = z.shape[-2:]
    w = direction.reshape(heads, size)
    a = pattern[row, :, columns[position]][:, columns].double().cpu()  # [heads, sources]
    values = _per_head(v[row, columns].double().cpu(), heads)  # [sources, heads, size]
    parts = a * torch.einsum("shd,hd->hs", values, w)
    here = z[row, columns[position]].double().cpu()
    held = _Parts(torch.empty(0, dtype=torch.float64), rest={"encoder": constant})
    numbers_h, numbers_s = torch.arange(heads), torch.arange(len(columns))
    if by == "source":
        held = _Parts(parts.sum(0), sources=numbers_s, rest=held.rest)
    elif by == "head":
        held = _Parts((here * w).sum(1), heads=numbers_h, rest=held.rest)
    elif by == "head-source":
        held = _Parts(
            parts.flatten(),
            sources=numbers_s.repeat(heads),
            heads=numbers_h.repeat_interleave(len(columns)),
            rest=held.rest,
        )
    else:
        assert upstream is not None
        held = _by_feature(model, trace, where, upstream, row, columns, a, w, constant)
    return Attribution(
        latent=latent,
        dest=position,
        by=by,
        preactivation=float((here * w).sum()) + constant,
        contributions=held.contributions,
        sources=held.sources,
        heads=held.heads,
        features=held.features,
        rest=held.rest,
        tokens=tokens,
    )


def reading_direction(lens: Dictionary, latent: int) -> tuple[Tensor, float]:
    """Return `(w, c)` with pre-activation `x . w + c`, float64, `x` in the units of the site.

    Raises:
        InputError: no such latent, or a dictionary whose codes are not read by one direction each.
    """
    lens.check_feature(latent)
    encoder, bias = getattr(lens, "W_enc", None), getattr(lens, "b_enc", None)
    if not isinstance(encoder, Tensor) or not isinstance(bias, Tensor):
        raise InputError(f"{type(lens).__name__} reads no latent by one direction; use a sparse autoencoder")
    direction = encoder[latent].detach().double().cpu()
    constant = float(bias[latent])
    if getattr(lens, "centred", False):
        offset: Tensor = lens.b_dec  # type: ignore[attr-defined]
        constant -= float(direction @ offset.detach().double().cpu())
    return direction * float(getattr(lens, "scale", 1.0)), constant


@dataclass(frozen=True)
class _Parts:
    contributions: Tensor
    sources: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    heads: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    features: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    rest: dict[str, float] = field(default_factory=dict)


def _by_feature(
    model: Model,
    trace: Trace,
    where: Site,
    upstream: Dictionary,
    row: int,
    columns: Tensor,
    a: Tensor,
    w: Tensor,
    constant: float,
) -> _Parts:
    """Split by (upstream feature, source); `a` is `[heads, sources]`, `w` `[heads, head_dim]`."""
    _check_upstream(model, where, upstream)
    x = trace[_sibling(where.name, "resid_pre")][row, columns]
    norm = FrozenNorm.of(model, where, x)
    site = model.resolve(_sibling(where.name, "attn.v"))[0]
    module = find(model.module, site.module)
    assert module is not None

    def read(u: Tensor, biased: bool = False) -> Tensor:
        """What each head's reading makes of normed directions `[n, d]`: `[n, heads]`."""
        try:
            bias = site.read(apply_linear(module, torch.zeros_like(u[:1])))
            value = bias if biased else site.read(apply_linear(module, u)) - bias
        except TypeError as error:
            raise InputError(f"{site.name} is not computed by one linear map ({error})") from error
        return torch.einsum("nhd,hd->nh", _per_head(value.double().cpu(), len(w)), w)

    codes = upstream.encode(x.to(upstream.atoms)).detach().flatten()
    atoms = upstream.atoms.detach()
    active = codes.active
    sources = torch.arange(len(columns)).unsqueeze(1).expand_as(active.cpu())[active.cpu()]
    features, strength = codes.indices[active].cpu(), codes.values[active].double().cpu()
    kinds, code = features.unique(return_inverse=True)
    scale = norm.inverse_scale  # [sources]
    if len(kinds):
        through = read(norm.direction(atoms[kinds.to(atoms.device)].to(x)))[code]  # [n, heads]
    else:
        through = torch.zeros(0, len(w), dtype=torch.float64)
    contributions = strength * scale[sources] * (a.T[sources] * through).sum(1)
    sparse = (codes.values.double().unsqueeze(-1) * atoms.double()[codes.indices]).sum(1)
    whole = upstream.decode(codes).double()

    def at_sources(u: Tensor) -> float:
        return float((a.T * read(norm.direction(u.to(x))) * scale.unsqueeze(1)).sum())

    rest = {
        "encoder": constant,
        "upstream error": at_sources(x.double() - whole.to(x.device)),
        "upstream offset": at_sources(whole - sparse),
        "norm bias": float((a.T * read(norm.bias.unsqueeze(0).to(x))).sum()),
        "value bias": float((a.T * read(x[:1], biased=True)).sum()),
    }
    return _Parts(contributions, sources=sources, features=features, rest=rest)


def _check_upstream(model: Model, where: Site, upstream: Dictionary) -> None:
    assert where.block is not None
    allowed = [_sibling(where.name, "resid_pre")]
    if where.block > 0:
        before = where.name.replace(f"blocks.{where.block}.", f"blocks.{where.block - 1}.")
        allowed.append(_sibling(before, "resid_post"))
    if model.resolve(upstream.site)[0].name not in allowed:
        raise InputError(
            f"upstream reads {upstream.site}; for {where.name} it must read {' or '.join(allowed)}"
        )


def z_site(lens: Dictionary, model: Model) -> Site:
    """Return the `attn.z` site of one block that a dictionary reads.

    Raises:
        SiteError: it reads something else.
    """
    found = model.resolve(lens.site)
    if len(found) != 1 or found[0].kind != "attn.z" or found[0].selector is not None:
        raise SiteError(f"{lens.site} is not the joined heads of one block; fit at 'blocks.5.attn.z'")
    return found[0]


def _sibling(site: str, kind: str) -> str:
    if not site.endswith(("attn.z", "attn.hook_z", "resid_post")):
        raise SiteError(f"{site} is not the joined heads of one block; fit at 'blocks.5.attn.z'")
    stem = site.removesuffix("attn.z").removesuffix("attn.hook_z").removesuffix("resid_post")
    return stem + kind


def _token(trace: Trace, row: int, dest: int) -> tuple[Tensor, int, tuple[str, ...]]:
    """Return the columns of a row's real tokens, the position of `dest` among them, and their text."""
    mask = trace.mask
    if mask is None:
        raise InputError("this trace has no tokens to attribute to")
    if not 0 <= row < len(mask):
        raise InputError(f"row is {row}; the trace has {len(mask)} rows")
    columns = mask[row].cpu().nonzero().squeeze(1)
    if not -len(columns) <= dest < len(columns):
        raise InputError(f"dest is {dest}; row {row} has {len(columns)} tokens")
    return columns, dest % len(columns), tuple(trace.token_strings(row))


def _per_head(v: Tensor, heads: int) -> Tensor:
    """Repeat `[n, kv_heads, d]` to `[n, heads, d]`: consecutive query heads share a value head."""
    return v if v.shape[1] == heads else v.repeat_interleave(heads // v.shape[1], dim=1)
