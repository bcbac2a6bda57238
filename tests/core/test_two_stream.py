"""The two streams equal the plain model and the model under the edits of all earlier blocks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.edits import Add, Scale, SwapModule
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import weight_matrix
from actlas.core.model import Model
from actlas.core.two_stream import BlockView, two_stream
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

FAMILIES = (
    "llama",
    "gpt2",
    "gpt-neox",
    "opt",
    "opt-post-norm",
    "bloom",
    "falcon",
    "falcon-alibi",
    "bert",
    "gemma2",
    "gemma3",
    "mixtral",
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OPTIONS = {"batch_tokens": 100, "context": 40}


def coarser(block: BlockView) -> list[Edit]:
    """Round every linear map of a block to a coarse grid."""
    edits: list[Edit] = []
    for name, linear in block.linears.items():
        module = copy.deepcopy(linear)
        with torch.no_grad():
            module.weight.copy_((module.weight * 8).round() / 8)
        edits.append(SwapModule(block.paths[name], module))
    return edits


def rows(model: Model, site: str, edits: Sequence[Edit] = ()) -> Tensor:
    """Return a site's rows over the corpus by running the whole model."""
    found = []
    if edits:
        with model.edit(*edits):
            found = [t.rows(site).flatten(1) for t in model.stream(TEXTS, site, **OPTIONS)]
    else:
        found = [t.rows(site).flatten(1) for t in model.stream(TEXTS, site, **OPTIONS)]
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_streams_equal_the_whole_model(family: str) -> None:
    model = tiny(family)
    made: list[Edit] = []
    seen: list[int] = []

    def visit(block: BlockView) -> list[Edit]:
        site = f"{block.name}.resid_pre"
        full = torch.cat([block.hidden(i)[0][block.mask(i)] for i in range(block.n_batches)])
        edited = torch.cat([block.hidden(i)[1][block.mask(i)] for i in range(block.n_batches)])
        torch.testing.assert_close(full, rows(model, site) if not made else plain[site], **CLOSE)
        torch.testing.assert_close(edited, under[site](), **CLOSE)
        batches = list(block.batches())
        outputs = torch.cat([b.outputs for b in batches])
        torch.testing.assert_close(outputs, plain[f"{block.name}.resid_post"], **CLOSE)
        edited_outputs = torch.cat([b.edited_outputs for b in batches])
        assert block.index == 0 or not torch.allclose(outputs, edited_outputs, atol=1e-4)
        edits = coarser(block)
        made.extend(edits)
        seen.append(block.index)
        return edits

    sites = [f"blocks.{i}.{kind}" for i in range(model.n_blocks or 0) for kind in ("resid_pre", "resid_post")]
    plain = {site: rows(model, site) for site in sites}
    # The visitor's edits are installed while it runs, so the whole model gives the edited stream.
    under = {site: lambda site=site: rows(model, site) for site in sites}
    edits = two_stream(model, TEXTS, visit, **OPTIONS)
    assert seen == list(range(model.n_blocks or 0))
    assert edits == made and model.installed == ()
    last = sites[-1]
    torch.testing.assert_close(rows(model, last), plain[last], rtol=0, atol=0)
    assert not torch.allclose(rows(model, last, edits), plain[last], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_inputs_of_every_linear(family: str) -> None:
    model = tiny(family)
    made: list[Edit] = []
    reads = {"mlp.down_proj": "mlp.act", "self_attn.o_proj": "attn.z", "self_attn.v_proj": "attn_norm"}
    if family == "gpt2":
        reads = {"mlp.c_proj": "mlp.act", "attn.c_proj": "attn.z", "attn.c_attn": "attn_norm"}

    def visit(block: BlockView) -> list[Edit]:
        assert set(reads) <= set(block.linears)
        for name, kind in reads.items():
            site = f"{block.name}.{kind}"
            full = torch.cat([b.full[name] for b in block.batches(name)])
            edited = torch.cat([b.edited[name] for b in block.batches(name)])
            torch.testing.assert_close(full, plain[site], **CLOSE)
            torch.testing.assert_close(edited, rows(model, site), **CLOSE)
            assert full.shape[1] == weight_matrix(block.linears[name]).shape[1]
        edits = coarser(block)
        made.extend(edits)
        return edits

    plain = {
        f"blocks.{i}.{kind}": rows(model, f"blocks.{i}.{kind}")
        for i in range(model.n_blocks or 0)
        for kind in reads.values()
    }
    two_stream(model, TEXTS, visit, **OPTIONS)
    assert len(made) == (model.n_blocks or 0) * (7 if family == "llama" else 4)


def test_activation_edits_and_scopes_reach_the_edited_stream_only() -> None:
    model = tiny("llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain = {i: rows(model, f"blocks.{i}.resid_pre") for i in range(3)}
    given = {
        0: Add("blocks.0.mlp.out", vector).at(positions=[0, 2]),
        1: Scale("blocks.1.attn.z[head=2]", 3.0) + Add("blocks.1.resid_pre", vector),
    }

    def visit(block: BlockView) -> Edit | None:
        full = torch.cat([block.hidden(i)[0][block.mask(i)] for i in range(block.n_batches)])
        edited = torch.cat([block.hidden(i)[1][block.mask(i)] for i in range(block.n_batches)])
        torch.testing.assert_close(full, plain[block.index], **CLOSE)
        torch.testing.assert_close(edited, rows(model, f"{block.name}.resid_pre"), **CLOSE)
        if block.index == 1:
            changed = (edited - full).abs().amax(1) > 1e-3
            assert 0 < int(changed.sum()) < len(changed)
        return given.get(block.index)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edits = two_stream(model, TEXTS, visit, **OPTIONS)
    assert edits == [given[0], given[1]]


def test_edits_that_are_installed_already_belong_to_the_plain_model() -> None:
    model = tiny("llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with model.edit(Add("embed", vector), Add("blocks.0.resid_post", vector)):
        plain = {i: rows(model, f"blocks.{i}.resid_pre") for i in range(3)}

        def visit(block: BlockView) -> list[Edit]:
            full = torch.cat([b.full["self_attn.q_proj"] for b in block.batches("self_attn.q_proj")])
            torch.testing.assert_close(full, rows(model, f"{block.name}.attn_norm"), **CLOSE)
            if block.index:
                hidden = torch.cat([block.hidden(i)[0][block.mask(i)] for i in range(block.n_batches)])
                torch.testing.assert_close(hidden, plain[block.index], **CLOSE)
            return []

        assert two_stream(model, TEXTS, visit, **OPTIONS) == []
        assert len(model.installed) == 2


def test_a_block_can_be_edited_in_steps() -> None:
    """Edits installed in mid-visit change the edited stream at once and never the plain one."""
    model = tiny("llama")
    plain = {i: rows(model, f"blocks.{i}.attn.z") for i in range(3)}
    after = {i: rows(model, f"blocks.{i}.resid_post") for i in range(3)}

    def visit(block: BlockView) -> list[Edit]:
        edits = {e.path.rpartition(".")[2]: e for e in coarser(block) if isinstance(e, SwapModule)}
        before = torch.cat([b.edited["self_attn.o_proj"] for b in block.batches("self_attn.o_proj")])
        block.install(edits["q_proj"], edits["k_proj"], edits["v_proj"])
        batches = list(block.batches("self_attn.o_proj"))
        now = torch.cat([b.edited["self_attn.o_proj"] for b in batches])
        assert not torch.allclose(before, now, atol=1e-4)
        torch.testing.assert_close(now, rows(model, f"{block.name}.attn.z"), **CLOSE)
        torch.testing.assert_close(
            torch.cat([b.full["self_attn.o_proj"] for b in batches]), plain[block.index], **CLOSE
        )
        torch.testing.assert_close(torch.cat([b.outputs for b in batches]), after[block.index], **CLOSE)
        return [edits["o_proj"]]

    assert len(two_stream(model, TEXTS, visit, **OPTIONS)) == 12


def test_an_edit_of_a_later_block_waits_for_it_and_spares_the_plain_stream() -> None:
    model = tiny("llama")
    plain = {i: rows(model, f"blocks.{i}.resid_post") for i in range(3)}
    edit = Scale("blocks.2.mlp.out", 5.0)

    def visit(block: BlockView) -> Edit | None:
        outputs = torch.cat([b.outputs for b in block.batches()])
        edited = torch.cat([b.edited_outputs for b in block.batches()])
        torch.testing.assert_close(outputs, plain[block.index], **CLOSE)
        assert torch.allclose(outputs, edited, atol=1e-5) == (block.index < 2)
        return edit if block.index == 0 else None

    two_stream(model, TEXTS, visit, **OPTIONS)


def test_gradients_flow_through_a_block() -> None:
    model = tiny("llama")

    def visit(block: BlockView) -> None:
        hidden = block.hidden(0)[1].clone().requires_grad_()
        out = block.forward(hidden, 0)
        (gradient,) = torch.autograd.grad(out[block.mask(0)].sum(), hidden)
        assert float(gradient.abs().sum()) > 0
        first = next(iter(block.batches()))
        torch.testing.assert_close(out[block.mask(0)].detach(), first.edited_outputs, **CLOSE)

    two_stream(model, TEXTS, visit, blocks=[1], **OPTIONS)


def test_only_the_blocks_asked_for_are_visited() -> None:
    model = tiny("llama")
    seen: list[int] = []
    two_stream(model, TEXTS, lambda block: seen.append(block.index), blocks=[0, 1], max_tokens=50)
    assert seen == [0, 1]


def test_everything_is_taken_back_after_an_exception() -> None:
    model = tiny("llama")
    before = rows(model, "blocks.2.resid_post")

    def visit(block: BlockView) -> list[Edit]:
        if block.index == 2:
            raise RuntimeError("stop here")
        return coarser(block)

    with pytest.raises(RuntimeError, match="stop here"):
        two_stream(model, TEXTS, visit, **OPTIONS)
    assert model.installed == ()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    torch.testing.assert_close(rows(model, "blocks.2.resid_post"), before, rtol=0, atol=0)


def test_bad_input_is_named() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="blocks 0 to 2; asked for 3"):
        two_stream(model, TEXTS, lambda block: None, blocks=[1, 3])
    with pytest.raises(ModelError, match="layout"):
        two_stream(Model(nn.Linear(2, 2), name="line"), TEXTS, lambda block: None)
    with pytest.raises(ModelError, match="two towers"):
        two_stream(BY_NAME["t5"].model(), TEXTS, lambda block: None)

    def unknown(block: BlockView) -> None:
        next(block.batches("mlp.down"))

    with pytest.raises(InputError, match=r"blocks.0 has no linear 'mlp.down'; it has .*mlp.down_proj"):
        two_stream(model, TEXTS, unknown, **OPTIONS)

    with pytest.raises(NonFiniteError, match=r"blocks\.0: the edited stream holds NaN"):
        two_stream(model, TEXTS, lambda block: Scale(f"{block.name}.mlp.out", math.inf), **OPTIONS)
