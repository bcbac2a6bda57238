"""Hypercube gates, abstention, neuron adjustment and pruning."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError, ShapeError
from actlas.core.lens import Lens
from actlas.core.methods import find_method
from actlas.core.model import Model
from actlas.steering.abstain import Abstain, fit_abstain
from actlas.steering.hypercube import FLOOR, HyperBox, best_multiplier, fit_hyper_box
from actlas.steering.neuron_adjust import NeuronAdjust, NeuronMoments, PruneNeurons
from actlas.steering.neuron_fit import fit_neuron_adjust, fit_prune_neurons
from tests.steering.gate_models import LABELLED, OTHERS, QUESTIONS, generated, model, same

KEYS = "blocks.2.mlp.act"


def rows(n: int = 12, d: int = 5, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.arange(1, d + 1) + 3


def test_the_box_is_the_smallest_around_its_rows() -> None:
    x = rows()
    box = HyperBox.of("s", x)
    a = x.double().numpy()
    z = np.abs(a - a.mean(0)) / a.std(0, ddof=1)
    assert box.reach == pytest.approx(z.max(), rel=1e-12)
    np.testing.assert_allclose(box.distance(x).numpy(), z.max(1), rtol=1e-5)
    assert box.widened(1.0001).inside(x).all()
    assert not box.widened(0.9999).inside(x).all()
    assert box.reach <= (len(x) - 1) / math.sqrt(len(x))
    flat = torch.cat([x, torch.ones(len(x), 1)], 1)
    assert float(HyperBox.of("s", flat).std[-1]) == pytest.approx(
        FLOOR * float(x.double().std(0).median()), rel=1e-5
    )


def test_the_multiplier_is_the_best_on_other_rows() -> None:
    box = HyperBox.of("s", rows(40))
    g = torch.Generator().manual_seed(9)
    other = torch.randn(60, 5, generator=g) * torch.arange(1, 6) * torch.linspace(0.5, 4, 60)[:, None] + 3
    y = (torch.arange(60) < 25).float()
    c = best_multiplier(box, other, y)

    def youden(c: float) -> float:
        inside = box.widened(c).inside(other)
        return float(inside[y == 1].double().mean() - inside[y == 0].double().mean())

    assert youden(c) >= max(youden(k) for k in np.linspace(0.01, 5, 800)) - 1e-9


def test_fitting_a_box_measures_it_beside_a_random_one(tmp_path: Path) -> None:
    m = model()
    box = fit_hyper_box(m, LABELLED)
    assert find_method("hyper-box").fit is fit_hyper_box and box.site == KEYS
    found = {(x.name, x.group["gate"]): x for x in box.measurements}
    assert set(found) == {(w, g) for w in ("detection", "false alarms") for g in ("box", "random box")}
    assert found["detection", "box"].n == 3
    box.save(tmp_path / "box")
    again = Lens.load(tmp_path / "box", m)
    assert isinstance(again, HyperBox)
    x = m.trace(QUESTIONS, KEYS).last(KEYS)
    assert torch.equal(again.score(x), box.score(x))
    fixed = fit_hyper_box(m, LABELLED[:12], multiplier=1.4)
    assert fixed.multiplier == 1.4 and {x.name for x in fixed.measurements} == {"detection"}


def test_the_gate_reads_the_query_only() -> None:
    """The box is around one query's last token: only that prompt is edited, and all of its answer is."""
    m = model()
    x = m.trace(QUESTIONS[0], "blocks.1.resid_post").last("blocks.1.resid_post")
    box = HyperBox(site="blocks.1.resid_post", mean=x[0], std=torch.full((32,), 1e-3), reach=1.0)
    edit = box.guard(
        Add("blocks.2.resid_post", 30 * torch.randn(32, generator=torch.Generator().manual_seed(2)))
    )
    prompts = [QUESTIONS[0], QUESTIONS[1], "Why"]
    base, gated = generated(m, prompts), generated(m, prompts, edit)
    assert not torch.equal(base[0], gated[0])
    assert same(base[1:], gated[1:])
    assert same(gated, generated(m, prompts, edit, use_cache=False))
    per_token = Add("blocks.2.resid_post", edit.vector).when(box)  # type: ignore[attr-defined]
    assert not same(generated(m, prompts, per_token), gated)


