"""Low-rank compensation, SpQR on a model, and bits by sensitivity."""

from __future__ import annotations

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.quant_edit import QuantEdit
from actlas.quantize.awq import fit_awq
from actlas.quantize.bit_allocation import allocate_bits
from actlas.quantize.lorc import compensate, fit_lorc, low_rank
from actlas.quantize.rtn import fit_rtn
from actlas.quantize.spqr import fit_spqr
from tests.core.tiny import TEXTS, tiny


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_eckart_young(shape: tuple[int, int]) -> None:
    e = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(e.double(), full_matrices=False)
    for rank in (1, 5, 20):
        branch = low_rank(e, rank)
        up, down, share = branch.up, branch.down, float(branch.energy[-1])
        cut = low_rank(e, 20).cut(rank)
        assert torch.allclose(cut.up @ cut.down, up @ down, atol=1e-4)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert torch.allclose((up @ down).double(), best, atol=1e-4)
        assert share == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-5)
        # U' = U S^1/2 and V' = S^1/2 V: both factors have the same size.
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-3)


def test_weighted_is_nearest_in_the_weighted_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    e, size = torch.randn(20, 50, generator=generator), torch.rand(50, generator=generator) * 10
    branch, plain = low_rank(e, 4, size), low_rank(e, 4)
    weighted = ((e - branch.up @ branch.down) * size).norm()
    assert weighted < ((e - plain.up @ plain.down) * size).norm()
    s = torch.linalg.svdvals((e * size).double())
    assert float(weighted) == pytest.approx(float(s[4:].square().sum().sqrt()), rel=1e-4)


@pytest.mark.parametrize("factor_bits", [16, 8])
def test_branch_lowers_weight_error_by_the_singular_values(factor_bits: int, tmp_path: object) -> None:
    from pathlib import Path

    model = tiny()
    base = fit_rtn(model, bits=3, group_size=16, evaluate=0)
    assert isinstance(base, QuantEdit)
    edit = compensate(model, base, rank=4, factor_bits=factor_bits)
    assert isinstance(edit, QuantEdit)
    modules = dict(model.module.named_modules())
    for path, layer in edit.modules.items():
        error = modules[path].weight - base.modules[path].weight
        left = (modules[path].weight - layer.weight).square().sum()
        want = torch.linalg.svdvals(error.double())[4:].square().sum()
        assert float(left) == pytest.approx(float(want), rel=2e-2 if factor_bits == 8 else 2e-3), path
    assert edit.bits_per_weight > base.bits_per_weight
    x = torch.randn(3, 32)
    layer = edit.modules["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-4)
    edit.save(Path(str(tmp_path)) / "e", model)
    again = Edit.load(Path(str(tmp_path)) / "e", model)
    assert torch.equal(
        again.modules["model.layers.0.mlp.up_proj"].weight, edit.modules["model.layers.0.mlp.up_proj"].weight
    )  # type: ignore[attr-defined]


def test_fit_and_bad_input() -> None:
    model = tiny()
    options = {"bits": 2, "group_size": 16, "context": 32, "tokens": 200, "evaluate": 0}
    edit = fit_lorc(model, TEXTS * 4, rank=4, weighting="activation", base="gptq", **options)  # type: ignore[arg-type]
    assert "hold" in edit.describe()
    with pytest.raises(InputError, match=r"rank is 33; this 32 x 32 map allows 1 to 32"):
        fit_lorc(model, TEXTS * 4, rank=33, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="8 or 16"):
        fit_lorc(model, TEXTS * 4, factor_bits=4, **options)  # type: ignore[arg-type]
    folded = fit_awq(model, TEXTS * 4, bits=3, group_size=16, tokens=200, context=32, evaluate=0)
    with pytest.raises(InputError, match="fold=False"):
        compensate(model, folded)  # type: ignore[arg-type]


def test_spqr_costs_bits_and_helps() -> None:
    model = tiny()
    options = {"bits": 2, "group_size": 16, "context": 32, "tokens": 300, "evaluate": 200}
    none = fit_spqr(model, TEXTS * 4, outliers=0.0, **options)  # type: ignore[arg-type]
    some = fit_spqr(model, TEXTS * 4, outliers=0.05, **options)  # type: ignore[arg-type]
    assert isinstance(none, QuantEdit)
    assert isinstance(some, QuantEdit)
    assert some.bits_per_weight == pytest.approx(none.bits_per_weight + 0.05 * 48, abs=0.1)
    assert sum(some.errors.values()) < sum(none.errors.values())
    with pytest.raises(InputError, match="share of outliers"):
        fit_spqr(model, TEXTS * 4, outliers=0.7)


def test_allocation_gives_bits_to_the_sensitive() -> None:
    found = allocate_bits({"a": 5.0, "b": 0.1, "c": 1.0, "d": 0.2}, (2, 3), 2.5)
    assert found == {"a": 3, "b": 2, "c": 3, "d": 2}
    # Three choices: one very sensitive layer takes two steps before the others take one.
    assert allocate_bits({"a": 1000.0, "b": 1.0}, (2, 3, 4), 3.0) == {"a": 4, "b": 2}
    sized = allocate_bits({"a": 1.0, "b": 1.0}, (2, 4), 3.0, {"a": 100, "b": 300})
    assert sum({"a": 100, "b": 300}[n] * b for n, b in sized.items()) <= 3 * 400
    assert sized == {"a": 4, "b": 2}


def test_allocation_bad_input() -> None:
    with pytest.raises(InputError, match="below the least choice"):
        allocate_bits({"a": 1.0}, (2, 3), 1.5)
    with pytest.raises(InputError, match="sensitivity of a"):
        allocate_bits({"a": float("nan")})
    with pytest.raises(InputError, match="no layers"):
        allocate_bits({})
