"""A Trace: activations that were read at sites, with the inputs they belong to.

    trace = model.trace("The capital of France is", "blocks.*.resid_post")
    trace["blocks.5.resid_post"]          # [batch, pos, d_model]
    trace.last("blocks.5.resid_post")     # [batch, d_model], the last real token of each row

Tensors are what the model computed: not copies where the model leaves them alone, and detached unless
the trace was made with `grad=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, SiteError, did_you_mean
from actlas.core.hooks import attach
from actlas.core.layout import ATTENTION_KINDS
from actlas.core.sites import Site

if TYPE_CHECKING:
    from actlas.core.installation import PassWatcher
    from actlas.core.model import Model


class StopForward(BaseException):
    """Ends a forward pass whose remaining work nobody asked for; never leaves Actlas."""


class Trace:
    """Activations by site name, with their tokens.

    Attributes:
        sites: the sites that were read.
        inputs: what the model was called with, by argument name.
        output: the model's output, or `None` when the pass was stopped early.
        documents: for streamed traces, the id of the document each row belongs to.
        offsets: for streamed traces, the position of each row's first token in its document.
        prompt_length: columns that belong to the prompt, when the rest was generated.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        values: dict[str, Tensor],
        inputs: dict[str, Any],
        output: Any = None,
        *,
        bases: dict[str, Tensor] | None = None,
        documents: Sequence[str] = (),
        offsets: Sequence[int] = (),
        prompt_length: int | None = None,
    ) -> None:
        self._model = model
        self._values = values
        self._bases = bases or {}
        self.sites = list(sites)
        self.inputs = inputs
        self.output = output
        self.documents = list(documents)
        self.offsets = list(offsets)
        self.prompt_length = prompt_length

    def __getitem__(self, name: str) -> Tensor:
        """Return the activation at a site; aliases are accepted.

        Raises:
            SiteError: the trace did not read that site.
        """
        if name in self._values:
            return self._values[name]
        try:
            resolved = self._model.resolve(name)
        except SiteError:
            resolved = []
        if len(resolved) == 1 and resolved[0].name in self._values:
            return self._values[resolved[0].name]
        raise SiteError(f"this trace has not read {name!r}{did_you_mean(name, self._values)}")

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (site name, activation)."""
        yield from self._values.items()

    @property
    def tokens(self) -> Tensor | None:
        """Token ids `[batch, pos]`, or `None` for inputs that are not tokens."""
        ids = self.inputs.get("input_ids")
        return ids if isinstance(ids, Tensor) else None

    @property
    def mask(self) -> Tensor | None:
        """Bool `[batch, pos]`, True at real tokens; `None` for inputs that are not tokens."""
        if self.tokens is None:
            return None
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, Tensor):
            return mask.bool()
        return torch.ones_like(self.tokens, dtype=torch.bool)

    @property
    def logits(self) -> Tensor:
        """The model's logits; the trace must have run to the end (`stop=False`).

        Raises:
            InputError: it was stopped early, or the model has no logits.
        """
        if "logits" in self._values:
            return self._values["logits"]
        found = getattr(self.output, "logits", self.output if isinstance(self.output, Tensor) else None)
        if not isinstance(found, Tensor):
            raise InputError("this trace has no logits; read the site 'logits' or trace with stop=False")
        return found

    def rows(self, site: str) -> Tensor:
        """Return the activations of real tokens only, `[n, ...features]`, row after row.

        Raises:
            SiteError: the site was not read, or is an attention site (its axes are query and key).
        """
        x = self[site]
        kind = next((s.kind for s in self.sites if s.name == site), "")
        if kind in ATTENTION_KINDS:
            raise SiteError(
                f"{site} is [batch, heads, query, key] and has no rows of tokens; index it directly"
            )
        mask = self.mask
        if mask is None or x.ndim < 3 or x.shape[:2] != mask.shape:
            return x.flatten(0, 1) if x.ndim > 2 else x
        return x[mask.to(x.device)]

    def last(self, site: str) -> Tensor:
        """Return the activation at the last real token of each row, `[batch, ...features]`."""
        x = self[site]
        mask = self.mask
        if mask is None or x.shape[:2] != mask.shape:
            return x[:, -1]
        mask = mask.to(x.device)
        last = (torch.arange(mask.shape[1], device=x.device) * mask).argmax(1)
        return x[torch.arange(x.shape[0], device=x.device), last]

    def token_strings(self, row: int = 0) -> list[str]:
        """Return the text of each real token of a row."""
        if self.tokens is None or self._model.tokenizer is None or self.mask is None:
            return []
        return self._model.token_strings(self.tokens[row][self.mask[row].to(self.tokens.device)])

    def gradients(self, metric: Callable[[Tensor], Tensor] | Tensor) -> dict[str, Tensor]:
        """Return d(metric)/d(activation) at every site of a trace made with `grad=True`.

        Args:
            metric: a scalar, or a function from the logits to one.

        Raises:
            InputError: the trace holds no graph, or the metric is not a scalar that depends on it.
        """
        if not self._bases:
            raise InputError("this trace holds no gradients; make it with grad=True")
        value = metric if isinstance(metric, Tensor) else metric(self.logits)
        if value.numel() != 1 or not value.requires_grad:
            raise InputError(
                f"the metric must be one number computed from the logits; it is {list(value.shape)}"
            )
        names = list(self._bases)
        bases = [self._bases[n] for n in names]
        grads = torch.autograd.grad(value.sum(), bases, retain_graph=True, allow_unused=True)
        found = {}
        for name, base, grad in zip(names, bases, grads, strict=True):
            site = next(s for s in self.sites if s.name == name)
            whole = torch.zeros_like(base) if grad is None else grad
            if site.tap.flat and whole.ndim == 2:
                batch = self._values[name].shape[0]
                whole = whole.unflatten(0, (batch, whole.shape[0] // batch))
            found[name] = site.read(whole)
        return found

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in list(self._values.items())[:3])
        more = f", and {len(self) - 3} more" if len(self) > 3 else ""
        return f"<Trace of {self._model.name}: {shapes}{more}>"


class Recorder:
    """Reads sites during one forward pass and stops it when all have been read."""

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        watcher: PassWatcher,
        *,
        grad: bool = False,
        stop: bool = True,
        attention_rows: int | None = None,
    ) -> None:
        self.values: dict[str, Tensor] = {}
        self.bases: dict[str, Tensor] = {}
        self._model, self._sites, self._watcher = model, sites, watcher
        self._grad, self._rows = grad, attention_rows
        self._stop = stop and not grad

    def attach(self, stack: ExitStack) -> None:
        """Place one reader per site; the stack removes them."""
        for site in self._sites:
            handle = attach(
                self._model.module,
                site,
                self._reader(site),
                batch=lambda site=site: self._watcher.of(site).batch,  # type: ignore[misc]
                raw=self._base(site) if self._grad else None,
                explicit=self._grad,
                last_rows=self._rows if site.kind in ATTENTION_KINDS else None,
            )
            stack.callback(handle.remove)

    def _reader(self, site: Site) -> Callable[[Tensor], Tensor]:
        def read(x: Tensor) -> Tensor:
            if site.name not in self.values:
                kept = x if self._grad else x.detach()
                self.values[site.name] = kept.clone() if site.tap.copy else kept
                if self._stop and len(self.values) == len(self._sites):
                    raise StopForward
            return x

        return read

    def _base(self, site: Site) -> Callable[[Tensor], Tensor]:
        def base(x: Tensor) -> Tensor:
            if site.name in self.bases:
                return x
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            self.bases[site.name] = x
            return x

        return base
