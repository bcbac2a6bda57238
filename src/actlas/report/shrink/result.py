"""What a search gives: the rows, the edit that was chosen, and a folder that other commands take.

    found = shrink("smollm2")
    found.save("shrunk")                  # edits as data, shrink.json, the plot; whole or not at all
    load_record("shrunk")["rows"]

The folder is an edit (`Edit.load`, `--edit shrunk/`) with two things more: `shrink.json` says what was
measured, where and how, and for which model; `frontier.html`, `.svg` and `.png` show it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.artifact import write_folder
from actlas.core.edit import Edit
from actlas.core.errors import ArtifactError, FailureError, InputError
from actlas.core.measurement import Measurement
from actlas.kernels.loading import native, threads
from actlas.report.build import _processor
from actlas.report.shrink.rows import ORIGINAL, Goal, Mix, Row

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.report.shrink.quality import Judge

RECORD = "shrink.json"
FORMAT = 1
PLOTS = ("html", "svg", "png")


@dataclass(frozen=True, eq=False)
class Shrunk:
    """The result of a search.

    Attributes:
        model: name of the model, as its loader takes it.
        goal: what was asked.
        rows: everything that was measured.
        edit: what makes the chosen mix of the original.
        lean: whether the lean loop runs it.
        quality: what quality means: `"perplexity"` or `"embeddings"`.
        base: the original's perplexity on the held-out text.
        notes: what a reader must know.
        settings, environment: how and where it was measured.
    """

    model: str
    goal: Goal
    rows: tuple[Row, ...]
    edit: Edit
    lean: bool
    quality: str
    base: float
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def chosen(self) -> Row:
        """The row of the answer."""
        return next(row for row in self.rows if row.chosen)

    @property
    def original(self) -> Row:
        """The row of the model as it was given."""
        return next(row for row in self.rows if row.name == ORIGINAL)

    def to_json(self) -> dict[str, Any]:
        """Return what `shrink.json` holds."""
        assert self.edit.fingerprint is not None
        return {
            "kind": "shrink",
            "format": FORMAT,
            "model": self.model,
            "goal": {**asdict(self.goal), "said": self.goal.say()},
            "chosen": self.chosen.name,
            "weights": self.chosen.weights,
            "lean": self.lean,
            "quality": self.quality,
            "base": self.base,
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "fingerprint": self.edit.fingerprint.to_json(),
        }

    def save(self, path: str | Path) -> Path:
        """Write the folder, replacing one of an earlier search; whole, or nothing changes.

        Raises:
            InputError: the path is something else. FailureError: it cannot be written.
        """
        from actlas.report.shrink.plot import chart

        path = check_target(path)
        drawn = chart(
            self.rows, self.goal, title=f"{self.model}: quality against speed", quality=self.quality
        )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.edit.save(folder / "edit")
            files: dict[str, str | bytes] = {p.name: p.read_bytes() for p in (folder / "edit").iterdir()}
            for suffix in PLOTS:
                if drawn is None:
                    break
                file = folder / f"frontier.{suffix}"
                drawn.save(str(file), **({"inline": True} if suffix == "html" else {}), **_sharp(suffix))
                files[file.name] = file.read_bytes()
        files[RECORD] = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        return write_folder(path, files, marker=RECORD)


def _sharp(suffix: str) -> dict[str, Any]:
    return {"scale_factor": 2} if suffix == "png" else {}


def new_result(
    model: Model,
    source: str,
    goal: Goal,
    rows: Sequence[Row],
    edit: Edit,
    mix: Mix,
    judge: Judge,
    base: float,
    notes: Sequence[str],
    effort: Any,
    seed: int,
) -> Shrunk:
    """Put a result together; the edit carries its row and the whole frontier as measurements."""
    row = next(r for r in rows if r.chosen)
    settings = {**asdict(effort), "seed": seed}
    where = environment()
    made = Shrunk(
        source,
        goal,
        tuple(rows),
        edit.bind(model.fingerprint),
        mix.lean,
        judge.what,
        base,
        tuple(notes),
        settings,
        where,
    )
    return Shrunk(
        **{**made.__dict__, "edit": made.edit.with_measurements(_measurements(made, row, effort, seed))}
    )


def _measurements(made: Shrunk, row: Row, effort: Any, seed: int) -> list[Measurement]:
    details = {
        "shrink": {
            k: v for k, v in made.to_json().items() if k in ("goal", "chosen", "rows", "quality", "model")
        }
    }
    group = {"mix": row.name}
    found = []
    if row.quality is not None:
        found.append(
            Measurement(
                "shrink-quality",
                row.quality,
                "ratio",
                effort.tokens,
                row.low,
                row.high,
                "paired bootstrap over documents",
                seed,
                group=group,
                better="lower",
                note=f"{made.quality} over the original's, held-out text",
                details=details,
            )
        )
    if row.rate is not None and row.speed is not None:
        found.append(
            Measurement(
                "shrink-speed",
                row.speed,
                "ratio",
                effort.repeats,
                row.speed_low,
                row.speed_high,
                "range of the repeats",
                group=group,
                better="higher",
                note=f"{row.rate:.1f} tokens/s on {made.environment['processor']}, in turn with the original",
            )
        )
    return found


def check_target(path: str | Path) -> Path:
    """Refuse a folder that may not be written to, before minutes of measuring.

    Raises:
        InputError: it is a file, or a folder of something else.
        FailureError: nothing can be written there.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give the name of a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD).exists():
        raise InputError(f"{path} exists and is not a shrunk model; give another folder or remove it")
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise FailureError(f"cannot write {path}: {above} cannot be written to; choose another folder")
    return path


def is_shrunk(path: str | Path) -> bool:
    """Say whether a path is a folder that a search has written."""
    try:
        return (Path(path) / RECORD).is_file()
    except OSError:
        return False


def load_record(path: str | Path) -> dict[str, Any]:
    """Return what `shrink.json` of a folder holds.

    Raises:
        ArtifactError: it is missing, unreadable, or of a later version.
    """
    file = Path(path) / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is not readable ({error}); run actlas shrink again") from error
    if (
        not isinstance(record, dict)
        or record.get("kind") != "shrink"
        or not isinstance(record.get("model"), str)
    ):
        raise ArtifactError(f"{file} lacks the fields of a shrunk model; run actlas shrink again")
    if not isinstance(record.get("format"), int) or record["format"] > FORMAT:
        raise ArtifactError(
            f"{file} has format {record.get('format')}; this Actlas reads up to {FORMAT}: upgrade it"
        )
    return record


def kernel_level() -> str | None:
    """Return which instructions the native kernels use: `"avx512"`, `"avx2"`, `"baseline"`; `None`: none."""
    module = native()
    return None if module is None else str(module.best_level())


def environment() -> dict[str, Any]:
    """Return where the measurements are made: versions, processor, threads, kernels, load."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["actlas"] = importlib.metadata.version("actlas")
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernel_threads": threads(),
        "kernels": kernel_level() or "none",
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
