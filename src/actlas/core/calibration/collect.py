"""The one calibration pass: stream a corpus once, keep only what the statistics need."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.calibration.massive import MassiveRows, massive_rows
from actlas.core.calibration.origin import Origin
from actlas.core.calibration.result import Calibration
from actlas.core.calibration.statistics import (
    DEFAULT_STATISTICS,
    SiteStatistics,
    check_statistics,
    make_parts,
    memory_needed,
)
from actlas.core.errors import InputError, NonFiniteError, SiteError
from actlas.core.layout import ATTENTION_KINDS, RESIDUAL_KINDS
from actlas.core.progress import progress as progress_bar

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace

MEMORY_LIMIT = 1 << 30
_MANY_MASSIVE = 0.1
_ITEMS = 16


def calibrate(
    model: Model,
    corpus: Iterable[Any],
    sites: str | Site | Iterable[str | Site],
    stats: Iterable[str] = DEFAULT_STATISTICS,
    *,
    batch_tokens: int = 2048,
    context: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    rows: int = 1024,
    keep_massive: bool = False,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = True,
) -> Calibration:
    """Read a corpus once and return statistics of the activations at some sites.

    Memory does not grow with the corpus: one batch of activations at a time, and what the statistics
    keep (`actlas.core.calibration.accumulators` says how much). Padding never counts.

    Args:
        model: the model; edits that are installed on it are part of what is measured, and recorded.
        corpus: strings, or documents with `.text` and `.id`; or a batch of inputs `[n, ...]`, or a set
            of images with `.pixels`, for models that do not read text.
        sites: names or patterns of sites with one row of channels a token. Heads are flattened.
        stats: names from `STATISTICS`: `"moments"`, `"absmax"`, `"quantiles"`, `"channel_quantiles"`,
            `"kurtosis"`, `"channel_norms"`, `"hessian"`, `"rows"`.
        batch_tokens: tokens in a forward pass.
        context: tokens a document is cut into; default: the model's context length, at most 512.
        max_tokens: stop after so many tokens; default: the whole corpus.
        seed: of the sampled rows.
        rows: how many rows a site's sample holds at most (only with `"rows"`).
        keep_massive: put massive-activation rows of the residual stream into the statistics. By
            default they are reported in `calibration[site].massive` and left out (see
            `actlas.core.calibration.massive`).
        memory_limit: bytes that all statistics together may take, 1 GiB by default; `X^T X` of many
            wide sites is more than most people expect.
        progress: show progress on standard error when it takes long.

    Returns:
        A `Calibration`: `calibration["blocks.5.mlp.act"].absmax`, `.save(path)`, `.merge(other)`.

    Raises:
        SiteError: a site that does not exist or has no rows of channels (attention patterns, logits).
        InputError: an unknown statistic, an empty corpus, or statistics beyond the memory limit.
        NonFiniteError: NaN or infinity at a site, with the document and position.
    """
    chosen = check_statistics(stats)
    _check_positive(batch_tokens=batch_tokens, max_tokens=max_tokens, rows=rows)
    resolved = check_row_sites(model.resolve(sites))
    watched = _Watched(corpus)
    result = Calibration(
        sites={},
        stats=chosen,
        fingerprint=model.fingerprint,
        model_name=model.name,
        context=context,
        seed=seed,
        size=rows if "rows" in chosen else 0,
        keep_massive=keep_massive,
        under=tuple(edit.describe() for edit in model.installed),
    )
    source = watched if watched.inputs is None else watched.inputs
    traces = _traces(model, source, resolved, batch_tokens, context, max_tokens)
    with closing(traces), _progress_line(progress, max_tokens) as advance:
        for trace in traces:
            shared = None if trace.mask is None else token_origin(trace, seed)
            for site in resolved:
                values, origin = rows_at(trace, site, seed, shared)
                if site.name not in result.sites:
                    result.sites[site.name] = _make_site(result, site, values.shape[1], rows, memory_limit)
                _take_rows(result.sites[site.name], site, values, origin, keep_massive)
            advance(_count(trace, result, shared))
    if not result.tokens:
        raise InputError("nothing to calibrate on: the corpus holds no text; give at least one document")
    result.corpora = [{"name": watched.name, "hash": watched.hash}]
    _warn_if_common(result)
    return result


def _traces(
    model: Model,
    source: Any,
    sites: Sequence[Site],
    batch_tokens: int,
    context: int | None,
    max_tokens: int | None,
) -> Generator[Trace, None, None]:
    """Yield traces over a corpus of text, or over inputs `[n, ...]` in batches of `_ITEMS`."""
    if not isinstance(source, Tensor):
        yield from model.stream(
            source, sites, batch_tokens=batch_tokens, context=context, max_tokens=max_tokens
        )
        return
    for start in range(0, len(source), _ITEMS):
        batch = source[start : start + _ITEMS]
        trace = model.trace(batch, sites)
        trace.documents = [str(i) for i in range(start, start + len(batch))]
        yield trace


def check_row_sites(sites: Sequence[Site]) -> list[Site]:
    """Return the sites if each holds one row of channels a token.

    Raises:
        SiteError: attention scores and patterns (query by key) and logits do not.
    """
    for site in sites:
        if site.kind in ATTENTION_KINDS:
            raise SiteError(
                f"{site.name} holds one weight for each query and key, not a row of channels a token; "
                "calibrate attn.z or attn.out, or read the pattern with model.trace"
            )
        if site.kind == "logits":
            raise SiteError("logits are not calibrated (one channel a word); calibrate final_norm instead")
    return list(sites)


def rows_at(trace: Trace, site: Site, seed: int = 0, tokens: Origin | None = None) -> tuple[Tensor, Origin]:
    """Return the rows `[n, d]` of a site in a trace, padding left out, and where they come from.

    Sites with tokens give one row a token, heads flattened. Any other module's output gives one row
    for each item (`[batch, d]`), item and place (`[batch, n, d]`) or pixel (`[batch, d, height, width]`).

    Args:
        trace: what was read.
        site: which site of it.
        seed: of the rows' priorities.
        tokens: the origins of the trace's tokens, if the caller has them already.

    Raises:
        SiteError: the site's value is not a floating-point tensor with a batch axis.
    """
    x, mask = trace[site.name], trace.mask
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise SiteError(f"{site.name} holds {what}; a calibration needs floats [batch, ..., channels]")
    if mask is not None and x.ndim > 2 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)].flatten(1), tokens or token_origin(trace, seed)
    if mask is not None and x.ndim == 2 and len(x) == mask.numel():
        return x[mask.reshape(-1).to(x.device)], tokens or token_origin(trace, seed)
    if x.ndim == 4:
        x = x.movedim(1, -1)
    items = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    n, places, d = items.shape
    item, place = torch.arange(n).repeat_interleave(places), torch.arange(places).repeat(n)
    origin = Origin(_names(trace, n), item, place, place, torch.full_like(place, -1), seed)
    return items.reshape(n * places, d), origin


def token_origin(trace: Trace, seed: int = 0) -> Origin:
    """Return the origins of a trace's real tokens, row by row."""
    assert trace.mask is not None
    mask = trace.mask.cpu()
    row = torch.arange(len(mask)).unsqueeze(1).expand_as(mask)[mask]
    place = (mask.cumsum(1) - 1)[mask]
    offsets = torch.tensor(trace.offsets or [0] * len(mask))
    token = trace.tokens.cpu()[mask] if trace.tokens is not None else torch.full_like(place, -1)
    return Origin(_names(trace, len(mask)), row, offsets[row] + place, place, token, seed)


