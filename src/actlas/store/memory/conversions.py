"""Conversions between the kinds of memory.

    text -> activation        `activate`: prefill once, keep keys and values
    activation -> text        `write_out`: decode its tokens
    text, activation -> parametric   `distil`: edits that answer without the text as the model does with it
    parametric -> text        `write_down`: let the model say it under the edit

Distilling minimises, over vectors v_l that are added to the residual stream after every block l,

    mean over queries and their tokens of KL( p(. | memory, query) || p_v(. | query) )

which is the context distillation of Snell et al. 2022 with the smallest adapter there is. It holds for the
queries that it was given; its measurement says how much of the divergence it removed there.

Source: "MemOS" (2025), whose public code leaves the parametric kind open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.core.divergence import kl_divergence
from actlas.core.edit import Edit, compose
from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.store.memory.cube import MemoryCube
from actlas.store.memory.kv_block import KVBlock

if TYPE_CHECKING:
    from actlas.core.model import Model


def activate(model: Model, cube: MemoryCube, *, by: str) -> MemoryCube:
    """Return the next version of a text memory, as keys and values.

    Raises:
        InputError: it is not text.
        NotAllowed: it is not theirs to change.
    """
    text = cube.read(by)
    if not isinstance(text, str):
        raise InputError(f"the memory {cube.name!r} is {cube.kind}; only text can be prefilled")
    return cube.revise(KVBlock.build(model, text), by=by, origin="converted from text")


def write_out(model: Model, cube: MemoryCube, *, by: str) -> MemoryCube:
    """Return the next version of an activation memory, as text."""
    block = cube.read(by)
    if not isinstance(block, KVBlock):
        raise InputError(f"the memory {cube.name!r} is {cube.kind}; it holds no tokens to write out")
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so tokens cannot be written out")
    text = model.tokenizer.decode(list(block.ids), skip_special_tokens=True)
    return cube.revise(text, by=by, origin="converted from activation")


def distil(
    model: Model,
    cube: MemoryCube,
    queries: Sequence[str],
    *,
    by: str,
    steps: int = 60,
    rate: float = 0.02,
    seed: int = 0,
) -> MemoryCube:
    """Return the next version of a text or activation memory, as an edit (see the module docstring).

    Args:
        model: whose answers are distilled.
        cube: the memory.
        queries: what will be asked; text that follows the memory.
        by: who asks.
        steps: of Adam.
        rate: its rate, relative to the root mean square of the residual stream after each block.
        seed: kept for the record of the measurement; the fit is deterministic.

    Raises:
        InputError: no queries, a parametric memory, or a rate or number of steps that is not above 0.
    """
    payload = cube.read(by)
    if isinstance(payload, Edit):
        raise InputError(f"the memory {cube.name!r} is parametric already")
    if not queries:
        raise InputError("no query was given; distilling needs what will be asked")
    if steps < 1 or not rate > 0:
        raise InputError(f"steps is {steps} and rate {rate:g}; both must be above 0")
    block = KVBlock.build(model, payload) if isinstance(payload, str) else payload
    rows = [model.encode(q)["input_ids"] for q in queries]
    teacher = [block.extend(model, r[0].tolist())[0] for r in rows]
    sites = [f"blocks.{i}.resid_post" for i in range(model.n_blocks or 0)]
    sizes = model.trace(rows[0], sites)
    scales = [float(sizes[s][:, -1].float().square().mean().sqrt()) for s in sites]
    vectors = [torch.zeros(model.d_model or 0, dtype=model.dtype, requires_grad=True) for _ in sites]
    optimiser = torch.optim.Adam(
        [{"params": [v], "lr": rate * s} for v, s in zip(vectors, scales, strict=True)]
    )
    for _ in range(steps):
        optimiser.zero_grad()
        with model.edit(compose([Add(s, v) for s, v in zip(sites, vectors, strict=True)])):
            for row, wanted in zip(rows, teacher, strict=True):
                logits = model._call(model.encode(row), use_cache=False).logits[0]
                p = wanted.log_softmax(-1)
                loss = (p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean() / len(rows)
                loss.backward(inputs=vectors)
        optimiser.step()
    edit = compose([Add(s, v.detach().clone()) for s, v in zip(sites, vectors, strict=True)])
    before, after = _gap(model, rows, teacher, None), _gap(model, rows, teacher, edit)
    removed = Measurement(
        "divergence from the memory, removed",
        1 - after / before if before > 0 else float("nan"),
        "fraction",
        len(rows),
        seed=seed,
        better="higher",
        note=f"KL {before:.3g} without, {after:.3g} nats/token with the edit, on the fitted queries",
    )
    made = edit.bind(model.fingerprint).with_measurements([removed])
    return cube.revise(made, by=by, origin=f"converted from {cube.kind}")


def write_down(
    model: Model, cube: MemoryCube, prompt: str, *, by: str, max_new_tokens: int = 40
) -> MemoryCube:
    """Return the next version of a parametric memory: what the model says to a prompt under it."""
    edit = cube.read(by)
    if not isinstance(edit, Edit):
        raise InputError(f"the memory {cube.name!r} is {cube.kind}; only a parametric one is written down")
    with model.edit(edit):
        text = model.generate(prompt, max_new_tokens=max_new_tokens).texts[0]
    return cube.revise(prompt + text, by=by, origin="converted from parametric")


def _gap(model: Model, rows: Sequence[Tensor], teacher: Sequence[Tensor], edit: Edit | None) -> float:
    """Return the mean KL from the answers with the memory, in nats a token."""
    total = 0.0
    for row, wanted in zip(rows, teacher, strict=True):
        if edit is None:
            logits = model.logits(row)[0]
        else:
            with model.edit(edit):
                logits = model.logits(row)[0]
        total += float(kl_divergence(wanted, logits).mean()) / len(rows)
    return total
