"""`actlas measure --suite`: variants side by side, and wrong requests in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actlas.measure import quantization_suite as module
from actlas.models import load
from actlas.quantize.rtn import fit_rtn

Run = Callable[..., Any]


@pytest.fixture
def edits(tiny: str, tmp_path: Path) -> list[Path]:
    model = load(tiny)
    return [fit_rtn(model, bits=b, group_size=32, evaluate=0).save(tmp_path / f"w{b}", model) for b in (8, 3)]


def test_every_edit_is_a_variant(
    actlas: Run, tiny: str, edits: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = module.quantization_suite

    def small(model: Any, variants: Any, **options: Any) -> Any:
        texts = ["the cat sat on the mat and the dog ran", "the dog ran to the house and the cat"] * 4
        return kept(model, variants, corpus=texts, tasks=(), tokens=60, context=16, prompts=1, new_tokens=2)

    monkeypatch.setattr(module, "quantization_suite", small)
    said = actlas(
        "measure", tiny, "--suite", "quantization", "--edit", edits[0], "--edit", edits[1], "--json"
    )
    assert said.status == 0, said
    kl = {m["group"]["variant"]: m["value"] for m in said.json["suite"] if m["name"] == "kl-to-base"}
    assert set(kl) == {"w8", "w3"} and kl["w8"] < kl["w3"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "speed", "--edit", "{w8}"], "there is no suite 'speed'; there is quantization"),
        (["--suite", "quantization"], "give at least one, e.g. --edit"),
        (["perplexity", "--suite", "quantization", "--edit", "{w8}"], "leave out 'perplexity'"),
        (["--suite", "quantization", "--edit", "{w8}", "--data", "ioi"], "of a suite is a corpus"),
    ],
)
def test_wrong_requests(actlas: Run, tiny: str, edits: list[Path], arguments: list[str], said: str) -> None:
    result = actlas("measure", tiny, *[a.format(w8=edits[0]) for a in arguments])
    assert result.status == 2 and said in result.err, result