def _names(trace: Trace, n: int) -> list[str]:
    return trace.documents or [str(i) for i in range(n)]


def _make_site(result: Calibration, site: Site, d: int, size: int, memory_limit: int) -> SiteStatistics:
    here = memory_needed(d, result.stats, size)
    total = here + sum(memory_needed(s.channels, result.stats, size) for s in result.sites.values())
    if total > memory_limit:
        raise InputError(
            f"{', '.join(result.stats)} of {site.name} ({d} channels) take {_size(here)}, with the sites "
            f"before it {_size(total)}, over the limit of {_size(memory_limit)}; give fewer sites or "
            "statistics, or raise memory_limit"
        )
    massive = MassiveRows(kept=result.keep_massive)
    return SiteStatistics(site.name, d, result.stats, 0, massive, make_parts(d, result.stats, size))


def _size(n: int) -> str:
    return f"{n / 1e6:,.0f} MB" if n >= 1e7 else f"{n / 1e3:,.1f} kB"


def _take_rows(
    statistics: SiteStatistics, site: Site, rows: Tensor, origin: Origin, keep_massive: bool
) -> None:
    if rows.shape[1] != statistics.channels:
        raise SiteError(
            f"{site.name} has {statistics.channels} channels in one batch and {rows.shape[1]} in another; "
            "its last axis is not a channel axis"
        )
    _check_finite(site.name, rows, origin)
    if site.kind in RESIDUAL_KINDS:
        massive = massive_rows(rows)
        if bool(massive.any()):
            where = massive.cpu()
            found = MassiveRows.of(rows[massive], origin.select(where), keep_massive)
            statistics.massive = statistics.massive.merge(found)
            if not keep_massive:
                rows, origin = rows[~massive], origin.select(~where)
    if len(rows):
        statistics.count += len(rows)
        for part in statistics.parts.values():
            part.update(rows, origin)


