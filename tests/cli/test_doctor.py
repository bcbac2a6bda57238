"""`actlas doctor`: stages for a model that works and one that does not, the audit, the outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from .conftest import Said

Run = Callable[..., Said]


def test_a_model_that_works(actlas: Run, tiny: str) -> None:
    said = actlas("doctor", tiny)
    assert said.status == 0 and "ok  forward pass" in said.out
    found = json.loads(actlas("doctor", tiny, "--json").out)
    assert {c["status"] for c in found["checks"]} <= {"ok", "warning", "skipped"}


def test_a_truncated_model_fails_with_the_fix(actlas: Run, tiny: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    said = actlas("doctor", broken)
    assert said.status == 1 and "failed" in said.out and weights.name in said.out


def test_audit_and_outputs(actlas: Run, tiny: str, tmp_path: Path) -> None:
    assert "completeness" in actlas("doctor", tiny, "--audit").out
    assert "logits" in actlas("doctor", tiny, "--outputs").out
    assert "choose one" in actlas("doctor", tiny, "--audit", "--outputs").failed()
    assert "give the model's folder" in actlas("doctor", "smollm3", "--audit").failed()
