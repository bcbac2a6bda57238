"""Path patching, direct logit attribution, DCM and CMAP against slower ways to the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from actlas.circuits import head, mlp
from actlas.circuits.batch import PromptPairs
from actlas.circuits.cmap import CrossModel, cmap, heads_of
from actlas.circuits.dcm import HeadMask, MaskedRuns, dcm, learn
from actlas.circuits.dla import dla
from actlas.circuits.faithfulness import EdgeRuns
from actlas.circuits.nodes import Node
from actlas.circuits.path_patching import path_patch
from actlas.core.errors import InputError, ModelError, SiteError
from actlas.core.hooks import attach
from actlas.core.model import Model
from tests.circuits.pairs import metric, model_of, pairs_of


@pytest.fixture(scope="module")
def llama() -> tuple[Model, PromptPairs]:
    model = model_of("llama", torch.float64)
    return model, pairs_of(model)


# -- path patching ------------------------------------------------------------------------------------


def test_direct_paths_to_the_logits_are_single_edges(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    senders = [head(0, 1), head(1, 3), mlp(0), head(2, 2), mlp(2)]
    found = path_patch(model, pairs, senders, freeze="everything")
    runs = EdgeRuns(model, pairs)
    for node, patched in zip(senders, found.patched, strict=True):
        cut = runs.graph.allowed.clone()
        cut[-1, runs.graph.writers.index(node.label)] = False
        torch.testing.assert_close(patched, runs.difference(cut), atol=1e-5, rtol=1e-5)
    assert float(found.changes.abs().max()) > 1e-3


@pytest.mark.parametrize("channel", ["q", "k", "v"])
def test_direct_paths_to_a_head_are_single_edges(llama: tuple[Model, PromptPairs], channel: str) -> None:
    model, pairs = llama
    senders = [head(0, 1), mlp(0), head(1, 3), head(2, 0)]
    found = path_patch(model, pairs, senders, [head(2, 3)], channel=channel, freeze="everything")  # type: ignore[arg-type]
    runs = EdgeRuns(model, pairs)
    receiver = runs.graph.receivers.index({"q": "L2H3.q", "k": "L2K1", "v": "L2V1"}[channel])
    for node, patched in zip(senders[:3], found.patched, strict=False):
        cut = runs.graph.allowed.clone()
        cut[receiver, runs.graph.writers.index(node.label)] = False
        torch.testing.assert_close(patched, runs.difference(cut), atol=1e-5, rtol=1e-5)
    assert bool(found.inert[3]) and not bool(found.inert[:3].any())  # a head of the receiver's own block


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_heads_let_mlps_carry_the_change_on(family: str) -> None:
    """Whole runs with every head's z written, MLPs free, against the batched suffixes."""
    model = model_of(family)
    pairs = pairs_of(model)
    zs = [f"blocks.{b}.attn.z" for b in range(3)]
    clean, other = (model.trace(dict(s), zs) for s in (pairs.clean, pairs.corrupt))
    out = model.trace(dict(pairs.corrupt), "blocks.0.mlp.out")["blocks.0.mlp.out"]
    senders = [head(0, 2, "last"), head(1, 0), mlp(0)]
    found = path_patch(model, pairs, senders)
    for node, patched in zip(senders, found.patched, strict=True):
        handles = []
        for b, name in enumerate(zs):
            new = clean[name].clone()
            if node.kind == "attn.z" and node.block == b:
                places: Sequence[int] | slice = [-1] if node.position == "last" else slice(None)
                new[:, places, node.index] = other[name][:, places, node.index]
            handles.append(attach(model.module, model.resolve(name)[0], lambda x, new=new: new))
        if node.kind == "mlp.out":
            handles.append(attach(model.module, model.resolve("blocks.0.mlp.out")[0], lambda x: out))
        expected = metric(model.logits(dict(pairs.clean))[:, -1], pairs)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(patched.float(), expected.detach(), atol=1e-4, rtol=1e-4)


