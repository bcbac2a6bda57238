"""Labelled activations: texts with labels, or contrastive pairs, read at one site.

Accepted data, in any sequence:

    ("the film was a delight", True)                    a text and a label (bool, 0/1, or a number)
    {"text": "...", "label": 1}                         the same as a record
    ("a delight", "a disaster")                         a pair: positive text, negative text
    {"positive": "...", "negative": "..."}, or objects with these attributes

or activations that were read already: a tuple `(x, y)` of arrays `[n, d]` and `[n]`.

Items that share a source (the two texts of a pair, the same text twice) carry the same group, and stay
together when a test set is split off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration import massive_rows
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.layout import RESIDUAL_KINDS

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace

Position = Literal["last", "first", "mean"] | int
_BATCH = 16


@dataclass(frozen=True)
class Examples:
    """Activations with labels.

    Attributes:
        x: float64 `[n, d]`.
        y: float64 `[n]`.
        group: int64 `[n]`; items with one number come from one source.
        paired: whether each group is a positive and a negative.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    group: NDArray[np.int64]
    paired: bool = False

    @property
    def binary(self) -> bool:
        """Whether every label is 0 or 1."""
        return bool(np.isin(self.y, (0.0, 1.0)).all())

    def at(self, index: NDArray[np.int64]) -> Examples:
        """Return some of the examples."""
        return Examples(self.x[index], self.y[index], self.group[index], self.paired)

    def shuffled(self, generator: np.random.Generator) -> Examples:
        """Return the same activations with labels that say nothing: pairs are swapped by coin flips,
        single labels are permuted."""
        if not self.paired:
            return Examples(self.x, generator.permutation(self.y), self.group)
        flips = generator.integers(0, 2, int(self.group.max()) + 1).astype(np.float64)
        return Examples(self.x, np.abs(self.y - flips[self.group]), self.group, True)


def gather_examples(model: Model | None, data: Any, site: Site | None, position: Position) -> Examples:
    """Read labelled activations.

    Args:
        model: may be `None` if `data` holds activations.
        data: see the module docstring.
        site: where to read.
        position: which token stands for a text: `"last"`, `"first"`, a number (negative ones count from
            the end), or `"mean"` over its tokens, massive-activation rows left out.

    Raises:
        InputError: data of another form, an empty text, or fewer than 8 items.
        ShapeError: arrays that do not fit together.
        NonFiniteError: NaN or infinity among activations or labels.
    """
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "shape") and hasattr(data[1], "shape"):
        examples = _from_arrays(*data)
    else:
        if model is None or site is None:
            raise InputError("texts need a model and a site to read them at; or give arrays (x, y)")
        texts, labels, groups, paired = parse_items(data)
        x = read_texts(model, texts, site, position)
        examples = Examples(x, np.array(labels), np.array(groups, dtype=np.int64), paired)
    if len(examples.y) < 8:
        raise InputError(f"a probe needs at least 8 labelled items, not {len(examples.y)}; give more")
    if not np.isfinite(examples.x).all() or not np.isfinite(examples.y).all():
        raise NonFiniteError("activations or labels hold NaN or infinity; check the model and the labels")
    return examples


def parse_items(data: Iterable[Any]) -> tuple[list[str], list[float], list[int], bool]:
    """Return texts, labels, groups and whether the items are pairs.

    Raises:
        InputError: items of an unknown or mixed form, or labels that are not numbers.
    """
    texts: list[str] = []
    labels: list[float] = []
    groups: list[int] = []
    kinds: set[bool] = set()
    known: dict[str, int] = {}
    for number, item in enumerate(data):
        first, second, pair = _fields(item, number)
        kinds.add(pair)
        if len(kinds) > 1:
            raise InputError(
                f"item {number} is {'a pair' if pair else 'labelled'} and those before it are not"
            )
        if pair:
            texts += [first, second]
            labels += [1.0, 0.0]
            groups += [number, number]
        else:
            texts.append(first)
            labels.append(_label(second, number))
            groups.append(known.setdefault(first, len(known)))
    for number, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"text {number} of the labelled data is empty; leave it out")
    return texts, labels, groups, kinds == {True}


def read_texts(model: Model, texts: Sequence[str], site: Site, position: Position) -> NDArray[np.float64]:
    """Return one activation for each text, float64 `[n, d]`, in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, NDArray[np.float64]] = {}
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        trace = model.trace([texts[i] for i in chosen], [site])
        pooled = pool(trace, site, position).to(torch.float64).cpu().numpy()
        found.update(zip(chosen, pooled, strict=True))
    return np.stack([found[i] for i in range(len(texts))])


def pool(trace: Trace, site: Site, position: Position) -> Tensor:
    """Return one activation for each row of a trace, `[batch, d]`, heads flattened."""
    x, mask = trace[site.name], trace.mask
    if mask is None or x.shape[:2] != mask.shape:
        return x.flatten(1) if x.ndim == 2 or position != "mean" else x.flatten(1, -2).mean(1)
    x, mask = x.flatten(2), mask.to(x.device)
    if position == "mean":
        keep = mask
        if site.kind in RESIDUAL_KINDS:
            ordinary = mask & ~massive_rows(x.flatten(0, 1)).view(mask.shape)
            keep = torch.where(ordinary.any(1, keepdim=True), ordinary, mask)
        weight = keep.to(torch.float64)
        return torch.einsum("bp,bpd->bd", weight / weight.sum(1, keepdim=True), x.to(torch.float64))
    wanted = {"last": -1, "first": 0}.get(position, position) if isinstance(position, str) else position
    if isinstance(wanted, str):
        raise InputError(f"position is {position!r}; it must be 'last', 'first', 'mean' or a number")
    lengths = mask.sum(1)
    place = lengths + wanted if wanted < 0 else torch.full_like(lengths, wanted)
    if bool(((place < 0) | (place >= lengths)).any()):
        raise InputError(f"position {wanted} does not exist in a text of {int(lengths.min())} tokens")
    column = ((mask.cumsum(1) - 1 == place.unsqueeze(1)) & mask).to(torch.int64).argmax(1)
    return x[torch.arange(len(x), device=x.device), column]


def _from_arrays(x: Any, y: Any) -> Examples:
    values = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
    labels = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y, dtype=np.float64)
    if values.ndim != 2 or labels.ndim != 1 or len(values) != len(labels):
        shapes = f"{list(values.shape)} and {list(labels.shape)}"
        raise ShapeError(f"labelled activations must be [n, d] with labels [n], not {shapes}")
    return Examples(values, labels, np.arange(len(labels)))


def _fields(item: Any, number: int) -> tuple[str, Any, bool]:
    """Return an item's text and label, or its two texts, and whether it is a pair."""
    if isinstance(item, Mapping):
        if "text" in item and "label" in item:
            return str(item["text"]), item["label"], False
        if "positive" in item and "negative" in item:
            return str(item["positive"]), str(item["negative"]), True
    elif isinstance(item, (tuple, list)):
        if len(item) == 2 and isinstance(item[0], str):
            return item[0], item[1], isinstance(item[1], str)
    elif hasattr(item, "positive") and hasattr(item, "negative"):
        return str(item.positive), str(item.negative), True
    raise InputError(
        f"item {number} of the labelled data is {type(item).__name__} {str(item)[:60]!r}; "
        "give (text, label), (positive, negative), or records with those fields"
    )


def _label(value: Any, number: int) -> float:
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = math.nan
    if not math.isfinite(label):
        raise InputError(f"the label of item {number} is {value!r}; it must be true, false or a number")
    return label
