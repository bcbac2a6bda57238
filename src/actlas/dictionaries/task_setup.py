"""What a task evaluation stands on: prompts to fit and to test, read at the sites, and changed prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.dictionaries.attribute_f1 import F1Table, Sign, attribute_f1
from actlas.dictionaries.supervised import attributes_of
from actlas.dictionaries.task_runs import Position, TaskRuns

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.data.task_items import TaskItem

ALL = "all"


@dataclass(frozen=True, eq=False)
class Setup:
    """Prompts to fit and to test, their activations, and the changed prompts, for one task evaluation."""

    runs: TaskRuns
    sites: list[str]
    dictionaries: dict[str, Dictionary]
    fit: dict[str, Tensor]
    fit_attributes: list[Mapping[str, str]]
    test_items: list[TaskItem]
    counterfactuals: dict[str, TaskRuns]
    note: str

    @property
    def changes(self) -> list[str]:
        return list(self.counterfactuals)

    @property
    def attributes(self) -> list[str]:
        return list(self.fit_attributes[0])

    def changed_items(self) -> list[TaskItem]:
        return [item for runs in self.counterfactuals.values() for item in runs.items]

    def mean(self, site: str) -> Tensor:
        return self.fit[site].mean(0)

    def tables(self, by_site: Mapping[str, Dictionary], sign: Sign) -> dict[str, dict[str, F1Table]]:
        """Return F1 tables by site and attribute, of the prompts that were fitted."""
        codes = {s: d.encode(self.fit[s]) for s, d in by_site.items()}
        return {
            s: {a: attribute_f1(c, [f[a] for f in self.fit_attributes], sign=sign) for a in self.attributes}
            for s, c in codes.items()
        }


def set_up(
    model: Model,
    dictionary: Dictionary | Mapping[str, Dictionary] | None,
    task: Sequence[TaskItem],
    site: str | Sequence[str] | None,
    test: int,
    changes: Sequence[str] | None,
    position: Position,
    batch: int,
) -> Setup:
    """Split a task, read the activations and check what can be wrong; see `dictionary_task_eval`."""
    given: dict[str, Lens]
    given = {dictionary.site: dictionary} if isinstance(dictionary, Lens) else dict(dictionary or {})
    for which in given.values():
        if not isinstance(which, Dictionary):
            raise InputError(
                f"a {type(which).__name__} is no dictionary of features; give an SAE or its like"
            )
        if which.fingerprint is not None:
            which.fingerprint.check(model.fingerprint, f"the dictionary for {which.site}")
    names = list(given) or ([site] if isinstance(site, str) else list(site or ()))
    if not names:
        raise InputError("there is neither a dictionary nor a site; give one")
    items = list(task)
    if test < 8 or len(items) - test < 16:
        raise InputError(
            f"{len(items)} prompts with {test} for testing are too few; at least 8 for testing and 16 others "
            "are needed"
        )
    attributes = attributes_of(items[0])
    if not attributes:
        raise InputError("the prompts have no attributes; use a task whose items carry some, such as ioi")
    offered = [*(a for a in attributes if any(a in i.variants for i in items)), ALL]
    wanted = list(changes) if changes is not None else offered
    for change in wanted:
        if change not in offered:
            raise InputError(f"no prompt has the change {change!r}; there are {', '.join(offered)}")
    held = items[-test:]
    whole = [i for i in held if all(_changed_item(i, c) is not None for c in wanted)]
    if len(whole) < 8:
        raise InputError(
            f"only {len(whole)} of the {test} prompts for testing have all of {', '.join(wanted)}"
        )
    runs = TaskRuns(model, whole, names, position=position, batch=batch)
    sites = [s.name for s in runs.sites]
    by_site: dict[str, Dictionary] = {}
    for n, d in given.items():
        assert isinstance(d, Dictionary)
        s = model.resolve(n)[0].name
        if d.channels != runs.values[s].shape[1]:
            raise InputError(
                f"the dictionary for {s} reads {d.channels} channels; the site has {runs.values[s].shape[1]}"
            )
        by_site[s] = d
    fitted = TaskRuns(model, items[:-test], names, position=position, batch=batch)
    counterfactuals = {
        c: TaskRuns(model, [_need(_changed_item(i, c)) for i in whole], names, position=position, batch=batch)
        for c in wanted
    }
    note = f"{len(items) - test} prompts to fit, {len(whole)} to test"
    if len(whole) < test:
        note += f" ({test - len(whole)} left out: a changed prompt of theirs has another number of tokens)"
    return Setup(
        runs,
        sites,
        by_site,
        fitted.values,
        [attributes_of(i) for i in fitted.items],
        whole,
        counterfactuals,
        note,
    )


def _changed_item(item: TaskItem, change: str) -> TaskItem | None:
    return item.counterfactual if change == ALL else item.variants.get(change)


def _need(item: TaskItem | None) -> TaskItem:
    assert item is not None
    return item
