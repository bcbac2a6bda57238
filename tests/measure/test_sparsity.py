"""CETT and PPL-p% sparsity against brute force in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.measure.activation_law import ActivationLaw, fit_activation_law
from actlas.measure.activation_sparsity import activation_sparsity
from actlas.measure.cett import CANDIDATES, cett_thresholds, mlp_sites, sample_neurons
from actlas.measure.likelihood import nll
from actlas.measure.paired import loss_rise
from actlas.measure.sparse_edits import KeepTop, MaskBelow, count_active
from actlas.measure.sparsity import evaluate_sparse, ppl_p_sparsity
from actlas.measure.sparsity_curve import METHODS, sparsity_curve
from tests.measure.letter_models import TEXTS, gpt2, llama, trained

SITE = "blocks.1.mlp.act"


def brute(model: Model, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, down projection and full MLP outputs of all tokens of all texts, one text at a time."""
    acts, outs = [], []
    for text in TEXTS:
        trace = model.trace(text, [f"blocks.{block}.mlp.act", f"blocks.{block}.mlp.out"])
        acts.append(trace.rows(f"blocks.{block}.mlp.act"))
        outs.append(trace.rows(f"blocks.{block}.mlp.out"))
    down = model.block(block).mlp
    weight = down.down_proj.weight if hasattr(down, "down_proj") else down.c_proj.weight.T
    return torch.cat(acts).double(), weight.detach().double(), torch.cat(outs).double()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_cett_is_brute_force(make: object) -> None:
    model = make()  # type: ignore[operator]
    neurons = sample_neurons(model, TEXTS, tokens=None, sample=10_000, context=64)
    act, weight, out = brute(model, 1)
    layer = neurons.layers[SITE]
    assert neurons.tokens == len(act)
    each = act[:, None, :] * weight[None]  # [tokens, d_model, d_mlp]: every neuron's output
    size = each.norm(dim=1)
    for share in (0.1, 0.5, 0.9):
        threshold = float(size.flatten().quantile(share))
        tail = (each * (size < threshold)[:, None]).sum(-1)
        expected = float((tail.norm(dim=1) / out.norm(dim=1)).mean())
        assert layer.cett(threshold) == pytest.approx(expected, rel=1e-4)
        assert layer.ratio(threshold) == pytest.approx(float((size >= threshold).double().mean()), abs=1e-4)


def test_thresholds_are_the_last_candidate_below() -> None:
    neurons = sample_neurons(llama(), TEXTS, tokens=None, sample=200)
    for cett in (0.05, 0.2, 0.5):
        exact, quick = neurons.thresholds(cett), neurons.thresholds(cett, tolerance=0.01)
        for site, layer in neurons.layers.items():
            step = (layer.high - layer.low) / (CANDIDATES - 1)
            assert (
                layer.cett(exact[site]) <= cett < layer.cett(exact[site] + 1.01 * step)
                or exact[site] == layer.high
            )
            assert cett * 0.99 <= layer.cett(quick[site]) <= cett or exact[site] == layer.high
    assert set(neurons.thresholds(0).values()) == {0.0}
    assert cett_thresholds(llama(), TEXTS, 0.2, tokens=None, sample=200) == neurons.thresholds(0.2)
    with pytest.raises(InputError, match="negative"):
        neurons.thresholds(-1)


def test_the_edit_is_the_inference_rule() -> None:
    model = llama()
    neurons = sample_neurons(model, TEXTS, tokens=None, sample=10_000, context=64)
    bounds = neurons.thresholds(0.3)
    edit = neurons.to_edit(bounds)
    text = TEXTS[0]
    plain = model.trace(text, "blocks.*.mlp.act")["blocks.0.mlp.act"]
    with model.edit(edit):
        after = model.trace(text, "blocks.*.mlp.act")["blocks.0.mlp.act"]
    columns = model.block(0).mlp.down_proj.weight.norm(dim=0)
    expected = torch.where(plain.abs() * columns < bounds["blocks.0.mlp.act"], 0.0, plain)
    assert torch.equal(after, expected)
    assert (after == 0).any() and (after != 0).any()


