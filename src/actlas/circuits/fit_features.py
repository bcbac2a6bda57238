"""Feature vectors, head subspaces and node effects as methods.

actlas fit observable smollm2 --option up=she --option down=he
actlas fit head-subspace smollm2 multiple-choice --option head=L20H3 --option rank=3
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from actlas.circuits.batch import PromptPairs
from actlas.circuits.head_subspace import head_subspace, label_columns
from actlas.circuits.node_effects import Baseline, Kind, node_effects
from actlas.circuits.nodes import Node, head
from actlas.circuits.observable import Observable
from actlas.circuits.propagate import FeatureVector, propagate, rank_paths
from actlas.core.errors import InputError
from actlas.core.methods import method

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.measurement import Measurement
    from actlas.core.model import Model

_HEAD = re.compile(r"^L(\d+)H(\d+)$", re.IGNORECASE)


@method(
    "observable",
    room="circuits",
    returns="Lens",
    data="none",
    summary="the direction that makes some words likelier than others through a head, from weights, no data",
    example="actlas fit observable smollm2 --option up=she --option down=he",
    papers=("observable-propagation",),
)
def fit_observable(model: Model, *, up: str, down: str = "", path: str = "best") -> FeatureVector:
    """Pull `logit(up) - logit(down)` back to the input of a path of heads.

    Args:
        model: a causal language model with a tokenizer.
        up: words that are made likelier, with commas between; each is one token with a space before it.
        down: words that are made less likely.
        path: heads in the order in which they run, `"L12H1,L20H3"`; `"best"` for the head with the longest
            vector; `""` for the output head alone.

    Raises:
        InputError: a word of more than one token, or a path that is none.
    """
    words: dict[str | int, float] = {f" {w}": c for side, c in ((up, 1.0), (down, -1.0)) for w in _list(side)}
    if len(words) < len(_list(up)) + len(_list(down)):
        raise InputError(f"up={up!r} and down={down!r} share a word or name one twice; name each once")
    observable = Observable(words)
    heads = (
        rank_paths(model, observable, top=1)[0].path if path == "best" else [as_head(p) for p in _list(path)]
    )
    return propagate(model, observable, heads)


@method(
    "head-subspace",
    room="circuits",
    returns="Edit",
    data="task",
    summary="a head's queries, keys and values kept in a few dimensions fitted on a lettered choice",
    example="actlas fit head-subspace smollm2 multiple-choice --option head=L20H3 --option rank=3",
    papers=("chinchilla-mcq-circuits",),
)
def fit_head_subspace(
    model: Model,
    data: Any,
    *,
    head: str,
    rank: int = 3,
    parts: str = "qkv",
    labels: str = "A B C D",
    prompts: int = 32,
    seed: int = 0,
) -> Edit:
    """Compress one head; the edit acts on the keys and values of the head's whole group.

    Args:
        model: a causal language model with a tokenizer.
        data: a task with lettered options; prompts that the model answers rightly are used.
        head: the head, `"L20H3"`.
        rank: dimensions of each subspace.
        parts: which of queries, keys and values.
        labels: the options' labels, with spaces between.
        prompts: at most so many.
        seed: of the task.
    """
    node = as_head(head)
    pairs = PromptPairs.from_task(model, data, n=prompts, seed=seed, correct_only=True)
    columns = label_columns(pairs, labels.split())
    return head_subspace(model, node, pairs, columns, rank=rank, parts=parts).edit()


@method(
    "node-effects",
    room="circuits",
    returns="Measurement",
    data="task",
    summary="what each head and MLP does to the answer: directly, against another prompt's output, or in all",
    example="actlas fit node-effects smollm2 ioi --option kind=direct",
    papers=("chinchilla-mcq-circuits",),
)
def fit_node_effects(
    model: Model,
    data: Any,
    *,
    kind: Kind = "direct",
    baseline: Baseline = "resample",
    prompts: int = 32,
    top: int = 10,
    seed: int = 0,
) -> tuple[Measurement, ...]:
    """Return the nodes with the largest effects, and how few nodes carry 80% of the sum."""
    pairs = PromptPairs.from_task(model, data, n=prompts, seed=seed)
    found = node_effects(model, pairs, kind=kind, baseline=baseline, seed=seed)
    return (found.carrying_measured(), *found.top(top))


def as_head(name: str) -> Node:
    """Return the node of a head's short name, `"L20H3"`.

    Raises:
        InputError: another form.
    """
    found = _HEAD.match(name.strip())
    if found is None:
        raise InputError(f"{name!r} names no head; write e.g. 'L20H3' for head 3 of block 20")
    return head(int(found[1]), int(found[2]))


def _list(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]
