"""Learning subspaces: it learns, it is tested on other prompts, it repeats, it refuses nonsense."""

from __future__ import annotations

import pytest
import torch

from actlas.circuits.das import das, learn, strongest_readers, subspace_faithfulness
from actlas.circuits.illusion import EFFECT, PARTS
from actlas.circuits.interchange import Interchange
from actlas.circuits.subspace import SubspacePatch, interchange
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.methods import find_method
from tests.circuits.pairs import model_of, pairs_of

SITE = "blocks.1.resid_post"


def test_learning_moves_answers_towards_the_target() -> None:
    model = model_of()
    swap = Interchange.of(model, pairs_of(model), SITE)
    loss = lambda d: float(  # noqa: E731
        torch.nn.functional.cross_entropy(swap.logits(interchange(swap.base, swap.source, d)), swap.target)
    )
    first, last = (loss(learn(swap, steps=n, batch=4, lr=0.05)) for n in (1, 40))
    assert last < first - 1e-4
    # No direction can be much better: the best of many random ones is worse than the learned one.
    generator = torch.Generator().manual_seed(1)
    assert last < min(loss(torch.randn(32, generator=generator)) for _ in range(50))
    found = learn(swap, rank=3, steps=3)
    torch.testing.assert_close(found @ found.T, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.equal(learn(swap, steps=3, seed=2), learn(swap, steps=3, seed=2))
    assert not torch.equal(learn(swap, steps=3, seed=2), learn(swap, steps=3, seed=3))


def test_both_ways() -> None:
    model = model_of()
    pairs = pairs_of(model)
    one, both = Interchange.of(model, pairs, SITE), Interchange.of(model, pairs, SITE, both=True)
    n = len(pairs)
    assert len(both) == 2 * n
    torch.testing.assert_close(both.base[:n], one.base)
    torch.testing.assert_close(both.source[n:], both.base[:n], atol=1e-5, rtol=1e-5)
    swapped = pairs.corrupt_difference < 0  # the corrupted prompt has the other answer
    assert torch.equal(both.answer[n:], torch.where(swapped, pairs.wrong_ids, pairs.answer_ids))


def test_a_full_swap_is_the_other_prompt_and_no_swap_is_the_own() -> None:
    model = model_of()
    pairs = pairs_of(model)
    last = "blocks.2.resid_post"  # after the last block the last token decides alone
    swap = Interchange.of(model, pairs, last)
    torch.testing.assert_close(
        swap.run(swap.source).metric.float(), pairs.corrupt_difference, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(swap.run(swap.base).metric.float(), pairs.difference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("site", [SITE, "blocks.1.mlp.act", "blocks.1.attn.z"])
def test_das_comes_with_its_test(site: str, tmp_path) -> None:
    model = model_of()
    patch = das(model, pairs_of(model), site=site, steps=2, rank=2, held_out=0.5)
    assert isinstance(patch, SubspacePatch) and patch.rank == 2
    names = {m.group.get("part") for m in patch.measurements if m.name == EFFECT}
    assert names == {"subspace", "readable", "unreadable", "whole", "random"}
    verdict = next(m for m in patch.measurements if m.name == PARTS)
    assert verdict.note.split(":")[0] in ("illusion", "faithful", "no effect", "undecided")
    loaded = Edit.load(patch.save(tmp_path / "das"), model)
    assert [m.name for m in loaded.measurements] == [m.name for m in patch.measurements]
    assert not das(model, pairs_of(model), site=site, steps=1, check=False).measurements


def test_any_direction_can_be_tested_and_readers_are_found() -> None:
    model = model_of()
    pairs = pairs_of(model)
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    report = subspace_faithfulness(model, v, pairs, site=SITE, controls=2)
    assert len(report.readers) == 4 and all(r.startswith("blocks.2.attn.q[head=") for r in report.readers)
    named = subspace_faithfulness(model, v, pairs, site=SITE, readers=["blocks.2.attn.k[head=0]"], controls=0)
    assert named.readers == ("blocks.2.attn.k[head=0]",)
    whole = report.effect("whole").value
    swap = Interchange.of(model, pairs, SITE)
    clean, moved = swap.run(swap.base).metric, swap.run(swap.source).metric
    assert whole == pytest.approx(float((clean - moved).mean() / clean.mean()), rel=1e-4)
    with pytest.raises(InputError, match="need a site"):
        subspace_faithfulness(model, v, pairs)


def test_the_strongest_reader_is_the_one_that_the_patch_reaches() -> None:
    """Queries of all heads but one are cut off from the residual stream; that one is found."""
    model = model_of()
    weight = model.block(2).self_attn.q_proj.weight
    with torch.no_grad():
        weight[:16] = 0
        weight[24:] = 0  # heads of 8 channels: head 2 is left
    pairs = pairs_of(model)
    swap = Interchange.of(model, pairs, SITE)
    reader = strongest_readers(model, swap, torch.eye(32), heads=4)
    clean, patched = swap.runs.trace("blocks.2.attn.q"), None
    patch = SubspacePatch(SITE, torch.eye(32), swap.source.unsqueeze(1))
    patched = swap.runs.trace("blocks.2.attn.q", edit=patch)
    moved = (patched["blocks.2.attn.q"] - clean["blocks.2.attn.q"]).abs().sum((0, 1, 3))
    assert moved[2] > 0 and moved[[0, 1, 3]].sum() == 0
    assert "blocks.2.attn.q[head=2]" in (reader[0], reader[-1])  # alone in not being 0, of either sign


def test_bad_requests() -> None:
    model = model_of()
    pairs = pairs_of(model)
    swap = Interchange.of(model, pairs, SITE)
    with pytest.raises(InputError, match="rank is 33"):
        learn(swap, rank=33)
    with pytest.raises(InputError, match="at least 1"):
        learn(swap, steps=0)
    with pytest.raises(InputError, match="held_out"):
        das(model, pairs, site=SITE, held_out=1.0)
    with pytest.raises(InputError, match="at least 4"):
        das(model, pairs.take([0, 1]), site=SITE)


def test_it_is_registered() -> None:
    info = find_method("das")
    assert (info.room, info.returns, info.data, info.needs_site) == ("circuits", "Edit", "task", True)
    assert find_method("knob").data == "pairs" and find_method("tune-head").returns == "Edit"
