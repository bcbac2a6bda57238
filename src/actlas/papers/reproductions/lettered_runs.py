"""Runs on lettered choices: prompts with their columns, a head compressed to ranks and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.nodes import Node
    from actlas.core.model import Model

_RANDOM = 5


@dataclass(frozen=True, eq=False)
class Lettered:
    """Prompts with one set of labels.

    Attributes:
        pairs: the prompts.
        labels: the four labels.
        ids: their tokens after the prompt, `[4]`.
        columns: where each option's label and word stand, `[n, 4, 2]`.
        right: which option is right, `[n]`.
        correct: whether the right label has the greatest logit of the four, bool `[n]`.
    """

    pairs: PromptPairs
    labels: tuple[str, ...]
    ids: Tensor
    columns: Tensor
    right: Tensor
    correct: Tensor

    def accuracy(self, name: str, seed: int) -> Measurement:
        """Return how often the copy is right."""
        return _rate("accuracy", self.correct.double().numpy(), seed, labels=name)


def lettered(model: Model, words: Sequence[str], n: int, labels: Sequence[str], seed: int) -> Lettered:
    """Return prompts and their columns, failing ones included."""
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.head_subspace import label_columns
    from actlas.data.single_token import Tokens
    from actlas.papers.reproductions.lettered_items import lettered_items

    items = lettered_items(words, n, labels=labels, seed=seed)
    pairs = PromptPairs.from_task(model, items, n=n, force=True)
    tokens = Tokens(model.tokenizer)
    ids = torch.tensor([tokens.one(items[0].prompt, f" {x}") or 0 for x in labels])
    at = label_columns(pairs, list(labels))
    right = torch.tensor([list(labels).index(i.answer.strip()) for i in items])
    correct = pairs.last_logits(model)[:, ids].argmax(1).cpu() == right
    return Lettered(pairs, tuple(labels), ids, torch.stack([at, at + 2], 2), right, correct)


def with_total(model: Model, case: Lettered, nodes: Sequence[Node], seed: int) -> list[Measurement]:
    """Return the total effects of some nodes, and their rank correlation with the direct ones."""
    from scipy.stats import spearmanr

    from actlas.circuits.node_effects import node_effects

    total = node_effects(model, case.pairs, kind="total", labels=case.ids, over=nodes, seed=seed)
    direct = node_effects(model, case.pairs, kind="unconditional", labels=case.ids, over=nodes, seed=seed)
    value = float(spearmanr(total.means.numpy(), direct.means.numpy()).statistic)
    return [
        *total.top(5),
        Measurement(
            "direct against total effects", value, "rank correlation", len(nodes),
            note="of the nodes with the largest direct effects, another prompt's output in their place",
        ),
    ]  # fmt: skip


def compression(
    model: Model,
    node: Node,
    fit: Lettered,
    tests: Mapping[str, Lettered],
    ranks: Sequence[int],
    seed: int,
) -> list[Measurement]:
    """Return what a head's subspaces keep of its effect and of its letter, by rank and labels."""
    from actlas.circuits.head_subspace import head_logits, head_subspace
    from actlas.circuits.node_effects import label_rows
    from actlas.circuits.one_attention import OneAttention

    at_fit = OneAttention(model, fit.pairs.clean, node.block)
    last = f"blocks.{(model.n_blocks or 1) - 1}.resid_post"
    measured: list[Measurement] = []
    kept: dict[tuple[str, str, int], tuple[Any, Any]] = {}
    for name, case in tests.items():
        run = OneAttention(model, case.pairs.clean, node.block)
        x = model.trace(dict(case.pairs.clean), last)[last][:, -1]
        rows = label_rows(model, case.ids, x)

        def read(z: Tensor, case: Lettered = case, rows: Tensor = rows) -> tuple[Any, Any]:
            logits = head_logits(model, node, z, rows)
            effect = logits.gather(1, case.right[:, None])[:, 0].numpy()
            return effect, (logits.argmax(1) == case.right).double().numpy()

        whole, right = read(run.values["attn.z"][:, -1, node.index or 0])
        measured.append(_rate("accuracy of the head alone", right, seed, labels=name, rank="all"))
        measured.append(_mean("direct effect of the head", whole, "logits", seed, labels=name, rank="all"))
        for parts in ("qkv", "qk"):
            for rank in ranks:
                space = head_subspace(
                    model, node, fit.pairs, fit.columns, rank=rank, parts=parts, attention=at_fit
                )
                group = {"labels": name, "rank": str(rank), "parts": parts}
                effect, letter = read(space.z(run, case.columns))
                kept[name, parts, rank] = effect, whole
                measured.append(_ratio(effect, whole, seed, subspace="fitted", **group))
                if parts == "qk":
                    continue
                measured.append(_rate("accuracy of the head alone", letter, seed, **group))
                if name == "A B C D":
                    lost = right - letter
                    measured.append(
                        _mean("accuracy of the head alone, lost", lost, "fraction", seed, rank=str(rank))
                    )
                drawn = [read(space.random(seed + s).z(run, case.columns))[0] for s in range(_RANDOM)]
                measured.append(_ratio(np.mean(drawn, 0), whole, seed, subspace="random", **group))
    one, three = kept["A B C D", "qkv", 1], kept["A B C D", "qkv", 3]
    measured.append(
        _mean(
            "effect kept at rank 1 minus rank 3",
            (one[0] - three[0]) / three[1].mean(),
            "fraction",
            seed,
            note="over the mean whole effect, which is held",
        )
    )
    for parts in ("qkv", "qk"):
        measured.append(
            _two_ratios(
                kept["X K Q T", parts, 3], three if parts == "qkv" else kept["A B C D", parts, 3], parts, seed
            )
        )
    return measured


