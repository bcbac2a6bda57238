"""ITDA: a dictionary whose atoms are activations, read by matching pursuit; nothing is trained.

Walk through the rows of a corpus and keep each one that the dictionary so far cannot rebuild:

    D: unit rows, no bias, no centring           atom j is "token t at position p of document s"
    encode(x):  r = x;  k times: j = argmax |<r, D_j>|,  a_j += <r, D_j>,  r -= <r, D_j> D_j
    decode(a):  a D                                              a is signed
    seed:       until n >= d, the most frequent distinct rows of the batch
    then, for each batch with D frozen: append x/|x| where cos(x, a D) < cos_min

The paper's threshold is on e = mean_d (x/|x| - x_hat/|x_hat|)^2 = (2 - 2 cos) / d, so that a tau that is
strict in a small model admits everything in none of a wide one: e never exceeds 2/d. `cos_min` means the
same at every width; `tau` is taken as cos_min = 1 - tau d / 2.

Atoms have names, and two models that read the same text name them alike: the overlap of the names is a
similarity of representations (`actlas.measure.similarity`). What the selection buys is measured by
default: held-out error beside that of as many random rows (`lens.measurements`).

Source: "Inference-Time Decomposition of Activations (ITDA)", sections 3.1-3.4 and Algorithm 1. The paper
writes orthogonal matching pursuit in the algorithm and matching pursuit in the text and the released
code; the default here is the latter, `pursuit="orthogonal"` the former (slower, less error). Near copies
of an atom are left out (as in the paper; the released code keeps them). The released loop also keeps rows
of padding, which then become the most frequent seeds.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError
from actlas.core.layout import HEAD_KINDS
from actlas.core.lens import check_finite
from actlas.core.methods import method
from actlas.core.progress import progress
from actlas.dictionaries.itda_growth import Growing, Pursuit, SeedAtoms
from actlas.dictionaries.itda_quality import RandomRows, measure_against_random
from actlas.dictionaries.labelled_rows import Rows, labelled_rows
from actlas.dictionaries.solvers import orthogonal_matching_pursuit
from actlas.dictionaries.sources import MASSIVE
from actlas.kernels.sparse_codes import matching_pursuit
from actlas.measure.similarity import AtomLabels

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(kw_only=True, eq=False)
class ITDA(Dictionary):
    """A dictionary of labelled activations.

    Attributes:
        directions: float32 `[n, d]`, the atoms as unit rows, in the order in which they were added.
        labels: int64 `[n, 3]`: document (an index into `documents`), position, token id (-1 if unknown).
        documents: names of the documents that atoms come from.
        texts: for each atom, the text up to its token, which stands in `«»`; empty without a tokenizer.
        k: steps of matching pursuit; at most so many atoms are active.
        cos_min: an activation rebuilt less well than this became an atom.
        batch: rows between two updates; the result depends on it and on the order of the rows.
        seeded: the first so many atoms are seeds.
        data: hash of what was read; only dictionaries of the same text can be compared by label.
        rows: how many rows were walked through.
        pursuit: how it is read: `"matching"` or `"orthogonal"` matching pursuit.
        max_atoms, seed_atoms, duplicate_cos: how it was fitted; see `fit_itda`.
    """

    directions: Tensor
    labels: Tensor
    documents: tuple[str, ...]
    texts: tuple[str, ...] = ()
    k: int
    cos_min: float
    batch: int
    seeded: int = 0
    data: str = ""
    rows: int = 0
    pursuit: str = "matching"
    max_atoms: int | None = None
    seed_atoms: str | None = None
    duplicate_cos: float | None = None

    def __post_init__(self) -> None:
        n = len(self.directions)
        if self.directions.ndim != 2 or n == 0 or self.labels.shape != (n, 3):
            raise ShapeError(
                f"ITDA needs directions [n, d] and labels [n, 3], not {list(self.directions.shape)} and "
                f"{list(self.labels.shape)}"
            )
        if not 1 <= self.k <= n:
            raise InputError(f"k is {self.k}; an ITDA of {n} atoms takes 1 to {n}")
        if self.texts and len(self.texts) != n:
            raise ShapeError(f"ITDA has {n} atoms but {len(self.texts)} texts")
        check_finite("ITDA", directions=self.directions)

    @property
    def channels(self) -> int:
        return self.directions.shape[1]

    @property
    def features(self) -> int:
        return len(self.directions)

    @property
    def atoms(self) -> Tensor:
        return self.directions

    def encode_rows(self, x: Tensor) -> Codes:
        """Return signed codes of rows `[n, d]`; they scale with the row."""
        atoms = self.directions
        if self.pursuit == "orthogonal":
            return orthogonal_matching_pursuit(x.to(atoms), atoms, self.k)
        indices, values = matching_pursuit(x.to(atoms), atoms, self.k, self._gram)
        return Codes(indices, values, self.features)

    @property
    def tau(self) -> float:
        """The paper's threshold on the error, which stands for `cos_min`: (2 - 2 cos_min) / d."""
        return 2 * (1 - self.cos_min) / self.channels

    def label(self, atom: int) -> str:
        """Return an atom's label on one line: document, position, and its text if that is known."""
        document, position, _ = self.labels[self.check_feature(atom)].tolist()
        name = self.documents[document] if document < len(self.documents) else str(document)
        said = " ".join(self.texts[atom].split("\n")) if self.texts else ""
        return f"{name} @ {position}" + (f": {said}" if said else "")

    @property
    def atom_labels(self) -> AtomLabels:
        """The labels as a set, for `representation_similarity(a, b, "itda")`."""
        names = dict(enumerate(self.documents))
        named = [(names.get(d, str(d)), p) for d, p, _ in self.labels.tolist()]
        return AtomLabels(frozenset(named), frozenset(named[: self.seeded]), self.data)

    @cached_property
    def _gram(self) -> Tensor:
        return self.directions @ self.directions.T


