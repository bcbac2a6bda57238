"""The k largest of a row: the kernel against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels import selection
from actlas.kernels.loading import native
from actlas.kernels.selection import topk_mask, topk_mask_reference


@pytest.mark.skipif(native() is None, reason="no native kernels")
@settings(max_examples=80, deadline=None)
@given(st.integers(1, 70), st.data())
def test_the_mask_is_that_of_a_stable_sort(d: int, data: st.DataObject) -> None:
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 0.5, torch.inf, -torch.inf, torch.nan, 3.5])
    row = torch.tensor(data.draw(st.lists(values, min_size=2 * d, max_size=2 * d))).view(2, 1, d)
    k = data.draw(st.integers(1, d))
    want = topk_mask_reference(row, k)
    for level in ("best", "avx2", "baseline"):
        assert torch.equal(topk_mask(row, k, level=level), want)
    assert want.sum(-1).eq(k).all()


def test_long_rows_and_other_types() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, d in ((3, 1536), (1, 8191), (40, 700)):
        scores = torch.randn(n, d, generator=generator)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = scores.to(dtype)
            assert torch.equal(topk_mask(x, d // 3), topk_mask_reference(x, d // 3))
    turned = torch.randn(6, 5, generator=generator).T
    assert torch.equal(topk_mask(turned, 2), topk_mask_reference(turned, 2))
    assert topk_mask(torch.ones(0, 4), 2).shape == (0, 4)


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "native", lambda: None)
    assert topk_mask(torch.tensor([1.0, 3.0, 3.0, 0.0]), 2).tolist() == [False, True, True, False]


def test_skip_inputs_uses_it_and_breaks_ties_by_the_lower_channel() -> None:
    from actlas.core.skip_inputs import SkipInputs

    x = torch.tensor([[2.0, -2.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    edit = SkipInputs("blocks.0.mlp.act", keep=0.5)
    assert edit.mask(x).tolist() == [[True, True, False, False], [True, True, False, False]]
    wide = torch.randn(5, 300)
    assert torch.equal(
        SkipInputs("blocks.0.mlp.act", keep=0.4).mask(wide), topk_mask_reference(wide.abs(), 120)
    )


@pytest.mark.parametrize("k", [0, 5, -1])
def test_a_wrong_number_is_named(k: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 4"):
        topk_mask(torch.ones(2, 4), k)
    with pytest.raises(ValueError, match="floats"):
        topk_mask(torch.ones(2, 4, dtype=torch.int64), 1)