def test_paths_that_make_no_sense_are_refused(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    with pytest.raises(InputError, match="channel is 'x'"):
        path_patch(model, pairs, [head(0, 0)], channel="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no sender"):
        path_patch(model, pairs, [])
    with pytest.raises(InputError, match="give receivers"):
        path_patch(model, pairs, [head(0, 0)], channel="q")
    with pytest.raises(InputError, match="a sender is a head or an MLP"):
        path_patch(model, pairs, [Node("blocks.1.resid_pre")])
    with pytest.raises(InputError, match="a receiver is a head"):
        path_patch(model, pairs, [head(0, 0)], [mlp(1)], channel="v")
    with pytest.raises(SiteError):
        path_patch(model, pairs, [head(0, 9)])


# -- direct logit attribution -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "opt"])
@pytest.mark.parametrize("by", ["component", "head"])
def test_direct_effects_add_up_to_the_logit_difference(family: str, by: str) -> None:
    model = model_of(family, torch.float64)
    pairs = pairs_of(model)
    found = dla(model, pairs, by, batch=3)  # type: ignore[arg-type]
    torch.testing.assert_close(found.total.float(), pairs.difference, atol=1e-5, rtol=1e-4)
    assert float(found.unexplained.abs().max()) < 1e-7
    heads = sum(label.startswith("L") for label in found.labels)
    assert heads == (12 if by == "head" else 0)


def test_a_head_s_direct_effect_splits_over_the_tokens_it_attends_to(
    llama: tuple[Model, PromptPairs],
) -> None:
    model, pairs = llama
    heads, tokens = dla(model, pairs, "head"), dla(model, pairs, "token", head=(1, 3), batch=3)
    expected = heads.values[:, heads.labels.index("L1H3")]
    torch.testing.assert_close(tokens.values.sum(1), expected)
    torch.testing.assert_close(tokens.total, expected)
    assert tokens.labels[-1] == "-1" and not bool(tokens.values[0, :3].any())  # padding gets nothing
    top = heads.top(3)
    assert top[0].group["part"] == heads.labels[int(heads.means.abs().argmax())]
    assert top[0].low is not None and top[0].low <= top[0].value


def test_bad_attributions_are_refused(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    with pytest.raises(InputError, match="by is 'layer'"):
        dla(model, pairs, "layer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give head="):
        dla(model, pairs, "token")
    with pytest.raises(SiteError):
        dla(model, pairs, "token", head=(0, 17))


# -- CMAP ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def child(llama: tuple[Model, PromptPairs]) -> Model:
    module = copy.deepcopy(llama[0].module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)))
    return Model(module, name="child")


@pytest.mark.parametrize("what", ["out", "q", "k", "v"])
@pytest.mark.parametrize("position", ["last", "changed", "all"])
def test_parts_of_the_child_are_written_into_the_base(
    llama: tuple[Model, PromptPairs], child: Model, what: str, position: str
) -> None:
    model, pairs = llama
    chosen = [(1, 3), (2, 0)]
    got = CrossModel(model, child, pairs, what=what, position=position).logits(chosen)  # type: ignore[arg-type]
    kind = "attn.z" if what == "out" else f"attn.{what}"
    column = pairs.column(position) if position != "all" else None
    handles = []
    for b, h in chosen:
        name = f"blocks.{b}.{kind}"
        theirs = child.trace(dict(pairs.clean), name)[name]
        part = h // 2 if what in ("k", "v") else h

        def write(x: Tensor, theirs: Tensor = theirs, part: int = part) -> Tensor:
            x = x.clone()
            for row in range(len(pairs)):
                places = range(9) if column is None or what in ("k", "v") else [int(column[row])]
                for c in places:
                    if bool(pairs.clean["attention_mask"][row, c]):
                        x[row, c, part] = theirs[row, c, part]
            return x

        handles.append(attach(model.module, model.resolve(name)[0], write))
        if what in ("k", "v") and column is not None:
            own = model_of("llama", torch.float64).trace(dict(pairs.clean), f"blocks.{b}.attn.z")
            z = own[f"blocks.{b}.attn.z"]

            def back(x: Tensor, z: Tensor = z, h: int = h) -> Tensor:
                x = x.clone()
                for row in range(len(pairs)):
                    keep = x[row, int(column[row]), h].clone()
                    x[row, :, h] = z[row, :, h]
                    x[row, int(column[row]), h] = keep
                return x

            handles.append(attach(model.module, model.resolve(f"blocks.{b}.attn.z")[0], back))
    expected = model.logits(dict(pairs.clean))[:, -1].float()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, expected.detach(), atol=1e-4, rtol=1e-4)
    assert float((got - pairs.last_logits(model)).abs().max()) > 1e-4


