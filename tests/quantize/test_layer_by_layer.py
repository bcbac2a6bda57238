"""Layers quantised one by one on ready-made inputs: moments by hand, exact parts, and what is refused."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.model import Model
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.quantize.layer_by_layer import fit_layers, input_moments
from tests.core.families import BY_NAME

FORMAT = "int3-g16"


def whisper() -> tuple[Model, list[dict[str, torch.Tensor]]]:
    model = BY_NAME["whisper"].model()
    config = model.config
    g = torch.Generator().manual_seed(0)
    frames = 2 * config.max_source_positions
    batches = [
        {
            "input_features": torch.randn(2, config.num_mel_bins, frames, generator=g),
            "decoder_input_ids": torch.randint(0, 50, (2, 6), generator=g),
        }
        for _ in range(2)
    ]
    return model, batches


def paths_of(model: Model) -> list[str]:
    return [n for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]


def test_moments_are_those_of_all_rows_that_count() -> None:
    model, batches = whisper()
    path = paths_of(model)[-1]
    seen: list[torch.Tensor] = []
    handle = model.module.get_submodule(path).register_forward_pre_hook(
        lambda m, a: seen.append(a[0].detach())
    )
    with torch.no_grad():
        for batch in batches:
            model.module(**batch)
    handle.remove()
    x = torch.cat([s[:, 1:].flatten(0, 1) for s in seen])
    found = input_moments(model, batches, [path], rows=lambda p, x: x[:, 1:].flatten(0, 1))[path]
    torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean, x.abs().mean(0))
    torch.testing.assert_close(found.most, x.abs().amax(0))
    assert found.rows == len(x)


def test_calibrated_methods_beat_rounding_on_their_own_inputs() -> None:
    model, batches = whisper()
    moments = input_moments(model, batches, paths_of(model))
    edits = {m: fit_layers(model, moments, method=m, format=FORMAT, ratios=6) for m in ("rtn", "awq", "gptq")}
    mean = {m: sum(e.errors.values()) / len(e.errors) for m, e in edits.items()}  # type: ignore[attr-defined]
    assert mean["gptq"] < mean["rtn"] and mean["awq"] < mean["rtn"]
    path = paths_of(model)[0]
    edit = edits["awq"]
    assert isinstance(edit, QuantEdit)
    layer = edit.modules[path]
    assert isinstance(layer, QuantLinear) and layer.input_scale is not None
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(
        layer(x), x @ layer.weight.T + (0 if layer.bias is None else layer.bias), rtol=1e-4, atol=1e-4
    )
    before = model.module(**batches[0]).logits
    with model.edit(edit):
        assert not torch.equal(model.module(**batches[0]).logits, before)
    assert torch.equal(model.module(**batches[0]).logits, before)


def test_what_cannot_be_calibrated_is_named() -> None:
    model, batches = whisper()
    with pytest.raises(InputError, match="no calibration inputs"):
        input_moments(model, [], paths_of(model))
    with pytest.raises(InputError, match="no module 'nowhere'"):
        input_moments(model, batches, ["nowhere"])
    broken = {**batches[0], "input_features": batches[0]["input_features"] * float("nan")}
    with pytest.raises(NonFiniteError, match="NaN or infinite inputs"):
        input_moments(model, [broken], paths_of(model))
    with pytest.raises(InputError, match="there are rtn, smoothquant, awq, gptq"):
        fit_layers(model, {}, method="magic")  # type: ignore[arg-type]
