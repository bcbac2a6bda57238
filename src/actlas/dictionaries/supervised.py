"""Supervised dictionaries: one vector for each value of each variable that a task is made of.

For prompts p with known attributes a_i(p) (in IOI: the indirect object, the subject, who comes first):

    x(p) ~ b + sum_i u[i, a_i(p)]                 b = mean of x
    mean codes:  u[i, v] = mean(x | a_i = v) - b
    MSE codes:   u = least squares of x - b on the one-hot attributes, of minimum norm

The one-hot columns of each attribute add up to 1, so with several attributes they are never independent;
minimum norm picks one of the equal solutions, and differences u[i, v'] - u[i, v], which is what edits use,
are the same in all of them. Where the prompts leave more than that open (an attribute with one value, two
attributes that always go together) `note` says so.

Parametrisations: *independent*, one vector for each value of each attribute; *coupled*, one for each
combination, e.g. (IO, Pos) and (S, Pos).

    found = fit_supervised(model, task("ioi", model.tokenizer, n=512), "blocks.21.resid_post")
    found.exchange(x, before, after)        # x - u[i, v] + u[i, v'] for every attribute that differs
    model.edit(found.swap("Pos", "ABBA", "BABA"))

It is the ceiling that an unsupervised dictionary of the same site is judged against (`task_eval`). As a
lens it must guess the attributes of an activation: `encode` takes the values that reconstruct it best;
`encode_values` takes known ones.

Source: Makelov, Lange and Nanda 2024, "Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.methods import method
from actlas.dictionaries.supervised_design import Attributes, Parametrisation, groups_of, one_hot
from actlas.dictionaries.supervised_lens import SupervisedDictionary
from actlas.dictionaries.supervised_quality import held_out

if TYPE_CHECKING:
    from actlas.core.model import Model

__all__ = ["SupervisedDictionary", "attributes_of", "changed", "fit_supervised"]
Codebook = Literal["mean", "mse"]


@method(
    "supervised-dictionary",
    room="dictionaries",
    returns="Lens",
    data="task",
    summary="one vector for each value of a task's variables, the ceiling for unsupervised dictionaries",
    example="actlas fit supervised-dictionary smollm2 ioi --site blocks.21.resid_post -o supervised/",
    papers=("sae-task-eval",),
)
def fit_supervised(
    model: Model | None,
    data: Any,
    site: str,
    *,
    method: Codebook = "mean",
    parametrisation: Parametrisation = "independent",
    attributes: Sequence[str] | None = None,
    position: Literal["last", "first"] | int = "last",
    seed: int = 0,
) -> SupervisedDictionary:
    """Fit a supervised dictionary to prompts with known attributes.

    Args:
        model: whose activations are read; may be `None` for rows.
        data: a task (items with `attributes`, or else `group`), or `(x, attributes)`: rows `[n, d]` and one
            mapping a row.
        site: one site.
        method: `"mean"` or `"mse"`, see the module docstring.
        parametrisation: `"independent"`, `"coupled"` (every attribute with the one of fewest values), or
            groups of names such as `("IO+Pos", "S+Pos")`.
        attributes: which attributes; default all.
        position: which token stands for a prompt.
        seed: of the held-out share, the shuffled control and the intervals.

    Returns:
        The dictionary; `measurements` has its explained variance on held-out prompts, with the same for
        shuffled attributes.

    Raises:
        InputError: fewer than 8 prompts, prompts without these attributes, an unknown option.
        NonFiniteError: NaN or infinity among the activations.
    """
    if method not in ("mean", "mse"):
        raise InputError(f"method is {method!r}; it must be 'mean' or 'mse'")
    heads, fingerprint = None, None if model is None else model.fingerprint
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        x, items = data[0].detach().to("cpu", torch.float64), list(data[1])
    else:
        if model is None:
            raise InputError("a task needs a model to read it; give one, or rows and their attributes")
        from actlas.core.probe_data import read_texts

        resolved = model.resolve(site)
        if len(resolved) != 1:
            raise InputError(f"a supervised dictionary reads one site; {site!r} names {len(resolved)}")
        site, features = resolved[0].name, resolved[0].features
        heads = features[0] if features is not None and len(features) == 2 else None
        items = [attributes_of(item) for item in data]
        x = torch.from_numpy(read_texts(model, [item.prompt for item in data], resolved[0], position))
    if x.ndim != 2 or len(x) != len(items):
        raise ShapeError(
            f"there are activations {list(x.shape)} for {len(items)} prompts; they must be [prompts, d]"
        )
    if len(items) < 8:
        raise InputError(f"a supervised dictionary needs at least 8 prompts, not {len(items)}")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"the activations at {site} hold NaN or infinity; leave those prompts out")
    names = groups_of(items, parametrisation, attributes)

    def fit(rows: Tensor, some: Sequence[Attributes], codebook: str) -> SupervisedDictionary:
        design, values = one_hot(some, names)
        bias = rows.mean(0)
        u, note = _solve(rows - bias, design, values, names, codebook)
        return SupervisedDictionary(
            site=site, heads=heads, fingerprint=fingerprint, vectors=u.float(), bias=bias.float(),
            attributes=names, values=values, codebook=codebook, count=len(some), note=note,
        )  # fmt: skip

    found = fit(x, items, method)
    found.measurements = held_out(x, items, lambda r, s: fit(r, s, method), seed, found.note)
    return found


def attributes_of(item: Any) -> Attributes:
    """Return what a prompt was made of: its `attributes`, or else its `group`."""
    found: Attributes = getattr(item, "attributes", None) or getattr(item, "group", None) or {}
    return found


def _solve(
    x: Tensor, design: Tensor, values: Sequence[Sequence[str]], names: Sequence[str], codebook: str
) -> tuple[Tensor, str]:
    """Return the vectors of centred rows `x`, float64, and what the prompts left open."""
    rank = int(torch.linalg.matrix_rank(design))
    open_directions = design.shape[1] - (len(names) - 1) - rank
    constant = [name for name, known in zip(names, values, strict=True) if len(known) == 1]
    said = []
    if constant:
        said.append(f"{', '.join(constant)} has one value only, so its vector cannot be told from the mean")
    if open_directions:
        said.append(
            f"the attributes go together in the prompts: {open_directions} directions of their vectors "
            "are open"
        )
    if codebook == "mean":
        return design.T @ x / design.sum(0).unsqueeze(1), "; ".join(said)
    if said:
        said.append("the minimum-norm solution was taken")
    return torch.linalg.pinv(design) @ x, "; ".join(said)


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """Return the attributes whose values differ."""
    return tuple(name for name, value in before.items() if after.get(name) != value)
