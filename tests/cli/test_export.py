"""`actlas export`: an edit becomes a folder that loads, and wrong requests are one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.models import load

Run = Callable[..., Any]


@pytest.fixture
def quantised(tiny: str, tmp_path: Path) -> Path:
    """An edit of four bits for the tiny GPT-2."""
    model = load(tiny)
    layers = {n: m for n, m in model.module.named_modules() if n.endswith(("c_fc", "c_attn"))}
    edit = QuantEdit({n: QuantLinear.of(m, "int4-g32") for n, m in layers.items()}, method="rtn")
    return edit.save(tmp_path / "w4", model)


def test_a_plain_folder_computes_the_same(actlas: Run, tiny: str, quantised: Path, tmp_path: Path) -> None:
    said = actlas("export", tiny, "--edit", quantised, "--format", "hf", "-o", tmp_path / "plain", "--json")
    assert said.status == 0, said
    assert said.json["format"] == "hf" and said.json["bytes"] > 0
    model = load(tiny)
    with model.edit(QuantEdit.load(quantised, model)):
        want = model.logits("the cat")
    torch.testing.assert_close(load(tmp_path / "plain").logits("the cat"), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--edit", "{w4}"], "say where to write"),
        (["-o", "{out}"], "nothing to export"),
        (["--edit", "{w4}", "-o", "{out}"], "is a Conv1D; hf can hold it"),
        (["--edit", "{w4}", "-o", "{w4}"], "is there already"),
        (["--edit", "{w4}", "-o", "{out}", "--format", "onnx"], "no exchange format 'onnx'"),
        (["--edit", "{vec}", "-o", "{out}"], "is not about weights"),
    ],
)
def test_wrong_requests(
    actlas: Run, tiny: str, quantised: Path, vector: str, tmp_path: Path, arguments: list[str], said: str
) -> None:
    names = {"w4": quantised, "out": tmp_path / "out", "vec": vector}
    result = actlas("export", tiny, *[a.format(**names) for a in arguments])
    assert result.status == 2 and said in result.err, result
    assert not (tmp_path / "out").exists()
