"""Fixtures for the models' tests: an empty cache, a tiny wheel, and the real bundled models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models.tiny_wheels import make_wheel


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no wheels; pip may use no index."""
    monkeypatch.setenv("ACTLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ACTLAS_WHEELS", raising=False)
    monkeypatch.delenv("ACTLAS_OFFLINE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one tiny wheel, where Actlas looks for wheels."""
    folder = tmp_path / "wheels"
    make_wheel(folder, {"tiny/weights": "12345", "tiny/other": "not wanted"})
    monkeypatch.setenv("ACTLAS_WHEELS", str(folder))
    return folder
