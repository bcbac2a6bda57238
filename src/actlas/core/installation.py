"""Installing edits: everything is checked before anything is changed, and always taken back.

An Installation is what `model.edit(...)` returns. Entering it resolves the sites, checks shapes,
fingerprints and gates, and only then places hooks; leaving it, also through an exception, removes
them in reverse order. It also knows which forward pass is running (see `passes.py`) and says once
when an edit that should have done something changed nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import ActivationEdit, Edit, Here
from actlas.core.errors import InputError, SiteError
from actlas.core.hooks import Handle, attach
from actlas.core.layout import find
from actlas.core.passes import Generation, Pass, PassReader
from actlas.core.sites import Site

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.swap import SwapModule


# A module's hooks, which a module that is swapped in shares with the one it replaces.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class EditHadNoEffect(UserWarning):
    """An installed edit ran through whole forward passes and changed nothing."""


@dataclass
class _Track:
    edit: Edit
    ran: bool = False
    changed: bool = False
    said: bool = False


class PassWatcher:
    """Keeps the running Pass of each tower, from pre-hooks on the towers' root modules."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.current: dict[str, Pass] = {}
        self.generations: dict[str, Generation] | None = None
        self._handles: list[Any] = []

    def start(self) -> None:
        """Place the pre-hooks."""
        towers = [(t.name, t.root) for t in self.model.layout.towers] if self.model.layout else [("", "")]
        if all(root for _, root in towers):
            towers.append(("model", ""))
        for name, path in towers:
            module = find(self.model.module, path)
            assert module is not None
            reader = PassReader(module)
            hook = self._hook(name, reader)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.current.clear()

    def of(self, site: Site) -> Pass:
        """Return the pass that runs at a site."""
        found = self.current.get(site.tower) or self.current.get("model") or self.current.get("")
        return found if found is not None else Pass(1, None, None, None, 0, None, None)

    def _hook(self, name: str, reader: PassReader) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = None
            if self.generations is not None:
                requests = self.generations["*"].requests
                state = self.generations.setdefault(name, Generation(requests=requests))
            self.current[name] = reader.read(args, kwargs, state)

        return hook


