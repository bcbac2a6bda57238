"""How alike a model finds two tasks: the cosine of what it computes at the end of their prompts.

    s(a, b) = cos(mean_a - m, mean_b - m)        m the mean of all tasks' means

A task's mean is over its prompts. All prompts share most of their activation (a last token is a last token),
so that plain cosines are near 1; the mean of all tasks is taken out unless `centre` is off. With only two
tasks it cannot be: the two rests would be each other's opposite.

Source: Chatterjee et al. 2024, "Language Models can Exploit Cross-Task In-context Learning"
(arXiv 2405.10548), section 5; centring is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.contrast import read_rows
from actlas.core.errors import InputError
from actlas.core.intervals import percentiles, resample_counts
from actlas.core.measurement import Measurement
from actlas.measure.registry import measure

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
Tokens = Literal["last", "mean", "last3"]


@dataclass(frozen=True, eq=False)
class TaskSimilarity:
    """Similarity of tasks at one or more sites.

    Attributes:
        names: the tasks.
        matrix: site -> cosines `[tasks, tasks]`.
        centred: whether the mean over tasks was taken out.
        rows: site -> one array `[prompts, d]` a task.
    """

    names: tuple[str, ...]
    matrix: Mapping[str, Array]
    centred: bool
    rows: Mapping[str, tuple[Array, ...]] = field(repr=False)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in the model's order."""
        return tuple(self.matrix)

    def between(self, a: str, b: str, site: str | None = None) -> float:
        """Return the similarity of two tasks, at the only site or a named one.

        Raises:
            InputError: an unknown task or site.
        """
        where = site if site is not None else self.sites[0]
        for known, name in ((self.names, a), (self.names, b), (self.sites, where)):
            if name not in known:
                raise InputError(f"{name!r} was not compared; there are {', '.join(known)}")
        return float(self.matrix[where][self.names.index(a), self.names.index(b)])

    def measurements(self, site: str | None = None, *, seed: int = 0) -> list[Measurement]:
        """Return one measurement for each two tasks, with a bootstrap over the prompts of both."""
        where = site if site is not None else self.sites[0]
        rows = self.rows[where]
        draws = [np.concatenate(list(resample_counts(len(r), 300, seed + i))) for i, r in enumerate(rows)]
        means = np.stack([d @ r / len(r) for d, r in zip(draws, rows, strict=True)], 1)  # [draws, tasks, d]
        drawn = _cosines(means, self.centred)
        found = []
        for i in range(len(rows)):
            for j in range(i):
                n = min(len(rows[i]), len(rows[j]))
                low, high = percentiles(drawn[:, i, j], n)
                found.append(
                    Measurement(
                        "task-similarity", float(self.matrix[where][i, j]), "cosine", n, low, high,
                        "bootstrap over prompts", seed,
                        group={"tasks": f"{self.names[j]} / {self.names[i]}", "site": where},
                        note="means over prompts" + (", mean of all tasks taken out" if self.centred else ""),
                    )
                )  # fmt: skip
        return found


def task_similarity(
    model: Model,
    tasks: Mapping[str, Sequence[str]] | Sequence[Any],
    sites: str | Iterable[str] | None = None,
    *,
    tokens: Tokens = "last",
    centre: bool | None = None,
) -> TaskSimilarity:
    """Compare tasks by the activations on their prompts.

    Args:
        model: the model; installed edits apply.
        tasks: prompts by name of the task, or tasks of `actlas.data`.
        sites: sites with channels; by default the residual stream at two thirds of the depth.
        tokens: which token stands for a prompt: the last, the mean over all, or the last three.
        centre: take out the mean over tasks; by default if there are at least three.

    Raises:
        InputError: fewer than two tasks, a task without prompts, two tasks of one name, or centring two.
    """
    given = dict(tasks) if isinstance(tasks, Mapping) else {t.name: [i.prompt for i in t] for t in tasks}
    if len(given) < 2 or (not isinstance(tasks, Mapping) and len(given) < len(tasks)):
        raise InputError(f"{len(given)} tasks of different names cannot be compared; give at least 2")
    empty = [name for name, texts in given.items() if not texts]
    if empty:
        raise InputError(f"the task {empty[0]!r} has no prompts; give at least one")
    centred = len(given) >= 3 if centre is None else centre
    if centred and len(given) < 3:
        raise InputError("two tasks are opposites once their mean is out; give 3, or centre=False")
    wanted = default_site(model) if sites is None else sites
    names = wanted if isinstance(wanted, str) else list(wanted)
    texts = [t for prompts in given.values() for t in prompts]
    read, _ = read_rows(model, texts, names, position=tokens)
    counts = [len(p) for p in given.values()]
    order = sorted(read, key=lambda name: model.resolve(name)[0].order)
    rows = {name: tuple(x.double().numpy() for x in torch.split(read[name], counts)) for name in order}
    matrix = {}
    for name, parts in rows.items():
        matrix[name] = _cosines(np.stack([p.mean(0) for p in parts])[None], centred)[0]
    return TaskSimilarity(tuple(given), matrix, centred, rows)


def default_site(model: Model) -> str:
    """Return the residual stream at two thirds of the depth."""
    if not model.n_blocks:
        raise InputError(f"{model.name} has no layout; name the sites to compare at")
    return f"blocks.{max(0, round(model.n_blocks * 2 / 3) - 1)}.resid_post"


def _cosines(means: Array, centred: bool) -> Array:
    """Return the cosines `[..., tasks, tasks]` of means `[..., tasks, d]`; 0 for a mean without length."""
    x = means - means.mean(-2, keepdims=True) if centred else means
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    found: Array = unit @ np.swapaxes(unit, -1, -2)
    return found


def task_similarities(
    model: Model, tasks: Any, *, seed: int = 0, items: int = 32, site: str = ""
) -> list[Measurement]:
    """Return the similarity of every two tasks at one site; see `task_similarity`."""
    many = [tasks] if hasattr(tasks, "chance") else list(tasks)
    if len(many) < 2:
        note = "two tasks are compared; only one was given"
        return [Measurement("task-similarity", math.nan, "cosine", 0, group={}, note=note)]
    found = task_similarity(model, {t.name: [i.prompt for i in t][:items] for t in many}, site or None)
    return found.measurements(seed=seed)


@measure(
    "task-similarity",
    summary="how alike the model's activations on the prompts of two tasks are",
    unit="cosine",
    needs=("causal-lm",),
    data="task",
    quick={"items": 8},
    source="Chatterjee et al. 2024, section 5",
    together=task_similarities,
)
def task_similarity_measure(
    model: Model, tasks: Any, *, seed: int = 0, items: int = 32, site: str = ""
) -> list[Measurement]:
    """Return the similarity of every two tasks."""
    return task_similarities(model, tasks, seed=seed, items=items, site=site)
