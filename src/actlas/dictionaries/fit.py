"""`fit_sae`: from a corpus, a store or rows to a trained sparse autoencoder, with its quality measured."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError, ShapeError, did_you_mean
from actlas.core.intervals import bootstrap_ratio
from actlas.core.layout import HEAD_KINDS
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.dictionaries.evaluation.controls import MOST_ATOMS, control_dictionaries
from actlas.dictionaries.objective import Batch, TrainSettings
from actlas.dictionaries.sae import SAE, parse_width
from actlas.dictionaries.sae import architecture as find_architecture
from actlas.dictionaries.sources import LiveSource, Packing, RowsSource, Source, StoreSource
from actlas.dictionaries.training import train

if TYPE_CHECKING:
    from actlas.core.model import Model

#: Rows held out of training to measure the dictionary on, when the rows are at hand.
HELD_OUT = 4096
#: Rows of a store that are kept apart: one stretch of 64 in sixteen, so that no neighbour was trained on.
_APART = "((row // 64) % 16 = 7)"
#: A default run is over in minutes on two cores.
DEFAULT_TOKENS = 500_000
DEFAULT_READ = 100_000


@method(
    "sae",
    room="dictionaries",
    returns="Lens",
    data="corpus",
    summary="a sparse autoencoder: features of a site, trained on a corpus or a store (default: TopK)",
    example="actlas fit sae smollm2 prose --site blocks.15.resid_post --width 8x --k 32 -o sae/",
    papers=("attention-output-sae", "fast-sae", "g-sae"),
)
def fit_sae(
    model: Model | None,
    data: Any,
    site: str | list[str],
    *,
    architecture: str = "topk",
    width: int | str = "8x",
    tokens: int | None = None,
    max_tokens: int | None = None,
    batch: int = 2048,
    lr: float | None = None,
    sparsity: float | None = None,
    target: str | None = None,
    packing: Packing = "document",
    context: int | None = None,
    dtype: str = "auto",
    checkpoint: str | None = None,
    seed: int = 0,
    **options: Any,
) -> SAE:
    """Train a sparse autoencoder.

    Rows of a corpus are read once and kept in memory while they fit (up to about 2 GB); longer corpora are
    read while training. Several passes are made when there are fewer rows than `tokens`.

    Args:
        model: whose activations are read; may be `None` for rows or a store.
        data: a corpus; a `Store`; or rows `[n, d]`.
        site: where; several for a crosscoder.
        architecture: a kind: `"topk"`, `"batchtopk"`, `"relu"`, `"jumprelu"`, `"gated"`, `"matryoshka"`, ...
        width: number of features, or a multiple of the channels such as `"8x"`.
        tokens: rows to train on; default: twenty passes, at most 500,000 rows.
        max_tokens: read at most so many tokens of the corpus; default: 100,000, a few minutes on two cores.
        batch, lr, sparsity, dtype, seed: see `TrainSettings`.
        target: reconstruct this site instead (a transcoder).
        packing, context: how a corpus is cut; see `sources`.
        checkpoint: a folder to save to every minute and to resume from.
        **options: of the kind, e.g. `k=32`, or any other field of `TrainSettings`.

    Raises:
        InputError: options that do not fit, no rows, or a store of another site.
        FingerprintError: a store of another model.
    """
    kind = find_architecture(architecture)
    own, training = _split_options(kind, options)
    sites = [site] if isinstance(site, str) else list(site)
    sites, sizes, heads = _widths(model, data, sites)
    if kind.several_sites and len(sites) > 1:
        own |= {"sites": tuple(sites)} | ({"sizes": tuple(sizes)} if len(sizes) > 1 else {})
    elif len(sites) > 1:
        raise InputError(f"{len(sites)} sites are given; a {architecture} dictionary is fitted at one")
    if target is not None and isinstance(data, Tensor):
        raise InputError("rows are of one site; train on two with RowsSource(x, y) and train(...)")
    if target is not None:
        (target,), (own["d_out"],), _ = _widths(model, data, [target])
        if "target" in {f.name for f in fields(kind)}:
            own["target"] = target
    read = sum(sizes)
    sae = kind.create(sites[0], read, parse_width(width, read), seed=seed, **own)
    sae.heads = heads
    given = {"batch": batch, "lr": lr, "sparsity": sparsity, "dtype": dtype, "seed": seed, **training}
    TrainSettings(tokens=tokens or 1, **given)  # it is quicker to be wrong before the data is read
    source, held = open_source(
        model,
        data,
        sites,
        target=target,
        gradient=kind.needs_gradient,
        packing=packing,
        context=context,
        max_tokens=max_tokens,
        seed=seed,
    )
    count = len(source) if isinstance(source, RowsSource) else getattr(source, "rows", None)
    if tokens is None:
        tokens = DEFAULT_TOKENS if count is None else min(DEFAULT_TOKENS, 20 * count)
    if count is not None:
        given["batch"] = min(batch, max(1, count))
    settings = TrainSettings(tokens=tokens, **given)
    train(sae, source, settings, checkpoint=None if checkpoint is None else Path(checkpoint))
    sae.fingerprint = model.fingerprint if model is not None else getattr(data, "fingerprint", None)
    judged = source.sample(HELD_OUT, seed + 1) if held is None else held
    plain = judged.y is None and len(sites) == 1
    controls = source.sample(min(sae.features, MOST_ATOMS), seed + 2) if plain else None
    sae.measurements = quality(sae, judged, held is not None, controls)
    return sae


def quality(
    sae: Dictionary, batch: Batch, held_out: bool, controls: Batch | None = None
) -> tuple[Measurement, ...]:
    """Return what every dictionary should say about itself: unexplained variance, L0, dead features.

    Args:
        sae: the dictionary.
        batch: rows to judge it on.
        held_out: whether they were kept out of training.
        controls: rows of which untrained dictionaries of equal size and equal k are made, to stand beside
            it: random rows as atoms, and random directions, both read by matching pursuit.
    """
    codes = sae.encode(batch.x)
    note = "on rows that it was not trained on" if held_out else "on rows that it was trained on"
    l0 = float(codes.l0.double().mean())
    silent = float((codes.counts() == 0).sum())
    of = f"of {sae.features}, {note}"
    found = [
        _unexplained(batch.target, sae.reconstruct(batch.x), note),
        Measurement("L0", l0, "features/token", len(batch), note=note),
        Measurement("features that never fired", silent, "count", len(batch), note=of),
    ]
    if controls is not None and len(controls) > 1:
        for name, control in control_dictionaries(sae, controls.x, l0).items():
            said = f"control: {name}, as many, {control.k} a row by matching pursuit"  # type: ignore[attr-defined]
            found.append(_unexplained(batch.target, control.reconstruct(batch.x), said, dictionary=name))
    return tuple(found)


def _unexplained(target: Tensor, rebuilt: Tensor, note: str, **group: str) -> Measurement:
    error = (target - rebuilt).square().sum(1).double()
    total = (target - target.mean(0)).square().sum(1).double()
    low, high = bootstrap_ratio(error.numpy(), total.numpy(), seed=0)
    return Measurement(
        "fraction of variance unexplained", float(error.sum() / total.sum()), "fraction", len(target),
        low, high, "bootstrap over rows", 0, group=group, better="lower", note=note,
    )  # fmt: skip


def _split_options(kind: type[SAE], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kind's own options and those of the training.

    Raises:
        InputError: an option that neither has.
    """
    settings = {f.name for f in fields(TrainSettings)}
    tensors = set(kind.trainable) | {f.name for f in fields(SAE)}
    own = {f.name for f in fields(kind)} - tensors | _keywords(kind.create) - {
        "cls",
        "site",
        "d",
        "width",
        "seed",
    }
    for name in options:
        if name not in own | settings:
            hint = did_you_mean(name, own | settings) or f"; it takes {', '.join(sorted(own))}"
            raise InputError(f"{kind.architecture} has no option {name!r}{hint}")
    mine = {name: value for name, value in options.items() if name in own}
    return mine, {name: value for name, value in options.items() if name not in own}


