"""What quantization costs, one protocol for every method: loss, divergence, agreement, paired differences.

    quant_prices(model, corpus, {"rtn": a, "awq": b}, pairs=[("awq", "rtn")], tokens=1536, context=192)

All variants score the same tokens, and the logits of the model as it is are computed once. For variant v and
base p, over the scored tokens:

    perplexity-ratio     exp(mean nll_v - mean nll_p)
    kl-to-base           mean KL(p || v), nats a token
    agreement            share of tokens at which v's first choice is p's
    bits-per-weight      stored bits over weights of the exchanged layers, where the edit says so

and for a pair (v, w), drawn together over documents, `extra-kl` and `extra-loss`: v minus w, below 0 where
v is better. The divergence is the sharper of the two: a worse model may by luck be less surprised by a text.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.installation import EditHadNoEffect
from actlas.core.measurement import Measurement
from actlas.measure.likelihood import Losses, nll, select
from actlas.measure.paired import perplexity_ratio
from actlas.measure.quantizability import item_outputs
from actlas.measure.samples import mean_measurement
from actlas.measure.statistics import paired_difference

if TYPE_CHECKING:
    from actlas.core.model import Model

KEEP_BYTES = 1_200_000_000  # logits of the base that are kept; beyond that they are computed for each variant


def quant_prices(
    model: Model,
    corpus: Iterable[Any],
    variants: Mapping[str, Edit],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    group: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Measurement]:
    """Measure several variants of a model on the same tokens, and against each other.

    Args:
        model: a causal language model without other edits.
        corpus: held-out text.
        variants: name -> edit.
        pairs: (variant, the one it is compared with).
        seed: of the bootstrap.
        group: further labels of all measurements.
        **options: of `likelihood.nll`: tokens, context, per_document.

    Returns:
        for each variant `bits-per-weight` (where known), `perplexity-ratio`, `kl-to-base` and `agreement`,
        `group={"variant": name}`; for each pair `extra-kl` and `extra-loss`,
        `group={"variant": name, "over": other}`.

    Raises:
        InputError: no variants, or a pair with a variant that is not there.
    """
    unknown = [name for pair in pairs for name in pair if name not in variants]
    if not variants or unknown:
        given = ", ".join(variants) or "none"
        which = f"{unknown[0]!r} is not one of the variants" if unknown else "variants are wanted by name"
        raise InputError(f"{which}; given {given}")
    corpus, labels = list(corpus), dict(group or {})
    base, found = losses_of(model, corpus, variants, **options)
    out = prices_of(base, found, variants, seed=seed, group=labels)
    for name, over in pairs:
        out += extra(found[name], found[over], seed=seed, group={"variant": name, "over": over, **labels})
    return out


def losses_of(
    model: Model, corpus: Iterable[Any], variants: Mapping[str, Edit], **options: Any
) -> tuple[Losses, dict[str, Losses]]:
    """Return the losses of the model as it is, and those of each variant with their divergence from it.

    Args:
        model, corpus, variants, options: as in `quant_prices`.
    """
    corpus = list(corpus)
    options = {k: v for k, v in options.items() if k != "against_base"}
    windows = select(model, corpus, **options).windows
    kept: list[Tensor] | None = []
    if 4 * (model.vocab_size or 50_000) * sum(len(w.ids) for w in windows) > KEEP_BYTES:
        kept = None
    base = nll(model, corpus, keep_logits=kept, **options)
    found = {}
    for name, edit in variants.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditHadNoEffect)
            with model.edit(edit):
                found[name] = nll(model, corpus, against_base=True, base_logits=kept, **options)
    return base, found


def prices_of(
    base: Losses,
    found: Mapping[str, Losses],
    variants: Mapping[str, Edit],
    *,
    seed: int = 0,
    group: Mapping[str, str] | None = None,
) -> list[Measurement]:
    """Return the prices of variants from their losses; see `quant_prices` for their names and groups.

    Args:
        base, found: of `losses_of`.
        variants: name -> edit, whose bits are told; a name may be missing.
        seed: of the bootstrap.
        group: further labels.
    """
    out = []
    for name, losses in found.items():
        out += _price(base, losses, variants.get(name), {"variant": name, **(group or {})}, seed)
    return out


def output_prices(
    model: Model,
    items: Sequence[Any],
    variants: Mapping[str, Edit],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    group: Mapping[str, str] | None = None,
) -> list[Measurement]:
    """Measure variants of a model without a perplexity (an encoder, a classifier) by how far outputs move.

    Args:
        model: the model, without other edits.
        items: texts or images.
        variants, pairs, seed, group: as in `quant_prices`.

    Returns:
        for each variant `bits-per-weight` and `output-distance` (1 - cosine of an item's outputs with those
        of the model as it is); for each pair `extra-distance`, below 0 where the first is better.

    Raises:
        InputError: no items, or a pair with a variant that is not there.
    """
    unknown = [name for pair in pairs for name in pair if name not in variants]
    if not len(items) or unknown:
        said = f"{unknown[0]!r} is not one of the variants" if unknown else "there are no items to run"
        raise InputError(f"{said}; variants are {', '.join(variants) or 'none'}")
    base, labels, out = item_outputs(model, items).double(), dict(group or {}), []
    found = {}
    for name, edit in variants.items():
        with model.edit(edit):
            moved = item_outputs(model, items).double()
        found[name] = (1 - torch.cosine_similarity(base, moved, dim=1)).cpu().numpy()
        own = {"variant": name, **labels}
        bits = getattr(edit, "bits_per_weight", None)
        if bits is not None and bits == bits:
            out.append(Measurement("bits-per-weight", float(bits), "bits", 1, group=own, better="lower"))
        out.append(
            mean_measurement(
                "output-distance",
                "1 - cosine",
                found[name],
                seed=seed,
                over="items",
                group=own,
                better="lower",
            )
        )
    for name, over in pairs:
        drawn = paired_difference(found[over], found[name], seed=seed)
        out.append(
            Measurement(
                "extra-distance",
                drawn.value,
                "1 - cosine",
                drawn.n,
                drawn.low,
                drawn.high,
                "paired bootstrap over items",
                seed,
                group={"variant": name, "over": over, **labels},
                better="lower",
            )
        )
    return out


def fit_measurements(
    model: Model, corpus: Iterable[Any], edit: Edit, *, tokens: int, context: int, seed: int = 0
) -> list[Measurement]:
    """Return an edit's prices, as a method hands them over with it; none for models without a perplexity.

    Args:
        model: the model.
        corpus: text that was not calibrated on.
        edit: what was fitted.
        tokens, context: how much is read; 0 tokens measure nothing.
        seed: of the bootstrap.
    """
    corpus = list(corpus)
    if model.kind != "causal-lm" or not tokens or not corpus:
        return []
    base, found = losses_of(model, corpus, {"": edit}, tokens=tokens, context=context)
    return _price(base, found[""], edit, {}, seed)


def _price(
    base: Losses, losses: Losses, edit: Edit | None, group: Mapping[str, str], seed: int
) -> list[Measurement]:
    out = []
    bits = getattr(edit, "bits_per_weight", None)
    if edit is not None and bits is not None and bits == bits:
        out.append(Measurement("bits-per-weight", float(bits), "bits", 1, group=group, better="lower"))
    assert losses.divergence is not None and losses.agreement is not None
    out += [
        perplexity_ratio(base, losses, seed=seed, group=group),
        _mean("kl-to-base", "nats/token", losses.divergence, losses, group, seed, "lower"),
        _mean("agreement", "fraction", losses.agreement, losses, group, seed, "higher"),
    ]
    return out


def _mean(
    name: str, unit: str, sums: Any, losses: Losses, group: Mapping[str, str], seed: int, better: Any
) -> Measurement:
    return mean_measurement(
        name,
        unit,
        sums / losses.tokens,
        losses.tokens,
        seed=seed,
        group=group,
        better=better,
        note=losses.note,
    )


def extra(
    losses: Losses, over: Losses, *, seed: int = 0, group: Mapping[str, str] | None = None
) -> list[Measurement]:
    """Return `extra-kl` and `extra-loss` of one variant over another, with a paired bootstrap over documents.

    Args:
        losses, over: of `losses_of`, on the same text.
        seed: of the bootstrap.
        group: labels.

    Raises:
        InputError: they did not score the same tokens.
    """
    if losses.ids != over.ids or not (losses.tokens == over.tokens).all():
        raise InputError("the two runs scored different tokens; compare runs over the same text and options")
    out = []
    for name, sums, other in (
        ("extra-kl", losses.divergence, over.divergence),
        ("extra-loss", losses.nll, over.nll),
    ):
        assert sums is not None and other is not None
        drawn = paired_difference(other / over.tokens, sums / losses.tokens, losses.tokens, seed=seed)
        out.append(
            Measurement(
                name,
                drawn.value,
                "nats/token",
                drawn.n,
                drawn.low,
                drawn.high,
                "paired bootstrap over documents",
                seed,
                group=dict(group or {}),
                better="lower",
                note=losses.note,
            )
        )
    return out
