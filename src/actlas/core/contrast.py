"""Contrasts: aligned texts that differ in one property, and the activations a model has on them.

    contrast = Contrast.of([("I love this film.", "I hate this film."), ...])
    readings = read_contrast(model, contrast, "blocks.10-20.resid_post")
    readings["blocks.15.resid_post"].difference.mean(0)         # [d], a direction

Row i of both sides belongs together, so that everything else about the texts cancels in a difference.
One token stands for a text (`position`), or the mean over its tokens. The rows of massive activations
(first tokens, mostly), which are hundreds of times longer than others, stay out of means and of the norm
that strengths are measured in.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.layout import RESIDUAL_KINDS
from actlas.core.probe_data import Position, pool

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

Where = Position | Literal["last3"]
_BATCH = 16


@dataclass(frozen=True)
class Contrast:
    """Aligned texts, in order.

    Attributes:
        positive, negative: whole texts, `n` each (a prompt is part of its text).
        y: a number for each row (how strongly the sides differ, an entropy, a length), or `None`.
        prompt: what both sides of a row begin with, if it is known.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    y: tuple[float, ...] | None = None
    prompt: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.positive)
        if n != len(self.negative):
            raise InputError(
                f"a contrast needs as many negative texts as positive ones, not {len(self.negative)} and {n}"
            )
        if not n:
            raise InputError("a contrast needs at least one pair of texts; there is none")
        for i, (p, q) in enumerate(zip(self.positive, self.negative, strict=True)):
            if not p.strip() or not q.strip():
                side = "negative" if p.strip() else "positive"
                raise InputError(f"pair {i} has an empty {side} side; give both texts or leave the pair out")
            if p == q:
                raise InputError(f"pair {i} has the same text on both sides ({p[:50]!r}); they must differ")
        for name in ("y", "prompt"):
            given = getattr(self, name)
            if given is not None and len(given) != n:
                raise InputError(f"a contrast of {n} pairs needs {n} values of {name}, not {len(given)}")
        if self.y is not None and not all(np.isfinite(self.y)):
            raise NonFiniteError("the labels y of a contrast hold NaN or infinity; all must be finite")
        for i, (start, p, q) in enumerate(zip(self.prompt or (), self.positive, self.negative, strict=False)):
            if not p.startswith(start) or not q.startswith(start):
                raise InputError(f"pair {i} does not begin with its prompt {start[:50]!r}")

    @classmethod
    def of(cls, data: Any) -> Contrast:
        """Return a contrast of pairs in any accepted form.

        Args:
            data: a `Contrast`; or a sequence of `(positive, negative)`, of records with `positive` and
                `negative` (and `prompt`, `y`), or of objects with these attributes.

        Raises:
            InputError: a pair of another form, a missing or empty side, or no pairs at all.
        """
        if isinstance(data, Contrast):
            return data
        if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
            raise InputError(f"pairs are a sequence of (positive, negative) texts, not {type(data).__name__}")
        rows = [_row(item, i) for i, item in enumerate(data)]
        prompts = tuple(r["prompt"] for r in rows) if all(r["prompt"] for r in rows) and rows else None
        labels = [r["y"] for r in rows]
        return cls(
            tuple(r["positive"] for r in rows),
            tuple(r["negative"] for r in rows),
            tuple(float(y) for y in labels) if labels and all(y is not None for y in labels) else None,
            prompts,
        )

    def __len__(self) -> int:
        return len(self.positive)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts: the positive ones, then the negative ones."""
        return self.positive + self.negative

    @property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of all texts and labels, in order."""
        rows = [self.positive, self.negative, self.y, self.prompt]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()

    def at(self, index: Sequence[int]) -> Contrast:
        """Return some of the pairs."""
        return Contrast(
            tuple(self.positive[i] for i in index),
            tuple(self.negative[i] for i in index),
            None if self.y is None else tuple(self.y[i] for i in index),
            None if self.prompt is None else tuple(self.prompt[i] for i in index),
        )

    def split(self, held_out: float = 0.25, seed: int = 0) -> tuple[Contrast, Contrast]:
        """Return `(fit, test)`: a share of the pairs is kept apart, drawn with the seed.

        Pairs with the same text on a side stay together, so that no test text was fitted on.

        Raises:
            InputError: the share is not between 0 and 1, or there are fewer than two independent pairs.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out is {held_out}; it must lie between 0 and 1, e.g. 0.25")
        groups = self._groups()
        if len(groups) < 2:
            raise InputError(f"{len(self)} pairs that share their texts cannot be split; give more pairs")
        random.Random(seed).shuffle(groups)
        wanted = max(1, round(len(self) * held_out))
        test: list[int] = []
        for group in groups[:-1]:
            if len(test) >= wanted:
                break
            test += group
        fit = sorted(set(range(len(self))) - set(test))
        return self.at(fit), self.at(sorted(test))

    def _groups(self) -> list[list[int]]:
        """Return the pairs by shared texts, as lists of their numbers."""
        parent = list(range(len(self)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        seen: dict[str, int] = {}
        for i, pair in enumerate(zip(self.positive, self.negative, strict=True)):
            for text in pair:
                parent[root(i)] = root(seen.setdefault(text, i))
        found: dict[int, list[int]] = {}
        for i in range(len(self)):
            found.setdefault(root(i), []).append(i)
        return list(found.values())

    def shuffled(self, seed: int = 0) -> Contrast:
        """Return the same pairs with sides swapped by coin flips, the control for every fit.

        Half of the pairs (rounded down) are swapped, so that the flips cannot all agree by chance.
        """
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        flipped = set(order[: len(self) // 2])
        both = [
            (q, p) if i in flipped else (p, q)
            for i, (p, q) in enumerate(zip(self.positive, self.negative, strict=True))
        ]
        return replace(self, positive=tuple(p for p, _ in both), negative=tuple(q for _, q in both))

    def flipped(self) -> Contrast:
        """Return the contrast with its sides exchanged."""
        return replace(self, positive=self.negative, negative=self.positive)


@dataclass(frozen=True, eq=False)
class Readings:
    """Activations of a contrast at one site.

    Attributes:
        site: its canonical name.
        positive, negative: float32 `[n, d]`, heads flattened; row i of both belongs together.
        reference: median norm of the ordinary (not massive) token rows there: the unit of strength.
        heads: number of heads, where the site has a head axis.
    """

    site: str
    positive: Tensor
    negative: Tensor
    reference: float
    heads: int | None = None

    @property
    def difference(self) -> Tensor:
        """`positive - negative`, `[n, d]`."""
        return self.positive - self.negative

    def at(self, index: Sequence[int] | Tensor) -> Readings:
        """Return some of the rows."""
        chosen = torch.as_tensor(index)
        return replace(self, positive=self.positive[chosen], negative=self.negative[chosen])


def read_contrast(
    model: Model,
    contrast: Contrast,
    sites: str | Site | Iterable[str | Site],
    *,
    position: Where = "last",
) -> dict[str, Readings]:
    """Return the activations of a contrast at all sites, from one pass over its texts.

    Args:
        model: the model; installed edits apply.
        contrast: the texts.
        sites: names or patterns; sites with channels, such as `resid_post`, `mlp.out` or `attn.z`.
        position: which token stands for a text: `"last"`, `"first"`, a number (negative ones count from
            the end), `"last3"` (the mean of the last three), or `"mean"` over its ordinary tokens.

    Raises:
        SiteError: a site that does not exist or has no channels.
        NonFiniteError: the model's activations are not finite.
    """
    rows, references = read_rows(model, contrast.texts, sites, position=position)
    n = len(contrast)
    heads = {s.name: _heads(s) for s in model.resolve(sites)}
    return {name: Readings(name, x[:n], x[n:], references[name], heads[name]) for name, x in rows.items()}


def read_rows(
    model: Model,
    texts: Sequence[str],
    sites: str | Site | Iterable[str | Site],
    *,
    position: Where = "last",
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return one row for each text and site, and each site's median norm.

    Returns:
        rows: by site, float32 `[n, d]` in the order of the texts.
        references: by site, the median norm of the ordinary token rows of these texts.

    Raises:
        InputError: no texts, an empty text, or a position that a text has not got.
        NonFiniteError: activations that are not finite.
    """
    from actlas.core.calibration.reading import check_row_sites

    resolved = check_row_sites(model.resolve(sites))
    if not texts:
        raise InputError("there are no texts to read; give at least one")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: dict[str, list[Tensor | None]] = {s.name: [None] * len(texts) for s in resolved}
    norms: dict[str, list[Tensor]] = {s.name: [] for s in resolved}
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        trace = model.trace([texts[i] for i in chosen], resolved)
        for site in resolved:
            pooled = _pooled(trace, site, position).float().cpu()
            if not bool(torch.isfinite(pooled).all()):
                raise NonFiniteError(f"{model.name} has activations at {site.name} that are NaN or infinite")
            for i, row in zip(chosen, pooled, strict=True):
                rows[site.name][i] = row
            norms[site.name].append(_ordinary_norms(trace, site))
    stacked = {name: torch.stack([r for r in found if r is not None]) for name, found in rows.items()}
    return stacked, {name: float(torch.cat(found).median()) for name, found in norms.items()}