def _keywords(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind == p.KEYWORD_ONLY} - {"d_out"}


def _widths(model: Model | None, data: Any, sites: list[str]) -> tuple[list[str], list[int], int | None]:
    """Return whole names, the channels of each (of rows: of all together), and the heads of the first."""
    if isinstance(data, Tensor):
        if data.ndim < 2:
            raise ShapeError(f"rows are [n, d], not {list(data.shape)}")
        return sites, [data[0].numel()], None
    if model is None:
        if not hasattr(data, "batches"):
            raise InputError("a corpus needs the model whose activations are read; give it")
        return sites, [data.channels(s) for s in sites], None
    found = [_site_width(model, s) for s in sites]
    return [name for _, _, name in found], [size for size, _, _ in found], found[0][1]


def _site_width(model: Model, site: str) -> tuple[int, int | None, str]:
    found = model.resolve(site)
    if len(found) != 1:
        raise InputError(f"site {site!r} names {len(found)} sites; a dictionary is fitted at one")
    features = found[0].features
    if features is None:
        raise InputError(
            f"the width of {found[0].name} is not known before it is read; harvest it to a store"
        )
    return math.prod(features), features[0] if found[0].kind in HEAD_KINDS else None, found[0].name


def open_source(
    model: Model | None,
    data: Any,
    site: str | list[str],
    *,
    target: str | None = None,
    gradient: bool = False,
    packing: Packing = "document",
    context: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> tuple[Source, Batch | None]:
    """Return a source of rows for a corpus, a store or rows, and held-out rows where rows are at hand.

    Raises:
        InputError: a corpus without a model, or a store without the site.
        FingerprintError: a store of another model.
    """
    if isinstance(data, Tensor):
        return hold_out(Batch(data), seed)
    if hasattr(data, "batches"):
        if model is not None and data.fingerprint is not None:
            data.fingerprint.check(model.fingerprint, "the store")
        options: dict[str, Any] = {"target": target, "gradient": gradient}
        source = StoreSource(data, site, where=f"NOT {_APART}", **options)
        held = StoreSource(data, site, where=_APART, **options) if source.rows < data.rows else None
        return source, None if held is None else held.sample(HELD_OUT, seed)
    if model is None:
        raise InputError("a corpus needs the model whose activations are read; give it")
    max_tokens = DEFAULT_READ if max_tokens is None else max_tokens
    live = LiveSource(
        model,
        data,
        site,
        target=target,
        gradient=gradient,
        packing=packing,
        context=context,
        max_tokens=max_tokens,
    )
    rows = _read_all(live)
    return (live, None) if rows is None else hold_out(rows, seed)


def _read_all(live: LiveSource) -> Batch | None:
    """Return all rows of one pass, or `None` if they are more than about 2 GB."""
    most = 500_000_000 // (live.channels + live.target_channels)
    return live.read(most)


def hold_out(rows: Batch, seed: int) -> tuple[RowsSource, Batch]:
    """Split rows into a source and held-out rows (a tenth, at most 4096)."""
    whole = RowsSource(rows.x, rows.y, rows.gradient)
    n = len(whole)
    some = min(HELD_OUT, n // 10)
    everything = whole.sample(n, seed)
    if some == 0:
        return whole, everything
    kept = everything.take(slice(some, None))
    return RowsSource(kept.x, kept.y, kept.gradient), everything.take(slice(0, some))
