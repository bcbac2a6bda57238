"""How well a dictionary reconstructs, told apart by kind of token, role and position.

    mse  = mean over conversations c of mean over its tokens t of |x_t - x_hat_t|^2 / d
    nmse = sum_t |x_t - x_hat_t|^2 / sum_t |x_t - m|^2          m: mean of the ordinary rows

`mse` is the metric of FAST (Li et al. 2025, section 4), which prints its base-2 logarithm; here both are
given, the value linear and the logarithm in `details["log2"]`. `nmse` is the fraction of variance left
unexplained.

Massive rows (the attention sink, usually a sequence's first token) have a squared norm thousands of times
the others', and alone decide any mean they are in. They are a slice of their own, `tokens=massive`; the
other slices are without them unless `massive="included"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.trace import Trace
from actlas.dictionaries.conversations import TEXT, TokenRows
from actlas.dictionaries.conversations import massive as massive_activations
from actlas.measure.samples import mean_measurement, missing

By = Literal["special", "role", "position"]
_BOUNDS = (1, 4, 16, 64, 256, 1024)  # positions are binned by powers of four


def reconstruction(
    lens: Dictionary,
    rows: TokenRows | Trace,
    by: By | None = None,
    *,
    massive: Literal["apart", "included"] = "apart",
    seed: int = 0,
) -> list[Measurement]:
    """Measure the reconstruction error, over all tokens and over slices.

    Args:
        lens: the dictionary.
        rows: from `token_rows`; or a trace that holds the lens's site.
        by: `"special"` (the template's tokens and the others), `"role"`, or `"position"` in the sequence.
        massive: see the module's text.
        seed: of the bootstrap over conversations.

    Returns:
        For each slice `reconstruction-mse` and `reconstruction-nmse`, with the slice in `group["tokens"]`:
        first `all`, then the slices, last `massive` if there are such rows.

    Raises:
        InputError: an unknown `by`, or a trace that does not know roles or special tokens.
        ShapeError: rows of another width than the dictionary's.
    """
    held = rows_of_trace(rows, lens.site) if isinstance(rows, Trace) else rows
    if by not in (None, "special", "role", "position"):
        raise InputError(f"by is {by!r}; it must be 'special', 'role' or 'position'")
    if massive not in ("apart", "included"):
        raise InputError(f"massive is {massive!r}; it must be 'apart' or 'included'")
    squares = squared_errors(lens, held.x)
    ordinary = ~held.massive
    centre = held.x[ordinary if bool(ordinary.any()) else slice(None)].double().mean(0)
    spread = torch.cat([(part.double() - centre).square().sum(1) for part in held.x.split(4096)])
    counted = ordinary if massive == "apart" else torch.ones_like(ordinary)
    found: list[Measurement] = []
    for name, where in _slices(held, by):
        found += _measure(lens.channels, squares, spread, held.conversation, where & counted, name, seed)
    if bool(held.massive.any()):
        found += _measure(lens.channels, squares, spread, held.conversation, held.massive, "massive", seed)
    return found


@torch.no_grad()
def squared_errors(lens: Dictionary, x: Tensor) -> Tensor:
    """Return the squared reconstruction error of each row, summed over channels, float64 `[n]`."""
    return torch.cat([(p.double() - lens.reconstruct(p).double()).square().sum(1) for p in x.split(4096)])


def rows_of_trace(trace: Trace, site: str) -> TokenRows:
    """Return a trace's rows of one site; special tokens are the tokenizer's, roles are not known."""
    mask, tokens = trace.mask, trace.tokens
    if mask is None or tokens is None:
        raise InputError(f"this trace has no tokens, so the rows of {site} cannot be told apart")
    mask = mask.cpu()
    x = trace.rows(site).flatten(1).detach().float().cpu()
    place = (mask.cumsum(1) - 1)[mask]
    ids = tokens.cpu()[mask]
    tokenizer = getattr(trace._model, "tokenizer", None)
    special = torch.isin(ids, torch.tensor(getattr(tokenizer, "all_special_ids", []), dtype=ids.dtype))
    conversation = torch.arange(len(mask)).unsqueeze(1).expand_as(mask)[mask]
    role = torch.zeros_like(place)
    return TokenRows(
        site, x, ids, special, role, place, place, conversation, massive_activations(x), (TEXT,), "trace"
    )


def _slices(rows: TokenRows, by: By | None) -> Iterator[tuple[str, Tensor]]:
    yield "all", torch.ones_like(rows.special)
    if by == "special":
        yield "special", rows.special
        yield "other", ~rows.special
    elif by == "role":
        for number, role in enumerate(rows.roles):
            yield role, rows.role == number
    elif by == "position":
        bins = torch.bucketize(rows.place, torch.tensor(_BOUNDS), right=True)
        for number in bins.unique().tolist():
            low = 0 if number == 0 else _BOUNDS[number - 1]
            high = f"-{_BOUNDS[number] - 1}" if number < len(_BOUNDS) else "+"
            yield ("0" if number == 0 else f"{low}{high}"), bins == number


def _measure(
    channels: int, squares: Tensor, spread: Tensor, conversation: Tensor, where: Tensor, name: str, seed: int
) -> list[Measurement]:
    group = {"tokens": name}
    names = ("reconstruction-mse", "squared units of the site"), ("reconstruction-nmse", "fraction")
    if not bool(where.any()):
        return [missing(n, unit, "no such tokens", group=group) for n, unit in names]
    source = conversation[where].numpy()
    _, code, count = np.unique(source, return_inverse=True, return_counts=True)
    errors = np.bincount(code, weights=squares[where].numpy())
    spreads = np.bincount(code, weights=spread[where].numpy())
    details = {"rows": int(where.sum())}
    over = "conversations"
    mse = mean_measurement(
        names[0][0], names[0][1], errors / count / channels,
        seed=seed, over=over, better="lower", group=group, details=details,
    )  # fmt: skip
    nmse = mean_measurement(
        names[1][0], names[1][1], np.divide(errors, spreads, out=np.zeros_like(errors), where=spreads > 0),
        spreads, seed=seed, over=over, better="lower", group=group, details=details,
    )  # fmt: skip
    return [_with_log(m) for m in (mse, nmse)]


def _with_log(m: Measurement) -> Measurement:
    log = math.log2(m.value) if m.value > 0 else None
    return replace(m, details={**m.details, "log2": log})