def test_threshold_zero_and_keep_all_change_no_bit() -> None:
    model = llama(dtype=torch.float32)
    before = model.logits(TEXTS[0])
    for edit in (
        MaskBelow("blocks.*.mlp.act", torch.zeros(24)),
        KeepTop("blocks.*.mlp.act", torch.ones(24), 1.0),
    ):
        with pytest.warns(UserWarning, match="changed nothing"), model.edit(edit):
            after = model.logits(TEXTS[0])
        assert torch.equal(before, after)


def test_edits_save_and_load(tmp_path: object) -> None:
    model = llama()
    edit = MaskBelow("blocks.0.mlp.act", torch.rand(24)) + KeepTop(
        "blocks.1.mlp.gate", torch.ones(1), 0.5, "silu"
    )
    path = edit.save(tmp_path / "edit", model=model)  # type: ignore[operator]
    with model.edit(edit):
        one = model.logits(TEXTS[1])
    with model.edit(Edit.load(path, model)):
        two = model.logits(TEXTS[1])
    assert torch.equal(one, two)


def test_keep_top_keeps_the_top() -> None:
    model = llama()
    weights = torch.rand(24, dtype=torch.float64) + 0.5
    plain = model.trace(TEXTS[0], SITE)[SITE]
    with model.edit(KeepTop(SITE, weights, 0.25)):
        after = model.trace(TEXTS[0], SITE)[SITE]
    score = plain.abs() * weights
    bound = score.sort(-1, descending=True).values[..., 5:6]
    assert torch.equal(after, torch.where(score >= bound, plain, 0.0))
    gate, down = "blocks.1.mlp.gate", model.block(1).mlp
    with model.edit(KeepTop(gate, torch.ones(1), 0.5, "silu")):
        acts = model.trace(TEXTS[0], SITE)[SITE]
    assert (acts != 0).sum(-1).eq(12).all() and down.act_fn(torch.zeros(1)) == 0
    with model.edit(KeepTop(SITE, torch.ones(1), 0.5, joint=True)):
        joint = model.trace(TEXTS[0], SITE)[SITE]
    assert int((joint != 0).sum()) == round(0.5 * joint.numel())


def test_bad_edits_are_refused() -> None:
    with pytest.raises(InputError, match="negative"):
        MaskBelow(SITE, torch.tensor([-1.0]))
    with pytest.raises(InputError, match="share"):
        KeepTop(SITE, torch.ones(1), 1.5)
    with pytest.raises(InputError, match="sigmoid"):
        MaskBelow(SITE, torch.ones(1), "sigmoid")
    with pytest.raises(InputError):
        with llama().edit(MaskBelow(SITE, torch.ones(7))):
            pass


