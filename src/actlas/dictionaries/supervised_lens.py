"""A supervised dictionary: one vector for each value of each variable; see `supervised` for how it is fitted.

    x(p) ~ b + sum_i u[i, a_i(p)]

As a lens it must guess the attributes of an activation: `encode` takes the values that reconstruct it
best; `encode_values` takes known ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.edits import Add
from actlas.core.errors import InputError, ShapeError, did_you_mean
from actlas.core.lens import check_finite
from actlas.dictionaries.supervised_design import Attributes, label

if TYPE_CHECKING:
    from actlas.core.edit import Edit

How = Literal["subtract", "project", "project-to-mean"]
_ROUNDS = 20  # of choosing one attribute after the other; a handful is enough


@dataclass(kw_only=True, eq=False)
class SupervisedDictionary(Dictionary):
    """One vector for each attribute value.

    Attributes:
        vectors: float32 `[features, d]`, attribute after attribute.
        bias: float32 `[d]`, the mean activation.
        attributes: names; a coupled one is written `"IO+Pos"`.
        values: the values of each attribute; a coupled one is written `"Mary+ABBA"`.
        codebook: `"mean"` or `"mse"`.
        count: prompts that it was fitted on.
        note: what the prompts left open.
    """

    vectors: Tensor
    bias: Tensor
    attributes: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    codebook: str = "mean"
    count: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        self.attributes = tuple(self.attributes)
        self.values = tuple(tuple(v) for v in self.values)
        n = sum(len(v) for v in self.values)
        if (
            self.bias.ndim != 1
            or self.vectors.shape != (n, len(self.bias))
            or len(self.attributes) != len(self.values)
        ):
            raise ShapeError(
                f"a supervised dictionary needs one vector [d] for each of its {n} values and a bias [d], "
                f"not {list(self.vectors.shape)} and {list(self.bias.shape)}"
            )
        check_finite("SupervisedDictionary", vectors=self.vectors, bias=self.bias)

    @property
    def channels(self) -> int:
        return len(self.bias)

    @property
    def features(self) -> int:
        return len(self.vectors)

    @property
    def atoms(self) -> Tensor:
        return self.vectors

    @property
    def offset(self) -> Tensor:
        return self.bias

    @property
    def starts(self) -> tuple[int, ...]:
        """The first feature of each attribute."""
        sizes = [len(v) for v in self.values]
        return tuple(sum(sizes[:i]) for i in range(len(sizes)))

    def feature(self, attribute: str, value: str) -> int:
        """Return the number of the feature that stands for an attribute's value.

        Raises:
            InputError: there is no such attribute, or the prompts never had that value.
        """
        if attribute not in self.attributes:
            known = ", ".join(self.attributes)
            raise InputError(f"there is no attribute {attribute!r}; there are {known}")
        i = self.attributes.index(attribute)
        if value not in self.values[i]:
            hint = did_you_mean(value, self.values[i])
            raise InputError(f"{attribute} was never {value!r} in the prompts of the fit{hint}")
        return self.starts[i] + self.values[i].index(value)

    def name(self, feature: int) -> str:
        """Return `"attribute=value"` for a feature."""
        self.check_feature(feature)
        i = max(i for i, start in enumerate(self.starts) if start <= feature)
        return f"{self.attributes[i]}={self.values[i][feature - self.starts[i]]}"

    def missing(self, items: Sequence[Attributes]) -> list[str]:
        """Return `"attribute=value"` for everything in these prompts that the fit has not seen."""
        found: dict[str, None] = {}
        for attribute, known in zip(self.attributes, self.values, strict=True):
            for item in items:
                if (value := label(item, attribute)) not in known:
                    found[f"{attribute}={value}"] = None
        return list(found)

    def encode_values(self, items: Sequence[Attributes]) -> Codes:
        """Return the codes of prompts whose attributes are known, `[n, attributes]` places of value 1.

        Raises:
            InputError: an attribute is absent, or values that the fit has not seen (all are listed).
        """
        if missing := self.missing(items):
            raise InputError(
                f"the fit has not seen {', '.join(missing[:12])}{' ...' if len(missing) > 12 else ''}; "
                "fit on prompts that have every value"
            )
        rows = [[self.feature(a, label(item, a)) for a in self.attributes] for item in items]
        indices = torch.tensor(rows, dtype=torch.int64, device=self.vectors.device).reshape(
            -1, len(self.attributes)
        )
        return Codes(indices, torch.ones_like(indices, dtype=self.vectors.dtype), self.features)

    def encode_rows(self, x: Tensor) -> Codes:
        """Return for rows `[n, d]` the values that reconstruct them best, one per attribute, value 1.

        For every value of the attribute with most values, the others are chosen one after the other until
        nothing changes, and the best outcome is kept: exact for one or two attributes.
        """
        u = self.vectors
        along, gram = (x.to(u) - self.bias) @ u.T, u @ u.T
        widest = max(range(len(self.values)), key=lambda i: len(self.values[i]))
        best_cost = torch.full((len(x),), torch.inf, dtype=u.dtype, device=u.device)
        best = torch.zeros(len(x), len(self.values), dtype=torch.int64, device=u.device)
        for value in range(len(self.values[widest])):
            found = self._descend(along, gram, widest, self.starts[widest] + value)
            at = gram[found.unsqueeze(2), found.unsqueeze(1)].sum((1, 2)) - 2 * along.gather(1, found).sum(1)
            better = at < best_cost
            best_cost, best = (
                torch.where(better, at, best_cost),
                torch.where(better.unsqueeze(1), found, best),
            )
        return Codes(best, torch.ones_like(best, dtype=u.dtype), self.features)

    def _descend(self, along: Tensor, gram: Tensor, first: int, feature: int) -> Tensor:
        """Choose the attributes one after the other, starting with one feature, `[n, attributes]`."""
        chosen: dict[int, Tensor] = {first: torch.full((len(along),), feature, device=along.device)}
        order = [i for i in range(len(self.values)) if i != first]
        for turn in range(_ROUNDS):
            changed = False
            for i in order if turn == 0 else range(len(self.values)):
                own = slice(self.starts[i], self.starts[i] + len(self.values[i]))
                cost = gram.diagonal()[own] - 2 * along[:, own]
                for j, other in chosen.items():
                    if j != i:
                        cost = cost + 2 * gram[other, own]
                pick = self.starts[i] + cost.argmin(1)
                changed |= i not in chosen or not torch.equal(pick, chosen[i])
                chosen[i] = pick
            if not changed and turn > 0:
                break
        return torch.stack([chosen[i] for i in range(len(self.values))], 1)

    def exchange(
        self,
        x: Tensor,
        before: Sequence[Attributes],
        after: Sequence[Attributes],
        *,
        how: How = "subtract",
    ) -> Tensor:
        """Return activations `[n, d]` in which every attribute that differs has its new value.

        Args:
            x: activations of the prompts `before`.
            before, after: attributes of each prompt, and those it shall have.
            how: `"subtract"`: x - u + u'; `"project"`: the whole component of x along u is taken out before
                u' is added; `"project-to-mean"`: the component along u is set to the mean's. The last two
                depend on the order of the attributes, which is the dictionary's.

        Raises:
            InputError: values that the fit has not seen.
        """
        if how not in ("subtract", "project", "project-to-mean"):
            raise InputError(f"how is {how!r}; it must be 'subtract', 'project' or 'project-to-mean'")
        old, new = self.encode_values(before).indices, self.encode_values(after).indices
        u, bias = self.vectors.to(x), self.bias.to(x)
        for i in range(len(self.attributes)):
            a, b = u[old[:, i]], u[new[:, i]]
            differs = (old[:, i] != new[:, i]).unsqueeze(1)
            if how == "subtract":
                x = torch.where(differs, x - a + b, x)
                continue
            unit = a / a.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
            part = x if how == "project" else x - bias
            x = torch.where(differs, x - (part * unit).sum(1, keepdim=True) * unit + b, x)
        return x

    def swap(self, attribute: str, old: str, new: str) -> Edit:
        """Return the edit that adds u[attribute, new] - u[attribute, old] at the site.

        Raises:
            InputError: no such attribute or value.
        """
        difference = self.direction(self.feature(attribute, new)) - self.direction(
            self.feature(attribute, old)
        )
        added = Add(self.site, self._shaped(difference))
        return added if self.fingerprint is None else added.bind(self.fingerprint)

    def describe(self) -> str:
        """Return one line that a person can read."""
        sizes = ", ".join(f"{a} ({len(v)})" for a, v in zip(self.attributes, self.values, strict=True))
        return f"supervised dictionary at {self.site} of {self.count} prompts: {sizes}, {self.codebook} codes"
