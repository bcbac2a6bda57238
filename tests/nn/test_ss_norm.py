"""Single-scale norms commute with rotations, and projections merge without a trace."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError, ModelError
from actlas.core.transforms import rotate_residual, slots
from actlas.nn.ss_norm import ProjectedEmbedding, SSNorm, merged, outlier_safe
from tests.core.tiny import tiny


def _rotation(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def _logits(model) -> torch.Tensor:
    ids = torch.randint(3, 67, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.module(input_ids=ids).logits


def test_one_number_commutes_with_every_rotation_and_many_do_not() -> None:
    x, r = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).double(), _rotation(32)
    one = SSNorm(32, gain=1.7).double()
    torch.testing.assert_close(one(x @ r), one(x) @ r)
    many = tiny("llama").module.model.layers[0].input_layernorm.double()
    with torch.no_grad():
        many.weight.add_(0.3 * torch.randn(32, generator=torch.Generator().manual_seed(3)))
    assert float((many(x @ r) - many(x) @ r).detach().abs().max()) > 0.05
    torch.testing.assert_close(one(x), 1.7 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_a_model_with_single_scale_norms_rotates_without_touching_them() -> None:
    model = outlier_safe(tiny("llama"), projections=False)
    assert not slots(model).reading("model.layers.0.self_attn.q_proj")
    base = _logits(model)
    fold = rotate_residual(model, _rotation(32), untie=True)
    assert not any("norm" in name for name in fold.parameters) and not fold.modules
    with model.edit(fold.edit()):
        assert float((_logits(model) - base).abs().max() / base.abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_merging_leaves_the_logits(family) -> None:
    plain = tiny(family)
    safe = outlier_safe(plain)
    base = _logits(safe)
    assert float((base - _logits(plain)).abs().max()) > 1e-3  # it is another model
    joined = merged(safe)
    assert float((_logits(joined) - base).abs().max() / base.abs().max()) < 1e-5
    assert not any(isinstance(m, ProjectedEmbedding) for m in joined.module.modules())
    standard = merged(safe, norms_like=plain)
    assert {n for n, _ in standard.module.named_parameters()} >= {
        n for n, _ in plain.module.named_parameters() if "norm" in n
    }
    assert float((_logits(standard) - base).abs().max() / base.abs().max()) < 1e-5
    assert torch.equal(_logits(safe), base)


def test_a_tied_table_stays_one_until_it_is_merged() -> None:
    plain = tiny("gemma")
    safe = outlier_safe(plain)
    assert safe.module.get_input_embeddings().weight is safe.module.get_output_embeddings().weight
    joined = merged(safe)
    first, second = joined.module.get_input_embeddings().weight, joined.module.get_output_embeddings().weight
    assert first is not second and not torch.equal(first, second)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no projections"):
        merged(tiny("llama"))
    with pytest.raises(ModelError, match="no RMSNorms"):
        outlier_safe(tiny("gpt2"))
    with pytest.raises(ModelError, match="has them already"):
        outlier_safe(outlier_safe(tiny("llama")), norms=False)
    with pytest.raises(InputError):
        SSNorm(0)
