"""Merging and pruning experts on a tiny Mixtral: what must stay exact, and bad input."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.expert_block import expert_blocks
from actlas.core.model import Model
from actlas.measure.routing import expert_load, gini, trace_routing
from actlas.merge.experts import align_units, merge_experts, spectral_clusters
from actlas.sparsity.expert_pruning import prune_experts
from tests.core.tiny import TEXTS, tiny


def fresh(family: str = "mixtral") -> Model:
    model = tiny(family)
    return Model(copy.deepcopy(model.module), model.tokenizer, name=model.name)


def make_equal(model: Model, *, permuted: bool) -> None:
    """Make all experts of each block one expert, its hidden units in another order in each."""
    generator = torch.Generator().manual_seed(0)
    for block in expert_blocks(model):
        hidden = block.down.shape[2]
        for e in range(1, block.n_experts):
            order = torch.randperm(hidden, generator=generator) if permuted else torch.arange(hidden)
            block.gate_up[e] = block.gate_up[0][torch.cat([order, order + hidden])]
            block.down[e] = block.down[0][:, order]


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
@pytest.mark.parametrize("router", ["mean", "logsumexp"])
def test_equal_experts_merge_without_loss(family: str, router: str) -> None:
    model = fresh(family)
    make_equal(model, permuted=True)
    if family != "mixtral":  # their gates do not sum to 1, so which are chosen matters
        for block in expert_blocks(model):
            model.module.get_submodule(block.router_path).norm_topk_prob = True
    before = model.logits(TEXTS[0])
    with model.edit(merge_experts(model, TEXTS, factor=2, router=router)):
        after = model.logits(TEXTS[0])
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    with model.edit(merge_experts(model, TEXTS, factor=2, align=False)):
        assert (model.logits(TEXTS[0]) - before).abs().max() > 1e-3
    assert torch.equal(model.logits(TEXTS[0]), before)


def test_log_sum_exp_router_keeps_the_probability_of_equal_experts() -> None:
    model = fresh()
    for block in expert_blocks(model):
        model.module.get_submodule(block.router_path).top_k = 4
        block.gate_up[2:], block.down[2:] = block.gate_up[:2].clone(), block.down[:2].clone()
        # what the router thinks of equal experts is nearly the same, so that they are clustered
        block.router[2:] = block.router[:2] * 1.3
    before = model.logits(TEXTS[0])
    with model.edit(merge_experts(model, TEXTS, factor=2, router="logsumexp")):
        torch.testing.assert_close(model.logits(TEXTS[0]), before, atol=1e-5, rtol=1e-4)


def test_alignment_recovers_a_planted_permutation() -> None:
    generator = torch.Generator().manual_seed(1)
    gate_up, down = torch.randn(2 * 12, 8, generator=generator), torch.randn(8, 12, generator=generator)
    order = torch.randperm(12, generator=generator)
    other = (gate_up[torch.cat([order, order + 12])], down[:, order])
    noisy = tuple(t + 0.1 * torch.randn(t.shape, generator=generator) for t in other)
    found = align_units((gate_up, down), noisy)  # type: ignore[arg-type]
    assert torch.equal(order[found], torch.arange(12))


def test_spectral_clusters_find_planted_groups_and_leave_none_empty() -> None:
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.arange(8) % 4)
    logits = rng.normal(size=(400, 4))[:, groups] * 3 + rng.normal(size=(400, 8)) + 10 * rng.normal(size=8)
    labels = spectral_clusters(logits, 4)
    for i, j in itertools.combinations(range(8), 2):
        assert (labels[i] == labels[j]) == (groups[i] == groups[j])
    same = spectral_clusters(np.tile(rng.normal(size=(50, 1)), (1, 6)), 3)
    assert set(same) == {0, 1, 2}


def test_pruning_is_the_model_with_fewer_experts_written_out() -> None:
    model = fresh()
    edit = prune_experts(model, TEXTS, keep=3, score="usage")
    trace = trace_routing(model, TEXTS)
    other = fresh()
    for layer, block in enumerate(expert_blocks(other)):
        worst = int(np.argmin(trace.loads()[layer]))
        router = other.module.get_submodule(block.router_path)
        old = router.forward

        def forward(x, router=router, worst=worst):  # type: ignore[no-untyped-def]
            logits = x.reshape(-1, router.hidden_dim) @ router.weight.T
            logits[:, worst] = -torch.inf
            p, chosen = torch.softmax(logits, -1).topk(2, -1)
            return logits, p / p.sum(-1, keepdim=True), chosen

        assert old is not forward
        router.forward = forward
    with model.edit(edit):
        torch.testing.assert_close(model.logits(TEXTS[0]), other.logits(TEXTS[0]), atol=1e-5, rtol=1e-4)
        assert trace_routing(model, TEXTS).n_experts == 3
        assert "blocks.0.moe.router" in {s.name for s in model.sites("blocks.0.moe.router")}


@pytest.mark.parametrize("score", ["usage", "gate_mass", "router_weighted_norm", "random"])
def test_keeping_every_expert_changes_nothing(score: str) -> None:
    model = fresh()
    with model.edit(prune_experts(model, TEXTS, keep=4, score=score)):  # type: ignore[arg-type]
        after = model.logits(TEXTS[0])
    torch.testing.assert_close(after, model.logits(TEXTS[0]), atol=1e-6, rtol=1e-5)


def test_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = fresh()
    edit = merge_experts(model, TEXTS, factor=2, router="logsumexp", cluster="hierarchical_output")
    edit.save(tmp_path / "e", model)
    with model.edit(edit):
        want = model.logits(TEXTS[0])
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(model.logits(TEXTS[0]), want)
        assert model.generate(TEXTS[1], max_new_tokens=3)


def test_trace_counts_what_the_routers_did() -> None:
    model = fresh()
    trace = trace_routing(model, TEXTS, inputs=True)
    tokens = sum(len(model.tokenizer(t)["input_ids"]) for t in TEXTS)
    assert len(trace) == tokens
    assert np.all(trace.loads().sum(1) == 2 * tokens)
    assert np.allclose(trace.transitions().sum(2), 2 * trace.loads()[:-1])
    assert np.allclose(trace.gate_mass().sum(1), tokens, atol=1e-3)
    for block, logits, x, active in zip(
        expert_blocks(model), trace.logits, trace.inputs, trace.active, strict=True
    ):
        torch.testing.assert_close(x @ block.router.T, logits, atol=1e-5, rtol=1e-5)
        best = torch.zeros_like(active).scatter(1, logits.topk(2, -1).indices, True)
        assert torch.equal(best, active)
    one, two = trace.split(0.5)
    assert len(one) + len(two) == tokens and not set(one.documents) & set(two.documents)
    alone = trace_routing(model, TEXTS[:1])  # padding of a batch is not counted
    assert torch.equal(alone.active[0], trace.rows(trace.documents == 0).active[0])
    assert all(0 <= m.value < 1 for m in expert_load(model, TEXTS))


def test_gini() -> None:
    assert gini(np.array([3.0, 3, 3])) == 0 and gini(np.array([0.0, 0, 0, 4])) == pytest.approx(0.75)
    assert gini(np.zeros(3)) == 0


def test_bad_input() -> None:
    model = fresh()
    with pytest.raises(InputError, match="factor is 3"):
        merge_experts(model, TEXTS, factor=3)
    with pytest.raises(InputError, match="cluster is 'kmeans'"):
        merge_experts(model, TEXTS, cluster="kmeans")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="keep is 5"):
        prune_experts(model, TEXTS, keep=5)
    with pytest.raises(InputError, match="score is 'size'"):
        prune_experts(model, TEXTS, keep=2, score="size")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no block with stacked experts"):
        merge_experts(fresh("llama"), TEXTS)
    with pytest.raises(ModelError, match="no router"):
        trace_routing(fresh("llama"), TEXTS)
    with pytest.raises(InputError, match="share is 1"):
        trace_routing(model, TEXTS).split(1.0)
