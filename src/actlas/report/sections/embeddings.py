"""How a sentence encoder places sentences: paraphrases near, others far, and how wide the space is."""

from __future__ import annotations

from actlas.report.content import DataUse, SectionResult, Tile
from actlas.report.plots import Row, dots
from actlas.report.predictions import data_hash
from actlas.report.registry import Context, section

KIND = {
    "paraphrase": "paraphrases",
    "hard": "same words, other meaning",
    "unrelated": "unrelated sentences",
}


@section("embeddings", title="Results on sentences", order=30, needs=("encoder",), cost=0.5)
def embeddings(context: Context) -> SectionResult:
    """Embed pairs of sentences from templates and compare their cosines."""
    from actlas.measure.encoder import encoder_measures, text_pairs

    pairs = text_pairs(context.budget.pairs, seed=context.seed)
    notes = context.notes_on(pairs)
    measurements = encoder_measures(context.model, pairs, seed=context.seed)
    similar = [m for m in measurements if m.name == "embedding-similarity"]
    separation = [m for m in measurements if m.name == "embedding-separation"]
    figures = [
        dots(
            "Similarity by kind of pair",
            "Mean cosine of two sentences, with 95% intervals over pairs. Paraphrases should be the "
            "most alike.",
            [Row.of(m, KIND.get(m.group["pairs"], m.group["pairs"])) for m in similar],
            axis="cosine",
        ),
        dots(
            "Separation",
            "How often a paraphrase is nearer than another pair (area under the ROC curve); the tick "
            "is chance.",
            [Row.of(m, f"against {KIND.get(m.group['against'], m.group['against'])}", reference=0.5)
             for m in separation],
            axis="AUC",
            domain=(0, 1),
            reference="chance",
        ),
    ]  # fmt: skip
    tiles = [
        Tile(f"Separation, {m.group['against']}", m, remark="AUC, chance 0.5", rank=10 + i)
        for i, m in enumerate(separation)
    ]
    tiles += [
        Tile("Dimensions in use", m, remark=f"of {m.details.get('width', '?')}", rank=16)
        for m in measurements
        if m.name == "embedding-dimension"
    ]
    intro = (
        "A sentence's embedding is the normalised mean of its tokens' last hidden states. Sentences "
        "come from templates: paraphrases mean the same, hard pairs share the template and most words, "
        "unrelated pairs share neither."
    )
    data = DataUse("sentence pairs", len(pairs), "pairs", data_hash(pairs), "templates in Actlas")
    return SectionResult(intro, measurements, figures, (), notes, tiles, [data])