def test_abstention_says_its_message_where_the_gate_is_open(tmp_path: Path) -> None:
    m = model()
    said = Abstain.say(m, "No, sorry.")
    prompts = [QUESTIONS[0], "Why"]
    wanted = [*m.tokenizer("No, sorry.")["input_ids"], 2]
    for options in ({}, {"use_cache": False}, {"num_beams": 3}, {"temperature": 1.0}):
        with m.edit(said):
            found = m.generate(prompts, max_new_tokens=14, **options)
        assert [t.tolist() for t in found.tokens] == [wanted, wanted], options
    x = m.trace(QUESTIONS[0], "blocks.1.resid_post").last("blocks.1.resid_post")
    box = HyperBox(site="blocks.1.resid_post", mean=x[0], std=torch.full((32,), 1e-3), reach=1.0)
    gated = said.guarded(box)
    gated.save(tmp_path / "abstain", m)
    loaded = Edit.load(tmp_path / "abstain", m)
    for edit in (gated, loaded):
        tokens = generated(m, prompts, edit, n=11)
        assert tokens[0].tolist() == wanted[:-1] + [2] or tokens[0].tolist()[:10] == wanted[:-1]
        assert torch.equal(tokens[1], generated(m, prompts, n=11)[1])
    prompt = m.logits(QUESTIONS[0])
    with m.edit(said):
        edited = m.logits(QUESTIONS[0])
    assert torch.equal(edited[:, :-1], prompt[:, :-1])
    assert int(edited[0, -1].argmax()) == wanted[0]


def test_abstention_refuses_what_makes_no_sense() -> None:
    m = model()
    with pytest.raises(InputError, match="message is empty"):
        Abstain.say(m, "  ")
    with pytest.raises(ModelError, match="cannot abstain"):
        Abstain.say(Model(m.module))
    with pytest.raises(InputError, match="strength 0.5"), m.edit(Abstain.say(m) * 0.5):
        pass
    with pytest.raises(InputError, match="edits 'logits'"), m.edit(Abstain("final_norm", (1,))):
        pass
    edit = fit_abstain(m, LABELLED, message="No.")
    assert {x.name for x in edit.measurements} == {"detection", "false alarms"}
    assert edit.condition is not None and edit.condition.per == "sequence"  # type: ignore[attr-defined]


def made_adjust(seed: int = 0, k: int = 6) -> NeuronAdjust:
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(k, generator=g)  # noqa: E731
    neurons = torch.randperm(48, generator=g)[:k]
    return NeuronAdjust(KEYS, neurons, draw(), draw().abs() + 0.3, draw(), draw().abs() + 0.3, seed)


def test_adjusted_values_are_the_papers() -> None:
    """Every value is either kept or the mirrored z-score, and only where forgetting is likelier."""
    m, edit = model(), made_adjust(k=24)
    ids = torch.randint(4, 60, (12, 50), generator=torch.Generator().manual_seed(4))
    x = m.trace(ids, KEYS)[KEYS]
    with m.edit(edit):
        new = m.trace(ids, KEYS)[KEYS]
    rest = [i for i in range(48) if i not in edit.neurons.tolist()]
    assert torch.equal(new[..., rest], x[..., rest]) and torch.equal(new[:, 0], x[:, 0])
    with m.edit(replace(edit, first=True)):
        assert not torch.equal(m.trace(ids, KEYS)[KEYS][:, 0], x[:, 0])
    values, changed = x[:, 1:, edit.neurons].double(), new[:, 1:, edit.neurons].double()
    mf, sf, mr, sr = (getattr(edit, n).double() for n in edit.moments)
    pf = torch.distributions.Normal(mf, sf).log_prob(values).exp()
    pr = torch.distributions.Normal(mr, sr).log_prob(values).exp()
    mirrored = mr - sr * (values - mf) / sf
    kept = changed == values
    replaced = ((changed - mirrored).abs() < 1e-4) & ~kept
    assert bool((replaced | kept).all()) and not bool((replaced & (pf < pr * 0.999)).any())
    likely = pf >= pr
    rate, wanted = replaced[likely].double().mean(), (pf / (pf + pr))[likely].mean()
    n = int(likely.sum())
    assert n > 1000 and abs(float(rate - wanted)) < 4 * 0.5 / math.sqrt(n)
    with m.edit(edit * 0.0):
        assert torch.equal(m.trace(ids, KEYS)[KEYS], x)


def test_adjusting_is_the_same_with_a_cache_and_with_padding(tmp_path: Path) -> None:
    m, edit = model(), made_adjust(k=30)
    prompts = [QUESTIONS[0], "Why", OTHERS[2]]
    together = generated(m, prompts, edit)
    assert same(together, generated(m, prompts, edit, use_cache=False))
    assert same(together, [generated(m, [p], edit)[0] for p in prompts])
    with m.edit(edit):
        one = m.trace(QUESTIONS[0], KEYS)[KEYS]
    edit.save(tmp_path / "adjust", m)
    with m.edit(Edit.load(tmp_path / "adjust", m)):
        assert torch.equal(m.trace(QUESTIONS[0], KEYS)[KEYS], one)


