"""Several Ray workers make the store that one process makes, even when they are killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actlas.core.edits import Add
from actlas.core.errors import InputError, NonFiniteError
from actlas.store import parallel
from actlas.store.making import make_shard
from tests.core.tiny import tiny

from .made import CORPUS, SITE, files_of, small


class Unlucky(parallel.Worker):
    """A worker that kills itself in the middle of shard 2, the first time."""

    def make(self, plan: Any) -> Any:
        mark = self._folder.parent / "killed"
        if plan.index == 2 and not mark.exists():
            mark.write_text(str(os.getpid()))

            def die(_: int) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            make_shard(self._model, plan, self._recipe, self._folder, die)
        return super().make(plan)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "src"), str(root)])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_make_what_one_process_makes(cluster: Any, tmp_path: Path) -> None:
    model = tiny()
    edit = Add("blocks.0.resid_post", torch.ones(32))
    with model.edit(edit):
        alone = small(tmp_path / "alone", model)
        shared = small(tmp_path / "shared", model, workers=2)
        assert model.installed == (edit,)
    assert len(shared.shards) > 3 and files_of(alone.path) == files_of(shared.path)
    for name in ("00001.json", "00003.safetensors"):
        (shared.path / "shards" / name).unlink()
    assert shared.verify().keys() == {"00001", "00003"}
    (shared.path / "shards" / "00003.json").unlink()
    with model.edit(edit):
        small(tmp_path / "shared", model, workers=2)
    assert files_of(alone.path) == files_of(shared.path)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    alone = small(tmp_path / "alone", model)
    monkeypatch.setattr(parallel, "Worker", Unlucky)
    shared = small(tmp_path / "shared", model, workers=2)
    assert (tmp_path / "killed").exists()
    assert files_of(alone.path) == files_of(shared.path)


@pytest.mark.slow
def test_what_a_worker_finds_is_said_in_one_line(cluster: Any, tmp_path: Path) -> None:
    model = tiny()
    token = model.tokenizer("Z")["input_ids"][0]
    with torch.no_grad():
        model.module.get_input_embeddings().weight[token] = torch.nan
    with pytest.raises(NonFiniteError, match="^embed: .* in document '12' at position 2;"):
        small(tmp_path / "acts", model, [*CORPUS, "abZ"], sites="embed", workers=2)


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'actlas\[ray\]'"):
        small(tmp_path / "acts", sites=SITE, workers=2)
