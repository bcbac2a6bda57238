"""EdgeQAT's losses: keep queries and keys spread out, attention maps like the teacher's, outputs like its
own.

    attention_entropy     -mean over rows of 1/2 log(1 + var(q)), the same for k; with `reference`, only what
                          is missing to the teacher's: mean of max(0, 1/2 log(1 + var_t) - 1/2 log(1 + var_s))
    attention_similarity  1 - mean over layers and heads of cos(student's score map, teacher's)
    distillation          1/2 CE + 1/2 T^2 KL(softmax(mean teacher logits / T) || softmax(student logits / T))

A Gaussian's entropy is 1/2 log(2 pi e var), so its variance over the channels of a head stands for it. It
grows
without bound by scaling q and k, and a cosine does not see that: hence `reference`. Masked scores are left
    out.

`official=True` gives the forms of the released code, for comparison: both take a logarithm of one sum over
layers, heads and tokens (so that gradients shrink with batch and depth), and the similarity enters with a
plus sign, so that minimising it makes the maps *less* alike.

Source: Shen et al. 2024, "EdgeQAT: Entropy and Distribution Guided Quantization-Aware Training", and its
    code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.errors import InputError, NonFiniteError

_MASKED = -1e4


def attention_entropy(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    reference: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    official: bool = False,
) -> Tensor:
    """Return the entropy loss.

    Args:
        queries, keys: one tensor a layer, `[batch, pos, heads, head_dim]`.
        reference: the teacher's queries and keys; see the module's text.
        official: the released form.

    Raises:
        InputError: no layers, or another number of keys.
    """
    if not queries or len(queries) != len(keys):
        raise InputError(f"{len(queries)} layers of queries and {len(keys)} of keys; one each, at least one")
    both = [*queries, *keys]
    if official:
        total = torch.stack([torch.log1p(x.float().var(-1)).sum() for x in both]).sum()
        return -0.5 * torch.log(total)
    rows = [0.5 * torch.log1p(x.float().var(-1)) for x in both]
    if reference is None:
        return -torch.stack([r.mean() for r in rows]).mean()
    wanted = [0.5 * torch.log1p(x.detach().float().var(-1)) for x in (*reference[0], *reference[1])]
    return torch.stack([F.relu(w - r).mean() for r, w in zip(rows, wanted, strict=True)]).mean()


def map_cosines(scores: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the cosines of score maps `[layers, batch, heads]`, masked entries left out.

    Args:
        scores, teacher: one tensor a layer, `[batch, heads, query, key]`, before the softmax.

    Raises:
        InputError: other numbers of layers.
    """
    if not scores or len(scores) != len(teacher):
        raise InputError(f"{len(scores)} layers of scores and {len(teacher)} of the teacher's; one each")
    found = []
    for a, b in zip(scores, teacher, strict=True):
        seen = (a > _MASKED) & (b > _MASKED)
        a, b = (torch.where(seen, x, torch.zeros_like(x)).flatten(2).float() for x in (a, b))
        found.append(F.cosine_similarity(a, b.detach(), dim=-1))
    return torch.stack(found)


def attention_similarity(
    scores: Sequence[Tensor], teacher: Sequence[Tensor], *, official: bool = False
) -> Tensor:
    """Return the similarity loss; see `map_cosines` for the arguments.

    Raises:
        InputError: other numbers of layers.
        NonFiniteError: the released form where the sum of cosines is not positive.
    """
    cosines = map_cosines(scores, teacher)
    if not official:
        return 1 - cosines.mean()
    total = cosines.sum()
    if float(total.detach()) <= 0:
        raise NonFiniteError(
            f"the sum of cosines is {float(total.detach()):.3g}, which has no logarithm; use official=False"
        )
    return torch.log(total)


def distillation(
    logits: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float = 2.0,
    share: float = 0.5,
) -> Tensor:
    """Return `(1 - share) CE + share T^2 KL`, over next tokens.

    Args:
        logits: the student's `[batch, pos, vocab]`.
        teachers: logits of each teacher, averaged; none: the cross-entropy alone.
        labels: token ids `[batch, pos]`.
        temperature: T, above 0.
        share: of the divergence, 0 to 1.

    Raises:
        InputError: a temperature or share out of range.
    """
    if not temperature > 0 or not 0 <= share <= 1:
        raise InputError(f"temperature={temperature:g}, share={share:g}: above 0, and from 0 to 1")
    z = logits[:, :-1].float().flatten(0, 1)
    ce = F.cross_entropy(z, labels[:, 1:].flatten())
    if not teachers or share == 0:
        return ce
    mean = torch.stack([t[:, :-1].detach().float().flatten(0, 1) for t in teachers]).mean(0)
    want, have = (F.log_softmax(x / temperature, -1) for x in (mean, z))
    kl = F.kl_div(have, want, reduction="batchmean", log_target=True)
    return (1 - share) * ce + share * temperature**2 * kl