def test_active_entries_are_counted_over_real_tokens() -> None:
    model = llama(act="relu")
    sites = mlp_sites(model)
    with count_active(model, sites) as found:
        model.forward(TEXTS)  # padded
    act, _, _ = brute(model, 1)
    assert found.total[SITE] == act.numel()
    assert found.active[SITE] == int((act != 0).sum())
    with count_active(model, sites, skip_first=1) as later:
        model.forward(TEXTS)
    assert later.total[SITE] == act.numel() - 24 * len(TEXTS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_ppl_p_reaches_its_target_and_saves(tmp_path: object) -> None:
    model = trained()
    found = ppl_p_sparsity(model, TEXTS, p=1.0, tokens=220, sample=200, evaluations=25)
    assert found.details["ppl_ratio"] == pytest.approx(
        1.01, abs=max(0.003, 2 * found.details["ppl_ratio_error"])
    )
    assert found.value == pytest.approx(1 - found.activation_ratio) and 0 < found.value < 1
    assert found.low <= found.value <= found.high
    base = nll(model, TEXTS, tokens=220)
    run = evaluate_sparse(model, TEXTS, found.to_edit(), tokens=220)
    assert run.active.ratio == pytest.approx(found.activation_ratio)
    assert math.exp(loss_rise(base, run.losses)[0]) == pytest.approx(found.details["ppl_ratio"])
    path = found.to_edit().save(tmp_path / "edit")  # type: ignore[operator]
    again = evaluate_sparse(model, TEXTS, Edit.load(path, model), tokens=220)
    assert np.array_equal(again.losses.nll, run.losses.nll)
    assert found.to_json()["details"]["cett"] == found.cett
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_more_perplexity_allows_more_sparsity() -> None:
    model = trained()
    values = [ppl_p_sparsity(model, TEXTS, p=p, tokens=220, sample=200).value for p in (0.3, 5.0)]
    assert values[0] < values[1]
    with pytest.raises(InputError, match="positive"):
        ppl_p_sparsity(model, TEXTS, p=0)


def test_relu_zeros_are_dropped_for_free() -> None:
    found = ppl_p_sparsity(trained("relu"), TEXTS, p=0.5, tokens=220, sample=200)
    zeros = activation_sparsity(trained("relu"), TEXTS, tokens=10_000)[0]
    assert zeros.group == {"threshold": "0", "layer": "all"} and 0.3 < zeros.value < 0.7
    assert found.value > zeros.value


def test_curve_compares_at_equal_activity() -> None:
    model = trained()
    rows = sparsity_curve(model, TEXTS, cetts=(0.3,), tokens=220, sample=200)
    assert [m.group["method"] for m in rows] == list(METHODS)
    reached = {m.group["method"]: m.details["activation_ratio"] for m in rows}
    assert reached["topk"] == pytest.approx(reached["cett"], abs=0.03)
    assert reached["topk-output"] == pytest.approx(reached["cett"], abs=0.03)
    assert reached["fat"] == pytest.approx(reached["cett"], abs=0.1)
    assert all(m.low <= m.value <= m.high for m in rows)
    with pytest.raises(InputError, match="unknown method"):
        sparsity_curve(model, TEXTS, methods=("best",))


def test_activation_sparsity_is_brute_force() -> None:
    model = llama()
    found = activation_sparsity(model, TEXTS, tokens=10_000, thresholds=(0.1, 0.5))
    act, _, _ = brute(model, 1)
    rms = act.square().mean(1, keepdim=True).sqrt()
    by = {(m.group["threshold"], m.group["layer"]): m for m in found}
    assert set(by) == {(t, x) for t in ("0", "0.1 rms", "0.5 rms") for x in ("all", "0", "1", "2")}
    for t in (0.1, 0.5):
        assert by[f"{t:g} rms", "1"].value == pytest.approx(float((act.abs() < t * rms).double().mean()))
    assert by["0", "1"].value == 0
    assert by["0.1 rms", "all"].n == len(TEXTS)


@pytest.mark.parametrize(
    "law",
    [
        ActivationLaw("relu", 0.8, -1.0, 0.05, 0.06, 0, 1),
        ActivationLaw("silu", 0.5, 0.0, 0.1, 0.6, 0, 1),
    ],
)
def test_laws_are_recovered(law: ActivationLaw) -> None:
    data = np.geomspace(0.5, 200, 12)
    fitted = fit_activation_law(list(zip(data, law.predict(data), strict=True)), law.kind)
    assert fitted.predict(data) == pytest.approx(law.predict(data), abs=1e-4)
    assert fitted.limit == pytest.approx(law.limit, abs=0.01)
    assert fitted.r2 > 0.999 and "A(D)" in fitted.describe()
    with pytest.raises(InputError, match="at least"):
        fit_activation_law([(1, 0.5)], law.kind)
