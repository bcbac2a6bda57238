"""One sparse vector a text: the mean (or maximum) of its tokens' codes.

    codes = sample_codes(model, lens, texts)        # SampleCodes: [texts, 2 * features], sparse
    codes.vectors[0]                                # the first text

Which tokens count: real ones, that are no special tokens (begin and end of text, chat markup) and no
massive activations; they would be in every text and decide every comparison. The mean is over the tokens
that count, not over the padded length, so that a long text is not liked for its length.

Codes may be negative (ITDA). A generalised Jaccard similarity needs them to be non-negative, so positive
and negative values get a place each: feature j stands at j where it is positive, at features + j where it
is negative. Without a lens the vector is that of the raw activations.

Source: "Task-Specific Data Selection for Instruction Tuning via Monosemantic Neuronal Activations",
sections 2.2 and 2.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.codes import Codes
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.lens import Lens
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.trace import Trace

Pool = Literal["mean", "max"]
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SampleCodes:
    """The vectors of some texts.

    Attributes:
        vectors: SciPy CSR matrix float64 `[texts, width]`.
        tokens: how many tokens of each text counted, int64 `[texts]`; a text without any is all zeros.
        features: how many features the lens has; 0 for raw activations.
        site: where they were read.
        pool: how a text's tokens were put together.
    """

    vectors: Any
    tokens: NDArray[np.int64]
    features: int
    site: str
    pool: str

    def __len__(self) -> int:
        return int(self.vectors.shape[0])

    def __getitem__(self, rows: Any) -> SampleCodes:
        return SampleCodes(self.vectors[rows], self.tokens[rows], self.features, self.site, self.pool)

    def latent(self, place: int) -> tuple[int, int]:
        """Return which feature stands at a place, and its sign (1 or -1)."""
        if self.features and place >= self.features:
            return place - self.features, -1
        return place, 1


@dataclass(frozen=True, eq=False)
class SampleRows:
    """The rows of some texts that count.

    Attributes:
        x: float32 `[n, d]`.
        owner: number of the text that each row belongs to, int64 `[n]`.
        count: how many texts there are.
        site: where they were read.
    """

    x: Tensor
    owner: NDArray[np.int64]
    count: int
    site: str


@dataclass(frozen=True)
class _Text:
    id: str
    text: str


def sample_rows(
    model: Model,
    texts: Iterable[Any],
    *,
    site: str = "penultimate",
    context: int | None = None,
    batch_tokens: int = 2048,
) -> SampleRows:
    """Read texts once and keep their rows, to make codes of them with several lenses.

    Args:
        model: reads them; installed edits apply.
        texts: strings, or documents with `.text`.
        site: a site, or `"penultimate"` for the output of the last block but one.
        context: tokens in a window; a longer text is read in several.
        batch_tokens: of one forward pass.

    Raises:
        InputError: no texts, or several sites.
        NonFiniteError: NaN or infinity, with the number of the text.
    """
    where = read_site(model, site)
    items = _items(texts)
    parts = list(_read(model, items, where, context, batch_tokens))
    return SampleRows(
        torch.cat([x for x, _ in parts]), np.concatenate([owner for _, owner in parts]), len(items), where
    )


def sample_codes(
    model: Model | None,
    lens: Lens | None,
    texts: Iterable[Any] | SampleRows,
    *,
    site: str = "penultimate",
    pool: Pool = "mean",
    absolute: bool = False,
    context: int | None = None,
    batch_tokens: int = 2048,
) -> SampleCodes:
    """Read texts and return one vector each.

    Args:
        model: reads them; installed edits apply. Not needed for `SampleRows`.
        lens: what turns activations into codes; `None` for the raw activations.
        texts: strings, documents with `.text`, or rows that `sample_rows` read.
        site: where to read without a lens: a site, or `"penultimate"` for the output of the last block
            but one (a lens knows its site).
        pool: `"mean"` or `"max"` over the tokens that count.
        absolute: without a lens, take magnitudes before pooling.
        context, batch_tokens: of the reading.

    Raises:
        InputError: no texts, an unknown pool, several sites, a site that is not the lens's.
        NonFiniteError: NaN or infinity, with the number of the text.
    """
    if pool not in get_args(Pool):
        raise InputError(f"pool is {pool!r}; it must be 'mean' or 'max'")
    if isinstance(texts, SampleRows):
        if lens is not None and lens.site != texts.site:
            raise InputError(f"the lens reads {lens.site}, but these rows are of {texts.site}")
        where, count, parts = texts.site, texts.count, iter([(texts.x, texts.owner)])
    elif model is None:
        raise InputError("texts need a model to read them; give one, or rows")
    else:
        items = _items(texts)
        where, count = read_site(model, site, lens), len(items)
        parts = _read(model, items, where, context, batch_tokens)
    features = 0 if lens is None else lens.features
    width = 2 * features
    keys: list[NDArray[np.int64]] = []
    values: list[Array] = []
    tokens = np.zeros(count, dtype=np.int64)
    for rows, of in parts:
        x, owner = _fitted(rows, of, lens)
        width = width or x.shape[1]
        tokens += np.bincount(owner, minlength=count)
        row, place, value = _codes(x, lens, absolute)
        key, value = _pooled(owner[row] * width + place, value, pool)
        keys.append(key)
        values.append(value)
    key, value = _pooled(np.concatenate(keys), np.concatenate(values), pool)
    owner, place = np.divmod(key, width)
    if pool == "mean":
        value = value / tokens[owner]
    from scipy.sparse import csr_matrix

    vectors = csr_matrix((value, (owner, place)), shape=(count, width))
    return SampleCodes(vectors, tokens, features, where, pool)


def _items(texts: Iterable[Any]) -> list[_Text]:
    items = [_Text(str(i), t if isinstance(t, str) else t.text) for i, t in enumerate(texts)]
    if not any(item.text.strip() for item in items):
        raise InputError(f"there is no text among {len(items)} samples; give at least one with some")
    return items


def _read(
    model: Model, items: list[_Text], site: str, context: int | None, batch_tokens: int
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield the rows that count, `[n, d]`, and the number of the text that each belongs to."""
    special = torch.tensor(sorted(getattr(model.tokenizer, "all_special_ids", None) or []), dtype=torch.int64)
    with progress("reading samples", len(items), "texts") as advance:
        for trace in model.stream(items, site, batch_tokens=batch_tokens, context=context):
            yield _counted(trace, site, special)
            advance(len(set(trace.documents)))


