"""What one step of dictionary training takes and gives: a batch, the state of the run, an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows to train on, in the units of the site.

    Attributes:
        x: float32 `[n, d]`, what is encoded.
        y: float32 `[n, d_out]`, what is reconstructed; `None` means `x` (a transcoder's differs).
        gradient: float32 `[n, d]`, dL/dx of the model's loss at these rows, if it was collected.
    """

    x: Tensor
    y: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def target(self) -> Tensor:
        return self.x if self.y is None else self.y

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor | slice) -> Batch:
        """Return some of the rows."""
        pick = [None if t is None else t[rows] for t in (self.y, self.gradient)]
        return Batch(self.x[rows], *pick)

    def to(self, device: torch.device) -> Batch:
        pick = [None if t is None else t.to(device) for t in (self.y, self.gradient)]
        return Batch(self.x.to(device), *pick)


@dataclass(frozen=True)
class TrainSettings:
    """How a sparse autoencoder is trained. The defaults give a good TopK dictionary from 10^5 to 10^7 tokens.

    Attributes:
        tokens: rows to train on; more than the source has means several passes.
        batch: rows a step.
        lr: peak learning rate of Adam; `None`: 2e-4 / sqrt(width / 2^14) (Gao et al. 2024, section A.3),
            times 4 for runs under 2,000 steps and 8 under 500, which end long before the slow rate converges.
        betas, eps: Adam's.
        warmup: share of the steps in which the rate rises linearly from 0.
        decay: share of the steps at the end in which it falls linearly to 0.
        sparsity: weight of the sparsity penalty, for the kinds that have one (ReLU: L1; JumpReLU: L0);
            `None`: the kind's own default.
        sparsity_warmup: share of the steps in which that weight rises linearly from 0.
        aux: weight of the auxiliary loss that revives dead features (Gao et al. 2024, section A.2: 1/32).
        dead_after: rows without firing after which a feature counts as dead; `None`: a twentieth of all
            rows, at least 10 batches and at most 10 million.
        clip: largest global norm of the gradient; `None` for no limit.
        dtype: of the encoder's product: `"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 where the processor
            is faster with it and the values can still be exact (TopK on a CPU: candidates are found in
            bfloat16, their values and the choice are float32's), float32 elsewhere.
        decoder_norm: `"unit"`: atoms are brought back to unit norm after every step, and the part of the
            gradient along them is left out (Gao et al. 2024). `"free"`: norms move while training, features
            compete by value times norm, and norms are folded into the encoder at the end (SAELens's way;
            TopK only). Features have unit norm afterwards either way.
        seed: of initial weights and of the order of rows.
    """

    tokens: int
    batch: int = 2048
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.05
    decay: float = 0.2
    sparsity: float | None = None
    sparsity_warmup: float = 0.1
    aux: float = 1 / 32
    dead_after: int | None = None
    clip: float | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    decoder_norm: Literal["unit", "free"] = "unit"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.lr is not None and not 0 < self.lr < 1:
            raise InputError(f"lr is {self.lr}; it must be between 0 and 1, e.g. 0.0004")
        for name in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share of the steps, 0 to 1")
        if not 0 <= self.aux < float("inf"):
            raise InputError(f"aux is {self.aux}; it must be 0 or a positive number, e.g. 0.03125")
        for name in ("clip", "dead_after", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}; it must be positive")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"dtype is {self.dtype!r}; it must be 'auto', 'float32' or 'bfloat16'")
        if self.decoder_norm not in ("unit", "free"):
            raise InputError(f"decoder_norm is {self.decoder_norm!r}; it must be 'unit' or 'free'")

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.batch))

    @property
    def patience(self) -> int:
        """Rows without firing after which a feature is dead."""
        if self.dead_after is not None:
            return self.dead_after
        return int(min(max(self.tokens / 20, 10 * self.batch), 10_000_000))

    def rate(self, step: int, width: int) -> float:
        """Return the learning rate of a step (from 0)."""
        peak = self.lr
        if peak is None:
            peak = 2e-4 / (width / 2**14) ** 0.5 * (8 if self.steps < 500 else 4 if self.steps < 2000 else 1)
        rising = (step + 1) / (self.warmup * self.steps) if self.warmup > 0 else 1.0
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay > 0 else 1.0
        return peak * min(1.0, rising, falling)


@dataclass(eq=False)
class TrainState:
    """Where a training run is.

    Attributes:
        settings: of the run.
        since_fired: int64 `[features]`, rows since each feature last fired.
        step: steps done. rows: rows seen.
    """

    settings: TrainSettings
    since_fired: Tensor
    step: int = 0
    rows: int = 0

    @property
    def dead(self) -> Tensor:
        """Which features have not fired for long, bool `[features]`."""
        return self.since_fired > self.settings.patience

    @property
    def sparsity_weight(self) -> float:
        """How far the sparsity penalty has been warmed up, 0 to 1."""
        steps = self.settings.sparsity_warmup * self.settings.steps
        return 1.0 if steps <= 0 else min(1.0, (self.step + 1) / steps)

    def saw(self, codes: Codes, processes: int = 1) -> None:
        """Count one batch's codes; with several processes, each holds its share of the batch."""
        n = codes.indices.reshape(-1, codes.places).shape[0] * processes
        self.since_fired += n
        self.since_fired[codes.indices[codes.active]] = 0
        self.rows += n


@dataclass(frozen=True, eq=False)
class Objective:
    """What a step minimises, and what a person wants to see of it.

    Attributes:
        loss: the number that is minimised, a scalar.
        error: summed squared error of the reconstruction (scaled units), a scalar without gradient.
        codes: the codes of the batch, without gradient.
        parts: named parts of the loss.
    """

    loss: Tensor
    error: Tensor
    codes: Codes
    parts: Mapping[str, float] = field(default_factory=dict)
