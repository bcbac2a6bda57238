"""GPTQ against an independent dense reference, its special cases, and on a small model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers import QuantSpec, quantize
from actlas.quantize.gptq import fit_gptq
from actlas.quantize.gptq_solver import output_error, solve
from tests.core.tiny import TEXTS, tiny


def _layer(
    rows: int = 12, columns: int = 64, tokens: int = 200, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, columns, generator=generator)
    return weight, x.T @ x


def _round(column: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return scale * (np.clip(np.round(column / scale) + zero, 0, 2**bits - 1) - zero)


def _reference(
    weight: torch.Tensor, gram: torch.Tensor, bits: int, size: int, damp: float = 0.01
) -> np.ndarray:
    """Optimal brain quantization in a fixed order: after each column the inverse Hessian is shrunk explicitly."""
    w = weight.double().numpy().copy()
    h = gram.numpy() + damp * np.diag(gram.numpy()).mean() * np.eye(len(gram))
    rows, columns = w.shape
    out = np.zeros_like(w)
    scale = zero = np.zeros(rows)
    for j in range(columns):
        inverse = np.linalg.inv(h[j:, j:])
        if j % size == 0:
            group = w[:, j : j + size]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
            exact = (high - low) / (2**bits - 1)
            zero = np.clip(np.round(-low / exact), 0, 2**bits - 1)
            scale = exact.astype(np.float16).astype(np.float64)
        out[:, j] = _round(w[:, j], scale, zero, bits)
        w[:, j:] -= np.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out


@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 64), (4, 32)])
def test_solver_equals_column_by_column_reference(bits: int, size: int) -> None:
    weight, gram = _layer()
    found = solve(weight, gram, QuantSpec(bits, group_size=size))
    want = torch.from_numpy(_reference(weight, gram, bits, size)).float()
    # Ties at half a step may fall either way in float32; no entry may differ otherwise.
    off = (found.value - want).abs()
    assert float((off > 1e-3).double().mean()) <= 0.002
    assert float(found.error.mean()) == pytest.approx(
        float(output_error(weight, want, gram).mean()), rel=0.02
    )


def test_long_groups_cross_blocks_of_128() -> None:
    weight, gram = _layer(columns=384, tokens=900)
    found = solve(weight, gram, QuantSpec(3, group_size=192))
    want = torch.from_numpy(_reference(weight, gram, 3, 192)).float()
    assert float(((found.value - want).abs() > 1e-3).double().mean()) <= 0.01


def test_codes_stand_for_the_value() -> None:
    from actlas.core.numbers import decode

    weight, gram = _layer()
    for name in (
        "int3-g16",
        "int4-channel-sym",
        "int4-g32-float",
        "nf4-g64",
        "fp4-e2m1-g32",
        "mxfp4",
        "nvfp4",
    ):
        spec = QuantSpec.parse(name)
        found = solve(weight, gram, spec)
        assert torch.allclose(decode(found.codes, spec, found.params), found.value, atol=1e-6), name
        nearest = output_error(weight, quantize(weight, spec), gram)
        assert float(found.error.mean()) < float(nearest.mean()), name


def test_independent_inputs_give_round_to_nearest() -> None:
    weight, _ = _layer()
    spec = QuantSpec(3, group_size=16)
    found = solve(weight, torch.eye(64, dtype=torch.float64), spec)
    assert torch.allclose(found.value, quantize(weight, spec), atol=2e-3)


def test_activation_order_keeps_original_groups() -> None:
    weight, gram = _layer()
    gram = gram * torch.logspace(-1, 1, 64, dtype=torch.float64).outer(
        torch.logspace(-1, 1, 64, dtype=torch.float64)
    )
    spec = QuantSpec(3, group_size=16)
    plain, ordered = solve(weight, gram, spec), solve(weight, gram, spec, order="activation")
    # Scales are those of the original weights' groups.
    low, high = weight.view(12, 4, 16).aminmax(dim=-1)
    assert torch.allclose(ordered.params.scale.float(), (high.clamp_min(0) - low.clamp_max(0)) / 7, rtol=1e-3)
    assert float(ordered.error.mean()) < float(output_error(weight, quantize(weight, spec), gram).mean())
    assert not torch.equal(plain.codes, ordered.codes)


def test_dead_columns_become_zero() -> None:
    weight, gram = _layer()
    gram[5], gram[:, 5] = 0, 0
    found = solve(weight, gram, QuantSpec(4, group_size=16))
    assert bool((found.value[:, 5] == 0).all())
    assert bool(torch.isfinite(found.value).all())


def test_outliers_stay_exact_and_help() -> None:
    weight, gram = _layer()
    weight[3, 7] = 9.0
    spec = QuantSpec(2, group_size=32)
    plain, kept = solve(weight, gram, spec), solve(weight, gram, spec, outliers=0.02)
    assert kept.outliers is not None
    assert int((kept.outliers != 0).sum()) == round(0.02 * weight.numel())
    assert float(kept.outliers[3, 7]) != 0
    assert float(kept.error.mean()) < float(plain.error.mean())


def test_bad_input() -> None:
    weight, gram = _layer()
    with pytest.raises(InputError, match="legal sizes are 16, 32, 64"):
        solve(weight, gram, QuantSpec(4, group_size=48))
    with pytest.raises(InputError, match="no calibration input"):
        solve(weight, torch.zeros_like(gram), QuantSpec(4, group_size=16))
    with pytest.raises(NonFiniteError, match="NaN"):
        solve(weight, gram * torch.nan, QuantSpec(4, group_size=16))
    with pytest.raises(InputError, match="damp"):
        solve(weight, gram, QuantSpec(4, group_size=16), damp=0)


def test_a_small_model() -> None:
    model = tiny()
    edit = fit_gptq(model, TEXTS * 4, bits=3, group_size=16, tokens=300, context=32, evaluate=150)
    assert [m.name for m in edit.measurements] == [
        "bits-per-weight",
        "perplexity-ratio",
        "kl-to-base",
        "agreement",
    ]
    assert len(edit.modules) == 21  # type: ignore[attr-defined]
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    with model.edit(edit):
        assert type(model.module.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())


@pytest.mark.parametrize("sequential", [False, True])
def test_errors_are_those_of_the_inputs_in_the_edited_model(sequential: bool) -> None:
    model = tiny()
    edit = fit_gptq(
        model, TEXTS * 4, bits=2, group_size=16, tokens=300, context=32, evaluate=0, sequential=sequential
    )
    rtn = {
        t: quantize(m.weight, QuantSpec(2, group_size=16))
        for t, m in model.module.named_modules()
        if "proj" in t
    }
    worse = 0
    for path, layer in edit.modules.items():  # type: ignore[attr-defined]
        worse += float((layer.weight - rtn[path]).abs().max()) > 1e-3
    assert worse > 15  # it did something else than round to nearest
    assert set(edit.errors) == set(edit.modules)  # type: ignore[attr-defined]


def test_ten_tokens_and_infinities() -> None:
    model = tiny()
    with pytest.raises(InputError, match="at least 64 are needed"):
        fit_gptq(model, ["Why not so?"], bits=3, group_size=16)
    with pytest.raises(InputError, match="too few"):
        fit_gptq(model, TEXTS, tokens=10)
    with pytest.raises(InputError, match="legal sizes are 16, 32"):
        fit_gptq(model, TEXTS * 4, bits=3, group_size=24)
    with pytest.raises(InputError, match="2 to 16 bits"):
        fit_gptq(model, TEXTS * 4, bits=1)
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj: 1 of"):
        fit_gptq(model, TEXTS * 4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma2"])
def test_other_families(family: str) -> None:
    """Encoders, Conv1D and norms after a block: everything is quantised, and better than by rounding."""
    from actlas.quantize.awq import fit_awq
    from actlas.quantize.rtn import fit_rtn

    model = tiny(family)
    options = {"bits": 3, "group_size": 16, "evaluate": 0}
    text = {"tokens": 200, "context": 32}
    inputs = model.encode(TEXTS[:1])

    def output() -> torch.Tensor:
        out = model.forward(inputs)
        return getattr(out, "logits", None) if hasattr(out, "logits") else out.last_hidden_state

    want, off = output(), {}
    edits = {
        "rtn": fit_rtn(model, **options),  # type: ignore[arg-type]
        "gptq": fit_gptq(model, TEXTS * 4, **options, **text),  # type: ignore[arg-type]
        "awq": fit_awq(model, TEXTS * 4, ratios=8, **options, **text),  # type: ignore[arg-type]
    }
    for name, edit in edits.items():
        assert set(edit.modules) == set(edits["rtn"].modules)  # type: ignore[attr-defined]
        with model.edit(edit):
            off[name] = float((output() - want).norm())
    assert min(off["gptq"], off["awq"]) < off["rtn"]