def test_the_neurons_are_those_that_rise_most() -> None:
    m = model()
    moments = NeuronMoments.of(m, QUESTIONS, OTHERS)
    trace = {s: [m.trace(t, s)[s].flatten(0, 1).double() for t in (QUESTIONS, OTHERS)] for s in moments.sites}
    masks = [m.encode(t)["attention_mask"].bool() for t in (QUESTIONS, OTHERS)]
    masks = [torch.cat([torch.zeros(len(k), 1, dtype=torch.bool), k[:, 1:]], 1).flatten() for k in masks]
    rise, spread = [], []
    for site in moments.sites:
        forget, retain = (x[k] for x, k in zip(trace[site], masks, strict=True))
        rise.append(forget.mean(0) - retain.mean(0))
        spread.append(forget.std(0, unbiased=False))
        torch.testing.assert_close(moments.forget[site][1].double(), spread[-1], atol=1e-5, rtol=1e-4)
    best = torch.cat(rise).topk(5).indices
    wanted = {(int(i) // 48, int(i) % 48) for i in best}
    chosen = moments.top(5 / 144)
    assert {(int(s.split(".")[1]), int(n)) for s, own in chosen.items() for n in own} == wanted
    random = moments.random(5 / 144, 1)
    assert sum(map(len, random.values())) == 5 and str(random) != str(chosen)
    with pytest.raises(InputError, match="top is 0"):
        moments.top(0)


def test_the_methods_give_edits_and_pruning_zeroes() -> None:
    m = model()
    assert find_method("neuron-adjust").fit is fit_neuron_adjust
    adjusted, pruned = fit_neuron_adjust(m, LABELLED, top=0.05), fit_prune_neurons(m, LABELLED, top=0.05)
    neurons = {p.site: p.neurons for p in pruned.parts() if isinstance(p, PruneNeurons)}
    assert {p.site: p.neurons.tolist() for p in adjusted.parts() if isinstance(p, NeuronAdjust)} == {
        s: n.tolist() for s, n in neurons.items()
    }
    found = {(x.group["of"], x.group["on"]): x for x in adjusted.measurements}
    assert len(found) == 4 and all(x.name == "rise of the loss" and x.n == 3 for x in found.values())
    assert (
        found["chosen neurons", "texts to forget"].value != found["random neurons", "texts to forget"].value
    )
    with m.edit(pruned):
        for site, own in neurons.items():
            assert not m.trace(QUESTIONS[0], site)[site][:, 1:, own].any()
            assert m.trace(QUESTIONS[0], site)[site][:, 0, own].any()
    with m.edit(PruneNeurons(KEYS, torch.tensor([3, 7]), first=True)):
        assert not m.trace(QUESTIONS, KEYS)[KEYS][..., [3, 7]].any()
    with pytest.raises(InputError, match="label 0 too"):
        fit_neuron_adjust(m, LABELLED[:12])
    with pytest.raises(InputError, match="names neuron 48"), m.edit(PruneNeurons(KEYS, torch.tensor([48]))):
        pass


def test_bad_boxes() -> None:
    m = model()
    with pytest.raises(InputError, match="at least 2 rows"):
        HyperBox.of("s", torch.ones(1, 3))
    with pytest.raises(InputError, match="all the same"):
        HyperBox.of("s", torch.ones(4, 3))
    with pytest.raises(ShapeError, match="mean and std"):
        HyperBox(site="s", mean=torch.ones(3), std=torch.ones(2), reach=1.0)
    with pytest.raises(InputError, match="length 0"):
        HyperBox(site="s", mean=torch.ones(3), std=torch.zeros(3), reach=1.0)
    with pytest.raises(InputError, match="multiplier is -1"):
        fit_hyper_box(m, LABELLED, multiplier=-1)
    with pytest.raises(InputError, match="label 0 too"):
        fit_hyper_box(m, LABELLED[:12])
    with pytest.raises(InputError, match="labels 0 and 1, not 2"):
        fit_hyper_box(m, [("a", 2), ("b", 0)])
    with pytest.raises(InputError, match="names 3"):
        fit_hyper_box(m, LABELLED, "blocks.*.mlp.act")
    with pytest.raises(InputError, match="too few"):
        fit_hyper_box(m, LABELLED[:2] + LABELLED[12:])
