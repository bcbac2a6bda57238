"""Subspace patches: brute force, rank-one equivalence, gradients, saving, last-token runs, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actlas.circuits.last_token import LastToken
from actlas.circuits.subspace import SubspacePatch, interchange, orthonormal, rank_one_edit
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, ShapeError
from tests.core.tiny import tiny

CLEAN = ["The committee met on Tuesday", "Nobody agreed!"]
OTHER = ["The committee met on Mondays", "Nobody agreee!"]
SITES = (
    "blocks.1.mlp.act",
    "blocks.1.attn.z",
    "blocks.1.attn.z[head=2]",
    "blocks.1.resid_mid",
    "blocks.1.resid_post",
)


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3])
def test_interchange_is_the_projector(rank: int) -> None:
    x, source, directions = double(5, 8), double(5, 8, seed=1), double(rank, 8, seed=2)
    projector = directions.T @ torch.linalg.inv(directions @ directions.T) @ directions
    wanted = x + (source - x) @ projector
    torch.testing.assert_close(interchange(x, source, directions), wanted)
    mixed = double(rank, rank, seed=3) @ directions  # another basis of the same span
    torch.testing.assert_close(interchange(x, source, mixed), wanted)


def test_everything_or_nothing() -> None:
    x, source = double(4, 6), double(4, 6, seed=1)
    torch.testing.assert_close(interchange(x, source, torch.eye(6, dtype=torch.float64)), source)
    assert torch.equal(interchange(x, x, double(6)), x)


def test_one_direction_as_in_the_paper() -> None:
    x, source, v = double(4, 6), double(4, 6, seed=1), 7 * double(6, seed=2)
    by_hand = x + (((source - x) @ v) / (v @ v)).unsqueeze(1) * v
    torch.testing.assert_close(interchange(x, source, v), by_hand)


def test_gradients_reach_directions_and_activations() -> None:
    x, source, v = double(3, 5).requires_grad_(), double(3, 5, seed=1), double(2, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, d: interchange(a, source, d), (x, v))


def test_rank_one_edit_equals_the_patch() -> None:
    weight, u, source, v = double(4, 7), double(7, seed=1), double(7, seed=2), double(7, seed=3)
    rows = double(50, 7, seed=4)
    moment = rows.T @ rows / 50
    edited = rank_one_edit(weight, u, source, v, moment)
    patched = weight @ interchange(u[None], source[None], v)[0]
    torch.testing.assert_close(edited @ u, patched)
    assert torch.linalg.matrix_rank(edited - weight) == 1
    b = torch.linalg.solve(moment, u)
    b = b / (u @ b)
    for seed in range(5):  # any other b with b . u = 1 has a larger expected (b . x)^2
        other = b + (d := double(7, seed=10 + seed)) - (d @ u) / (u @ u) * u
        assert other @ moment @ other > b @ moment @ b


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_last_token_runs_equal_installed_edits(family: str, site: str) -> None:
    model = tiny(family)
    inputs = model.encode(CLEAN, padding_side="left")
    runs = LastToken(model, CLEAN, site)
    torch.testing.assert_close(runs.logits(), model.logits(inputs)[:, -1], atol=1e-5, rtol=1e-4)
    v = torch.randn(runs.values.flatten(1).shape[1], generator=torch.Generator().manual_seed(0))
    patch = SubspacePatch(site, v).from_inputs(model, OTHER)
    with model.edit(patch):
        wanted = model.logits(inputs)[:, -1]
    assert (wanted - runs.logits()).abs().max() > 1e-4
    moved = interchange(runs.values.flatten(1), patch.source.flatten(1), v)
    torch.testing.assert_close(runs.logits(moved.reshape(runs.values.shape)), wanted, atol=1e-5, rtol=1e-4)
    second = LastToken(model, CLEAN, "blocks.0.mlp.out").at(site).take(torch.tensor([1]))
    torch.testing.assert_close(
        second.logits(moved.reshape(runs.values.shape)[1:]), wanted[1:], atol=1e-5, rtol=1e-4
    )
    rows = torch.tensor([1, 0, 1])
    torch.testing.assert_close(
        runs.logits(moved.reshape(runs.values.shape)[rows], rows=rows), wanted[rows], atol=1e-5, rtol=1e-4
    )


def test_gradients_pass_through_a_last_token_run_twice() -> None:
    model = tiny()
    runs = LastToken(model, CLEAN, "blocks.1.mlp.act")
    x = runs.values.clone().requires_grad_()
    first = torch.autograd.grad(runs.logits(x, grad=True)[:, 5].sum(), x)[0]
    again = torch.autograd.grad(runs.logits(x, grad=True)[:, 5].sum(), x)[0]
    torch.testing.assert_close(first, again)
    step = 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = (runs.logits(x + step) - runs.logits(x - step))[:, 5].sum() / 2
    torch.testing.assert_close((first * step).sum(), change, rtol=0.02, atol=1e-5)
    assert all(p.grad is None for p in model.module.parameters())


def test_a_patch_token_by_token_and_its_scope() -> None:
    model, site = tiny(), "blocks.1.resid_post"
    source = model.trace(OTHER[0], site)
    patch = SubspacePatch(site, torch.eye(32)).from_trace(source)
    with model.edit(patch):
        found = model.trace(CLEAN[0], site)[site]
    torch.testing.assert_close(found, source[site], atol=1e-5, rtol=1e-5)
    with model.edit(patch.at(positions=[-2])):
        some = model.trace(CLEAN[0], site)[site]
    clean = model.trace(CLEAN[0], site)[site]
    torch.testing.assert_close(some[:, -2], source[site][:, -2], atol=1e-5, rtol=1e-5)
    assert torch.equal(some[:, :-2], clean[:, :-2])
    assert not torch.equal(some[:, -2], clean[:, -2])


def test_saving_and_scaling(tmp_path) -> None:
    model, site = tiny(), "blocks.1.mlp.act"
    patch = SubspacePatch(site, torch.randn(2, 48, generator=torch.Generator().manual_seed(0)))
    patch = patch.from_inputs(model, OTHER)
    loaded = Edit.load(patch.save(tmp_path / "patch", model), model)
    inputs = model.encode(CLEAN, padding_side="left")
    with model.edit(patch):
        wanted = model.logits(inputs)
    with model.edit(loaded):
        assert torch.equal(model.logits(inputs), wanted)
    bare = SubspacePatch(site, patch.directions)
    again = Edit.load(bare.save(tmp_path / "bare", model), model)
    assert isinstance(again, SubspacePatch) and again.source is None and again.rank == 2
    clean = model.logits(inputs)
    with model.edit(patch * 0):
        assert torch.equal(model.logits(inputs), clean)


def test_bad_patches() -> None:
    model, site = tiny(), "blocks.1.mlp.act"
    with pytest.raises(InputError, match="no source"), model.edit(SubspacePatch(site, torch.ones(48))):
        pass
    good = SubspacePatch(site, torch.ones(48)).from_inputs(model, OTHER)
    with pytest.raises(ShapeError, match="48 channels"):
        with model.edit(SubspacePatch(site, torch.ones(47), good.source)):
            pass
    with pytest.raises(InputError, match="direction 1 is zero"):
        orthonormal(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match="depends on the ones before"):
        orthonormal(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))
    longer = SubspacePatch(site, torch.ones(48)).from_trace(model.trace("Why not? Because.", site))
    with pytest.raises(ShapeError, match="align"), model.edit(longer):
        model.logits("Nobody agreed!")
    with pytest.raises(ShapeError, match="2 rows"), model.edit(good):
        model.logits([*CLEAN, CLEAN[0]])


def test_bad_prompts_for_last_token_runs() -> None:
    model = tiny()
    with pytest.raises(InputError, match="one token"):
        LastToken(model, ["A", "Why"], "blocks.1.mlp.act")
    right = model.encode(CLEAN, padding_side="right")
    with pytest.raises(InputError, match="pad on the left"):
        LastToken(model, right, "blocks.1.mlp.act")
    with pytest.raises(ModelError, match="causal"):
        LastToken(tiny("bert"), CLEAN, "blocks.1.mlp.act")
