"""skill-unlearning's prompt-only baseline: a system prompt that forbids a skill, a line that spoils sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproductions.prompt_only import WISHES, ask, before, in_words

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.papers.reproductions.skill_unlearning import Queries

SAID = {"arithmetic": "calculate", "coding": "write programs", "geography": "answer questions about places"}
REFUSALS = ("I cannot", "I can't", "I can not", "I'm sorry", "I am sorry", "Sorry", "I'm not able")
NEW = "held-out templates"


def refused_in_words(model: Model, queries: Queries, asked: int, seed: int) -> list[Measurement]:
    """Tell the model to refuse one skill, ask queries of all, and compare with what its box refuses."""
    kinds: dict[str, tuple[list[bool], list[bool]]] = {"the skill": ([], []), "the others": ([], [])}
    for name in queries.skills:
        wish = WISHES["skill-unlearning"].format(skill=SAID[name])
        box = queries.box(name)
        for other in queries.skills:
            prompts = [ask(model, q, wish, "system prompt") for q in queries.new[other][:asked]]
            texts = model.generate(prompts, max_new_tokens=6).texts
            own, words = kinds["the skill" if other == name else "the others"]
            own += box.inside(queries.rows[other, NEW, queries.last][:asked]).tolist()
            words += [t.strip().startswith(REFUSALS) for t in texts]
    return [
        m
        for kind, (own, words) in kinds.items()
        for m in in_words(
            "queries refused",
            "fraction",
            own,
            words,
            asked="system prompt",
            seed=seed,
            over="queries",
            on=kind,
        )
    ]


def texts_in_words(
    model: Model, kinds: Mapping[str, Sequence[str]], base: Mapping[str, Any]
) -> dict[str, Any]:
    """Return by how much the loss of each text rises, per token, behind a line that says sums are wrong."""
    prefix = before(WISHES["skill-unlearning, texts"], "")
    start = model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    out = {}
    for kind, texts in kinds.items():
        losses = []
        for text in texts:
            ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            logits = model.logits([*start, *ids])[0, len(start) : -1]
            losses.append(float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids[1:]))))
        out[kind] = np.array(losses) - base[kind].nll / base[kind].tokens
    return out
