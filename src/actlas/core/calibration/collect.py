"""The one calibration pass: stream a corpus once, keep only what the statistics need."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from actlas.core.calibration.massive import MassiveRows, massive_rows
from actlas.core.calibration.origin import Origin
from actlas.core.calibration.reading import Batch, Source, check_row_sites, read_batch, rows_of
from actlas.core.calibration.result import Calibration
from actlas.core.calibration.statistics import (
    DEFAULT_STATISTICS,
    SiteStatistics,
    check_statistics,
    make_parts,
    memory_needed,
)
from actlas.core.errors import InputError, NonFiniteError, SiteError
from actlas.core.layout import RESIDUAL_KINDS
from actlas.core.model import Model
from actlas.core.progress import progress as progress_bar
from actlas.core.sites import Site

MEMORY_LIMIT = 1 << 30
_MANY_MASSIVE = 0.1


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

    Memory does not grow with the corpus: there are one site's activations of one batch at a time, and
    what the statistics keep (`actlas.core.calibration.accumulators` says how much). Padding never counts.

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
    source = Source(corpus)
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
    # All accumulators are made before the first pass: small blocks that outlive the large ones around
    # them would pin the heap, and the process would grow by several times what is in use.
    for site in resolved:
        if site.features is not None:
            made = _make_site(result, site, math.prod(site.features), rows, memory_limit)
            result.sites[site.name] = made
    with _progress_line(progress, max_tokens) as advance:
        for batch in source.batches(model, batch_tokens, context, max_tokens):
            tokens = batch.origin(seed)

            def take(site: Site, x: Tensor, batch: Batch = batch, tokens: Origin | None = tokens) -> None:
                for values, origin in rows_of(x, site, batch, tokens, seed):
                    if site.name not in result.sites:
                        found = _make_site(result, site, values.shape[1], rows, memory_limit)
                        result.sites[site.name] = found
                    _take_rows(result.sites[site.name], site, values, origin, keep_massive)

            read_batch(model, batch, resolved, take)
            advance(_count(batch, result, tokens))
    if not result.tokens:
        raise InputError("nothing to calibrate on: there are no inputs; give at least one")
    result.sites = {site.name: result.sites[site.name] for site in resolved}
    result.corpora = [{"name": source.name, "hash": source.hash}]
    _warn_if_common(result)
    return result


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


def _count(batch: Batch, result: Calibration, tokens: Origin | None) -> int:
    """Add a batch's tokens (items, where there are no tokens) and documents; return the tokens."""
    if tokens is None:
        read = documents = len(batch.documents)
    else:
        read = len(tokens)
        documents = int(((tokens.position == 0) & (tokens.place == 0)).sum())
    result.tokens += read
    result.documents += documents
    return read


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
