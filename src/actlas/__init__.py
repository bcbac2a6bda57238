"""Actlas: read, explain, edit, compress, protect and report on a neural network's activations.

    import actlas
    model = actlas.load("smollm2")
    trace = model.trace("The capital of France is", "blocks.*.resid_post")

Names are loaded when they are first used, so `import actlas` is quick and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Model": "core.model",
    "Trace": "core.trace",
    "Site": "core.sites",
    "Edit": "core.edit",
    "Lens": "core.lens",
    "Measurement": "core.measurement",
    "Calibration": "core.calibration",
    "calibrate": "core.calibration",
    "split_at": "core.splitting",
    "two_stream": "core.two_stream",
    "Add": "core.edits",
    "Scale": "core.edits",
    "Zero": "core.edits",
    "MeanAblate": "core.edits",
    "Resample": "core.edits",
    "Replace": "core.edits",
    "ProjectOut": "core.edits",
    "Clamp": "core.edits",
    "Substitute": "core.edits",
    "HeadScale": "core.edits",
    "AttentionEdit": "core.edits",
    "SwapModule": "core.edits",
    "Probe": "core.probe",
    "PCA": "core.pca",
    "LogitLens": "core.logit_lens",
    "Codes": "core.codes",
    "Dictionary": "core.dictionary",
    "methods": "core.methods",
    "load": "models",
    "wrap": "models",
    "corpus": "data",
    "task": "data",
    "Store": "store",
    "harvest": "store",
    "fit_sae": "dictionaries",
    "compare": "measure",
    "card": "report",
    "reproduce": "papers",
}
__all__ = ["__version__", "sites", *_HOMES]

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site


def sites(model: Model, pattern: str | None = None) -> list[Site]:
    """Return where activations of a model can be read and edited; absent sites say why.

    A model without a layout has `module:` sites only, one for each of its submodules.
    """
    return model.sites(pattern)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'actlas' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"actlas.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
