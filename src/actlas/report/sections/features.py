"""Features of the model's middle layer: a dictionary fitted in under a minute, and what its atoms mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actlas.core.errors import ModelError
from actlas.core.measurement import Measurement
from actlas.report.content import DataUse, SectionResult, Table, Tile, plain
from actlas.report.registry import Context, section

if TYPE_CHECKING:
    from actlas.dictionaries.feature_atlas import FeatureAtlas

_SHOWN = 12
_BEFORE, _AFTER = 8, 4


@section("features", title="Features of the middle layer", order=45, needs=("causal-lm", "encoder"), cost=1.4)
def features(context: Context) -> SectionResult:
    """Fit an ITDA on the middle block's residual stream and name its features on other text."""
    from actlas.data import corpus
    from actlas.dictionaries.feature_atlas import feature_atlas
    from actlas.dictionaries.itda import fit_itda

    model, budget = context.model, context.budget
    if model.layout is None or model.tokenizer is None or not model.n_blocks:
        raise ModelError(f"{model.name} has no blocks or tokenizer to read features by")
    site = f"blocks.{model.n_blocks // 2}.resid_post"
    text = corpus("mixed", seed=context.seed)
    window = min(128, model.context_length or 128)
    lens = fit_itda(
        model, text, site, tokens=budget.dictionary_tokens, seed=context.seed, context=window,
        held_out=budget.dictionary_tokens // 5, k=min(32, model.d_model or 32),
    )  # fmt: skip
    other = corpus("mixed", seed=context.seed + 1)
    atlas = feature_atlas(
        model, lens, other, max_tokens=budget.feature_tokens, context=window,
        contexts=1, before=_BEFORE, after=_AFTER, name="mixed",
    )  # fmt: skip
    fvu = [m for m in lens.measurements if m.unit == "fraction" and m.group.get("atoms") == "selected"]
    named = Measurement(
        "labelled features", float(len(atlas.named)), "count", len(other),
        note=f"of {lens.features:,}; a label says at which tokens, or next to which, a feature fires",
    )  # fmt: skip
    intro = (
        f"At `{site}`, half way through the model, every activation is written as a sum of at most "
        f"{lens.k} of {lens.features:,} atoms, which are activations of single tokens of text (ITDA). Each "
        "atom is a feature; a label is given where an attribute of the tokens tells where it fires, on "
        "text that did not choose the label."
    )
    tiles = []
    if fvu:
        remark = f"{lens.features:,} atoms, {lens.k} at a token"
        tiles.append(Tile("Variance that features leave out", fvu[0], remark=remark, rank=45))
    notes = [
        "The dictionary is small and quickly made; "
        f"`actlas fit sae {plain(model.name)} --site {site}` trains a better one in minutes, and "
        "`actlas features` shows all of its features.",
    ]
    used = text.take(min(len(text), max(1, len(other))))
    data = DataUse("mixed", len(used), "documents", used.hash, text.source)
    table = _table(atlas)
    return SectionResult(
        intro, (*lens.measurements, named), (), () if table is None else (table,), notes, tiles, [data]
    )


def _table(atlas: FeatureAtlas) -> Table | None:
    """The surest labels, one for each set of tokens, with the place where the feature is largest."""
    rows: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for f in atlas.named:
        if str(f.label) in seen or not f.contexts:
            continue
        seen.add(str(f.label))
        assert f.label is not None
        share = f"{f.label.precision:.0%} / {f.label.recall:.0%}"
        rows.append((str(f.label), str(f.contexts[0]), share, f"{f.density:.1%}", str(f.number)))
        if len(rows) == _SHOWN:
            break
    if not rows:
        return None
    columns = ("label", "where it is largest", "precision / recall", "fires at", "feature")
    note = "Precision and recall on text that did not choose the label; «» marks the token."
    return Table("Features with the surest labels", columns, tuple(rows), note)
