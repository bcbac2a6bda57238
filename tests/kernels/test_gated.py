"""The gated MLP that reads only active neurons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.kernels.gated import ACTIVATIONS, gated_mlp, gated_mlp_reference, pack_gated
from actlas.kernels.loading import native

needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["f32", "bf16", "q8", "q4"]), st.integers(1, 4), st.integers(1, 4), st.floats(0, 1),
    st.floats(0, 0.8), st.sampled_from(list(ACTIVATIONS)), st.booleans(),
    st.sampled_from(["best", "avx2", "baseline"]), st.integers(0, 3),
)  # fmt: skip
def test_the_kernel_is_the_reference(
    format: str, d: int, hidden: int, skipped: float, threshold: float, activation: str, two: bool, level: str,
    seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    d, hidden = 32 * d, 32 * hidden
    gate, up, down = (torch.randn(*s, generator=g) / 6 for s in ((hidden, d), (hidden, d), (d, hidden)))
    w = pack_gated(gate, up, down, format)  # type: ignore[arg-type]
    x = torch.randn(d, generator=g)
    x = torch.where(torch.rand(d, generator=g) < skipped, 0.0, x)
    least = torch.full((hidden,), threshold)
    want, active = gated_mlp_reference(w, x, threshold=least, activation=activation, two_bytes=two)
    found, count = gated_mlp(w, x, threshold=threshold, activation=activation, two_bytes=two, level=level)
    # A neuron at the very threshold may fall on either side.
    assert abs(count - active) <= 1
    if count == active:
        scale = float(want.abs().max()) + float(x.norm()) * 1e-2 + 1e-6
        assert torch.allclose(found, want, rtol=0, atol=(2e-3 if two else 3e-2) * scale)


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_odd_sizes_against_torch(format: str) -> None:
    g = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 45, 37, generator=g)
    down, x = torch.randn(37, 45, generator=g), torch.randn(37, generator=g)
    if format == "bf16":
        gate, up, down = (t.bfloat16().float() for t in (gate, up, down))
    w = pack_gated(gate, up, down, format)  # type: ignore[arg-type]
    want = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
    found, active = gated_mlp(w, x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)
    assert active == 45


@needs_native
@pytest.mark.parametrize("format", ["f32", "bf16", "q8", "q4"])
def test_rows_of_silent_neurons_are_never_read(format: str) -> None:
    g = torch.Generator().manual_seed(1)
    gate, up = torch.randn(2, 64, 32, generator=g)
    down, x = torch.randn(32, 64, generator=g), torch.randn(32, generator=g)
    w = pack_gated(gate, up, down, format)  # type: ignore[arg-type]
    a = torch.relu(w.gate.dequantised() @ x)
    least = torch.full((64,), 0.5)
    assert float((a - 0.5).abs().min()) > 1e-3
    want, active = gated_mlp(w, x, threshold=least, activation="relu")
    w.up_rows.view(64, -1)[a < 0.5] = 255  # NaN, in float formats
    found, again = gated_mlp(w, x, threshold=least, activation="relu")
    assert active == again == int((a >= 0.5).sum())
    assert torch.equal(found, want)


def test_nothing_active_and_bad_input() -> None:
    w = pack_gated(torch.ones(32, 32), torch.ones(32, 32), torch.ones(32, 32), "q4")
    y, active = gated_mlp(w, torch.ones(32), threshold=1e9)
    assert active == 0 and torch.equal(y, torch.zeros(32))
    y, active = gated_mlp(w, torch.full((32,), torch.nan), threshold=1.0)
    assert active == 32 and bool(y.isnan().all())
    with pytest.raises(ValueError, match=r"x must be \[32\]"):
        gated_mlp(w, torch.ones(31))
    with pytest.raises(ValueError, match="it must be one of silu"):
        gated_mlp(w, torch.ones(32), activation="tanh")
    with pytest.raises(ValueError, match="down"):
        pack_gated(torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 8))
