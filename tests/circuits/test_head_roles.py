"""Node effects, head subspaces and head families against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from actlas.circuits.batch import PromptPairs
from actlas.circuits.classify_heads import classify_heads, value_shares
from actlas.circuits.head_subspace import head_logits, head_subspace
from actlas.circuits.node_effects import label_rows, node_effects, others
from actlas.circuits.nodes import head, mlp
from actlas.circuits.one_attention import OneAttention
from actlas.core.errors import InputError, ShapeError
from tests.circuits.pairs import brute, metric, model_of, pairs_of

FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: Any) -> tuple[Any, PromptPairs]:
    model = model_of(request.param, torch.float64)
    return model, pairs_of(model)


def test_direct_effects_sum_to_the_score(case: tuple[Any, PromptPairs]) -> None:
    """All heads and MLPs, the embedding and what biases write make up the whole score, scale held."""
    model, pairs = case
    found = node_effects(model, pairs, kind="direct")
    assert found.values.shape == (3 * 4 + 3, 4)
    trace = model.trace(dict(pairs.clean), ["blocks.0.resid_pre", "blocks.2.resid_post"])
    x = trace["blocks.2.resid_post"][:, -1]
    from actlas.circuits.node_effects import answer_rows

    rows = answer_rows(model, pairs, x)
    whole = (rows * x.double()).sum(1)
    rest = (rows * trace["blocks.0.resid_pre"][:, -1].double()).sum(1)
    for b in range(3):
        bias = getattr(_out(model, b), "bias", None)
        rest = rest + (rows @ bias.double() if bias is not None else 0)
    torch.testing.assert_close(found.values.sum(0) + rest, whole, rtol=1e-8, atol=1e-8)


def _out(model: Any, block: int) -> Any:
    from actlas.core.layout import find

    return find(model.block(block), model.tower.out_proj)


def test_total_effect_is_a_run_with_the_output_replaced(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    node = head(1, 2)
    found = node_effects(model, pairs, kind="total", baseline="zero", over=[node])
    z = model.trace(dict(pairs.clean), "blocks.1.attn.z")["blocks.1.attn.z"]
    where = torch.zeros(pairs.clean["input_ids"].shape, dtype=torch.bool)
    where[:, -1] = True
    patched = brute(model, pairs, node, torch.zeros_like(z), "clean", where)
    expected = metric(model.logits(dict(pairs.clean))[:, -1].double(), pairs) - patched
    torch.testing.assert_close(found.values[0], expected, rtol=1e-5, atol=1e-7)


def test_unconditional_effect_compares_with_another_prompts_output(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    node = mlp(1)
    found = node_effects(model, pairs, kind="unconditional", over=[node], seed=4)
    trace = model.trace(dict(pairs.clean), ["blocks.1.mlp.out", "blocks.2.resid_post"])
    from actlas.circuits.node_effects import answer_rows

    rows = answer_rows(model, pairs, trace["blocks.2.resid_post"][:, -1])
    out = trace["blocks.1.mlp.out"][:, -1].double()
    other = others(4, 4)
    assert sorted(other.tolist()) == [0, 1, 2, 3] and bool((other != torch.arange(4)).all())
    torch.testing.assert_close(found.values[0], (rows * (out - out[other])).sum(1), rtol=1e-8, atol=1e-10)
    centred = node_effects(model, pairs, kind="unconditional", baseline="mean", over=[node])
    torch.testing.assert_close(centred.values[0], (rows * (out - out.mean(0))).sum(1), rtol=1e-8, atol=1e-10)


def test_carrying_counts_the_fewest_nodes() -> None:
    from actlas.circuits.node_effects import NodeEffects

    values = torch.tensor([[6.0, 6], [3, 3], [1, 1], [-9, -9]], dtype=torch.float64)
    found = NodeEffects(
        tuple(head(0, i) for i in range(4)), values, "direct", "zero", torch.zeros(2).double(), "t"
    )
    assert [found.carrying(s) for s in (0.5, 0.6, 0.61, 0.9, 1.0)] == [1, 1, 2, 2, 3]
    m = found.carrying_measured(0.8)
    assert m.value == 0.5 and m.low == m.high == 0.5


def test_bad_effects_are_refused(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    with pytest.raises(InputError, match="kind is"):
        node_effects(model, pairs, kind="indirect")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none of the labels"):
        node_effects(model, pairs, labels=[60, 61])
    with pytest.raises(InputError, match="at least 2 different"):
        node_effects(model, pairs, labels=[60, 60])
    with pytest.raises(InputError, match="another|other"):
        node_effects(model, pairs.take([0]), kind="unconditional")
    with pytest.raises(InputError, match="not among"):
        node_effects(model, pairs, over=[mlp(0)]).of(mlp(1))


def _positions(pairs: PromptPairs) -> Tensor:
    return torch.tensor([[4, 5, 6]] * len(pairs))


def test_full_rank_changes_nothing_and_rank_one_is_brute_force(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    attention = OneAttention(model, pairs.clean, 1)
    node, positions = head(1, 3), _positions(pairs)
    whole = head_subspace(model, node, pairs, positions, rank=8, attention=attention)
    own = attention.values["attn.z"][:, -1, 3]
    torch.testing.assert_close(whole.z(attention, positions), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention.z({}), attention.values["attn.z"], rtol=1e-9, atol=1e-9)

    space = head_subspace(model, node, pairs, positions, rank=1, attention=attention)
    with model.edit(*_edits(model, space, pairs, positions)):
        expected = model.trace(dict(pairs.clean), "blocks.1.attn.z")["blocks.1.attn.z"][:, -1, 3]
    found = space.z(attention, positions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((found - own).norm()) > 1e-3 * float(own.norm())


def _edits(model: Any, space: Any, pairs: PromptPairs, positions: Tensor) -> list[Any]:
    """The same compression as edits of the model, limited to the columns (padding is on the left)."""
    width = pairs.width
    columns = [int(c) - width for c in positions[0]]
    q, k, v = space.edit().parts()
    return [q.at(positions=[-1]), k.at(positions=columns), v.at(positions=columns)]


def test_a_subspace_keeps_what_lies_in_it_and_random_ones_differ(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    space = head_subspace(model, head(0, 1), pairs, _positions(pairs), rank=2)
    x = torch.randn(5, 8)
    once = space.project("k", x)
    torch.testing.assert_close(space.project("k", once), once, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(once - once.mean(0), atol=1e-4) <= 2
    random = space.random(0)
    basis = random.bases["k"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), rtol=1e-4, atol=1e-5)
    assert float((random.project("k", x) - once).norm()) > 0.1 * float(once.norm())
    assert set(space.only("q").bases) == {"q"}


def test_bad_subspaces_are_refused(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    positions = _positions(pairs)
    for node, kwargs, said in (
        (mlp(0), {}, "no head"),
        (head(0, 1), {"rank": 9}, "1 to 8"),
        (head(0, 1), {"parts": "x"}, "q, k and v"),
    ):
        with pytest.raises(InputError, match=said):
            head_subspace(model, node, pairs, positions, **{"rank": 2, **kwargs})  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        head_subspace(model, head(0, 1), pairs, positions[:2])
    with pytest.raises(InputError, match="outside"):
        head_subspace(model, head(0, 1), pairs, positions + 50)
    space = head_subspace(model, head(0, 1), pairs, positions)
    with pytest.raises(InputError, match="block 1"):
        space.z(OneAttention(model, pairs.clean, 1), positions)
    with pytest.raises(InputError, match="cannot be changed"):
        OneAttention(model, pairs.clean, 1).z({"attn.z": lambda x: x})


def test_head_logits_are_direct_effects_on_the_labels(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    labels = torch.cat([pairs.answer_ids, pairs.wrong_ids]).unique()
    node = head(2, 1)
    trace = model.trace(dict(pairs.clean), ["blocks.2.attn.z", "blocks.2.resid_post"])
    rows = label_rows(model, labels, trace["blocks.2.resid_post"][:, -1])
    logits = head_logits(model, node, trace["blocks.2.attn.z"][:, -1, 1], rows)
    assert float(logits.sum(1).abs().max()) < 1e-9
    direct = node_effects(model, pairs, labels=labels, over=[node]).values[0]
    right = torch.stack([(labels == a).nonzero()[0, 0] for a in pairs.answer_ids])
    torch.testing.assert_close(logits.gather(1, right[:, None])[:, 0], direct, rtol=1e-8, atol=1e-10)


def test_value_shares_weigh_attention_by_what_is_written() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(2, 4, 5, generator=generator).softmax(-1)
    values = torch.randn(2, 5, 2, 3, generator=generator)
    weight = torch.randn(6, 12, generator=generator)
    found = value_shares(pattern, values, weight)
    h, s = 3, 2
    written = [float(pattern[1, h, p] * (weight[:, 9:12] @ values[1, p, 1]).norm()) for p in range(5)]
    assert float(found[1, h, s]) == pytest.approx(written[s] / sum(written), rel=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_families_follow_the_rules() -> None:
    from actlas.circuits.classify_heads import _family

    right = torch.tensor([0, 1, 2, 3])
    eye = torch.eye(4, dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    cases = {
        "correct label": (0.5 * eye + 0.05, zero),
        "single label": (0.05 + eye * torch.tensor([0.9, 0.02, 0.02, 0.02]), zero),
        "uniform": (torch.full((4, 4), 0.2, dtype=torch.float64), zero),
        "amplification": (torch.full((4, 4), 0.02, dtype=torch.float64), zero + 0.7),
        "other": (torch.full((4, 4), 0.02, dtype=torch.float64), zero + 0.1),
    }
    for family, (at_labels, final) in cases.items():
        assert _family(head(0, 0), at_labels.double(), final, right).family == family


def test_classify_heads_covers_every_head_and_checks_labels(case: tuple[Any, PromptPairs]) -> None:
    model, pairs = case
    positions = _positions(pairs)[:, :2]
    found = classify_heads(model, pairs, positions, torch.tensor([0, 1, 0, 1]))
    assert [f.head for f in found] == [head(b, h) for b in range(3) for h in range(4)]
    some = classify_heads(model, pairs, positions, torch.tensor([0, 1, 0, 1]), heads=[head(1, 2)])
    assert len(some) == 1
    torch.testing.assert_close(some[0].right, found[6].right)
    with pytest.raises(InputError, match="right in some"):
        classify_heads(model, pairs, positions, torch.tensor([0, 0, 0, 0]))


def test_features_and_subspaces_are_fitted_by_name() -> None:
    from actlas.circuits.fit_features import as_head
    from actlas.core.methods import find_method

    assert as_head("L2H1") == head(2, 1)
    for wrong in ("2.1", "H1", "L2"):
        with pytest.raises(InputError, match="names no head"):
            as_head(wrong)
    info = find_method("observable")
    assert info.data == "none" and info.returns == "Lens"
    assert find_method("head-subspace").returns == "Edit"
    with pytest.raises(InputError, match="once"):
        info.fit(model_of(), up="she,he", down="he")


def test_an_observables_words_become_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from actlas.circuits import observable
    from actlas.circuits.fit_features import fit_observable

    ids = {" she": 5, " he": 7}
    monkeypatch.setattr(observable, "_one", lambda model, text: ids[text])
    model = model_of()
    best = fit_observable(model, up="she", down="he")
    named = fit_observable(model, up="she", down="he", path=best.path[0])
    torch.testing.assert_close(best.vector, named.vector)
    other = [
        fit_observable(model, up="she", down="he", path=f"L{b}H{h}").norm for b in range(3) for h in range(4)
    ]
    assert best.norm == pytest.approx(max(other), rel=1e-5)
    assert fit_observable(model, up="she", down="he", path="").site == "blocks.2.resid_post"