class Installation:
    """Edits that are, or will be, installed on a model; a context manager."""

    def __init__(self, model: Model, edits: tuple[Edit, ...]) -> None:
        self.model = model
        self.edits = tuple(p for e in edits for p in e.parts())
        self._roots = edits
        self.watcher = PassWatcher(model)
        self._undo: list[Callable[[], None]] = []
        self._tracks: list[_Track] = []

    def __enter__(self) -> Model:
        self.install()
        self.model._installations.append(self)
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.uninstall()
        if self in self.model._installations:
            self.model._installations.remove(self)
        if exception[0] is None:
            self.report(final=True)

    def install(self) -> None:
        """Check everything, then place every hook and module; on any failure leave nothing."""
        for edit in self._roots:
            for part in (edit, *edit.parts()):
                if part.fingerprint is not None:
                    part.fingerprint.check(self.model.fingerprint, part.describe())
        plans = [(edit, self._check(edit)) for edit in self.edits if isinstance(edit, ActivationEdit)]
        _check_overwrites(plans)
        _forget_compiled(self.model.module)
        try:
            self.watcher.start()
            self._undo.append(self.watcher.stop)
            self._wrap_generate()
            handle = self.model.module.register_forward_hook(self._after_pass)
            self._undo.append(handle.remove)
            for edit in self.edits:
                edit._attach(self)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Take everything back, in reverse order."""
        while self._undo:
            self._undo.pop()()
        _forget_compiled(self.model.module)

    def _check(self, edit: ActivationEdit) -> list[Site]:
        sites = self.model.resolve(edit.site)
        for site in sites:
            edit.check(site)
        if edit.condition is not None:
            reader = self.model.resolve(edit.condition.lens.site)
            if len(reader) != 1:
                raise InputError(f"the lens of {edit.describe()} must read one site, not {len(reader)}")
            for site in sites:
                same = site.kind != "module" and reader[0].kind != "module" and site.tower == reader[0].tower
                if same and reader[0].order > site.order:
                    raise InputError(
                        f"the gate reads {reader[0].name}, which comes after {site.name} in a forward pass; "
                        "let it read at or before the edited site"
                    )
        self._token_ids(edit)
        return sites

    def _token_ids(self, edit: ActivationEdit) -> tuple[int, ...] | None:
        if edit.scope.tokens is None:
            return None
        ids = []
        for token in edit.scope.tokens:
            if isinstance(token, int):
                ids.append(token)
                continue
            if self.model.tokenizer is None:
                raise InputError(f"tokens={token!r} needs a tokenizer, and this model has none; give ids")
            pieces = self.model.tokenizer.encode(token, add_special_tokens=False)
            if len(pieces) != 1:
                names = self.model.tokenizer.convert_ids_to_tokens(pieces)
                raise InputError(
                    f"tokens={token!r} is {len(pieces)} tokens ({', '.join(names)}); name single tokens"
                )
            ids.append(pieces[0])
        return tuple(ids)

    def attach_activation(self, edit: ActivationEdit) -> None:
        """Place the hooks of one activation edit. Called by the edit."""
        if edit.strength == 0.0:
            return
        track = next((t for t in self._tracks if t.edit is edit), None)
        if track is None:
            track = _Track(edit)
            self._tracks.append(track)
        ids = self._token_ids(edit)
        key = object()
        if edit.condition is not None:
            self._attach_gate(edit, key)
        for site in self.model.resolve(edit.site):
            self.keep(self._attach_one(edit, site, ids, key, track))

    def _attach_one(
        self, edit: ActivationEdit, site: Site, ids: tuple[int, ...] | None, key: object, track: _Track
    ) -> Handle:
        def apply(x: Tensor) -> Tensor:
            run = self.watcher.of(site)
            new = edit.apply(x, Here(site, run, self), ids, key)
            track.ran = True
            if new is x:
                return x
            if new.shape != x.shape:
                raise InputError(
                    f"{edit.describe()} made {list(new.shape)} of {list(x.shape)} at {site.name}"
                )
            if not track.changed:
                track.changed = not torch.equal(new, x)
            return new

        return attach(self.model.module, site, apply, batch=lambda: self.watcher.of(site).batch)

    def _attach_gate(self, edit: ActivationEdit, key: object) -> None:
        assert edit.condition is not None
        site = self.model.resolve(edit.condition.lens.site)[0]
        target = self.model.resolve(edit.site)[0]

        def read(x: Tensor) -> Tensor:
            self.watcher.of(target).values[key] = x.detach()
            return x

        batch = lambda: self.watcher.of(site).batch  # noqa: E731
        self.keep(attach(self.model.module, site, read, batch=batch))

    def swap(self, edit: SwapModule) -> None:
        """Swap a module in. Called by the edit. Hooks on the original (readers, other edits) go with it."""
        original = edit.swap_in(self.model.module)
        edit.module.train(original.training)
        self._undo.append(lambda: edit.swap_out(self.model.module, original))
        own = {name: getattr(edit.module, name) for name in _HOOKS}
        if edit.module is not original and not any(own.values()):
            for name in _HOOKS:
                setattr(edit.module, name, getattr(original, name))
            self._undo.append(lambda: _set_hooks(edit.module, own))

    def keep(self, handle: Handle) -> None:
        """Remove a hook when the edits are taken back; for edits that place hooks of their own."""
        self._undo.append(handle.remove)

    def _wrap_generate(self) -> None:
        module = self.model.module
        if not callable(getattr(module, "generate", None)):
            return
        own = module.__dict__.get("generate")
        original: Callable[..., Any] = module.generate  # type: ignore[assignment]

        def generate(*args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            decoder_only = self.model.layout is None or len(self.model.layout.towers) == 1
            known = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and decoder_only else None
            with self.generating(_requests(args, kwargs), known):
                return original(*args, **kwargs)

        module.__dict__["generate"] = generate

        def undo() -> None:
            if own is None:
                del module.__dict__["generate"]
            else:
                module.__dict__["generate"] = own

        self._undo.append(undo)

    @contextmanager
    def generating(self, requests: int | None, prompt_mask: Tensor | None = None) -> Iterator[None]:
        """Mark the passes inside as one generation of `requests` rows.

        Args:
            requests: number of prompts.
            prompt_mask: bool `[requests, columns]` if it is known already (a trace of generated text).
        """
        before = self.watcher.generations
        state = {"*": Generation(requests=requests)}
        if prompt_mask is not None:
            towers = self.model.layout.towers if self.model.layout else ()
            for name in [t.name for t in towers] or [""]:
                state[name] = Generation(requests, prompt_mask)
        self.watcher.generations = state
        try:
            yield
        finally:
            self.watcher.generations = before
        self.report()

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.watcher.generations is None:
            self.report()

    def report(self, final: bool = False) -> None:
        """Say once about every edit that ran, or never ran at all, and changed nothing."""
        for track in self._tracks:
            if track.changed or track.said or getattr(track.edit, "condition", None) is not None:
                continue
            if getattr(track.edit, "may_do_nothing", False):
                continue
            if not track.ran and not final:
                continue
            track.said = True
            why = (
                "its scope matched no token, or it wrote what was there already"
                if track.ran
                else "its site never ran"
            )
            warnings.warn(f"{track.edit.describe()} changed nothing: {why}", EditHadNoEffect, stacklevel=4)


def _check_overwrites(plans: list[tuple[ActivationEdit, list[Site]]]) -> None:
    """Refuse an edit that sets what a later one sets again, for the same tokens: it could do nothing.

    Raises:
        InputError: two such edits; names them and the site.
    """
    seen: dict[tuple[str, Any], ActivationEdit] = {}
    for edit, sites in plans:
        if not edit.overwrites or edit.condition is not None or edit.strength != 1.0:
            continue
        for site in sites:
            first = seen.setdefault((site.name, edit.scope), edit)
            if first is not edit:
                raise InputError(
                    f"{first.describe()} and {edit.describe()} both set {site.name} for the same tokens, so "
                    "the first would be lost; leave one out, or limit them with at(...)"
                )


def _set_hooks(module: nn.Module, hooks: dict[str, Any]) -> None:
    for name, value in hooks.items():
        setattr(module, name, value)


def _requests(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    named = ("inputs", "input_ids", "inputs_embeds", "input_features", "pixel_values")
    for value in [*args[:1], *(kwargs.get(n) for n in named)]:
        if isinstance(value, Tensor):
            return value.shape[0]
    return None


def _forget_compiled(module: nn.Module) -> None:
    """Make torch.compile look at the hooks again: it does not guard on hooks of inner modules."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    if compiled or any(getattr(m, "_compiled_call_impl", None) is not None for m in module.modules()):
        torch._dynamo.reset()


__all__ = ["EditHadNoEffect", "Installation", "PassWatcher", "SiteError"]
