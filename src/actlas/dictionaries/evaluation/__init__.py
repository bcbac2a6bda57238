"""Judging a dictionary: how well it reconstructs, what the model loses by it, and what its features hold.

    found = evaluate(model, sae, corpus("prose"))                      # SAEBench's core metrics
    found = evaluate(model, sae, corpus(), parts=PARTS)                # everything
    dictionary_similarity(sae, other)                                  # MMCS of two dictionaries

Parts, each a module of this folder with its definitions and sources:

* `core`: `reconstruction` (L0, explained variance, cosine, dead and dense features, densities);
* `error`: `..dark_matter` (how much of the error is linear, how predictable its norm is);
* `behaviour`: `substitution` (ce_loss_score, kl_div_score, with zero and mean ablation);
* `probing`: k-sparse probing of labelled texts;
* `removal`: targeted concept removal (TPP, SCR);
* `first-letter`: feature absorption and splitting.

Names and definitions follow SAEBench, so that numbers can be compared; a module says where it departs.
Every number stands beside the same number of two dictionaries that nobody trained, of equal size and
equal k (`controls`), and beside the difference. Their atoms come from the text of the evaluation, so on
text unlike that of its training a dictionary has this against it: evaluate on held-out text of the same
kind first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.edits import Zero
from actlas.core.errors import InputError, did_you_mean
from actlas.core.measurement import Measurement
from actlas.dictionaries.evaluation.controls import Offset, UnitDirections, control_dictionaries
from actlas.dictionaries.evaluation.differences import over_controls
from actlas.dictionaries.evaluation.first_letter import first_letter
from actlas.dictionaries.evaluation.probing import probing_of, sparse_probing
from actlas.dictionaries.evaluation.reconstruction import reconstruction_measurements
from actlas.dictionaries.evaluation.removal import (
    scr_of,
    spurious_correlation_removal,
    targeted_probe_perturbation,
    tpp_of,
)
from actlas.dictionaries.evaluation.rows import Sample, read_sample
from actlas.dictionaries.evaluation.similarity import dictionary_similarity, max_cosine, one_to_one
from actlas.dictionaries.evaluation.substitution import (
    substitution_measurements,
    variant_losses,
)
from actlas.dictionaries.evaluation.texts import default_sets, pool_texts, review_corners
from actlas.measure.samples import missing

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

PARTS = ("core", "error", "behaviour", "probing", "removal", "first-letter")
DEFAULT = ("core", "behaviour")
_ROWS_DO = {"core", "error"}  # parts that need no model
OWN = "evaluated"  # the dictionary that is evaluated, in `group["dictionary"]`

__all__ = [
    "DEFAULT",
    "PARTS",
    "UnitDirections",
    "Offset",
    "Sample",
    "control_dictionaries",
    "dictionary_similarity",
    "evaluate",
    "first_letter",
    "max_cosine",
    "one_to_one",
    "read_sample",
    "sparse_probing",
    "spurious_correlation_removal",
    "targeted_probe_perturbation",
]


def evaluate(
    model: Model | None,
    lens: Dictionary,
    data: Iterable[Any] | Tensor,
    *,
    parts: Sequence[str] = DEFAULT,
    tokens: int = 8192,
    behaviour_tokens: int | None = None,
    context: int = 256,
    controls: bool = True,
    per_class: int = 60,
    per_letter: int = 40,
    thresholds: Sequence[int] = (2, 5, 10, 20, 50),
    seed: int = 0,
) -> list[Measurement]:
    """Evaluate a dictionary, beside untrained ones of equal size.

    Args:
        model: the model that it was fitted on; for rows it may be `None`.
        lens: any dictionary that reconstructs its own site.
        data: documents that it was not fitted on; or rows `[n, d]`.
        parts: of `PARTS`.
        tokens: about how many tokens the `core` part reads (as many again give the random atoms).
        behaviour_tokens: tokens that are scored under each substitution; default a quarter of `tokens`.
        context: window length in tokens.
        controls: also evaluate random atoms and random directions, and give the differences.
        per_class: texts of each label, for probing and removal.
        per_letter: words of each letter, for the first-letter task.
        thresholds: how many features the `removal` part switches off.
        seed: of every draw, split and bootstrap.

    Returns:
        Measurements; `group["dictionary"]` is `"evaluated"`, `"random atoms"` or `"random directions"`.

    Raises:
        InputError: an unknown part, no text, or a part that needs a model when there is none.
        FingerprintError: the dictionary was fitted on another model.
        ShapeError: the dictionary writes to another site than it reads.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(
                f"there is no part {part!r}; the parts are {', '.join(PARTS)}{did_you_mean(part, PARTS)}"
            )
    if not parts:
        raise InputError(f"no part was named; the parts are {', '.join(PARTS)}")
    if model is None and not set(parts) <= _ROWS_DO:
        raise InputError("without a model only the parts core and error can be measured; give the model")
    if isinstance(data, Tensor) and not set(parts) <= _ROWS_DO:
        raise InputError("rows of activations serve the parts core and error only; give text for the others")
    if model is not None and lens.fingerprint is not None:
        lens.fingerprint.check(model.fingerprint, "the dictionary")
    documents = data if isinstance(data, Tensor) else list(data)
    whole = read_sample(model, documents, lens, tokens=2 * tokens if controls else tokens, context=context)
    sample, others = whole.split(len(whole) // 2) if controls else (whole, whole)
    l0 = float(lens.encode(sample.x[:2048]).l0.double().mean())
    lenses = {OWN: lens}
    if controls:
        lenses |= control_dictionaries(lens, others.x, l0, seed)
    found: list[Measurement] = []
    if "core" in parts:
        for name, one in lenses.items():
            found += reconstruction_measurements(one, sample, seed=seed, group={"dictionary": name})
    if "error" in parts:
        for name, one in lenses.items():
            found += _error(one, sample, name, seed)
    if model is not None:
        options = {"tokens": behaviour_tokens or max(2, tokens // 4), "context": context, "seed": seed}
        if "behaviour" in parts:
            found += _behaviour(model, documents, lenses, others, **options)
        if "probing" in parts or "removal" in parts:
            found += _concepts(model, documents, lenses, parts, per_class, thresholds, seed)
        if "first-letter" in parts:
            found += _letters(model, lenses, per_letter, seed)
    return [*found, *over_controls(found, OWN, seed)] if controls else found


def _error(lens: Dictionary, sample: Sample, name: str, seed: int) -> list[Measurement]:
    from actlas.dictionaries.dark_matter import error_decomposition

    group = {"dictionary": name}
    try:
        return list(error_decomposition(lens, sample, group=group, seed=seed).measurements)
    except InputError as error:
        return [missing("vector_r2", "R2", str(error), group=group)]


def _behaviour(
    model: Model,
    documents: Any,
    lenses: dict[str, Dictionary],
    others: Sample,
    *,
    tokens: int,
    context: int,
    seed: int,
) -> list[Measurement]:
    """Substitute every dictionary, and the two ablations, in one pass over the text."""
    lens = lenses[OWN]
    if model.kind != "causal-lm":
        note = f"needs a model of kind causal-lm; {model.name} is of kind {model.kind}"
        return [missing("ce_loss_score", "fraction", note, group={"dictionary": OWN})]
    mean = others.x.double().mean(0).float()
    empty = Offset(site=lens.site, heads=lens.heads, skip_above=lens.skip_above, centre=mean)
    variants: dict[str, Edit] = {"zero ablation": Zero(lens.site), "mean ablation": empty.substitute()}
    variants |= {name: one.substitute() for name, one in lenses.items()}
    losses = variant_losses(model, documents, lens.site, variants, tokens=tokens, context=context)
    out = []
    for name in lenses:
        out += substitution_measurements(losses, name, seed=seed, group={"dictionary": name})
    return out


def _concepts(
    model: Model,
    documents: Any,
    lenses: dict[str, Dictionary],
    parts: Sequence[str],
    per_class: int,
    thresholds: Sequence[int],
    seed: int,
) -> list[Measurement]:
    """Probing and removal on the labelled texts that are at hand."""
    out: list[Measurement] = []
    usable = [n for n in thresholds if n <= lenses[OWN].features]
    for name, texts in default_sets(model, documents, per_class=per_class).items():
        pooled = pool_texts(model, texts, lenses)
        if "probing" in parts:
            out += probing_of(pooled, dataset=name, seed=seed)
        if "removal" in parts and len(pooled.classes()) > 2:
            out += tpp_of(pooled, lenses, dataset=name, thresholds=usable, seed=seed)
    if "removal" in parts:
        corners = review_corners(model, per_corner=per_class // 2)
        if corners:
            pooled = pool_texts(model, [(text, a) for text, a, _ in corners], lenses)
            second = [b for _, _, b in corners]
            out += scr_of(pooled, second, lenses, dataset="reviews", thresholds=usable, seed=seed)
    for part, metric in (("probing", "sae_test_accuracy"), ("removal", "tpp")):
        if part in parts and not any(m.name.startswith(("sae_", "tpp", "scr")) for m in out):
            out.append(missing(metric, "fraction", "no labelled texts: the corpus has no domains and the "
                               "tokenizer cannot express the tasks", group={"dictionary": OWN}))  # fmt: skip
    return out


def _letters(model: Model, lenses: dict[str, Dictionary], per_letter: int, seed: int) -> list[Measurement]:
    try:
        return first_letter(model, lenses, per_letter=per_letter, seed=seed)
    except InputError as error:
        group = {"dictionary": OWN}
        return [missing("mean_absorption_fraction_score", "fraction", str(error), group=group)]
