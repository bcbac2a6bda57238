"""Reading rows of activations while a forward pass runs, one site at a time.

A trace holds the activations of all its sites together: 30 sites of 2,048 tokens of `smollm2` are
150 MB, and those of wide sites several times that. Here each site's value is handed over as soon as
it is computed and then let go, so that memory does not depend on how many sites are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actlas.core.calibration.origin import Origin
from actlas.core.errors import InputError, SiteError
from actlas.core.hooks import attach
from actlas.core.installation import PassWatcher
from actlas.core.layout import ATTENTION_KINDS
from actlas.core.model import Model, _takes_cache
from actlas.core.sites import Site
from actlas.core.streaming import batches, encode_windows, windows
from actlas.core.trace import StopForward

_PIECE = 512  # rows handed over at once
_ITEMS = 16  # inputs without tokens (images) in a batch


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass, and which documents they come from.

    Attributes:
        encoded: the module's keyword arguments.
        documents: the document of each row.
        offsets: the position of each row's first token in its document.
    """

    encoded: dict[str, Any]
    documents: Sequence[str]
    offsets: Sequence[int]

    @property
    def mask(self) -> Tensor | None:
        """Bool `[batch, pos]` on the CPU, True at real tokens; `None` for inputs that are not tokens."""
        ids, mask = self.encoded.get("input_ids"), self.encoded.get("attention_mask")
        if not isinstance(ids, Tensor):
            return None
        return mask.bool().cpu() if isinstance(mask, Tensor) else torch.ones(ids.shape, dtype=torch.bool)

    def origin(self, seed: int) -> Origin | None:
        """Return the origins of the real tokens, row by row; `None` for inputs that are not tokens."""
        mask = self.mask
        if mask is None:
            return None
        row = torch.arange(len(mask)).unsqueeze(1).expand_as(mask)[mask]
        place = (mask.cumsum(1) - 1)[mask]
        token = self.encoded["input_ids"].cpu()[mask]
        return Origin(self.documents, row, torch.tensor(self.offsets)[row] + place, place, token, seed)


class Source:
    """What a calibration reads: a corpus of text, or inputs `[n, ...]`; it notes name and hash.

    Strings are named by their content: a name that depended on the place in the corpus would make a
    calibration in parts sample other rows than one made at once.
    """

    def __init__(self, corpus: Any) -> None:
        found = getattr(corpus, "pixels", corpus)
        self._inputs: Tensor | None = found if isinstance(found, Tensor) else None
        self.name = str(getattr(corpus, "name", "text" if self._inputs is None else "inputs"))
        self._corpus: Iterable[Any] = [corpus] if isinstance(corpus, str) else corpus
        self._known: str | None = getattr(corpus, "hash", None)
        self._digest = hashlib.sha256()
        if self._inputs is not None:
            self._digest.update(self._inputs.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())

    @property
    def hash(self) -> str:
        """The corpus's own hash, or SHA-256 of the inputs that were read."""
        return self._known if isinstance(self._known, str) else self._digest.hexdigest()

    def batches(
        self, model: Model, batch_tokens: int, context: int | None, max_tokens: int | None
    ) -> Iterator[Batch]:
        """Yield the batches: padded windows of documents, or slices of the inputs."""
        if self._inputs is not None:
            for start in range(0, len(self._inputs), _ITEMS):
                part = self._inputs[start : start + _ITEMS]
                names = [str(i) for i in range(start, start + len(part))]
                yield Batch(model.encode(part), names, [0] * len(part))
            return
        for held in batches(windows(model, self._documents(), context, max_tokens), batch_tokens):
            encoded = encode_windows(model, held)
            yield Batch(encoded, [w.document for w in held], [w.offset for w in held])

    def _documents(self) -> Iterator[Any]:
        for document in self._corpus:
            text = document if isinstance(document, str) else document.text
            data = text.encode("utf-8", "surrogatepass")
            if self._known is None:
                self._digest.update(len(data).to_bytes(8, "big") + data)
            if isinstance(document, str):
                yield _Text("text-" + hashlib.sha256(data).hexdigest()[:16], text)
            else:
                yield document