def test_a_model_patched_with_itself_stays_as_it_is(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    runs = CrossModel(model, model, pairs)
    every = [(b, h) for b in range(3) for h in range(4)]
    torch.testing.assert_close(runs.logits(every), pairs.last_logits(model), atol=1e-5, rtol=1e-5)


def test_cmap_reports_the_group_beside_its_controls(llama: tuple[Model, PromptPairs], child: Model) -> None:
    model, pairs = llama
    found = cmap(model, child, pairs, heads_of([(1, 3), (2, 0)]), controls=2)
    runs = {m.group["run"] for m in found if m.name == "CMAP accuracy"}
    assert runs == {"base", "tuned", "group", "all heads", "random heads"}
    with pytest.raises(ModelError, match="differ in"):
        cmap(model, model_of("gpt2"), pairs, heads_of([(0, 0)]))
    with pytest.raises(InputError, match="2 positions"):
        cmap(model, child, pairs, [head(0, 0, "last"), head(0, 1)])
    with pytest.raises(InputError, match="what is 'z'"):
        CrossModel(model, child, pairs, what="z")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no head 7.0"):
        CrossModel(model, child, pairs).logits([(7, 0)])


# -- DCM ----------------------------------------------------------------------------------------------


def test_a_mask_mixes_the_heads_of_two_runs(llama: tuple[Model, PromptPairs]) -> None:
    """Whole runs with z mixed at the last token, against the runs that only compute that token."""
    model, pairs = llama
    group = [head(1, 3, "last"), head(2, 0, "last")]
    runs = MaskedRuns(model, dict(pairs.clean), dict(pairs.corrupt), pairs.wrong_ids, group)
    mask, rows = torch.tensor([0.25, 0.75]), torch.arange(len(pairs))
    got = runs.logits(mask, rows)
    handles = []
    for (b, h), m in zip(((1, 3), (2, 0)), mask.tolist(), strict=True):
        name = f"blocks.{b}.attn.z"
        other = model.trace(dict(pairs.corrupt), name)[name]

        def write(x: Tensor, other: Tensor = other, h: int = h, m: float = m) -> Tensor:
            x = x.clone()
            x[:, -1, h] = m * x[:, -1, h] + (1 - m) * other[:, -1, h]
            return x

        handles.append(attach(model.module, model.resolve(name)[0], write))
    expected = model.logits(dict(pairs.clean))[:, -1].float()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got.detach(), expected.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        runs.logits(torch.ones(2), rows).detach(), pairs.last_logits(model), atol=1e-5, rtol=1e-5
    )


def test_the_mask_that_is_learned_patches_the_head_that_matters(llama: tuple[Model, PromptPairs]) -> None:
    """The target is what one head's patch raises most; the others are not worth their price."""
    model, pairs = llama
    group = [head(2, h, "last") for h in range(4)]
    sides = dict(pairs.clean), dict(pairs.corrupt)
    before = MaskedRuns(model, *sides, pairs.wrong_ids, group)
    rows, ones = torch.arange(len(pairs)), torch.ones(4)
    one = ones.clone()
    one[2] = 0
    raised = before.logits(one, rows) - before.logits(ones, rows)
    runs = MaskedRuns(model, *sides, raised.argmax(1), group)
    mask = learn(runs, lam=0.01, epochs=20, generator=torch.Generator().manual_seed(0))
    assert float(mask[2]) < 0.5 and float(mask.min()) >= 0 and float(mask.max()) <= 1
    dear = learn(runs, lam=1e3, epochs=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dear, torch.ones(4))


def test_a_mask_names_the_heads_that_are_patched() -> None:
    group = (head(1, 3, "last"), head(2, 0, "last"))
    assert HeadMask(group, torch.tensor([0.2, 0.8])).chosen == (group[0],)


def test_bad_groups_are_refused(llama: tuple[Model, PromptPairs]) -> None:
    model, _ = llama
    triples = [("a", "b", "c")] * 4
    with pytest.raises(InputError, match="cannot be split"):
        dcm(model, triples[:1], [head(0, 0, "last")])
    with pytest.raises(InputError, match="no heads"):
        dcm(model, triples, [])
    with pytest.raises(InputError, match="masks heads"):
        dcm(model, triples, [mlp(0, "last")])
    with pytest.raises(InputError, match="share one position"):
        dcm(model, triples, [head(0, 0, "last"), head(0, 1, -2)])
    with pytest.raises(InputError, match="share one position"):
        dcm(model, triples, [head(0, 0)])
