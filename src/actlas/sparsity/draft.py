"""Drafts: a cheap stand-in for a model, made from the model itself by an edit.

    draft = draft_of(model, fit_layer_skip(model, corpus, budget=6))

The draft has a module tree of its own, so that it can run while the model runs, under other edits; the
weights are the same tensors, so it costs no memory beyond what the edit brings.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from torch import nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.model import Model

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def draft_of(model: Model, edit: Edit | None = None) -> Model:
    """Return a model that shares the weights of another and has an edit installed for good.

    Args:
        model: the model; edits that are installed on it do not apply to the draft.
        edit: what makes it a draft; `None`: the same model again.
    """
    changed: set[str] = set()
    for part in edit.parts() if edit is not None else ():
        changed |= set(
            getattr(part, "deltas", ())
        )  # a weight edit writes into parameters: not into shared ones
    draft = Model(
        _sharing_copy(model.module, changed),
        model.tokenizer,
        model.processor,
        f"draft of {model.name}",
        kind=model.kind,
    )
    if edit is not None:
        draft.edit(edit).__enter__()
    return draft


def as_draft(target: Model, draft: Model | Edit | None) -> Model:
    """Return a draft that may run inside a forward pass of `target`.

    Raises:
        InputError: the draft generates no text or has another tokenizer.
    """
    if draft is None or isinstance(draft, Edit):
        return draft_of(target, draft)
    if draft.kind != "causal-lm":
        raise InputError(f"the draft {draft.name} is a model of kind {draft.kind}; it must be a causal-lm")
    if _vocabulary(draft) != _vocabulary(target):
        raise InputError(
            f"the draft {draft.name} has another tokenizer than {target.name}; both must read the same tokens"
        )
    return draft_of(draft) if draft.module is target.module else draft


def _vocabulary(model: Model) -> Any:
    return model.tokenizer.get_vocab() if model.tokenizer is not None else model.vocab_size


def _sharing_copy(module: nn.Module, own_weights: Collection[str] = ()) -> nn.Module:
    """Copy a module tree without its weights (but for those named), and without the hooks of Actlas."""
    shared = [p for n, p in module.named_parameters() if n not in own_weights]
    memo: dict[int, Any] = {id(t): t for t in [*shared, *module.buffers()]}
    for part in module.modules():
        for name in _HOOKS:
            memo[id(vars(part)[name])] = OrderedDict(
                (k, f) for k, f in vars(part)[name].items() if not _ours(f)
            )
    made: nn.Module = copy.deepcopy(module, memo)
    for part in made.modules():
        own = vars(part)
        if own.pop("_actlas_functions", None) is not None:
            own.pop("forward", None)
        if _ours(own.get("generate")):
            own.pop("generate")
    return made.eval()


def _ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("actlas.")