@dataclass(frozen=True)
class _Text:
    id: str
    text: str


@torch.no_grad()
def read_batch(
    model: Model, batch: Batch, sites: Sequence[Site], take: Callable[[Site, Tensor], None]
) -> None:
    """Run one forward pass, call `take` with each site's value, and stop after the last of them.

    Raises:
        InputError: a site never ran.
    """
    left = {site.name for site in sites}

    def reader(site: Site) -> Callable[[Tensor], Tensor]:
        def read(x: Tensor) -> Tensor:
            if site.name in left:
                left.discard(site.name)
                take(site, x.detach())
                if not left:
                    raise StopForward
            return x

        return read

    watcher = PassWatcher(model)
    with ExitStack() as stack:
        if any(site.tap.flat for site in sites):
            watcher.start()
            stack.callback(watcher.stop)
        for site in sites:
            size = _size_reader(watcher, site)
            stack.callback(attach(model.module, site, reader(site), batch=size).remove)
        options = {"use_cache": False} if _takes_cache(model.module) else {}
        with suppress(StopForward):
            model._call(batch.encoded, **options)
    if left:
        raise InputError(f"{min(left)} never ran in this forward pass")


def _size_reader(watcher: PassWatcher, site: Site) -> Callable[[], int]:
    return lambda: watcher.of(site).batch


def rows_of(
    x: Tensor, site: Site, batch: Batch, tokens: Origin | None, seed: int
) -> Iterator[tuple[Tensor, Origin]]:
    """Yield the rows `[n, d]` of a site's value, padding left out, and where they come from, in pieces.

    Sites with tokens give one row a token, heads flattened. Any other module's output gives one row
    for each item (`[batch, d]`), item and place (`[batch, n, d]`) or pixel (`[batch, d, height, width]`).

    Args:
        x: the value.
        site: the site.
        batch: what was run.
        tokens: `batch.origin(seed)`, made once for all sites.
        seed: of the rows' priorities.

    Raises:
        SiteError: the value is not a floating-point tensor with a batch axis.
    """
    if not x.is_floating_point() or x.ndim < 2:
        what = f"{x.dtype} {list(x.shape)}"
        raise SiteError(f"{site.name} holds {what}; a calibration needs floats [batch, ..., channels]")
    mask = batch.mask
    if mask is not None and site.has_tokens and x.shape == mask.shape:
        x = x.unsqueeze(-1)  # one channel was selected
    if mask is not None and tokens is not None:
        by_token = x.ndim > 2 and x.shape[:2] == mask.shape
        if by_token or (x.ndim == 2 and len(x) == mask.numel()):
            flat = x.flatten(2).flatten(0, 1) if by_token else x
            real = mask.reshape(-1).nonzero().squeeze(1)
            for start in range(0, len(real), _PIECE):
                piece = torch.arange(start, min(start + _PIECE, len(real)))
                yield flat[real[piece].to(x.device)], tokens.select(piece)
            return
    if x.ndim == 4:
        x = x.movedim(1, -1)
    items = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    n, places, d = items.shape
    item, place = torch.arange(n).repeat_interleave(places), torch.arange(places).repeat(n)
    names = batch.documents if len(batch.documents) == n else [str(i) for i in range(n)]
    origin = Origin(names, item, place, place, torch.full_like(place, -1), seed)
    flat = items.reshape(n * places, d)
    for start in range(0, len(flat), _PIECE):
        yield flat[start : start + _PIECE], origin.select(torch.arange(start, min(start + _PIECE, len(flat))))


def check_row_sites(sites: Sequence[Site]) -> list[Site]:
    """Return the sites if each holds one row of channels a token.

    Raises:
        SiteError: attention scores and patterns (query by key) and logits do not.
    """
    for site in sites:
        if site.kind in ATTENTION_KINDS:
            raise SiteError(
                f"{site.name} holds one weight for each query and key, not a row of channels a token; "
                "calibrate attn.z or attn.out, or read the pattern with model.trace"
            )
        if site.kind == "logits":
            raise SiteError("logits are not calibrated (one channel a word); calibrate final_norm instead")
    return list(sites)
