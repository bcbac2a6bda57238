"""Dictionaries: activations as sparse sums of features that a person can name, test and turn.

    sae = fit_sae(model, corpus("prose"), "blocks.15.resid_post", width="8x", k=32)
    sae.encode(x)                    # Codes: which features, how strongly
    model.edit(sae.edit(417, 6.0))   # steer along a feature

Kinds of dictionary are one file each over `sae.SAE` (or `core.dictionary.Dictionary`); all sparse
autoencoders are trained by the one loop in `training.py`, from one of the data sources in `sources.py`.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "SAE": "sae",
    "TopKSAE": "topk",
    "ReluSAE": "relu",
    "BatchTopKSAE": "batch_topk",
    "GatedSAE": "gated",
    "JumpReluSAE": "jumprelu",
    "MatryoshkaSAE": "matryoshka",
    "GradientSAE": "gradient",
    "Transcoder": "transcoder",
    "SkipTranscoder": "transcoder",
    "Crosscoder": "crosscoder",
    "TrainSettings": "objective",
    "train": "training",
    "Batch": "objective",
    "LiveSource": "sources",
    "RowsSource": "sources",
    "StoreSource": "sources",
    "fit_sae": "fit",
    "load_saelens": "saelens",
    "save_saelens": "saelens",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"actlas.dictionaries.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'actlas.dictionaries' has no attribute {name!r}")