def _pooled(trace: Any, site: Site, position: Where) -> Tensor:
    if position != "last3":
        return pool(trace, site, position)
    x, mask = trace[site.name], trace.mask
    if mask is None or x.shape[:2] != mask.shape:
        last: Tensor = x.flatten(1) if x.ndim == 2 else x.flatten(2)[:, -3:].mean(1)
        return last
    places = mask.cumsum(1) - 1
    weight = (mask & (places >= mask.sum(1, keepdim=True) - 3)).to(x.device, torch.float32)
    weight = weight / weight.sum(1, keepdim=True)
    pooled: Tensor = torch.einsum("bp,bpd->bd", weight, x.flatten(2).float())
    return pooled


def _ordinary_norms(trace: Any, site: Site) -> Tensor:
    """Return the norms of the real, not massive rows of a trace at a site."""
    x, mask = trace[site.name], trace.mask
    if mask is not None and x.shape[:2] == mask.shape:
        flat = x.flatten(2)[mask.to(x.device)].float()
    else:
        flat = x.reshape(-1, x.shape[-1]).float()
    if site.kind in RESIDUAL_KINDS:
        massive = massive_rows(flat)
        flat = flat if bool(massive.all()) else flat[~massive]
    norms: Tensor = flat.norm(dim=-1)
    return norms.cpu()


def _heads(site: Site) -> int | None:
    from actlas.core.layout import HEAD_KINDS

    if site.features is None or site.kind not in HEAD_KINDS or len(site.features) != 2:
        return None
    return site.features[0]


def _row(item: Any, number: int) -> dict[str, Any]:
    """Return a pair's fields, or raise InputError that says what is missing."""
    if isinstance(item, Mapping):
        fields = dict(item)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        fields = {"positive": item[0], "negative": item[1]}
    else:
        fields = {name: getattr(item, name, None) for name in ("positive", "negative", "prompt", "y")}
    for side in ("positive", "negative"):
        text = fields.get(side)
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"pair {number} has no {side} side (it is {text!r}); give texts as 'positive' and 'negative'"
            )
    return {"prompt": "", "y": None} | {k: v for k, v in fields.items() if v is not None}
