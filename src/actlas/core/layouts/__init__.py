"""One file per architecture family; `layout_of` finds the right one by the config's model type.

To add a family: write a file with `MODEL_TYPES` and `build(model) -> Layout`, add it to `_FAMILIES`,
and add a small random configuration to `tests/core/families.py`, whose tests then hold it to the
identities that every layout must satisfy.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from actlas.core.layout import Layout, LayoutBuilder
from actlas.core.layouts import bert, bloom, clip, falcon, gpt2, gpt_neox, llama, opt, t5, vit, whisper

_FAMILIES: tuple[ModuleType, ...] = (llama, gpt2, gpt_neox, opt, bloom, falcon, bert, t5, vit, clip, whisper)
LAYOUTS: dict[str, LayoutBuilder] = {t: f.build for f in _FAMILIES for t in f.MODEL_TYPES}


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a transformers model, or `None` for architectures without one."""
    config = getattr(module, "config", None)
    builder = LAYOUTS.get(getattr(config, "model_type", ""))
    if builder is None:
        return None
    layout = builder(module)
    return layout if all(t.n_blocks for t in layout.towers) and layout.towers else None
