"""`actlas fit clusters`: k-means of per-prompt differences, and the probes that choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.calibration.reading import check_row_sites
from actlas.core.contrast import Contrast, Where, read_contrast
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.measure.samples import mean_measurement, rate_measurement
from actlas.steering.clusters import ClusterDirections, Hold, prompt_rows
from actlas.steering.probe_gate import ProbeGate

if TYPE_CHECKING:
    from actlas.core.model import Model


def cluster_directions(
    model: Model,
    data: Any,
    site: str | Sequence[str],
    *,
    k: int = 3,
    prompts: Sequence[str] | None = None,
    position: Where = "last",
    probe: Literal["fitted", "fresh"] = "fitted",
    seed: int = 0,
) -> ClusterDirections:
    """Return the centroids of the pairs' differences and a probe at every site.

    Args:
        model: the model.
        data: pairs: the prompt in target style, the prompt in base style.
        site: names or patterns of sites.
        k: number of directions; 1 is the mean difference.
        prompts: what the probes read, one a pair; default the base style.
        position: which token stands for a text.
        probe: fit the probes on these pairs, or leave them blank, for `observe`.
        seed: of k-means.

    Raises:
        InputError: more directions than different pairs, or prompts that are not one a pair.
    """
    contrast = Contrast.of(data)
    names = [s.name for s in check_row_sites(model.resolve(site))]
    if probe not in ("fitted", "fresh"):
        raise InputError(f"probe is {probe!r}; it must be 'fitted' or 'fresh'")
    if not 1 <= k <= len(contrast):
        raise InputError(f"k is {k}; {len(contrast)} pairs can have 1 to {len(contrast)} directions")
    read = read_contrast(model, contrast, names, position=position)
    rows = prompt_rows(model, read, prompts, position)
    centroids, gates, sizes = {}, {}, {}
    for name in names:
        labels, centroids[name] = _k_means(read[name].difference, k, seed, name)
        sizes[name] = tuple(int(c) for c in torch.bincount(labels, minlength=k))
        given: dict[str, Any] = {"fingerprint": model.fingerprint}
        gates[name] = (
            ProbeGate.fitted(name, rows[name], labels, k, **given)
            if probe == "fitted"
            else ProbeGate.fresh(name, rows[name], k, **given)
        )
    return ClusterDirections(centroids, gates, {n: read[n].reference for n in names}, sizes)


@method(
    "clusters",
    room="steering",
    returns="Edit",
    data="pairs",
    summary="a few steering directions from clustered differences, chosen for each prompt by a probe",
    example="actlas fit clusters smollm2 pairs.jsonl --site blocks.20.resid_post --k 3 -o styles/",
    papers=("g-act",),
)
def fit_clusters(
    model: Model,
    data: Any,
    site: str | Sequence[str],
    *,
    k: int = 3,
    alpha: float = 0.1,
    unit: Literal["resid", "raw"] = "resid",
    position: Where = "last",
    hold: Hold = "prompt",
    soft: bool = False,
    lr: float = 0.01,
    held_out: float = 0.25,
    seed: int = 0,
) -> Edit:
    """Fit clustered directions and the edit that adds the one which a prompt's probe chooses.

    Args:
        model: the model.
        data: pairs: the prompt in target style, the prompt in base style.
        site: where; with several sites each has its own directions and probe.
        k: number of directions.
        alpha, unit, hold, soft: see `ClusterDirections.steer`.
        position: which token stands for a text.
        lr: of the probes' updates on the held-out pairs, which are measured before they are learned from.
        held_out: share of pairs that clusters and probes are not fitted on.
        seed: of the split, k-means and the control.

    Returns:
        The edit; its `measurements` are, by site, the probes' accuracy on held-out pairs, the same with
        probes of shuffled labels, and the mean cosine of single differences with their mean (near 1: one
        direction would do).
    """
    contrast = Contrast.of(data)
    fit, test = contrast.split(held_out, seed)
    found = cluster_directions(model, fit, site, k=k, position=position, seed=seed)
    measured = probe_quality(model, found, fit, test, position=position, seed=seed)
    learned = found.observe(model, test, lr=lr, position=position)
    edit = learned.steer(alpha, unit=unit, hold=hold, soft=soft)
    return edit.with_measurements(measured)


def probe_quality(
    model: Model,
    found: ClusterDirections,
    fit: Contrast,
    test: Contrast,
    *,
    position: Where = "last",
    seed: int = 0,
) -> list[Measurement]:
    """Return accuracy and control of the probes on test pairs, and how alike the differences are."""
    read = read_contrast(model, fit, tuple(found.centroids), position=position)
    tested = read_contrast(model, test, tuple(found.centroids), position=position)
    generator = np.random.default_rng(seed)
    out: list[Measurement] = []
    for site, gate in found.gates.items():
        right = found.nearest(site, tested[site].difference)
        labels = found.nearest(site, read[site].difference)
        mixed = labels[torch.from_numpy(generator.permutation(len(labels)))]
        control = ProbeGate.fitted(site, read[site].negative, mixed, gate.choices)
        for name, probe in (("probe", gate), ("shuffled labels", control)):
            hits = (probe.choose(tested[site].negative) == right).numpy()
            group = {"site": site, "gate": name}
            out.append(rate_measurement("choice accuracy", hits, seed=seed, better="higher", group=group))
        out.append(
            mean_measurement(
                "cosine with the mean difference",
                "cosine",
                likeness(read[site].difference).numpy(),
                seed=seed,
                over="pairs",
                group={"site": site},
                details={"cluster sizes": list(found.sizes[site])},
            )
        )
    return out


def likeness(differences: Tensor) -> Tensor:
    """Return the cosine of each difference with the mean of the others, `[n]` (1 for a single pair)."""
    n = len(differences)
    if n == 1:
        return torch.ones(1)
    others = (differences.sum(0) - differences) / (n - 1)
    return torch.nn.functional.cosine_similarity(differences, others, dim=1)


def _k_means(differences: Tensor, k: int, seed: int, site: str) -> tuple[Tensor, Tensor]:
    """Return labels `[n]` and centroids `[k, d]`, the largest cluster first."""
    from sklearn.cluster import KMeans

    x = differences.double().numpy()
    if len(np.unique(x, axis=0)) < k:
        raise InputError(f"the pairs have fewer than {k} different differences at {site}; take a smaller k")
    labels = KMeans(k, n_init=10, random_state=seed).fit_predict(x)
    order = np.argsort(-np.bincount(labels, minlength=k), kind="stable")
    rank = np.empty(k, dtype=np.int64)
    rank[order] = np.arange(k)
    ranked = rank[labels]
    centroids = np.stack([x[ranked == j].mean(0) for j in range(k)])
    if not (np.linalg.norm(centroids, axis=1) > 0).all():
        raise InputError(f"a direction at {site} is zero: the two styles have the same activations there")
    return torch.from_numpy(ranked), torch.from_numpy(centroids).float()
