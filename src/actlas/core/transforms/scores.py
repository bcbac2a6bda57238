"""Find q-k slots: which scales of queries and keys cancel in the attention scores.

    s_i q_i * k_i / s_i = q_i k_i        with rotary positions only if both channels of a pair share s

Which channels form a rotary pair (halves, neighbours, only a part of the head, none) is tried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.layout import weight_matrix
from actlas.core.model import Model
from actlas.core.transforms.dataflow import Flow
from actlas.core.transforms.probing import Outcome, Trial, run_trials

if TYPE_CHECKING:
    from actlas.core.transforms.slots import Slots

#: Largest relative change of what attention gives that counts as none, in float32.
_STILL = 1e-4


def score_slots(
    model: Model,
    inputs: Mapping[str, Any],
    flow: Flow,
    mixed: Mapping[str, Sequence[str]],
    heads: Mapping[str, int],
    out: Slots,
) -> None:
    """Add the q-k slot of each attention; `mixed` names what else its output projection depends on."""
    from actlas.core.transforms.slots import Refused, Slot

    ready: list[tuple[str, str, str]] = []
    for reader, others in mixed.items():
        where = f"{', '.join(others) or 'nothing'} -> {reader}"
        if norms := [p for p in others if p in flow.norms]:
            reason = f"{norms[0]} normalises before the product, so a scale has no effect"
            out.refused.append(Refused("qk", where, reason))
        elif len(others) != 2:
            reason = "queries and keys do not come from two linear maps of their own"
            out.refused.append(Refused("qk", where, reason))
        else:
            first, second = sorted(others, key=lambda p: -weight_matrix(flow.linears[p]).shape[0])
            ready.append((first, second, reader))
    done: set[str] = set()
    open_ = [p for p in ready if _fits(flow, p, heads.get(p[2], 0))]
    for number in range(7):
        tried = [(p, heads[p[2]], t) for p in open_ for t in _ties(heads[p[2]])[number : number + 1]]
        outcomes = run_trials(model, inputs, [_trial(flow, *t) for t in tried])
        for (pair, head, tied), outcome in zip(tried, outcomes, strict=True):
            if not _difference(outcome) <= (_STILL if model.dtype == torch.float32 else 100 * _STILL):
                continue
            done.add(pair[2])
            n_q, n_k = (weight_matrix(flow.linears[p]).shape[0] for p in pair[:2])
            free = int(tied.max()) + 1
            whole = torch.cat([tied + g * free for g in range(n_k // head)])
            index = _key_of_query(n_q, n_k, head)
            rows = torch.arange(n_k)
            out.found.append(
                Slot(
                    "qk",
                    pair[0],
                    (pair[1],),
                    int(whole.max()) + 1,
                    rows,
                    index,
                    groups=n_k // head,
                    tied=whole,
                )
            )
        open_ = [p for p in open_ if p[2] not in done]
    for pair in ready:
        if pair[2] not in done:
            where = f"{pair[0]}, {pair[1]} -> {pair[2]}"
            out.refused.append(Refused("qk", where, "no pairing of channels keeps the scores"))


def _key_of_query(q: int, k: int, head: int) -> Tensor:
    repeat = q // k
    j = torch.arange(q)
    return (j // head // repeat) * head + j % head


def _fits(flow: Flow, pair: tuple[str, str, str], head: int) -> bool:
    n_q, n_k = (weight_matrix(flow.linears[p]).shape[0] for p in pair[:2])
    return head > 0 and n_k % head == 0 and n_q % n_k == 0


def _ties(head: int) -> list[Tensor]:
    """Return which free scale each channel of a head takes, the freest first."""
    out = [torch.arange(head)]
    for part in (head // 4, head // 2, head):  # rotary positions may turn only a part of each head
        if part >= 2 and part % 2 == 0:
            half = torch.arange(part // 2)
            rest = torch.arange(part // 2, part // 2 + head - part)
            out += [torch.cat([half, half, rest]), torch.cat([half.repeat_interleave(2), rest])]
    return [out[0], *out[-2:], *out[1:-2]]


def head_widths(
    model: Model, inputs: Mapping[str, Any], flow: Flow, asked: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Return the width of a head of each attention, 0 where it cannot be told.

    One channel of the queries is turned around; the inputs of the output projection that move are its head.

    Args:
        model, inputs, flow: as for `score_slots`.
        asked: output projection -> what it depends on.
    """
    probes: list[tuple[str, Trial]] = []
    for reader, sources in asked.items():
        linear = [p for p in sources if p in flow.linears]
        linear += [q for p in sources if p in flow.norms for q in flow.read(p).modules if q in flow.linears]
        for path in linear[:1]:
            scale = torch.ones(weight_matrix(flow.linears[path]).shape[0], dtype=torch.float64)
            scale[0] = -3.0
            probes.append((reader, Trial(outputs={path: scale}, watch=reader)))
    out = dict.fromkeys(asked, 0)
    for (reader, _), outcome in zip(probes, run_trials(model, inputs, [t for _, t in probes]), strict=True):
        assert outcome.before is not None and outcome.after is not None
        moved = (outcome.after - outcome.before).abs().amax(0) > 1e-5 * outcome.before.abs().max()
        n = len(moved)
        last = int(moved.nonzero().max()) + 1 if bool(moved.any()) else 0
        width = min((h for h in range(2, n + 1) if n % h == 0 and h >= last), default=0) if last > 1 else 0
        if width and (not out[reader] or width < out[reader]):
            out[reader] = width
    return out


def _trial(flow: Flow, pair: tuple[str, str, str], head: int, tied: Tensor) -> Trial:
    n_q, n_k = (weight_matrix(flow.linears[p]).shape[0] for p in pair[:2])
    generator = torch.Generator().manual_seed(11)
    groups = n_k // head
    free = torch.exp(1.5 * torch.randn(groups, int(tied.max()) + 1, generator=generator, dtype=torch.float64))
    key = free[:, tied].flatten()
    return Trial(outputs={pair[0]: 1 / key[_key_of_query(n_q, n_k, head)], pair[1]: key}, watch=pair[2])


def _difference(outcome: Outcome) -> float:
    assert outcome.before is not None and outcome.after is not None
    return float((outcome.after - outcome.before).abs().max() / outcome.before.abs().max().clamp_min(1e-30))
