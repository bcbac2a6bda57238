"""Products where nothing could be compiled: the references give what the kernels give."""

from __future__ import annotations

import pytest
import torch

from actlas.kernels import binary_coded, columns, gated, memory, packed


def test_every_product_runs_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 64, generator=g) / 8, torch.randn(3, 64, generator=g)
    up, down = torch.randn(40, 64, generator=g) / 8, torch.randn(64, 40, generator=g) / 8
    x[:, ::2] = 0
    rows = [packed.pack(weight, f) for f in ("f32", "bf16", "q8", "q4", "q3", "q2", "f4", "e4m3", "e5m2")]  # type: ignore[arg-type]
    by_column = [columns.pack_columns(weight, f) for f in ("f32", "bf16", "q8", "q4", "q2")]  # type: ignore[arg-type]
    signs = binary_coded.BinaryCoded.of(
        torch.randn(2, 40, 64, generator=g), torch.rand(2, 40, 2, generator=g)
    )
    mlp = gated.pack_gated(weight, up, down, "f32")

    def products() -> list[torch.Tensor]:
        found = [packed.packed_product(w, x) for w in rows]
        found += [columns.column_products(w, x) for w in by_column]
        y, active = gated.gated_mlp(mlp, x[0], threshold=0.05)
        return [*found, binary_coded.lookup_product(signs, x), y, torch.tensor(float(active))]

    compiled = products()
    for module in (packed, columns, binary_coded, gated, memory):
        monkeypatch.setattr(module, "native", lambda: None)
    for a, b in zip(compiled, products(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="need the native kernels"):
        rows[0].handle()
    assert memory.in_large_pages(weight) is weight