def in_place(
    model: Model, nodes: Sequence[Node], fit: Lettered, case: Lettered, seed: int
) -> list[Measurement]:
    """Return the model's accuracy with some heads of one block compressed, at random, or at their mean."""
    from actlas.circuits.head_subspace import head_subspace
    from actlas.circuits.last_token import LastToken
    from actlas.circuits.one_attention import OneAttention

    block = nodes[0].block
    runs = LastToken(model, dict(case.pairs.clean), f"blocks.{block}.attn.z")
    attention, at_fit = (OneAttention(model, c.pairs.clean, block) for c in (case, fit))
    mean = at_fit.values["attn.z"][:, -1].mean(0)
    spaces = {node: head_subspace(model, node, fit.pairs, fit.columns, attention=at_fit) for node in nodes}
    measured = []
    for how in ("rank 3", "random rank 3", "mean"):
        z = runs.values.clone()
        for node, space in spaces.items():
            i = node.index or 0
            if how == "mean":
                z[:, i] = mean[i]
            else:
                z[:, i] = (space if how == "rank 3" else space.random(seed)).z(attention, case.columns)
        right = (runs.logits(z)[:, case.ids].argmax(1).cpu() == case.right).double().numpy()
        names = ", ".join(node.label for node in nodes)
        measured.append(_rate("accuracy of the model with heads replaced", right, seed, heads=names, by=how))
    return measured


def _rate(name: str, x: Any, seed: int, **group: str) -> Measurement:
    from actlas.core.intervals import wilson

    low, high = wilson(float(x.sum()), len(x))
    return Measurement(
        name, float(x.mean()), "fraction", len(x), low, high, "wilson", seed, group=group, better="higher"
    )


def _mean(name: str, x: Any, unit: str, seed: int, note: str = "", **group: str) -> Measurement:
    from actlas.core.intervals import bootstrap_mean

    low, high = bootstrap_mean(x, seed=seed)
    return Measurement(
        name, float(x.mean()), unit, len(x), low, high, "bootstrap over prompts", seed, group=group, note=note
    )


def _ratio(x: Any, whole: Any, seed: int, **group: str) -> Measurement:
    from actlas.core.intervals import bootstrap_ratio

    low, high = bootstrap_ratio(x, whole, seed=seed)
    value = float(x.sum() / whole.sum())
    return Measurement(
        "effect kept", value, "fraction", len(x), low, high, "bootstrap over prompts", seed, group=group
    )


def _two_ratios(one: tuple[Any, Any], other: tuple[Any, Any], parts: str, seed: int) -> Measurement:
    """Return the difference of two ratios of means over different prompts, each resampled by itself."""
    from actlas.core.intervals import percentiles, resample_counts

    drawn = []
    for k, (x, whole) in enumerate((one, other)):
        counts = np.concatenate(list(resample_counts(len(x), 1000, seed + k)))
        drawn.append(counts @ x / (counts @ whole))
    n = min(len(one[0]), len(other[0]))
    low, high = percentiles(drawn[0] - drawn[1], n)
    value = float(one[0].sum() / one[1].sum() - other[0].sum() / other[1].sum())
    return Measurement(
        "effect kept on X K Q T minus A B C D", value, "fraction", n, low, high,
        "bootstrap over prompts", seed, group={"rank": "3", "parts": parts},
    )  # fmt: skip
