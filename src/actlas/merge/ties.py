"""Merge fine-tunes of one model, or edits, into one edit.

A fine-tuned model is its base plus a task vector t = theta - theta_0, which is an edit like any other
(`WeightEdit`): it can be scaled, negated, added and merged with others.

    poet = task_vector(model, "poet/")                       # a folder, a name, or a Model
    both = merge(model, [poet, "coder/", "saved-edit/"], method="ties", density=0.2)
    with model.edit(both * 0.8): ...

* `"ties"`: trim, elect a sign, average what agrees (`core.ties`; Yadav et al. 2023).
* `"average"`: the mean of the changes.
* `"sum"`: task arithmetic (Ilharco et al. 2023): their sum.

Steering vectors (`Add` edits at one site) are merged in the same way, as changes of one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from actlas.core.artifact import load_artifact
from actlas.core.edit import Edit
from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError
from actlas.core.methods import method as registered
from actlas.core.model import Model
from actlas.core.scope import Scope
from actlas.core.ties import Trim, average, ties
from actlas.core.weight_edit import WeightEdit

How = Literal["ties", "average", "sum"]
Source = Edit | Model | str | Path


def task_vector(base: Model, tuned: Source) -> WeightEdit:
    """Return the difference between a fine-tuned model and its base as an edit.

    Args:
        base: the model that was tuned.
        tuned: the tuned model, or its name or folder.

    Raises:
        InputError, ShapeError: the models have other parameters, shapes or tokens (named), or do not differ.
    """
    if isinstance(tuned, Edit):
        raise InputError(f"{tuned.describe()} is an edit already; a task vector is made of a tuned model")
    if not isinstance(tuned, Model):
        from actlas.models import load

        tuned = load(str(tuned))
    if tuned.vocab_size != base.vocab_size:
        raise ModelError(
            f"{tuned.name} has {tuned.vocab_size} tokens and {base.name} {base.vocab_size}; "
            "merging needs one vocabulary"
        )
    made = WeightEdit.between(base, tuned).bind(base.fingerprint)
    assert isinstance(made, WeightEdit)
    return made


def merge(
    model: Model,
    sources: Sequence[Source],
    *,
    method: How = "ties",
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    trim: Trim = "global",
    scale: float = 1.0,
) -> Edit:
    """Return one edit made of several.

    Args:
        model: the base of all of them.
        sources: at least two: edits, folders of saved edits, tuned models, or their names or folders.
        method: see the module docstring.
        density: share of entries that TIES keeps of each.
        weights: of each source; equal if missing.
        trim: of TIES, see `core.ties`.
        scale: strength of the result (TIES' lambda).

    Raises:
        InputError: fewer than two sources, an unknown method, edits that cannot be merged with each other.
        FingerprintError: an edit of another model.
    """
    if method not in ("ties", "average", "sum"):
        raise InputError(f"method is {method!r}; it must be 'ties', 'average' or 'sum'")
    if len(sources) < 2:
        raise InputError(f"merging needs at least two edits or models, not {len(sources)}")
    if method == "sum" and weights is not None and len(weights) != len(sources):
        raise InputError(f"weights must be {len(sources)} numbers, not {len(weights)}")
    edits = [_edit(model, source) for source in sources]
    changes, kind = _changes(edits)
    if method == "ties":
        merged = ties(changes, density=density, weights=weights, trim=trim)
    elif method == "average":
        merged = average(changes, weights=weights)
    else:
        share = [1.0] * len(changes) if weights is None else list(weights)
        mean = average(changes, weights=share)
        merged = {n: t * sum(share) for n, t in mean.items()}
    note = f"{method} of {len(edits)}" + (f", density {density:g}" if method == "ties" else "")
    return _made(merged, kind, note, scale).bind(model.fingerprint)


@registered(
    "merge",
    room="merge",
    returns="Edit",
    data="none",
    summary="merge fine-tunes or saved edits of one model: TIES, average or sum",
    example="""actlas fit merge smollm2 --option 'sources=["a/","b/"]' --density 0.2 -o merged/""",
    papers=("wise",),
)
def fit_merge(
    model: Model,
    *,
    sources: Sequence[Source],
    method: How = "ties",
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    trim: Trim = "global",
    scale: float = 1.0,
) -> Edit:
    """Merge; arguments as `merge`. On the command line `sources` is a JSON list of folders.

    Raises:
        InputError: see `merge`.
    """
    if isinstance(sources, str):
        sources = [s.strip() for s in sources.split(",") if s.strip()]
    return merge(model, sources, method=method, density=density, weights=weights, trim=trim, scale=scale)


@registered(
    "task-vector",
    room="merge",
    returns="Edit",
    data="none",
    summary="a fine-tuned model as an edit of its base: scale it, negate it, merge it",
    example="actlas fit task-vector smollm2 --tuned tuned-model/ -o vector/",
)
def fit_task_vector(model: Model, *, tuned: str) -> Edit:
    """Return `task_vector(model, tuned)`.

    Raises:
        InputError: see `task_vector`.
    """
    return task_vector(model, tuned)


def _edit(model: Model, source: Source) -> Edit:
    """Return what a source is, as an edit of the model."""
    if isinstance(source, Edit):
        if source.fingerprint is not None:
            source.fingerprint.check(model.fingerprint, source.describe())
        return source
    if not isinstance(source, Model) and (Path(source) / "manifest.json").is_file():
        kind = load_artifact(source)[0]["kind"]
        if kind != "edit":
            raise InputError(f"{source} holds a {kind}; edits and models can be merged")
        return Edit.load(source, model)
    return task_vector(model, source)


def _changes(edits: Sequence[Edit]) -> tuple[list[Mapping[str, Tensor]], str]:
    """Return what each edit adds, by name, all over the same names; and the site, for vectors."""
    parts = [edit.parts() for edit in edits]
    if all(isinstance(p, WeightEdit) for some in parts for p in some):
        found = [_total(some) for some in parts]
        names = list(dict.fromkeys(n for f in found for n in f))
        shape = {n: t for f in found for n, t in f.items()}
        return [{n: f[n] if n in f else shape[n].new_zeros(shape[n].shape) for n in names} for f in found], ""
    vectors = [some[0] for some in parts if len(some) == 1 and isinstance(some[0], Add)]
    if len(vectors) == len(edits) and all(v.scope == Scope() and v.condition is None for v in vectors):
        sites = {v.site for v in vectors}
        if len(sites) == 1:
            return [{"vector": v.vector * v.strength} for v in vectors], sites.pop()
        raise InputError(f"steering vectors at {' and '.join(sorted(sites))} cannot be merged; use one site")
    odd = next((e for e in edits if not all(isinstance(p, WeightEdit) for p in e.parts())), edits[0])
    raise InputError(
        f"{odd.describe()} cannot be merged with the others; merge changes of weights with each other, or "
        "plain steering vectors at one site"
    )


def _total(parts: Sequence[Any]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, delta in part.deltas.items():
            scaled = part.strength * delta.float()
            total[name] = total[name] + scaled if name in total else scaled
    return total


def _made(merged: Mapping[str, Tensor], site: str, note: str, scale: float) -> Edit:
    if site:
        return Add(site, merged["vector"]) * scale
    return WeightEdit(dict(merged), note=note) * scale
