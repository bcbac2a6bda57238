"""Activation patching: put one part of a run into another run, and see what becomes of the answer.

    pairs = PromptPairs.from_task(model, "ioi", n=32)
    effects = patch(model, pairs, "components", mode="denoise")      # every head and every MLP
    effects = patch(model, pairs, "positions", mode="noise")         # the residual stream, layer by token
    effects = patch(model, pairs, [head(20, 3), mlp(21, "last")])    # parts of one's own

For each part and prompt the model is run with the part's activation replaced (`sources.py` says by what),
and the metric is read from the last token's logits. Exact, but not one forward pass per part: runs start at
the patched block and column (`prefix.py`), parts of one block share a batch, and only the logits that the
metric needs are computed. Of the last block only the last token matters.

Source: Vig et al. 2020 (arXiv 2004.12265); Meng et al. 2022 (arXiv 2202.05262); on modes and metrics
Heimersheim and Nanda 2024 (arXiv 2404.15255).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actlas.circuits.effects import Effects, Part, check_difference
from actlas.circuits.metrics import Metric, MetricFunction
from actlas.circuits.nodes import Node, Position, nodes
from actlas.circuits.prefix import SharedRun, Write
from actlas.circuits.sources import Mode, Source, at, read_both
from actlas.circuits.writing import write_nodes
from actlas.core.errors import InputError, SiteError
from actlas.core.layout import ATTENTION_KINDS
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.dictionary import Dictionary
    from actlas.core.model import Model
    from actlas.core.sites import Site

BATCH_TOKENS = 4096
_EARLY = frozenset({"resid_pre", "attn_norm", "attn.k", "attn.v"})
"""Kinds at which earlier tokens reach the last one through the attention of the same block."""


class PatchChangedNothing(UserWarning):
    """No patch changed any logit that the metric reads."""


@dataclass(frozen=True)
class Job:
    """One run: a part, a prompt, the first block and the number of last columns that must be run."""

    part: int
    row: int
    block: int
    width: int


def patch(
    model: Model,
    pairs: PromptPairs,
    over: str | Sequence[Part] = "components",
    *,
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    layers: Sequence[int] | None = None,
    positions: Position | Sequence[Position] | None = None,
    lens: Dictionary | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> Effects:
    """Patch parts of a model one at a time.

    Args:
        model: a causal language model; installed edits apply to both runs.
        pairs: clean and corrupted prompts.
        over: what to patch: a word (see `nodes.nodes`), nodes, or tuples of nodes that are patched together.
        mode: `"denoise"`, `"noise"`, `"resample"`, `"mean"` or `"zero"`; see `sources`.
        metric: `"logit_difference"`, `"log_prob"`, `"kl"`, or a function from logits and pairs to `[n]`.
        layers, positions: limits, where `over` is a word; every position of the prompts by default, one
            node for each of them with `over="positions"`.
        lens: the dictionary, where `over` is `"features"` or has nodes with features.
        seed: of resampling and of the intervals.
        batch_tokens: about how many tokens are run at once.

    Raises:
        InputError: nothing to patch, or a metric that does not tell clean from corrupted prompts.
        SiteError: a place that this model has not got.
    """
    parts = as_parts(model, pairs, over, layers=layers, positions=positions, lens=lens)
    sites = sites_of(model, parts)
    run, other_logits, source = read_both(model, pairs, sites.values(), mode, seed=seed)
    clean_logits = other_logits if mode == "denoise" else run.logits
    corrupt_logits = run.logits if mode == "denoise" else other_logits
    judge = Metric.of(metric, pairs, clean_logits)
    clean, corrupt = judge.whole(clean_logits), judge.whole(corrupt_logits)
    check_difference(clean, corrupt, judge.name)
    base = corrupt if mode == "denoise" else clean
    patched = base.repeat(len(parts), 1)
    plans = [_plan(p, i, run, pairs, source) for i, p in enumerate(parts)]
    batches = _batches([job for plan in plans for job in plan], batch_tokens)
    total = sum(len(b) * b[0].width * (run.blocks - b[0].block + 1) for b in batches)
    with progress("patching", total=total, unit="token blocks") as advance:
        for batch in batches:
            found = _run(run, source, pairs, parts, sites, lens, judge, batch)
            where = [j.part for j in batch], [j.row for j in batch]
            patched[where] = found.to(patched)
            advance(len(batch) * batch[0].width * (run.blocks - batch[0].block + 1))
    inert = (patched == base).all(1)
    return Effects(
        tuple(parts), patched.double().cpu(), clean.double().cpu(), corrupt.double().cpu(), mode, judge.name,
        judge.unit, "exact", model.name, pairs.task, inert.cpu(), seed, say_inert(inert, pairs),
    )  # fmt: skip


def as_parts(
    model: Model,
    pairs: PromptPairs,
    over: str | Sequence[Part],
    *,
    layers: Sequence[int] | None = None,
    positions: Position | Sequence[Position] | None = None,
    lens: Dictionary | None = None,
) -> list[Part]:
    """Return the parts that `over` means; see `patch`."""
    if not isinstance(over, str):
        parts = list(over)
        if not parts or any(isinstance(p, tuple) and not p for p in parts):
            raise InputError("there is nothing to patch; give at least one node")
        return parts
    if positions is None and over == "positions":
        widest = int((pairs.width - pairs.changed).max())
        positions = list(range(-widest, 0))
    return list(
        nodes(model, over, layers=layers, positions="all" if positions is None else positions, lens=lens)
    )


def sites_of(model: Model, parts: Iterable[Part]) -> dict[str, Site]:
    """Return the sites that parts lie at, without heads and channels, by name.

    Raises:
        SiteError: the model has not got one, or it is one that cannot be patched this way.
    """
    found: dict[str, Site] = {}
    for node in {n for part in parts for n in as_nodes(part)}:
        model.resolve(node.site)  # says which head or block does not exist
        name = node.site.split("[")[0]
        if name not in found:
            site = model.resolve(name)[0]
            if site.kind in ATTENTION_KINDS or site.block is None or site.kind.startswith("moe."):
                raise SiteError(
                    f"{name} cannot be patched token by token; patch attn.q, attn.k, attn.v or attn.z"
                )
            found[name] = site
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def say_inert(inert: Tensor, pairs: PromptPairs) -> tuple[str, ...]:
    """Return the notes of a run, and warn if no patch changed anything."""
    notes = [pairs.note] if pairs.note else []
    count = int(inert.sum())
    if count:
        what = "its activation was" if count == 1 else "their activations were"
        notes.append(
            f"{count} of {len(inert)} patches changed nothing: {what} the same in both runs, or cannot reach"
            " the last token"
        )
    if count == len(inert):
        warnings.warn(
            f"{'the patch' if count == 1 else 'every patch'} changed nothing",
            PatchChangedNothing,
            stacklevel=3,
        )
    return tuple(notes)


def as_nodes(part: Part) -> tuple[Node, ...]:
    return (part,) if isinstance(part, Node) else part


def _plan(part: Part, number: int, run: SharedRun, pairs: PromptPairs, source: Source) -> list[Job]:
    """Return one job for each prompt in which a part's patch can change the last token."""
    block = min(_start(n, run, alone=isinstance(part, Node)) for n in as_nodes(part))
    where = torch.stack([at(pairs, n.position) & source.mask for n in as_nodes(part)]).any(0)
    if all(n.block == run.blocks - 1 and n.kind not in _EARLY for n in as_nodes(part)):
        where = where & at(pairs, "last")
    first = where.to(torch.int8).argmax(1)
    jobs = []
    for row in where.any(1).nonzero()[:, 0].tolist():
        jobs.append(Job(number, row, block, run.width - run.first_column(int(first[row]))))
    return jobs