def _check_finite(site: str, rows: Tensor, origin: Origin) -> None:
    """Raise if any value is NaN or infinite; the sum is a cheap first look that no such value escapes."""
    if math.isfinite(float(rows.sum())):
        return
    bad = ~rows.isfinite()
    if not bool(bad.any()):
        return
    first = int(bad.any(1).nonzero()[0])
    raise NonFiniteError(
        f"{site}: {int(bad.sum()):,} of {rows.numel():,} values are NaN or infinite, the first in document "
        f"{origin.names[int(origin.document[first])]!r} at position {int(origin.position[first])}; "
        "check the model's weights, or load it in float32"
    )


def _count(trace: Trace, result: Calibration, shared: Origin | None) -> int:
    """Add a trace's tokens (items, where there are no tokens) and documents; return the tokens."""
    if shared is None:
        tokens = documents = len(next(iter(trace.items()))[1])
    else:
        tokens = len(shared)
        documents = int(((shared.position == 0) & (shared.place == 0)).sum())
    result.tokens += tokens
    result.documents += documents
    return tokens


def _warn_if_common(result: Calibration) -> None:
    for site, statistics in result.sites.items():
        massive, total = statistics.massive.count, result.tokens
        if massive > _MANY_MASSIVE * total and not result.keep_massive:
            warnings.warn(
                f"{site}: {massive:,} of {total:,} rows were recognised as massive activations and left out; "
                "so many are ordinary large channels, so calibrate with keep_massive=True",
                stacklevel=3,
            )
            return


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


@contextmanager
def _progress_line(wanted: bool, total: int | None) -> Iterator[Callable[..., None]]:
    if wanted:
        with progress_bar("calibrate", total, "tokens") as advance:
            yield advance
    else:
        yield lambda *_: None


@dataclass(frozen=True)
class _Text:
    id: str
    text: str


class _Watched:
    """A corpus that notes its name and hash while it is read, and names strings by their content.

    A string's name must not depend on its place in the corpus, or a calibration made in parts would
    sample other rows than one made at once.
    """

    def __init__(self, corpus: Any) -> None:
        found = getattr(corpus, "pixels", corpus)
        self.inputs: Tensor | None = found if isinstance(found, Tensor) else None
        self.name = str(getattr(corpus, "name", "inputs" if self.inputs is not None else "text"))
        self._corpus: Iterable[Any] = [corpus] if isinstance(corpus, str) else corpus
        self._known: str | None = getattr(corpus, "hash", None)
        self._digest = hashlib.sha256()
        if self.inputs is not None:
            self._digest.update(self.inputs.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())

    def __iter__(self) -> Iterator[Any]:
        for document in self._corpus:
            text = document if isinstance(document, str) else document.text
            data = text.encode("utf-8", "surrogatepass")
            if self._known is None:
                self._digest.update(len(data).to_bytes(8, "big") + data)
            if isinstance(document, str):
                yield _Text("text-" + hashlib.sha256(data).hexdigest()[:16], text)
            else:
                yield document

    @property
    def hash(self) -> str:
        """The corpus's own hash, or SHA-256 of the inputs that were read."""
        return self._known if isinstance(self._known, str) else self._digest.hexdigest()
