"""Families of heads in a choice between labels, by where the last token looks, weighted by what it takes.

    share(s) = A[last, s] |W_O v_s| / sum_s' A[last, s'] |W_O v_s'|

| family | rule, over prompts with the right label at each place |
| --- | --- |
| correct label | the right label gets 0.15 more than the mean of the others |
| single label | the same, but one label alone makes 70% of that lead |
| uniform | all labels together get 0.4, the right one no such lead |
| amplification | the last three tokens get 0.5 |
| other | none of these |

Attention alone misleads where values are small (first tokens); weighting by the length of what is written
corrects that. A family says where a head looks, not why.

Source: Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?" (arXiv 2307.09458), section 3.3;
value-weighted attention after Kobayashi et al. 2020 (arXiv 2004.10102). The thresholds are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.head_subspace import check_positions, label_columns
from actlas.circuits.nodes import Node, head
from actlas.circuits.readers import readers_of
from actlas.core.errors import InputError
from actlas.core.intervals import bootstrap_mean
from actlas.core.measurement import Measurement
from actlas.core.methods import method

if TYPE_CHECKING:
    from actlas.core.model import Model

LEAD, ALONE, ALL, LAST = 0.15, 0.7, 0.4, 0.5
FINAL = 3


@dataclass(frozen=True, eq=False)
class HeadFamily:
    """Where one head looks.

    Attributes:
        head: the head.
        family: see the module docstring.
        right: share on the right label, `[n]` float64.
        others: share on the other labels together, `[n]`.
        final: share on the last three tokens, `[n]`.
        leads: how much more each label gets when it is right, `[labels]`.
    """

    head: Node
    family: str
    right: Tensor
    others: Tensor
    final: Tensor
    leads: Tensor

    @property
    def lead(self) -> float:
        """Share of the right label above the mean of the others."""
        return float((self.right - self.others / (len(self.leads) - 1)).mean())


def classify_heads(
    model: Model,
    pairs: PromptPairs,
    positions: Tensor,
    right: Tensor,
    *,
    heads: Sequence[Node] | None = None,
) -> list[HeadFamily]:
    """Return the family of every head (or of some), in the model's order.

    Args:
        model: a causal language model with a layout.
        pairs: prompts; the clean ones are read.
        positions: columns of the labels, int64 `[n, k]`, or `[n, k, m]` where several belong to each.
        right: which of the k labels is right, int64 `[n]`; every label must be right and wrong in some
            prompts.
        heads: only these.

    Raises:
        InputError: a label that is never, or always, right.
        ShapeError: positions of other prompts.
    """
    n, width = pairs.clean["input_ids"].shape
    places = check_positions(positions, n, width)
    k = positions.shape[1]
    counts = torch.bincount(right.cpu(), minlength=k)
    if k < 2 or len(counts) != k or int(counts.min()) == 0 or int(counts.max()) == n:
        raise InputError(
            f"the labels are right {counts.tolist()} times in {n} prompts; each must be right in some and"
            " wrong in others"
        )
    blocks = sorted({h.block for h in heads}) if heads is not None else list(range(model.n_blocks or 0))
    names = [f"blocks.{b}.{kind}" for b in blocks for kind in ("attn.pattern", "attn.v")]
    trace = model.trace(dict(pairs.clean), names, attention_rows=1)
    found = []
    for block in blocks:
        weight = readers_of(model, f"blocks.{block}.attn.z").matrix
        pattern = trace[f"blocks.{block}.attn.pattern"][:, :, -1].double().cpu()  # [n, heads, pos]
        shares = value_shares(pattern, trace[f"blocks.{block}.attn.v"], weight)
        flat = places.flatten(1)[:, None].expand(-1, shares.shape[1], -1)
        at_labels = shares.gather(2, flat).unflatten(2, (k, -1)).sum(3)  # [n, heads, k]
        for number in range(shares.shape[1]):
            node = head(block, number)
            if heads is None or any(h.site == node.site for h in heads):
                found.append(
                    _family(node, at_labels[:, number], shares[:, number, -FINAL:].sum(1), right.cpu())
                )
    return found


def value_shares(pattern: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Return value-weighted attention, float64 `[n, heads, pos]`; rows sum to 1.

    Args:
        pattern: attention of one query row, `[n, heads, pos]`.
        values: `[n, pos, groups, head_dim]`.
        weight: the output projection `[d, heads * head_dim]`.
    """
    heads, groups = pattern.shape[1], values.shape[2]
    each = values.double().cpu().repeat_interleave(heads // groups, 2)  # [n, pos, heads, head_dim]
    by_head = weight.double().cpu().unflatten(1, (heads, -1))
    gram = torch.einsum("dhk,dhl->hkl", by_head, by_head)
    length = torch.einsum("nphk,hkl,nphl->nhp", each, gram, each).clamp_min(0).sqrt()
    shares = pattern.double().cpu() * length
    return shares / shares.sum(-1, keepdim=True).clamp_min(1e-300)


def _family(node: Node, at_labels: Tensor, final: Tensor, right: Tensor) -> HeadFamily:
    k = at_labels.shape[1]
    mine = at_labels.gather(1, right[:, None])[:, 0]
    others = at_labels.sum(1) - mine
    when = torch.nn.functional.one_hot(right, k).bool()
    leads = torch.stack(
        [at_labels[when[:, j], j].mean() - at_labels[~when[:, j], j].mean() for j in range(k)]
    )
    lead = float((mine - others / (k - 1)).mean())
    if lead >= LEAD:
        positive = leads.clamp_min(0)
        alone = float(positive.max() / positive.sum().clamp_min(1e-300)) >= ALONE
        family = "single label" if alone else "correct label"
    elif float((mine + others).mean()) >= ALL:
        family = "uniform"
    elif float(final.mean()) >= LAST:
        family = "amplification"
    else:
        family = "other"
    return HeadFamily(node, family, mine, others, final, leads)


@method(
    "head-families",
    room="circuits",
    returns="Measurement",
    data="task",
    summary="which heads look at the right label of a lettered choice, at all labels, or at the last tokens",
    example="actlas fit head-families smollm2 multiple-choice",
    papers=("chinchilla-mcq-circuits",),
)
def fit_head_families(
    model: Model, data: Any, *, labels: str = "A B C D", prompts: int = 32, top: int = 10, seed: int = 0
) -> tuple[Measurement, ...]:
    """Return the heads with the largest lead of the right label, and their families.

    Args:
        model: a causal language model with a tokenizer.
        data: a task with lettered options.
        labels: the options' labels, with spaces between.
        prompts: at most so many, of those that the model answers rightly.
        top: how many heads are returned.
        seed: of the intervals.
    """
    pairs = PromptPairs.from_task(model, data, n=prompts, seed=seed, correct_only=True)
    names = labels.split()
    columns = label_columns(pairs, names)
    said = [pairs.decode(i).strip() if pairs.decode else "" for i in pairs.answer_ids.tolist()]
    missing = [s for s in said if s not in names]
    if missing:
        raise InputError(f"the answer {missing[0]!r} is none of the labels {labels}; give the task's labels")
    families = classify_heads(model, pairs, columns, torch.tensor([names.index(s) for s in said]))
    families.sort(key=lambda f: -f.lead)
    found = []
    for f in families[:top]:
        x = (f.right - f.others / (len(names) - 1)).numpy()
        low, high = bootstrap_mean(x, seed=seed) if len(x) > 1 else (float("nan"),) * 2
        found.append(
            Measurement(
                "lead of the right label", float(x.mean()), "share of attention", len(x), low, high,
                "bootstrap over prompts", seed, group={"component": f.head.label, "family": f.family},
                note="value-weighted attention from the last token",
            )
        )  # fmt: skip
    return tuple(found)
