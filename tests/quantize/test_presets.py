"""Deployable formats: what they store, how they rank on a tiny model, and that they are exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from actlas.core.errors import InputError
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.models.exchange import export, read_compressed
from actlas.quantize.presets import fit_preset
from tests.core.tiny import TEXTS, tiny

TEXT = [t * 4 for t in TEXTS]
SMALL = {"tokens": 128, "context": 48, "evaluate": 0}


@pytest.mark.parametrize(
    ("preset", "weights", "inputs"),
    [
        ("w8a8-fp", "fp8-e4m3-channel", "fp8-e4m3-channel"),
        ("w8a8-int", "int8-channel-sym", "int8-channel-sym"),
        ("w8a8-int-static", "int8-channel-sym", "int8-tensor-sym"),
        ("w4a16-int", "int4-g16-sym", None),
    ],
)
def test_formats_of_the_presets(preset: str, weights: str, inputs: str | None, tmp_path: Path) -> None:
    model = tiny()
    options = {**SMALL, "group_size": 16} if preset == "w4a16-int" else SMALL
    edit = fit_preset(model, TEXT, preset=preset, **options)  # type: ignore[arg-type]
    assert isinstance(edit, QuantEdit)
    layers = list(edit.modules.values())
    assert all(isinstance(m, QuantLinear) and m.spec.name == weights for m in layers)
    assert {m.act_spec.name if m.act_spec else None for m in layers} == {inputs}  # type: ignore[union-attr]
    with model.edit(edit):
        changed = model.logits(TEXTS[0])
    assert float((changed - model.logits(TEXTS[0])).abs().max()) > 0
    if preset == "w8a8-int-static":
        with pytest.raises(InputError, match="with static scales"):
            export(model, edit, tmp_path / "out")
    else:
        export(model, edit, tmp_path / "out")
        again, codes = read_compressed(tmp_path / "out")
        with again.edit(codes):
            assert float((again.logits(TEXTS[0]) - changed).abs().max()) < 1e-4


def test_unknown_presets_are_named() -> None:
    with pytest.raises(InputError, match="there are w8a8-fp, w8a8-int, w4a16-int"):
        fit_preset(tiny(), TEXT, preset="w2a2")  # type: ignore[arg-type]
