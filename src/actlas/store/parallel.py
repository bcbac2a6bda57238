"""Shards made by several workers on Ray: on this machine, or on the cluster that is connected.

The driver cuts the corpus into shards and hands each to a worker that is free; a worker holds a copy of
the model and writes its shards by itself. Nothing but plans and records travels. A worker that dies is
started again and makes the shard that it was at once more; what it had finished is on disk. All workers
must see the store's folder under the same path.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from actlas.core.errors import ActlasError, FailureError, InputError
from actlas.core.model import Model
from actlas.store.layout import ShardRecord
from actlas.store.making import Recipe, make_shard
from actlas.store.planning import ShardPlan

_WAITING = 2  # shards a worker has before it: one it makes and one it goes on with
_RESTARTS = 8


def make_shards(
    model: Model,
    plans: Iterator[ShardPlan],
    recipe: Recipe,
    folder: Path,
    workers: int,
    advance: Callable[..., object],
) -> None:
    """Make shards on Ray workers.

    Args:
        model: copied to the workers, with the edits that are installed on it.
        plans: the shards that are missing.
        recipe: which sites and how.
        folder: the store; the same path on every worker.
        workers: how many. Ray is started on this machine if the process is not connected to a cluster.
        advance: called with the rows of each shard that is done.

    Raises:
        InputError: Ray is not installed.
        FailureError: workers died again and again.
        NonFiniteError, ...: what a worker found.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("several workers need Ray; install it with: pip install 'actlas[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        _share_out(ray, model, plans, recipe, folder.resolve(), workers, advance)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ActlasError):
            raise error.cause from error
        raise FailureError(f"a worker failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        said = " ".join(str(error).split())
        raise FailureError(f"the workers could not go on: {said}; run it again to continue") from error
    finally:
        if started:
            ray.shutdown()


def _share_out(
    ray: Any,
    model: Model,
    plans: Iterator[ShardPlan],
    recipe: Recipe,
    folder: Path,
    workers: int,
    advance: Callable[..., object],
) -> None:
    edits = model.installed
    with model.without_edits():
        held = ray.put(model)
    threads = max(1, torch.get_num_threads() // workers)
    gpus = 1 if model.device.type == "cuda" else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(Worker)
    crew = [remote.remote(held, edits, recipe, folder, threads) for _ in range(workers)]
    busy: dict[Any, Any] = {}
    left = dict.fromkeys(crew, 0)
    try:
        for plan in plans:
            worker = min(crew, key=lambda w: left[w])
            if left[worker] >= _WAITING:
                worker = _collect(ray, busy, left, advance)
            busy[worker.make.remote(plan)] = worker
            left[worker] += 1
        while busy:
            _collect(ray, busy, left, advance)
    finally:
        for worker in crew:
            ray.kill(worker)


def _collect(ray: Any, busy: dict[Any, Any], left: dict[Any, int], advance: Callable[..., object]) -> Any:
    """Wait for a shard and return the worker that has made it."""
    done, _ = ray.wait(list(busy), num_returns=1)
    record: ShardRecord = ray.get(done[0])
    advance(record.rows)
    worker = busy.pop(done[0])
    left[worker] -= 1
    return worker


class Worker:
    """What runs on a worker: a model, and the edits that belong to the store.

    Args:
        model: the model, without edits.
        edits: the edits to install.
        recipe: which sites and how.
        folder: the store.
        threads: processor threads.
    """

    def __init__(
        self, model: Model, edits: tuple[Any, ...], recipe: Recipe, folder: Path, threads: int
    ) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(threads)
        self._model, self._edits, self._recipe, self._folder = model, edits, recipe, folder

    def make(self, plan: ShardPlan) -> ShardRecord:
        """Make one shard."""
        if not self._edits:
            return make_shard(self._model, plan, self._recipe, self._folder)
        with self._model.edit(*self._edits):
            return make_shard(self._model, plan, self._recipe, self._folder)
