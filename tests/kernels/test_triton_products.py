"""The Triton products against the PyTorch references: on CUDA, or in Triton's interpreter if that is asked for.

TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_products.py
"""

from __future__ import annotations

import os

import pytest
import torch

from actlas.kernels.binary_coded import BinaryCoded, lookup_product
from actlas.kernels.columns import column_products, pack_columns
from actlas.kernels.packed import pack, packed_product

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="there is no CUDA device")


def kernels():
    from actlas.kernels import triton_products

    return triton_products


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


KINDS = [*((f, o) for f in ("q8", "q4", "q3", "q2") for o in ("none", "minimum", "integer")), ("f4", None)]


@pytest.mark.parametrize(("format", "offset"), KINDS)
@pytest.mark.parametrize("group", [32, 64])
def test_packed(format, offset, group):
    w = pack(normal(21, 128), format, normal(21, seed=1), group=group, offset=offset)
    x = normal(2, 128, seed=2)
    want = x @ w.dequantised().T + w.bias
    torch.testing.assert_close(kernels().packed_product(w, x.to(DEVICE)).cpu(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("format", "group"), [("f32", 32), ("bf16", 32), ("q8", 64), ("q4", 32), ("q2", 64)])
def test_columns(format, group):
    w = pack_columns(normal(70, 64), format, group=group)
    x = normal(2, 64, seed=3)
    x[:, ::3] = 0
    want = x @ w.dequantised().T
    torch.testing.assert_close(kernels().column_products(w, x.to(DEVICE)).cpu(), want, rtol=1e-4, atol=1e-3)
    nothing = kernels().column_products(w, torch.zeros(1, 64, device=DEVICE)).cpu()
    assert torch.equal(nothing, torch.zeros(1, 70))


@pytest.mark.parametrize("offset", [True, False])
def test_lookup(offset):
    o = normal(21, 2, seed=4) if offset else None
    w = BinaryCoded.of(normal(3, 21, 64), normal(3, 21, 2, seed=5), o)
    x = normal(2, 64, seed=6)
    want = x @ w.dequantised().T
    torch.testing.assert_close(kernels().lookup_product(w, x.to(DEVICE)).cpu(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device")
def test_cuda_tensors_take_triton(monkeypatch):
    from actlas.kernels import binary_coded, columns, packed

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the reference was used")

    monkeypatch.setattr(packed, "packed_product_reference", fail)
    monkeypatch.setattr(columns, "column_products_reference", fail)
    monkeypatch.setattr(binary_coded, "lookup_product_reference", fail)
    x = torch.randn(2, 64, device=DEVICE)
    packed_product(pack(normal(21, 64), "q4"), x)
    column_products(pack_columns(normal(21, 64), "q4"), x)
    lookup_product(BinaryCoded.of(normal(3, 21, 64), normal(3, 21, 2)), x)