def read_site(model: Model, site: str = "penultimate", lens: Lens | None = None) -> str:
    """Return the name of the site that samples are read at: the lens's, the penultimate block's, or `site`.

    Raises:
        InputError: several sites, or another than the lens's. ModelError: the blocks are not known.
    """
    if lens is not None:
        if site not in ("penultimate", lens.site) and [s.name for s in model.resolve(site)] != [lens.site]:
            raise InputError(f"the lens reads {lens.site}, not {site}; leave the site out")
        return lens.site
    if site != "penultimate":
        found = model.resolve(site)
        if len(found) != 1:
            raise InputError(f"samples are read at one site; {site!r} names {len(found)}")
        return found[0].name
    if model.n_blocks is None:
        raise ModelError(f"{model.name} has no layout, so its penultimate block is not known; name a site")
    prefix = f"{model.tower.name}." if model.tower is not None and model.tower.name else ""
    return model.resolve(f"{prefix}blocks.{max(0, model.n_blocks - 2)}.resid_post")[0].name


def _counted(trace: Trace, site: str, special: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
    assert trace.mask is not None and trace.tokens is not None
    mask = trace.mask.cpu()
    x = trace.rows(site).flatten(1).to(torch.float32)
    owner = torch.tensor([int(d) for d in trace.documents]).unsqueeze(1).expand(mask.shape)[mask]
    bad = ~torch.isfinite(x).all(1).cpu()
    if bool(bad.any()):
        raise NonFiniteError(f"{site} holds NaN or infinity in sample {int(owner[bad][0])}; leave it out")
    keep = ~(massive_rows(x).cpu() | torch.isin(trace.tokens.cpu()[mask], special))
    return x[keep.to(x.device)], owner[keep].numpy()


def _fitted(x: Tensor, owner: NDArray[np.int64], lens: Lens | None) -> tuple[Tensor, NDArray[np.int64]]:
    """Leave out rows above the norm up to which a dictionary was fitted."""
    above = getattr(lens, "skip_above", None)
    if above is None:
        return x, owner
    keep = x.norm(dim=1) <= above
    return x[keep], owner[keep.cpu().numpy()]


def _codes(
    x: Tensor, lens: Lens | None, absolute: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Return (row, place, value) of everything that is not zero."""
    if lens is None:
        dense = (x.abs() if absolute else x).double().cpu()
        n, d = dense.shape
        row, place = np.divmod(np.arange(n * d), max(d, 1))
        return row, place, dense.flatten().numpy()
    with torch.no_grad():
        found: Any = lens.encode(x)
    codes = found if isinstance(found, Codes) else Codes.from_dense(found)
    row, slot = (t.numpy() for t in codes.active.nonzero(as_tuple=True))
    value = codes.values[codes.active].double().cpu().numpy()
    index = codes.indices.cpu().numpy()[row, slot]
    return row, np.where(value < 0, index + lens.features, index), np.abs(value)


def _pooled(key: NDArray[np.int64], value: Array, pool: Pool) -> tuple[NDArray[np.int64], Array]:
    """Add up (or take the largest of) the values that have one key; keys come out sorted."""
    if not len(key):
        return key, value
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    starts = np.flatnonzero(np.diff(key, prepend=key[0] - 1))
    reduce = np.add.reduceat if pool == "mean" else np.maximum.reduceat
    return key[starts], reduce(value, starts)


def batches_of(n: int, size: int) -> Iterator[slice]:
    """Yield slices that cover `n` items."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def texts_of(samples: Sequence[Any]) -> list[str]:
    """Return the texts of strings or documents."""
    return [s if isinstance(s, str) else s.text for s in samples]
