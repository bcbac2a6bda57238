"""Rewards and advantages for learning to answer right *and* briefly, from groups of sampled answers.

Among the answers to one prompt, with lengths L and L_max, L_min over the right ones,

    r_i = 1 + beta (L_max - L_i) / (L_max - L_min + 1)     if answer i is right, else 0
    A_i = (r_i - mean r) / (std r + 1e-6)                  (group relative, GRPO)
    loss = -mean_i A_i mean_t log pi(token_t of answer i)

so a wrong answer never outranks a right one, and right answers of equal length are told nothing about
length. After Self-Rewarded Efficiency RL (Exploring and Exploiting the Inherent Efficiency within Large
Reasoning Models); its formula was not seen, this is the reading of its description. A small reference, not
a trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actlas.core.errors import InputError, ShapeError


def brevity_rewards(lengths: Sequence[int], right: Sequence[bool], beta: float = 0.5) -> Tensor:
    """Return the reward of each answer of one group, float64 `[n]`.

    Args:
        lengths: tokens of each answer, at least 1.
        right: whether each is right.
        beta: weight of brevity; 0 rewards rightness alone.

    Raises:
        InputError: an empty group, lists of different lengths, a length below 1 or a negative beta.
    """
    if not lengths or len(lengths) != len(right):
        raise InputError(f"a group needs as many lengths as verdicts, not {len(lengths)} and {len(right)}")
    if min(lengths) < 1 or beta < 0:
        raise InputError(f"lengths must be at least 1 and beta at least 0, not {min(lengths)} and {beta:g}")
    length = torch.tensor(lengths, dtype=torch.float64)
    correct = torch.tensor([bool(r) for r in right])
    if not bool(correct.any()):
        return torch.zeros(len(lengths), dtype=torch.float64)
    longest, shortest = length[correct].max(), length[correct].min()
    reward = 1 + beta * (longest - length) / (longest - shortest + 1)
    return torch.where(correct, reward, torch.zeros_like(reward))


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Return `(r - mean) / (std + eps)` along the last axis; a group of equal rewards gives exactly 0.

    Raises:
        ShapeError: a group of one, which has nothing to be compared with.
    """
    if rewards.ndim < 1 or rewards.shape[-1] < 2:
        raise ShapeError(f"rewards must be [..., group] with groups of at least 2, not {list(rewards.shape)}")
    centred = rewards - rewards.mean(-1, keepdim=True)
    same = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    return torch.where(same, torch.zeros_like(centred), centred / (rewards.std(-1, keepdim=True) + eps))


def group_policy_step(rewards: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the policy loss of one group of answers.

    Args:
        rewards: `[n]`.
        log_probs: log probabilities of the answers' tokens under the policy, `[n, t]`, with a graph.
        mask: bool `[n, t]`, True at the answers' own tokens.

    Raises:
        ShapeError: shapes that do not fit.
        InputError: an answer without tokens.
    """
    if log_probs.shape != mask.shape or log_probs.ndim != 2 or rewards.shape != log_probs.shape[:1]:
        shapes = f"{list(rewards.shape)}, {list(log_probs.shape)} and {list(mask.shape)}"
        raise ShapeError(f"a group is rewards [n] with log_probs and mask [n, t], not {shapes}")
    weight = mask.to(log_probs.dtype)
    counts = weight.sum(1)
    if not bool((counts > 0).all()):
        raise InputError(f"answer {int((counts == 0).nonzero()[0])} has no tokens; leave it out")
    advantage = group_advantages(rewards.to(log_probs.dtype)).detach()
    return -(advantage * (log_probs * weight).sum(1) / counts).mean()
