"""From the attributes of prompts to the columns of a linear model: which groups, which values, one-hot.

A group is one attribute (`"IO"`) or several whose combinations get a column each (`"IO+Pos"`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actlas.core.errors import InputError

Attributes = Mapping[str, str]
Parametrisation = str | Sequence[str]
JOIN = "+"


def groups_of(
    items: Sequence[Attributes], parametrisation: Parametrisation, attributes: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the groups that a parametrisation means for these prompts.

    Args:
        items: attributes of every prompt.
        parametrisation: `"independent"`, `"coupled"` (each attribute with the one of fewest values), or
            groups, as a sequence or separated by commas.
        attributes: which attributes to use; default all.

    Raises:
        InputError: prompts without attributes, with different ones, or a name that they have not got.
    """
    names = list(attributes) if attributes is not None else list(items[0])
    if not names:
        raise InputError("the prompts have no attributes; use a task whose items carry some, such as ioi")
    _check(items, names)
    if parametrisation == "independent":
        return tuple(names)
    if parametrisation == "coupled":
        if len(names) < 2:
            raise InputError(f"there is only the attribute {names[0]}; coupling needs two")
        sizes = {name: len({item[name] for item in items}) for name in names}
        smallest = min(reversed(names), key=lambda name: sizes[name])
        return tuple(f"{name}{JOIN}{smallest}" for name in names if name != smallest)
    split = parametrisation.split(",") if isinstance(parametrisation, str) else list(parametrisation)
    groups = tuple(part.strip() for part in split if part.strip())
    if not groups or len(set(groups)) < len(groups):
        raise InputError(f"parametrisation is {parametrisation!r}; name each group once, e.g. 'IO+Pos,S+Pos'")
    _check(items, [name for group in groups for name in group.split(JOIN)])
    return groups


def label(item: Attributes, group: str) -> str:
    """Return a prompt's value of a group.

    Raises:
        InputError: the prompt lacks one of its attributes.
    """
    try:
        return JOIN.join(item[name] for name in group.split(JOIN))
    except KeyError as error:
        raise InputError(
            f"a prompt has no attribute {error.args[0]!r}; it has {', '.join(item) or 'none'}"
        ) from None


def one_hot(items: Sequence[Attributes], groups: Sequence[str]) -> tuple[Tensor, tuple[tuple[str, ...], ...]]:
    """Return the design matrix, float64 `[prompts, all values]`, and the values of each group, sorted."""
    columns, values = [], []
    for group in groups:
        labels = [label(item, group) for item in items]
        known = tuple(sorted(set(labels)))
        place = {value: i for i, value in enumerate(known)}
        rows = torch.tensor([place[value] for value in labels])
        columns.append(torch.nn.functional.one_hot(rows, len(known)).double())
        values.append(known)
    return torch.cat(columns, 1), tuple(values)


def _check(items: Sequence[Attributes], names: Sequence[str]) -> None:
    for number, item in enumerate(items):
        for name in names:
            if name not in item:
                has = ", ".join(item) or "none"
                raise InputError(f"prompt {number} has no attribute {name!r}; it has {has}")
