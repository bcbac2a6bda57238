"""Two ways in which a sparse autoencoder misses a variable, on data where the variables are known.

Occlusion: two independent attributes share a site, and the larger hides the smaller.

    x = u[a] + size * w[b]         a, b uniform; u, w random unit vectors        size < 1 shrinks b

Over-splitting: a binary attribute is not one feature for each value but many, each for a part of the noise
around it.

    x = u[v] + noise * N(0, 1)     v in {0, 1}

For each, autoencoders are trained on fresh data, several seeds, and the features that tell the attribute
(F1 above 0.8) are counted. Both depend on the sparsity: with a budget of as many active features as there
are attributes nothing is hidden; one feature fewer, and the smaller attribute is gone.

Source: Makelov, Lange and Nanda 2024, "Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control", section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.dictionaries.attribute_f1 import attribute_f1
from actlas.dictionaries.objective import TrainSettings
from actlas.dictionaries.sae import SAE, architecture
from actlas.dictionaries.sources import RowsSource
from actlas.dictionaries.task_measures import INTERPRETABLE, parts_of_value
from actlas.dictionaries.training import train
from actlas.measure.samples import mean_measurement, missing

_CHANNELS, _WIDTH = 64, 128


def occlusion(
    kind: str = "topk",
    *,
    sizes: Sequence[float] = (1.0, 0.7, 0.4),
    values: int = 30,
    rows: int = 4096,
    passes: int = 60,
    seeds: int = 3,
    seed: int = 0,
    **options: Any,
) -> list[Measurement]:
    """Count the values of two attributes that an autoencoder has features for, as one of them shrinks.

    Args:
        kind: an architecture, e.g. `"topk"` with `k=1`, or `"relu"` with `sparsity=2.0`.
        sizes: norms of the second attribute's vectors; the first one's are 1.
        values: values of each attribute.
        rows, passes: training data and passes over it.
        seeds: how many times, each with its own data and weights. seed: the first of them.
        **options: of the architecture or of `TrainSettings`.

    Returns:
        `values with a feature`, by `attribute` (`"fixed"`, `"shrunk"`), `size` and `architecture`, with
        intervals over seeds; and `occluded`: by how much that share is lower for the shrunk attribute.

    Raises:
        InputError: a size that is not positive, or fewer than two values.
    """
    if values < 2 or not sizes or min(sizes) <= 0:
        raise InputError(
            f"occlusion needs positive sizes and at least 2 values, not {list(sizes)} and {values}"
        )
    out: list[Measurement] = []
    for size in sizes:
        told: dict[str, list[float]] = {"fixed": [], "shrunk": []}
        for s in range(seed, seed + seeds):
            g = torch.Generator().manual_seed(s)
            u, w = (_unit(values, g) for _ in range(2))
            labels = {name: torch.randint(0, values, (rows,), generator=g) for name in told}
            x = u[labels["fixed"]] + size * w[labels["shrunk"]]
            codes = _trained(kind, x, passes, s, options).encode(x)
            for name, label in labels.items():
                table = attribute_f1(codes, [str(int(i)) for i in label])
                told[name].append(float((table.f1 > INTERPRETABLE).any(0).double().mean()))
        group = {"architecture": _called(kind, options), "size": f"{size:g}"}
        for name, shares in told.items():
            own = {**group, "attribute": name}
            out.append(mean_measurement("values with a feature", "fraction", shares, over="seeds", group=own))
        lost = [a - b for a, b in zip(told["fixed"], told["shrunk"], strict=True)]
        out.append(mean_measurement("occluded", "fraction", lost, over="seeds", group=group))
    return out


def over_splitting(
    kind: str = "topk",
    *,
    noises: Sequence[float] = (0.05, 0.2),
    rows: int = 4096,
    passes: int = 60,
    seeds: int = 3,
    seed: int = 0,
    **options: Any,
) -> list[Measurement]:
    """Count into how many features a binary attribute is split, as the noise around it grows.

    Args:
        noises: standard deviation of the noise in each of 64 channels; the attribute's vectors have norm 1.
        kind, rows, passes, seeds, seed, options: see `occlusion`.

    Returns:
        `features per value`: how many features of precision 0.9 cover 90% of a value's rows, and `best F1`
        of a single feature, by `noise` and `architecture`, with intervals over seeds.
    """
    out: list[Measurement] = []
    for noise in noises:
        counts, best = [], []
        for s in range(seed, seed + seeds):
            g = torch.Generator().manual_seed(s)
            u = _unit(2, g)
            v = torch.randint(0, 2, (rows,), generator=g)
            x = u[v] + noise * torch.randn(rows, _CHANNELS, generator=g)
            codes = _trained(kind, x, passes, s, options).encode(x)
            labels = [str(int(i)) for i in v]
            table, on = attribute_f1(codes, labels), codes.dense() > 0
            parts = [parts_of_value(table, i, on, labels) for i in range(2)]
            found = [p for p in parts if p is not None]
            best.append(float(table.f1.max()))
            counts += [sum(found) / len(found)] if found else []
        group = {"architecture": _called(kind, options), "noise": f"{noise:g}"}
        if counts:
            out.append(mean_measurement("features per value", "count", counts, over="seeds", group=group))
        else:
            out.append(missing("features per value", "count", "no value can be covered", group=group))
        out.append(mean_measurement("best F1", "fraction", best, over="seeds", group=group))
    return out


def _unit(n: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, _CHANNELS, generator=generator), dim=1)


def _trained(kind: str, x: Tensor, passes: int, seed: int, options: Mapping[str, Any]) -> SAE:
    training = {n: v for n, v in options.items() if n in TrainSettings.__dataclass_fields__}
    own = {n: v for n, v in options.items() if n not in training}
    settings = TrainSettings(
        **{"tokens": len(x) * passes, "batch": 1024, "lr": 3e-3, "seed": seed, **training}
    )
    sae = architecture(kind).create("synthetic", _CHANNELS, _WIDTH, seed=seed, **own)
    return train(sae, RowsSource(x), settings, show=False)


def _called(kind: str, options: Mapping[str, Any]) -> str:
    return " ".join(
        [kind, *(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in options.items())]
    )