@method(
    "itda",
    room="dictionaries",
    returns="Lens",
    data="corpus",
    summary="a dictionary whose atoms are activations, read by matching pursuit; no training",
    example="actlas fit itda smollm2 prose --site blocks.15.resid_post -o itda/",
    papers=("itda",),
)
def fit_itda(
    model: Model | None,
    data: Any,
    site: str,
    *,
    k: int = 40,
    cos_min: float = 0.9,
    tau: float | None = None,
    max_atoms: int = 8192,
    seed_atoms: SeedAtoms | None = "frequent",
    tokens: int | None = 16_384,
    context: int | None = None,
    batch: int = 1024,
    pursuit: Pursuit = "matching",
    duplicate_cos: float | None = 0.9999,
    held_out: int = 2048,
    labels: Tensor | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> ITDA:
    """Walk once through a corpus and keep what the dictionary cannot rebuild yet.

    Args:
        model: reads a corpus; may be `None` for rows.
        data: a corpus, a Store, or rows `[n, d]`.
        site: one site with a row of channels a token.
        k: steps of matching pursuit (paper: 40).
        cos_min: what is rebuilt with a lower cosine becomes an atom (GPT-2 in the paper: about 0.85, which
            in the middle of `smollm2` adds only a few dozen to the seeds).
        tau: the paper's threshold, instead of `cos_min`; it depends on d.
        max_atoms: stop there (held-out rows are still read).
        seed_atoms: the first d atoms: the most `"frequent"` distinct rows of a batch, the `"first"` ones,
            or `None`: the first row alone, then batches no larger than the dictionary.
        tokens: rows to read, held-out ones included; `None`: all (paper: 1.2 million).
        context: tokens in a window of a corpus; default 128, or what the model takes.
        batch: rows between two updates; smaller ones admit fewer atoms that are alike.
        pursuit: `"matching"`, or `"orthogonal"`, which fits all coefficients again after each step.
        duplicate_cos: leave out a row whose cosine with another row added in its batch is larger; `None`
            keeps all, as the released code does.
        held_out: about so many rows are kept apart to measure on; 0 measures nothing.
        labels: for rows, int64 `[n, 2 or 3]`: document, position and token of each.
        batch_tokens: tokens of one forward pass.
        seed: of the random atoms that it is measured against, and of a Store's order.

    Raises:
        InputError: k, cos_min, tau or max_atoms out of range, no rows, or rows that are zero.
        NonFiniteError: rows that hold NaN, named.
        ShapeError: rows or labels of another shape.
    """
    _check(k, cos_min, tau, max_atoms, seed_atoms, pursuit)
    grown: Growing | None = None
    apart: list[Rows] = []
    random = RandomRows(max_atoms, seed)
    norm = bound = 0.0
    walked, print_ = 0, ""
    source = labelled_rows(
        model, data, site, batch=batch, tokens=tokens, context=context, labels=labels,
        batch_tokens=batch_tokens, seed=seed,
    )  # fmt: skip
    with progress("ITDA", tokens, "tokens") as advance:
        for part in source:
            if grown is None:
                norm = MASSIVE * float(part.x.norm(dim=1).median())
                bound = cos_min if tau is None else _as_cosine(tau, part.x.shape[1])
                grown = Growing(part.x.shape[1], k, bound, max_atoms, duplicate_cos, pursuit)
                print_ = str(getattr(data, "hash", "") or _digest(part))
            advance(len(part))
            part = part[part.x.norm(dim=1) <= norm]
            if sum(len(p) for p in apart) < held_out:
                apart.append(part[part.held])
                part = part[~part.held]
            full = grown.n >= max_atoms
            if full and sum(len(p) for p in apart) >= held_out:
                break
            if full or not len(part):
                continue
            walked += len(part)
            random.add(part.x)
            grown.walk(part, seed_atoms)
    if grown is None or not grown.n:
        raise InputError(f"no row of {site} could become an atom; give more text than {tokens} tokens")
    if k > grown.n:
        raise InputError(f"k is {k}, but {walked} rows gave {grown.n} atoms; give more rows or a smaller k")
    kept = Rows.cat(grown.kept)
    name, heads = _place(model, site)
    lens = ITDA(
        site=name,
        heads=heads,
        fingerprint=getattr(data if model is None else model, "fingerprint", None),
        skip_above=norm,
        directions=grown.atoms[: grown.n].clone(),
        **_named(kept, getattr(model, "tokenizer", None)),
        k=k,
        cos_min=bound,
        batch=batch,
        seeded=grown.seeded,
        data=print_,
        rows=walked,
        pursuit=pursuit,
        max_atoms=max_atoms,
        seed_atoms=seed_atoms,
        duplicate_cos=duplicate_cos,
    )
    note = f"; it stopped at max_atoms after {walked:,} rows" if grown.n >= max_atoms else ""
    lens.measurements = measure_against_random(lens, apart, random.take(lens.features), seed, note)
    return lens


def _place(model: Model | None, site: str) -> tuple[str, int | None]:
    """Return the site's whole name and its number of heads."""
    if model is None:
        return site, None
    found = model.resolve(site)[0]
    features = found.features
    return found.name, features[0] if found.kind in HEAD_KINDS and features is not None else None


def _named(kept: Rows, tokenizer: Any) -> dict[str, Any]:
    """Return labels with the documents renumbered to those in use, their names, and the texts."""
    used, number = torch.unique(kept.label[:, 0], return_inverse=True)
    names = [kept.names[i] if i < len(kept.names) else str(i) for i in used.tolist()]
    labels = torch.cat([number.unsqueeze(1), kept.label[:, 1:]], dim=1)
    texts: tuple[str, ...] = ()
    if tokenizer is not None and bool((kept.before[:, -1] >= 0).all()):
        ids = [[t for t in row if t >= 0] for row in kept.before.tolist()]
        ahead = tokenizer.batch_decode([row[:-1] for row in ids])
        own = tokenizer.batch_decode([row[-1:] for row in ids])
        texts = tuple(f"{a}«{b}»" for a, b in zip(ahead, own, strict=True))
    return {"labels": labels, "documents": tuple(names), "texts": texts}


def _digest(part: Rows) -> str:
    names = [part.names[i] if i < len(part.names) else str(i) for i in part.label[:, 0].tolist()]
    return hashlib.sha256(repr((names, part.label[:, 1:].tolist())).encode()).hexdigest()


def _as_cosine(tau: float, d: int) -> float:
    if tau >= 2 / d:
        warnings.warn(
            f"tau is {tau:g}, but the largest possible error with {d} channels is 2/d = {2 / d:.2g}: nothing "
            f"would be added after the seeds; give a smaller tau, or cos_min",
            stacklevel=3,
        )
    return 1 - tau * d / 2


def _check(k: int, cos_min: float, tau: float | None, max_atoms: int, seed_atoms: Any, pursuit: Any) -> None:
    if pursuit not in get_args(Pursuit):
        raise InputError(f"pursuit is {pursuit!r}; it must be 'matching' or 'orthogonal'")
    if k < 1:
        raise InputError(f"k is {k}; matching pursuit takes at least 1 step")
    if k > max_atoms or max_atoms < 1:
        raise InputError(f"max_atoms is {max_atoms}; with k={k} it must be at least {max(k, 1)}")
    if tau is None and not 0 < cos_min < 1:
        raise InputError(f"cos_min is {cos_min:g}; it must lie between 0 and 1")
    if tau is not None and not tau > 0:
        raise InputError(f"tau is {tau:g}; it must be above 0 (and below 2/d)")
    if seed_atoms is not None and seed_atoms not in get_args(SeedAtoms):
        raise InputError(f"seed_atoms is {seed_atoms!r}; it must be 'frequent', 'first' or None")
