"""What a head reads, in a few dimensions: its queries, keys and values on low-rank subspaces.

    space = head_subspace(model, head(20, 3), pairs, positions, rank=3)
    space.z(OneAttention(model, pairs.clean, 20), positions)      # the head's output, read in 3 dimensions

Keys at the positions that matter (the labels of a lettered choice), centred over the positions of their
prompt, span a subspace; so do the queries at the last token, centred over prompts, and the values. Of each,
what lies outside the top r singular directions is set to its mean:

    q -> m_q + B_q B_q' (q - m_q)           k, v at the positions likewise

Queries and keys are changed before rotation, and the head alone sees the change: `z` recomputes this head
and leaves those that share its keys and values as they were. `edit()`, which acts on the model itself,
cannot: it changes keys and values for the whole group, at every token, and says so.

Source: Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?" (arXiv 2307.09458), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.nodes import Node
from actlas.circuits.one_attention import OneAttention
from actlas.circuits.readers import readers_of
from actlas.core.edit import compose
from actlas.core.errors import InputError, ShapeError
from actlas.core.pca import PCA

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.fingerprint import Fingerprint
    from actlas.core.model import Model

PARTS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class HeadSubspace:
    """Subspaces of one head.

    Attributes:
        head: the head.
        group: the key-value head that it reads.
        bases: part (`q`, `k`, `v`) -> orthonormal columns, float32 `[head_dim, rank]`.
        means: part -> float32 `[m, head_dim]`, one for each of the m columns that an option may have.
        values: part -> singular values of what was centred, largest first.
        fingerprint: of the model.
    """

    head: Node
    group: int
    bases: dict[str, Tensor]
    means: dict[str, Tensor]
    values: dict[str, Tensor]
    fingerprint: Fingerprint | None = None

    @property
    def rank(self) -> int:
        """Dimensions of each subspace."""
        return max(b.shape[1] for b in self.bases.values())

    def only(self, parts: str) -> HeadSubspace:
        """Return the same with only some of `q`, `k`, `v` compressed.

        Raises:
            InputError: an unknown part, or one that was not fitted.
        """
        wrong = [p for p in parts if p not in self.bases]
        if wrong or not parts:
            raise InputError(f"parts is {parts!r}; it can hold {', '.join(self.bases)}")
        kept = dict.fromkeys(parts)
        return replace(self, bases={p: self.bases[p] for p in kept}, means={p: self.means[p] for p in kept})

    def random(self, seed: int = 0) -> HeadSubspace:
        """Return subspaces of the same rank that point anywhere, with the same means: the control."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {p: torch.randn(*b.shape, generator=generator) for p, b in self.bases.items()}
        return replace(self, bases={p: torch.linalg.qr(x).Q for p, x in drawn.items()})

    def project(self, part: str, x: Tensor) -> Tensor:
        """Return queries, keys or values `[..., m, head_dim]` with all but the subspace at its mean."""
        basis, mean = self.bases[part].to(x), self.means[part].to(x)
        return mean + ((x - mean) @ basis) @ basis.T

    def z(self, attention: OneAttention, positions: Tensor) -> Tensor:
        """Return the head's output at the last token `[n, head_dim]` under compression.

        Args:
            attention: the head's attention on the prompts to test.
            positions: columns `[n, k]` or `[n, k, m]` whose keys and values are compressed.

        Raises:
            InputError: the attention of another block.
            ShapeError: positions of other prompts.
        """
        if attention.block != self.head.block:
            raise InputError(f"{self.head.label} is not in block {attention.block}; run its own attention")
        n, width = attention.values["attn.q"].shape[:2]
        places = check_positions(positions, n, width)
        index, group = self.head.index or 0, self.group
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        if "q" in self.bases:

            def query(x: Tensor) -> Tensor:
                y = x.clone()
                y[:, -1, index] = self.project("q", x[:, -1, index, None])[:, 0]
                return y

            changes["attn.q"] = query
        for part in ("k", "v"):
            if part in self.bases:

                def at_positions(x: Tensor, part: str = part) -> Tensor:
                    y, rows = x.clone(), torch.arange(n, device=x.device)[:, None, None]
                    y[rows, places, group] = self.project(part, x[rows, places, group])
                    return y

                changes[f"attn.{part}"] = at_positions
        return attention.z(changes)[:, -1, index]

    def edit(self) -> Edit:
        """Return the compression as an edit of the model.

        It compresses queries of this head, and keys and values of its whole group, at every token; scope it
        with `.at(positions=...)` or `.at(tokens=...)`.
        """
        parts = []
        for part, basis in self.bases.items():
            number = self.head.index if part == "q" else self.group
            lens = PCA(
                site=f"blocks.{self.head.block}.attn.{part}[head={number}]", mean=self.means[part].mean(0),
                components=basis.T.contiguous(), variance=torch.zeros(basis.shape[1]), total=0.0, count=0,
                fingerprint=self.fingerprint,
            )  # fmt: skip
            parts.append(lens.substitute())
        return compose(parts)


