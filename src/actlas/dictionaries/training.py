"""The one training loop for all sparse autoencoders.

    source = RowsSource(x)                     # or a Store, or a live model: sources.py
    sae = train(TopKSAE.create(site, 576, 4608, k=32), source, TrainSettings(tokens=1_000_000))

A step: the next batch, scaled; the kind's gradients; their mean over processes, if there are several;
clipping, if asked for; Adam; the kind's constraint (unit atoms). A kind may do all of that at once
(`SAE.step`). Which features are dead is counted on the
way. With `checkpoint=` the run is saved every few minutes and goes on from there after an interruption,
to the same result as an uninterrupted run on the same machine.

Several devices: start the script with `accelerate launch` (or `torchrun`). Every process takes its own
rows of each batch, and gradients are averaged, so N processes train as one with the same batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import ArtifactError, InputError, NonFiniteError
from actlas.core.progress import progress as progress_line
from actlas.dictionaries.objective import Batch, Objective, TrainSettings, TrainState
from actlas.dictionaries.sae import SAE
from actlas.dictionaries.sources import Source
from actlas.kernels.row_steps import adam_rows

_EVERY = 60.0  # seconds between checkpoints
_SAMPLE = 8192  # rows from which scale and offset are taken

S = TypeVar("S", bound=SAE)


def train(
    sae: S,
    source: Source,
    settings: TrainSettings,
    *,
    prepare: bool = True,
    checkpoint: str | Path | None = None,
    show: bool = True,
) -> S:
    """Train an autoencoder in place and return it.

    Args:
        sae: from `create`, or one that is to be trained further.
        source: rows; see `sources`.
        settings: see `TrainSettings`.
        prepare: set the scale to bring the mean norm to sqrt(d) and `b_dec` to the geometric median.
        checkpoint: a folder; an interrupted run with the same settings goes on from it.
        show: print the progress line.

    Raises:
        InputError: sizes that do not fit the source, or a checkpoint of another run.
        NonFiniteError: the loss became NaN or infinite; the autoencoder is not changed then.
    """
    if source.channels != sae.channels or source.target_channels != sae.b_dec.shape[0]:
        raise InputError(
            f"the data has {source.channels} -> {source.target_channels} channels; the autoencoder reads "
            f"{sae.channels} and writes {sae.b_dec.shape[0]}"
        )
    if checkpoint is not None and Path(checkpoint).exists() and not Path(checkpoint).is_dir():
        raise InputError(f"{checkpoint} is a file; a checkpoint is a folder")
    if settings.decoder_norm == "free" and sae.architecture != "topk":
        raise InputError(f"decoder_norm='free' is for topk; {sae.architecture} is trained with unit norms")
    run = _Run(sae, settings)
    if checkpoint is not None and (Path(checkpoint) / "manifest.json").exists():
        run.resume(Path(checkpoint), source)
    elif prepare:
        run.prepare(source)
    saved = time.monotonic()
    with progress_line("training", total=settings.steps * settings.batch, unit="rows") as advance:
        while run.state.step < settings.steps:
            passed = run.state.step
            for batch in source.batches(settings.batch, seed=settings.seed + run.epoch, start=run.taken):
                objective = run.step(batch)
                if show:
                    advance(len(batch), run.note(objective, batch))
                if checkpoint is not None and time.monotonic() - saved > _EVERY:
                    run.save(Path(checkpoint), source)
                    saved = time.monotonic()
                if run.state.step >= settings.steps:
                    break
            else:
                if run.state.step == passed:
                    raise InputError(
                        f"the data has fewer rows than one batch of {settings.batch}; lower the batch"
                    )
                run.epoch, run.taken = run.epoch + 1, 0
    run.sae.finish(run.state)
    run.sae.check()
    for name in sae.trainable:
        getattr(sae, name).copy_(getattr(run.sae, name))
    for name, value in vars(run.sae).items():
        if not isinstance(value, Tensor) or name not in sae.trainable:
            setattr(sae, name, value)
    sae.trained_rows += run.state.rows
    return sae


class _Run:
    """A run's moving parts: a working copy of the autoencoder, Adam's moments, counters."""

    def __init__(self, sae: SAE, settings: TrainSettings) -> None:
        self.settings = settings
        tensors: dict[str, Any] = {name: t.detach().clone() for name, t in sae._tensors().items()}
        self.sae = replace(sae, **tensors)
        self.moments = {
            name: (torch.zeros_like(tensors[name]), torch.zeros_like(tensors[name])) for name in sae.trainable
        }
        self._said = ""
        fired = torch.zeros(sae.features, dtype=torch.int64, device=sae.W_enc.device)
        self.state = TrainState(settings, fired)
        self.epoch = self.taken = 0
        self.started = time.monotonic()
        self.began_at = 0
        self.world, self.rank = _processes()

    def prepare(self, source: Source) -> None:
        sample = source.sample(_SAMPLE, self.settings.seed)
        sae = self.sae
        norm = float(sample.x.norm(dim=1).mean())
        if not math.isfinite(norm) or norm <= 0:
            raise NonFiniteError(f"the rows' mean norm is {norm}; nothing can be learned from them")
        sae.scale = math.sqrt(sae.channels) / norm
        sae.b_dec.copy_(geometric_median(sample.target * sae.scale))
        sae.skip_above = source.skip_above
        sae.prepared(sample)

    def step(self, batch: Batch) -> Objective:
        s, state, sae = self.settings, self.state, self.sae
        if self.world > 1:
            batch = batch.take(slice(self.rank, None, self.world))
        batch = batch.to(sae.W_enc.device)
        scaled = Batch(
            batch.x * sae.scale,
            None if batch.y is None else batch.y * sae.scale,
            None if batch.gradient is None else batch.gradient / sae.scale,
        )
        rate = s.rate(state.step, sae.features)
        objective = sae.step(scaled, state, self.moments, rate) if self.world == 1 else None
        gradients: dict[str, Tensor] = {}
        if objective is None:
            objective, gradients = sae.gradients(scaled, state)
        if not math.isfinite(float(objective.loss)):
            raise NonFiniteError(
                f"the loss is {float(objective.loss)} at step {state.step}; lower the learning rate"
            )
        if self.world > 1:
            _average(gradients.values(), self.world)
        if s.clip is not None and gradients:
            clip(gradients.values(), s.clip)
        for name, gradient in gradients.items():
            m, v = self.moments[name]
            adam_rows(
                getattr(sae, name), gradient, m, v,
                step=state.step + 1, lr=rate, beta1=s.betas[0], beta2=s.betas[1], eps=s.eps,
            )  # fmt: skip
        state.saw(objective.codes, self.world)
        if self.world > 1:
            _share_fired(state, self.world)
        if gradients:  # a whole step has brought the atoms back to unit norm
            sae.after_step(state)
        state.step += 1
        self.taken += 1
        return objective

    def note(self, objective: Objective, batch: Batch) -> str:
        """Return the progress line's words: explained variance, L0, dead features, speed."""
        if self.state.step % 10 and self.state.step > 1:
            return self._said
        target = batch.target * self.sae.scale
        total = float((target - target.mean(0)).square().sum())
        explained = 1 - float(objective.error) * self.world / total if total > 0 else float("nan")
        l0 = float(objective.codes.l0.float().mean())
        speed = (self.state.rows - self.began_at) / (time.monotonic() - self.started)
        dead = int(self.state.dead.sum())
        self._said = f"explained variance {explained:.3f}, L0 {l0:.1f}, {dead} dead, {speed:,.0f} rows/s"
        return self._said

    def save(self, path: Path, source: Source) -> None:
        """Write everything that the rest of the run depends on."""
        tensors = {f"sae.{n}": t for n, t in self.sae._tensors().items()}
        for name, (m, v) in self.moments.items():
            tensors |= {f"m.{name}": m, f"v.{name}": v}
        manifest: dict[str, Any] = {
            "settings": asdict(self.settings),
            "step": self.state.step,
            "rows": self.state.rows,
            "epoch": self.epoch,
            "taken": self.taken,
            "scale": self.sae.scale,
            "skip_above": self.sae.skip_above,
            "source": source.identity,
        }
        save_artifact(path, "training", manifest, tensors | {"since_fired": self.state.since_fired})

    def resume(self, path: Path, source: Source) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it is of a run with other settings or data.
        """
        manifest, tensors = load_artifact(path, "training")
        settings = asdict(self.settings) | {"betas": list(self.settings.betas)}
        mine = {"settings": settings, "source": source.identity}
        for what, value in mine.items():
            if manifest.get(what) != value:
                raise InputError(
                    f"{path} is a checkpoint of a run with other {what}; remove it or give another folder"
                )
        try:
            for name, t in self.sae._tensors().items():
                t.copy_(tensors[f"sae.{name}"])
            for name, (m, v) in self.moments.items():
                m.copy_(tensors[f"m.{name}"])
                v.copy_(tensors[f"v.{name}"])
            self.state.since_fired.copy_(tensors["since_fired"])
            self.state.step, self.state.rows = int(manifest["step"]), int(manifest["rows"])
            self.epoch, self.taken = int(manifest["epoch"]), int(manifest["taken"])
            self.sae.scale, self.sae.skip_above = manifest["scale"], manifest["skip_above"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"{path} is a checkpoint of another autoencoder ({error}); remove it"
            ) from error
        self.began_at = self.state.rows


def geometric_median(rows: Tensor, iterations: int = 20) -> Tensor:
    """Return the point with the least summed distance to rows `[n, d]` (Weiszfeld's iteration)."""
    median = rows.mean(0)
    for _ in range(iterations):
        weight = 1 / (rows - median).norm(dim=1, keepdim=True).clamp_min(1e-6)
        median = (rows * weight).sum(0) / weight.sum()
    return median


def clip(gradients: Any, most: float) -> None:
    """Scale gradients in place so that their joint norm is at most `most`."""
    gradients = list(gradients)
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    if norm > most:
        for g in gradients:
            g *= most / norm


def _processes() -> tuple[int, int]:
    """Return (number of processes, this one's number); accelerate sets them up when there are several."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 1, 0
    from accelerate import PartialState

    state = PartialState()
    return state.num_processes, state.process_index


def _average(gradients: Any, world: int) -> None:
    for g in gradients:
        torch.distributed.all_reduce(g)
        g /= world


def _share_fired(state: TrainState, world: int) -> None:
    """A feature has fired when it fired in any process."""
    torch.distributed.all_reduce(state.since_fired, op=torch.distributed.ReduceOp.MIN)
