"""Layers of small byte models that differ only in their seed, matched by several similarities.

Used by `itda`: does the overlap of atom labels find the same layer again more often than others do?
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.measurement import Measurement, format_number
from actlas.core.progress import progress
from actlas.papers.reproduction import Plot

if TYPE_CHECKING:
    from actlas.data.documents import Corpus

SETTINGS = tuple((k, cos) for k in (4, 8) for cos in (0.9, 0.94, 0.96, 0.98))
OVER_CKA = "layer matching of ITDA minus CKA"


def match_layers(
    texts: Corpus, seed: int, models: int, train_steps: int, shared_tokens: int
) -> tuple[list[Measurement], Plot, str]:
    """Match layers of byte models of different seeds by several similarities."""
    from actlas.measure.similarity import layer_matching, similarity_matrix
    from actlas.papers.reproductions.byte_models import STEP_BYTES

    fit, shared = texts.split()
    text = "\n\n".join(d.text for d in fit)[: 4 * STEP_BYTES * train_steps + 100_000]
    rows = [_layers(text, shared, 100 * seed + i, train_steps, shared_tokens) for i in range(models)]
    pairs = list(itertools.combinations(range(models), 2))
    test = pairs[1:] or pairs
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "CKA": ("cka", {}),
        "CKA, columns of unit norm": ("cka", {"unit_columns": True}),
        "SVCCA": ("svcca", {}),
        "relative representations": ("relative", {"seed": seed}),
        "regression": ("linreg", {"seed": seed}),
    }
    measured: list[Measurement] = []
    matrices: dict[str, list[Tensor]] = {}
    with progress("itda: comparing layers", len(kinds) + len(SETTINGS), "similarities") as advance:
        for name, (kind, options) in kinds.items():
            matrices[name] = [similarity_matrix(rows[a], rows[b], kind, **options) for a, b in test]
            advance()
        best, k, cos, fitted = -1.0, 0, 0.0, []
        for steps, bound in SETTINGS:
            made = [_fits(r, steps, bound) for r in rows[:2]]
            score = layer_matching(similarity_matrix(made[0], made[1], "itda")).value
            measured.append(_chosen_on(score, steps, bound))
            if score > best:
                best, k, cos, fitted = score, steps, bound, made
            advance()
    fitted += [_fits(r, k, cos) for r in rows[2:]]
    for name, keep in (("ITDA", False), ("ITDA, seeds kept", True)):
        matrices[name] = [
            similarity_matrix(fitted[a], fitted[b], "itda", exclude_seed=not keep) for a, b in test
        ]
    measured += [layer_matching(*ms, group={"by": name}) for name, ms in matrices.items()]
    measured.append(_against(matrices["ITDA"], matrices["CKA"], seed, f"k={k}, cos_min={cos:g}"))
    scores = {m.group["by"]: m.value for m in measured if m.name == "layer matching"}
    bars = [{"by": name, "right layer": value} for name, value in scores.items()]
    ours, cka = (format_number(scores[name]) for name in ("ITDA", "CKA"))
    line = f"layers matched: ITDA {ours}, CKA {cka}, chance 0.2"
    return measured, Plot("Layers matched", bars, "by", "right layer", mark="bar"), line


def _layers(text: str, shared: Corpus, seed: int, steps: int, tokens: int) -> dict[int, Tensor]:
    """Train one byte model and return the rows of each of its layers."""
    from actlas.papers.reproductions.byte_models import train_checkpoints

    trained = train_checkpoints(text, activation="silu", checkpoints=(steps,), seed=seed, width=64, layers=5)
    model = next(trained)[1]
    found: dict[int, list[Tensor]] = {}
    for trace in model.stream(shared, "blocks.*.resid_post", context=128, max_tokens=tokens):
        for layer, site in enumerate(trace):
            found.setdefault(layer, []).append(trace.rows(site))
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _fits(rows: dict[int, Tensor], k: int, cos: float) -> dict[int, Any]:
    """Fit an ITDA to every layer; a row's number is its label, because all models read the same bytes."""
    from actlas.dictionaries.itda import fit_itda

    labels = torch.stack([torch.zeros(len(rows[0]), dtype=torch.int64), torch.arange(len(rows[0]))], dim=1)
    return {
        layer: fit_itda(
            None, x, f"blocks.{layer}.resid_post", k=k, cos_min=cos, tokens=None, batch=128, held_out=0,
            labels=labels,
        )
        for layer, x in rows.items()
    }  # fmt: skip


def _chosen_on(score: float, k: int, cos: float) -> Measurement:
    return Measurement(
        "layer matching on the pair that chooses",
        score,
        "fraction",
        10,
        group={"k": str(k), "cos_min": f"{cos:g}"},
        note="used only to choose steps and threshold",
    )


def _against(ours: list[Tensor], theirs: list[Tensor], seed: int, said: str) -> Measurement:
    """Return the difference of two hit rates, paired over pair and layer."""
    from actlas.measure.statistics import paired_difference

    def hits(matrices: list[Tensor]) -> list[float]:
        own = torch.arange(len(matrices[0]))
        return [h for m in matrices for d in (1, 0) for h in (m.argmax(d) == own).float().tolist()]

    layers = len(ours[0])
    clusters = [f"{i} {layer}" for i in range(len(ours)) for _ in range(2) for layer in range(layers)]
    found = paired_difference(hits(theirs), hits(ours), clusters=clusters, seed=seed)
    return Measurement(
        OVER_CKA,
        found.value,
        "fraction",
        found.n,
        found.low,
        found.high,
        "paired bootstrap over layers of pairs",
        seed,
        note=f"{len(ours)} pairs of models; {said} chosen on another pair",
    )
