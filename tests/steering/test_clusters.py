"""Clustered directions: probes that learn on, choices that are held, k-means, saving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.contrast import Contrast, read_contrast
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens
from actlas.core.methods import find_method
from actlas.steering.cluster_fit import cluster_directions, fit_clusters, likeness
from actlas.steering.clusters import ClusterSteer
from actlas.steering.probe_gate import ProbeGate
from tests.steering.gate_models import OTHERS, QUESTIONS, generated, model, same

SITE = "blocks.1.resid_post"
PAIRS = [(f"{q} Loud!!", f"{q} calm") for q in QUESTIONS] + [(f"Oh {q}", q) for q in OTHERS]


def test_updates_are_adam() -> None:
    g = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(9, 4, generator=g), torch.arange(9) % 3
    probe = ProbeGate.fresh(SITE, rows, 3)
    learned = probe.updated(rows[:5], labels[:5], lr=0.05).updated(rows[5:], labels[5:], lr=0.05)
    weight = torch.zeros(3, 5, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.05)
    z = torch.cat([(rows - rows.mean(0)) / rows.std(0), torch.ones(9, 1)], 1)
    for row, label in zip(z, labels, strict=True):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy((weight @ row)[None], label[None]).backward()
        optimiser.step()
    torch.testing.assert_close(learned.weight, weight.detach(), atol=1e-6, rtol=1e-5)
    assert learned.steps == 9 and probe.steps == 0 and not probe.weight.any()


def test_a_saved_probe_learns_on_as_the_one_in_memory(tmp_path: Path) -> None:
    m = model()
    x = m.trace(QUESTIONS, SITE).last(SITE)
    labels = torch.arange(12) % 2
    probe = ProbeGate.fresh(SITE, x, 2).updated(x[:6], labels[:6])
    probe.save(tmp_path / "probe", m)
    again = Lens.load(tmp_path / "probe", m)
    assert isinstance(again, ProbeGate)
    assert torch.equal(again.updated(x[6:], labels[6:]).weight, probe.updated(x[6:], labels[6:]).weight)


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,)])
def test_a_fitted_probe_is_softmax_regression(present: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    labels = torch.tensor([present[i % len(present)] for i in range(30)])
    rows = torch.randn(30, 3, generator=g) + labels[:, None] * torch.tensor([3.0, -2.0, 1.0])
    probe = ProbeGate.fitted(SITE, rows, labels, 3)
    p = probe.encode(rows)
    torch.testing.assert_close(p.sum(-1), torch.ones(30))
    assert set(probe.choose(rows).tolist()) <= set(present)
    assert float((probe.choose(rows) == labels).double().mean()) > 0.9
    torch.testing.assert_close(probe.score(rows), p.amax(-1))
    if len(present) == 2:
        from sklearn.linear_model import LogisticRegression

        z = ((rows - rows.mean(0)) / rows.std(0)).numpy()
        wanted = LogisticRegression(C=1.0, max_iter=2000).fit(z, labels.numpy()).predict_proba(z)
        np.testing.assert_allclose(p[:, list(present)].numpy(), wanted, atol=1e-4)


def test_centroids_are_means_of_their_clusters_and_one_is_the_mean() -> None:
    m = model()
    difference = read_contrast(m, Contrast.of(PAIRS), SITE)[SITE].difference
    one = cluster_directions(m, PAIRS, SITE, k=1)
    torch.testing.assert_close(one.centroids[SITE][0], difference.mean(0), atol=1e-5, rtol=1e-4)
    found = cluster_directions(m, PAIRS, SITE, k=3)
    nearest = found.nearest(SITE, difference)
    sizes = found.sizes[SITE]
    assert sum(sizes) == len(PAIRS) and list(sizes) == sorted(sizes, reverse=True) and sizes[-1] > 0
    for j in range(3):
        torch.testing.assert_close(
            found.centroids[SITE][j], difference[nearest == j].mean(0), atol=1e-4, rtol=1e-3
        )
    within = sum(
        float((difference[nearest == j] - found.centroids[SITE][j]).square().sum()) for j in range(3)
    )
    assert within < float((difference - difference.mean(0)).square().sum())


def test_the_edit_adds_the_chosen_direction_at_its_length() -> None:
    m = model()
    found = cluster_directions(m, PAIRS, SITE, k=3)
    prompts = [QUESTIONS[0], OTHERS[0]]
    x = m.trace(prompts, SITE)
    choice = found.gates[SITE].choose(x.last(SITE))
    c, reference = found.centroids[SITE], found.references[SITE]
    for unit in ("resid", "raw"):
        wanted = c[choice] if unit == "raw" else c[choice] / c[choice].norm(dim=1, keepdim=True) * reference
        with m.edit(found.steer(0.3, unit=unit)):  # type: ignore[arg-type]
            moved = m.trace(prompts, SITE)[SITE] - x[SITE]
        for row in range(2):
            n = len(m.tokenizer(prompts[row])["input_ids"])
            torch.testing.assert_close(
                moved[row, :n], (0.3 * wanted[row]).expand(n, -1), atol=1e-3, rtol=1e-3
            )
    p = found.gates[SITE].encode(x[SITE])
    with m.edit(found.steer(0.3, unit="raw", hold="token", soft=True)):
        moved = m.trace(prompts, SITE)[SITE] - x[SITE]
    n = len(m.tokenizer(prompts[0])["input_ids"])
    torch.testing.assert_close(moved[0, :n], 0.3 * (p[0, :n] @ c), atol=1e-3, rtol=1e-3)


def choosy(m_rows: Tensor, k: int = 3) -> ClusterSteer:
    """An edit whose choice differs between prompts and between tokens."""
    g = torch.Generator().manual_seed(3)
    gate = ProbeGate.fresh(SITE, m_rows, k)
    gate.weight = torch.randn(k, 33, generator=g)
    return ClusterSteer(SITE, 12 * torch.randn(k, 32, generator=g), gate)


@pytest.mark.parametrize("hold", ["prompt", "token"])
def test_cache_padding_beams_and_saving(hold: str, tmp_path: Path) -> None:
    m = model()
    made = choosy(m.trace(QUESTIONS, SITE).last(SITE))
    edit = ClusterSteer(SITE, made.centroids, made.gate, hold)  # type: ignore[arg-type]
    prompts = [QUESTIONS[0], "Why", OTHERS[3]]
    together = generated(m, prompts, edit)
    assert same(together, generated(m, prompts, edit, use_cache=False))
    assert same(together, [generated(m, [p], edit)[0] for p in prompts])
    assert not same(together, generated(m, prompts))
    assert same(
        generated(m, prompts[:2], edit, num_beams=2),
        [generated(m, [p], edit, num_beams=2)[0] for p in prompts[:2]],
    )
    edit.save(tmp_path / "edit", m)
    loaded = Edit.load(tmp_path / "edit", m)
    assert same(generated(m, prompts, loaded), together)
    assert same(generated(m, prompts, edit.at(rows=1))[::2], generated(m, prompts)[::2])


def test_holding_differs_from_choosing_at_every_token() -> None:
    m = model()
    made = choosy(m.trace(QUESTIONS, SITE).last(SITE))
    other = ClusterSteer(SITE, made.centroids, made.gate, "token")
    assert len(set(made.gate.choose(m.trace(QUESTIONS[0], SITE)[SITE][0]).tolist())) > 1
    with m.edit(made):
        held = m.trace(QUESTIONS[0], SITE)[SITE]
    with m.edit(other):
        assert not torch.equal(m.trace(QUESTIONS[0], SITE)[SITE], held)


def test_observing_new_pairs_teaches_the_probes() -> None:
    m = model()
    pairs = Contrast.of(PAIRS)
    fresh = cluster_directions(m, pairs, SITE, k=2, probe="fresh")
    learned = fresh
    for _ in range(6):
        learned = learned.observe(m, pairs, lr=0.03)
    before = fresh.hits(m, pairs)[SITE].double().mean()
    after = learned.hits(m, pairs)[SITE].double().mean()
    assert float(after) > 0.9 and float(after) > float(before)
    assert fresh.gates[SITE].steps == 0 and learned.gates[SITE].steps == 6 * len(PAIRS)
    with pytest.raises(InputError, match="one prompt a pair"):
        fresh.observe(m, pairs, ["one"])
    neutral = fresh.observe(m, pairs, list(pairs.positive))
    assert not torch.equal(neutral.gates[SITE].weight, fresh.observe(m, pairs).gates[SITE].weight)


def test_the_method_measures_its_probes_and_refuses_bad_input() -> None:
    m = model()
    edit = fit_clusters(m, PAIRS, SITE, k=2, alpha=0.3)
    assert find_method("clusters").fit is fit_clusters
    names = {(x.name, x.group.get("gate")) for x in edit.measurements}
    assert names == {
        ("choice accuracy", "probe"),
        ("choice accuracy", "shuffled labels"),
        ("cosine with the mean difference", None),
    }
    both = fit_clusters(m, PAIRS, [SITE, "blocks.2.resid_post"], k=1)
    assert [p.site for p in both.parts()] == [SITE, "blocks.2.resid_post"]  # type: ignore[attr-defined]
    torch.testing.assert_close(likeness(torch.tensor([[1.0, 0.0], [0.0, 2.0]])), torch.zeros(2))
    with pytest.raises(InputError, match="k is 25"):
        cluster_directions(m, PAIRS, SITE, k=25)
    with pytest.raises(InputError, match="fewer than 2 different"):
        cluster_directions(m, [PAIRS[0], PAIRS[0]], SITE, k=2)
    gate = cluster_directions(m, PAIRS, SITE, k=1).gates[SITE]
    elsewhere = m.edit(ClusterSteer("blocks.2.resid_post", torch.ones(1, 32), gate))
    with pytest.raises(InputError, match="cannot choose at blocks.2"):
        elsewhere.install()
    with pytest.raises(InputError, match="hold is 'once'"):
        ClusterSteer(SITE, torch.ones(1, 32), gate, "once")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="choices 0 to 0"):
        gate.updated(torch.zeros(1, 32), torch.tensor([1]))
    with pytest.raises(ShapeError, match="needs weight"):
        ProbeGate(
            site=SITE, weight=torch.zeros(2, 3), centre=torch.zeros(3), spread=torch.ones(3),
            first=torch.zeros(2, 3), second=torch.zeros(2, 3),
        )  # fmt: skip
