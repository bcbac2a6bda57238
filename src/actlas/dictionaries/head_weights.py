"""Which heads a latent of the joined head outputs z belongs to, by weights alone.

    p_ih = |W_dec[i, head h]| / sum_h' |W_dec[i, head h']|            1 / sum_h p_ih^2: over how many heads

Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders", section 4.2. A head
whose ten latents of most weight do different things is polysemantic; if all ten share one role, it is a
candidate for a monosemantic head. Ten latents can only disprove it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.layout import find, weight_matrix
from actlas.core.model import Model
from actlas.dictionaries.attention_output import z_site


def head_weights(lens: Dictionary, *, through: Model | None = None) -> Tensor:
    """Return how much each latent belongs to each head: `|W_dec[i, head h]| / sum_h' |W_dec[i, head h']|`.

    Args:
        lens: a dictionary at an `attn.z` site, fitted with its model (it knows its heads).
        through: weigh what the heads' parts write through this model's output projection instead; heads whose
            values differ in scale then compare fairly.

    Returns:
        `[features, heads]`; rows sum to 1 (0 for an atom without length).
    """
    atoms = _by_head(lens, lens.atoms.detach())
    if through is not None:
        where = z_site(lens, through)
        tower = through.tower
        assert tower is not None and where.block is not None
        project = find(through.block(where.block), tower.out_proj) if tower.out_proj else None
        if project is None:
            raise InputError(f"{through.name} has no output projection after {lens.site}")
        weight = weight_matrix(project).detach().to(atoms)  # [d_model, heads * head_dim]
        atoms = torch.einsum("nhd,ohd->nho", atoms, weight.unflatten(1, atoms.shape[1:]))
    norms = atoms.norm(dim=-1)
    return norms / norms.sum(1, keepdim=True).clamp_min(1e-30)


def participation_ratio(weights: Tensor) -> Tensor:
    """Return over how many heads each latent is spread: `1 / sum_h p_h^2`, from 1 to the number of heads."""
    return 1 / weights.square().sum(-1).clamp_min(1e-30)


@dataclass(frozen=True)
class HeadLatents:
    """The latents that have most of their weight on one head.

    Attributes:
        head: the head.
        latents: numbers, most weight first.
        weights: the share of each that lies on this head.
        roles: what a person (or a labeller) calls each latent; empty if no labels were given.
    """

    head: int
    latents: tuple[int, ...]
    weights: tuple[float, ...]
    roles: tuple[str, ...] = field(default=())

    @property
    def monosemantic_candidate(self) -> bool | None:
        """Whether all its latents share one role; `None` without roles. The paper's rule (section 4.2)."""
        return len(set(self.roles)) == 1 if self.roles else None


def latents_by_head(
    lens: Dictionary,
    n: int = 10,
    *,
    through: Model | None = None,
    labels: Mapping[int, str] | None = None,
    among: Sequence[int] | None = None,
) -> list[HeadLatents]:
    """Return, for every head, the `n` latents with most weight on it, to judge whether it has one role.

    Args:
        lens: a dictionary at an `attn.z` site.
        n: how many; the paper reads 10.
        through: see `head_weights`.
        labels: what each latent is about, by its number.
        among: only these latents, e.g. those that are not dead.

    Raises:
        InputError: `n` below 1, or a latent without a label when labels are given.
    """
    if n < 1:
        raise InputError(f"cannot read {n} latents a head; read at least 1")
    weights = head_weights(lens, through=through)
    chosen = (
        torch.arange(lens.features) if among is None else torch.tensor([lens.check_feature(i) for i in among])
    )
    found = []
    for head in range(weights.shape[1]):
        share, order = weights[chosen, head].sort(descending=True, stable=True)
        latents = tuple(chosen[order[:n]].tolist())
        missing = [i for i in latents if labels is not None and i not in labels]
        if missing:
            raise InputError(f"latent {missing[0]} has no label; label the {n} latents of every head")
        roles = tuple(labels[i] for i in latents) if labels is not None else ()
        found.append(HeadLatents(head, latents, tuple(share[:n].tolist()), roles))
    return found


def _by_head(lens: Dictionary, atoms: Tensor) -> Tensor:
    if lens.heads is None or atoms.shape[1] % lens.heads:
        raise InputError(
            f"this dictionary does not know the heads of {lens.site}; set its heads, e.g. heads=12"
        )
    return atoms.unflatten(1, (lens.heads, -1))