def _start(node: Node, run: SharedRun, *, alone: bool) -> int:
    """Return the first block to run: the next one where the patch changes only the stream between two."""
    return node.block + 1 if alone and _between(node, run) else node.block if run.shares else 0


def _between(node: Node, run: SharedRun) -> bool:
    tower = run.model.tower
    added = tower is not None and not tower.post_norm
    kinds = {"resid_post"} | ({"mlp.out"} if added else set())
    return run.shares and node.kind in kinds


def _batches(jobs: Sequence[Job], batch_tokens: int) -> list[list[Job]]:
    """Group jobs that start at the same block and column."""
    groups: dict[tuple[int, int], list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.block, job.width].append(job)
    batches = []
    for (_, width), group in sorted(groups.items()):
        size = max(1, batch_tokens // width)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def _run(
    run: SharedRun,
    source: Source,
    pairs: PromptPairs,
    parts: Sequence[Part],
    sites: dict[str, Site],
    lens: Dictionary | None,
    judge: Metric,
    batch: Sequence[Job],
) -> Tensor:
    """Return the metric of a batch of jobs, `[jobs]`."""
    device = pairs.answer_ids.device
    rows = torch.tensor([j.row for j in batch], device=device)
    block, width = batch[0].block, batch[0].width
    at_site: dict[str, list[tuple[int, Node]]] = defaultdict(list)
    for b, job in enumerate(batch):
        for node in as_nodes(parts[job.part]):
            at_site[node.site.split("[")[0]].append((b, node))
    entering: Tensor | None = None
    writes: list[tuple[Site, Write]] = []
    for name, site in sites.items():
        if name not in at_site:
            continue
        write = write_nodes(at_site[name], rows, width, source, pairs, name, lens)
        if site.block is not None and site.block < block:  # the patch changes the stream between two blocks
            if entering is None:
                entering = run.streams[block - 1][rows, -width:].clone()
            now = source.base[name][rows, -width:]
            changed = write(now)
            entering = write(entering) if site.kind == "resid_post" else entering + (changed - now)
        else:
            writes.append((site, write))
    columns = None if judge.columns is None else judge.columns[rows]
    logits = run.rerun(rows, block=block, width=width, entering=entering, writes=writes, columns=columns)
    return judge.function(logits, rows)