def head_subspace(
    model: Model,
    head: Node,
    pairs: PromptPairs,
    positions: Tensor,
    *,
    rank: int = 3,
    parts: str = "qkv",
    attention: OneAttention | None = None,
) -> HeadSubspace:
    """Fit a head's subspaces on the clean prompts.

    Args:
        model: a causal language model with a layout.
        head: one head's node.
        pairs: prompts; fit on some and test on others.
        positions: int64 `[n, k]`, columns of the k options that the head chooses between, or `[n, k, m]`, m
            columns of each (its label and its word, say).
        rank: dimensions of each subspace.
        parts: which of `q`, `k`, `v` to compress.
        attention: the head's attention on these prompts, if it was run already.

    Raises:
        InputError: a node that is no head, fewer than two positions or prompts, or a rank outside 1 to
            head_dim (what was centred may span fewer; the rest is then any direction across it).
        ShapeError: positions of other prompts.
    """
    if head.kind != "attn.z" or head.index is None:
        raise InputError(f"{head.label} is no head; name one with head(block, number)")
    model.resolve(head.site)
    run = attention or OneAttention(model, pairs.clean, head.block)
    q, k, v = (run.values[f"attn.{p}"] for p in PARTS)
    n, width, heads, size = q.shape
    places = check_positions(positions, n, width).to(q.device)
    if n < 2 or positions.shape[1] < 2:
        raise InputError(
            f"{n} prompts with {positions.shape[1]} positions span nothing; give at least 2 of each"
        )
    if not 1 <= rank <= size:
        raise InputError(f"rank is {rank}; heads of {model.name} have 1 to {size} dimensions")
    if not parts or any(p not in PARTS for p in parts):
        raise InputError(f"parts is {parts!r}; it can hold q, k and v")
    group = head.index // (heads // k.shape[2])
    rows = torch.arange(n, device=q.device)[:, None, None]
    read = {"q": q[:, -1, head.index, None], "k": k[rows, places, group], "v": v[rows, places, group]}
    bases, means, values = {}, {}, {}
    for part in dict.fromkeys(parts):
        x = read[part].double()
        mean = x.mean(0) if part == "q" else x.mean((0, 1))  # [m, head_dim]
        centred = x - (mean if part == "q" else x.mean(1, keepdim=True))
        _, s, directions = torch.linalg.svd(centred.reshape(-1, size), full_matrices=True)
        bases[part], means[part], values[part] = directions[:rank].T.float(), mean.float(), s.float()
    return HeadSubspace(head, group, bases, means, values, model.fingerprint)


def head_logits(model: Model, head: Node, z: Tensor, rows: Tensor) -> Tensor:
    """Return what a head's outputs `[n, head_dim]` write on functionals `rows` `[n, k, d]`: float64 `[n, k]`.

    With `node_effects.label_rows` these are the centred logits of the labels that the head alone gives.

    Raises:
        ShapeError: outputs of another width, or rows of other prompts.
    """
    out = readers_of(model, head.site).matrix.cpu()  # [d, head_dim]
    if z.ndim != 2 or z.shape[1] != out.shape[1] or len(rows) != len(z):
        raise ShapeError(f"outputs are [{len(rows)}, {out.shape[1]}], not {list(z.shape)}")
    return torch.einsum("nkd,nd->nk", rows, z.double().cpu() @ out.T)


def check_positions(positions: Tensor, n: int, width: int) -> Tensor:
    """Return columns of prompts `[n, width]` as `[n, k, m]`; raise unless they are."""
    if positions.ndim not in (2, 3) or len(positions) != n:
        raise ShapeError(f"positions are [{n}, k] or [{n}, k, m], not {list(positions.shape)}")
    if int(positions.min()) < 0 or int(positions.max()) >= width:
        raise InputError(f"position {int(positions.max())} lies outside prompts of {width} columns")
    return positions if positions.ndim == 3 else positions.unsqueeze(-1)


def label_columns(pairs: PromptPairs, labels: list[str]) -> Tensor:
    """Return where each label stands in the clean prompts, int64 `[n, labels]`.

    It is the last token that is the label and nothing else, spaces apart, so that a question before the
    options may use the same letter.

    Raises:
        InputError: no tokenizer, or a prompt without one of the labels as a token of its own.
    """
    if pairs.decode is None:
        raise InputError("these pairs know only token ids; find the labels' columns yourself")
    ids, mask = pairs.clean["input_ids"], pairs.clean["attention_mask"].bool()
    known = {i: pairs.decode(i).strip() for i in ids[mask].unique().tolist()}
    found = torch.empty(len(ids), len(labels), dtype=torch.int64)
    for j, label in enumerate(labels):
        same = torch.isin(
            ids, torch.tensor([i for i, text in known.items() if text == label], device=ids.device)
        )
        same &= mask
        if not bool(same.any(1).all()):
            row = int((~same.any(1)).nonzero()[0])
            raise InputError(f"prompt {row} has no token {label!r} of its own; give the columns yourself")
        found[:, j] = (ids.shape[1] - 1 - same.flip(1).to(torch.int8).argmax(1)).cpu()
    return found
