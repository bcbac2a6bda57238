"""recsae: does a sparse autoencoder on a recommender's user state find concepts, and do they drive it?

SASRec learns from item numbers alone; the categories are known to us only. A TopK autoencoder on the
user's state is judged on three things: the ranking through its reconstruction, how many features are
categories (or unions of them) to users that did not name them, and what switching one off does to the
share of its category in the top ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import recsae_model as models

TOP = 10
#: kind of catalogue -> items, categories, channels of the recommender
KINDS = {"roomy": (300, 12, 32), "crowded": (480, 48, 16)}
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)


def judge(m: Measured) -> list[Check]:
    """Holds if, in a roomy catalogue (12 categories, 32 channels) and in a crowded one (48 categories, 16
    channels), the share of live features that are concepts (F1 above 0.8 for one category, on users that
    did not name them) is above that of the state's own channels cut at their best quantile (central), if
    switching off a category's best feature lowers the category's share in the top ten at least three times
    as much as features that are as active for the same users (central), and if NDCG@10 through the
    reconstruction is at least 0.95 of what it was. Controls: an untrained autoencoder has fewer concepts,
    and a random direction of equal length does less.
    """
    checks = []
    for kind in KINDS:
        questions = (
            ("features are concepts more often than channels", "concepts over channels", 0.0, True),
            (
                "a concept's feature lowers its category three times as much as others",
                "fall minus three times the control's",
                0.0,
                True,
            ),
            ("the reconstruction ranks as well", "NDCG@10 through the reconstruction", 0.95, False),
            ("training makes the concepts", "concepts over an untrained autoencoder", 0.0, False),
            ("a random direction does less", "fall minus a random direction's", 0.0, False),
        )
        for question, name, bound, central in questions:
            found = m.get(name, catalogue=kind)
            checks.append(Check.above(f"{kind} catalogue: {question}", found, bound, central=central))
    return checks


@reproduction(
    "recsae",
    claim="A TopK autoencoder on a frozen recommender's user state keeps its ranking, has features that "
    "stand for item categories nobody told the model about, and switching one off takes its category out "
    "of the recommendations.",
    judge=judge,
    quick={"users": 5000, "epochs": 6, "features": 256, "k": 8, "rows": 400_000, "seeds": 3},
    full={"users": 5000, "epochs": 6, "features": 256, "k": 8, "rows": 2_000_000, "seeds": 5},
)
def recsae(*, seed: int, users: int, epochs: int, features: int, k: int, rows: int, seeds: int) -> Findings:
    """Run it.

    Args:
        seed: of catalogues, models and splits.
        users: histories of 20 items.
        epochs: of SASRec.
        features, k, rows: of the autoencoder: features, active ones, rows of training.
        seeds: catalogues of each kind, with models of their own.
    """
    out: list[Measurement] = []
    said, table = [], []
    for kind in KINDS:
        runs = [_one(kind, 100 * seed + s, users, epochs, features, k, rows) for s in range(seeds)]
        found = _measured(runs, kind, seed)
        out += found
        value = {m.name: m.value for m in found}
        said.append(
            f"{kind}: {value['live features that are concepts']:.2f} of live features are concepts (channels "
            f"{value['channels that are concepts']:.2f}), switching one off lowers its category by "
            f"{value['fall of the share in the top ten']:.3f}, others as active by "
            f"{value['fall of the share in the top ten, features as active']:.3f}"
        )
        table += [
            {"category": f"{kind} {c}", "fall": float(v), "switched off": what}
            for what, key in (("its feature", "falls"), ("as active", "control falls"))
            for c, v in enumerate(runs[0][key])
        ]
    plot = Plot(
        "Fall of a category's share in the top ten",
        table,
        x="category",
        y="fall",
        color="switched off",
        mark="point",
    )
    return Findings(out, "; ".join(said), NOTE, [plot])


def _measured(runs: Sequence[dict[str, Any]], kind: str, seed: int) -> list[Measurement]:
    """Return every number of one kind of catalogue."""
    from actlas.measure.statistics import mean_measurement

    def mean(name: str, unit: str, values: Sequence[float], over: str = "catalogues") -> Measurement:
        return mean_measurement(name, unit, values, seed=seed, over=over, group={"catalogue": kind})

    out = [mean(name, unit, [r[key] for r in runs]) for key, (name, unit) in _NAMES.items()]
    out += [
        mean("concepts over channels", "fraction", [r["concepts"] - r["channels"] for r in runs]),
        mean(
            "concepts over an untrained autoencoder",
            "fraction",
            [r["concepts"] - r["untrained"] for r in runs],
        ),
        mean("NDCG@10 through the reconstruction", "ratio", [r["ndcg with"] / r["ndcg"] for r in runs]),
    ]
    falls, controls, moved = (
        np.concatenate([r[k] for r in runs]) for k in ("falls", "control falls", "random falls")
    )
    for name, values in (
        ("fall of the share in the top ten", falls),
        ("fall of the share in the top ten, features as active", controls),
        ("fall of the share in the top ten, random direction", moved),
        ("fall minus three times the control's", falls - 3 * controls),
        ("fall minus a random direction's", falls - moved),
    ):
        out.append(mean(name, "share of the top ten", list(values), "categories of all catalogues"))
    return out


_NAMES = {
    "ndcg": ("NDCG@10", "fraction"),
    "ndcg with": ("NDCG@10, reconstruction", "fraction"),
    "concepts": ("live features that are concepts", "fraction"),
    "channels": ("channels that are concepts", "fraction"),
    "untrained": ("features of an untrained autoencoder that are concepts", "fraction"),
    "shuffled": ("live features that are concepts, shuffled categories", "fraction"),
    "unions": ("live features that are a category or a union of some", "fraction"),
    "channel unions": ("channels that are a category or a union of some", "fraction"),
    "live": ("live features", "fraction"),
    "categories": ("categories with a feature of their own", "fraction"),
    "unexplained": ("fraction of variance unexplained", "fraction"),
}
NOTE = (
    "Published: Amazon and MovieLens data, concepts written and checked by a language model, 2,048 "
    "features on 64 channels. Official code: the auxiliary target is the negative residual and its "
    "prediction adds the bias, atoms drift from unit norm within an epoch, and zeros among the top k "
    "count as chosen. Ours: the residual without bias, unit atoms after every step, only positive values "
    "fire; a synthetic catalogue whose categories are known, so that names need no language model; SASRec "
    "with the whole softmax, which 300 items allow. The autoencoder sees the states of all positions of "
    "all users; concepts are of last states, named on half of the users and judged on the others. A "
    "concept is one category: states lie in as many clusters as there are categories, so whatever cuts "
    "them in two, any channel, is a union of some; unions are shown beside. A channel may fire above or "
    "below any of eight quantiles, the best one chosen with its name. Control features are matched in "
    "mean activation on the users whose mood is the category."
)


def _one(kind: str, seed: int, users: int, epochs: int, features: int, k: int, rows: int) -> dict[str, Any]:
    """Return everything that is measured on one catalogue."""
    from actlas.dictionaries.concepts import concepts
    from actlas.dictionaries.fit import fit_sae

    items, categories, width = KINDS[kind]
    catalogue = models.draw_catalogue(seed, users=users, items=items, categories=categories)
    model = models.train_sasrec(catalogue, seed, width=width, epochs=epochs)
    states = models.states_of(model, catalogue.history)
    options: dict[str, Any] = {"width": features, "k": k, "batch": 512, "lr": 1e-3, "seed": seed}
    sae = replace(fit_sae(model, states.flatten(0, 1), models.SITE, tokens=rows, **options), skip_above=None)
    untrained = fit_sae(model, states.flatten(0, 1), models.SITE, tokens=1, **{**options, "lr": 1e-12})
    last = states[:, -1]
    known = {"category of the last item": _words(catalogue.category[catalogue.history[:, -1]])}
    known["category of most of the last five items"] = _words(
        _most(catalogue.category[catalogue.history[:, -5:]])
    )
    known["mood"] = _words(catalogue.mood[:, -2])
    book, unions = (concepts(sae, known, rows=last, most=most, seed=seed) for most in (1, 10))
    everyone = torch.arange(users)
    before = models.ndcg(model, catalogue, everyone, TOP)
    with model.edit(sae.substitute()):
        after = models.ndcg(model, catalogue, everyone, TOP)
    measured = book.measurements[0]
    assert measured.baseline is not None
    found = {m.name: m for m in sae.measurements}
    return {
        "ndcg": float(before.mean()),
        "ndcg with": float(after.mean()),
        "concepts": measured.value,
        "shuffled": measured.baseline.value,
        "unions": unions.measurements[0].value,
        "live": book.live / features,
        "categories": len({c.values for c in book.named()}) / int(catalogue.category.max() + 1),
        "unexplained": found["fraction of variance unexplained"].value,
        "channels": _channels(last, known, seed, 1),
        "channel unions": _channels(last, known, seed, 10),
        "untrained": _finite(concepts(untrained, known, rows=last, most=1, seed=seed).measurements[0].value),
        **_ablations(model, catalogue, sae, last, known["mood"], seed),
    }


def _channels(last: Tensor, known: dict[str, list[str]], seed: int, most: int) -> float:
    """Return the share of channels that are concepts, each cut at its best quantile and side."""
    from actlas.dictionaries.concepts import concepts

    signed = torch.cat([last, -last], 1)
    limits = torch.quantile(signed, torch.tensor(QUANTILES), dim=0)  # [quantiles, 2 d]
    fires = (signed.unsqueeze(1) > limits).float().flatten(1)  # [n, quantiles * 2 d]
    book = concepts(fires, known, most=most, seed=seed)
    width = last.shape[1]
    best: dict[int, Any] = {}
    for concept in book.concepts:
        channel = concept.feature % width
        if channel not in best or concept.named_f1 > best[channel].named_f1:
            best[channel] = concept
    return sum(c.confidence > 0.8 for c in best.values()) / width


def _ablations(
    model: Any, catalogue: models.Catalogue, sae: Any, last: Tensor, mood: list[str], seed: int
) -> dict[str, list[float]]:
    """Return, for each category, the fall of its share in the top ten for users in the mood for it."""
    from actlas.dictionaries.attribute_f1 import attribute_f1
    from actlas.dictionaries.feature_ablation import ablation_effect

    half = len(last) // 2  # features are picked on the first half of the users, switched off on the others
    table = attribute_f1(sae.encode(last[:half]), mood[:half])
    embedding = model.module.items.weight.detach()
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, list[float]] = {"falls": [], "control falls": [], "random falls": []}
    for category in table.values:
        rows = torch.tensor([i for i in range(half, len(last)) if mood[i] == category])
        if not len(rows):
            continue
        (feature, _), own = table.best(category)[0], catalogue.category == int(category)

        def share(x: Tensor, own: Tensor = own) -> Tensor:
            return own[(x @ embedding.T).topk(TOP, dim=1).indices].float().mean(1)

        x = last[rows]
        others = [j for j, f1 in table.best(category, 20) if f1 > 0.5]  # of the same concept: no controls
        found = ablation_effect(
            sae, x, feature, share, exclude=others, seed=seed, unit="share of the top ten"
        )
        direction = torch.randn(x.shape[1], generator=generator)
        direction *= sae.direction(feature).norm() / direction.norm()
        moved = x - sae.encode(x).of(feature).unsqueeze(1) * direction
        out["falls"].append(found.effect.value)
        out["control falls"].append(found.control.value)
        out["random falls"].append(float((share(x) - share(moved)).mean()))
    return out


def _most(categories: Tensor) -> Tensor:
    """Return the category that most items of a row have; of several, the one of the latest item."""
    last = categories.shape[1]
    counts = (categories.unsqueeze(2) == categories.unsqueeze(1)).sum(2) * last + torch.arange(last)
    return categories.gather(1, counts.argmax(1, keepdim=True)).squeeze(1)


def _words(categories: Tensor) -> list[str]:
    return [str(int(c)) for c in categories]


def _finite(x: float) -> float:
    return x if x == x else 0.0
