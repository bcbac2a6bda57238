"""Writing patches into a batch in which every row is another run: another prompt, another part.

Rows of one site are written together: whole sites, single heads, single channels, and features of a
dictionary (`x + (z' - z) d`, so that what the dictionary does not explain stays).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.circuits.nodes import Node
from actlas.circuits.sources import Source, at
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.dictionary import Dictionary


def write_nodes(
    jobs: Sequence[tuple[int, Node]],
    rows: Tensor,
    width: int,
    source: Source,
    pairs: PromptPairs,
    site: str,
    lens: Dictionary | None,
) -> Callable[[Tensor], Tensor]:
    """Return the function that writes all patches of one site.

    Args:
        jobs: (place in the batch, node); the nodes lie at this site.
        rows: the prompt of each place in the batch, `[B]`.
        width: the last columns that are run.
        source: what is written.
        pairs: the prompts.
        site: name of the site, without head or channel.
        lens: the dictionary of nodes with a feature.

    Returns:
        A function from activations `[B, width, ...]` to the patched ones.
    """
    groups: dict[str, list[tuple[int, Node]]] = defaultdict(list)
    for b, node in jobs:
        kind = "feature" if node.feature is not None else "whole" if node.index is None else "indexed"
        groups[kind].append((b, node))
    masks = {p: (at(pairs, p) & source.mask)[:, -width:] for p in {n.position for _, n in jobs}}
    device = rows.device

    def place(group: Sequence[tuple[int, Node]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return places in the batch, their prompts, and where they write, bool `[jobs, width]`."""
        b = torch.tensor([b for b, _ in group], device=device)
        mask = torch.stack([masks[n.position][r] for (_, n), r in zip(group, rows[b].tolist(), strict=True)])
        return b, rows[b], mask

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        if group := groups.get("whole"):
            b, r, mask = place(group)
            new = source.values(site)[r, -width:].to(x)
            x[b] = torch.where(_like(mask, new), new, x[b])
        if group := groups.get("indexed"):
            b, r, mask = place(group)
            i = torch.tensor([n.index for _, n in group], device=device)
            new = source.values(site)[r, -width:, i].to(x)  # [jobs, width, (head_dim)]
            x[b, :, i] = torch.where(_like(mask, new), new, x[b, :, i])
        if group := groups.get("feature"):
            b, r, mask = place(group)
            x.index_add_(
                0,
                b,
                _feature_change(group, r, mask, width, source, site, lens).to(x).reshape(-1, *x.shape[1:]),
            )
        return x

    return write


def _feature_change(
    group: Sequence[tuple[int, Node]],
    rows: Tensor,
    mask: Tensor,
    width: int,
    source: Source,
    site: str,
    lens: Dictionary | None,
) -> Tensor:
    """Return `(z' - z) d` of each job's feature, `[jobs, width, d]`."""
    if lens is None:
        raise InputError(f"a node names a feature at {site}, but no dictionary was given (lens)")
    now, new = source.codes(lens, site)
    j = torch.tensor([n.feature for _, n in group], device=rows.device)
    change = (new - now)[rows, -width:].gather(2, j[:, None, None].expand(-1, width, 1))
    return change * mask.unsqueeze(-1) * lens.atoms[j].unsqueeze(1)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (x.ndim - 2)))
