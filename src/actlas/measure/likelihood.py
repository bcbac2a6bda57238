"""The token likelihood engine: one pass over text, from which all language measures are read.

A document is cut into windows of `context` tokens. Each window is one row of a right-padded batch;
a token is scored from the tokens before it in its window, so the first token of a window is not
scored. Tokenizers that begin a text with a special token (`<s>`, `<bos>`) get it at the start of
every window, and every real token is scored then. With `stride < context` windows overlap: each
repeats the last `context - stride` tokens of the one before, and only new tokens are scored.

For the token at position t with logits z_t: `nll_t = logsumexp(z_t) - z_t[x_t]` in nats, computed in
float32 on a few positions at a time, so that besides the model's own logits of one batch (which is
sized to keep them under `LOGIT_BYTES`) nothing as wide as the vocabulary is held.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.core.model import Model

LOGIT_BYTES = 128 * 2**20  # logits that the model returns for one batch
_CHUNK_BYTES = 8 * 2**20  # logits that are turned into losses at once
_MOST_ROWS = 32


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a document; those from `scored` on are scored.

    `ids` holds the tokenizer's first special token, if it has one, and then the tokens.
    """

    document: int
    ids: tuple[int, ...]
    start: int
    stop: int
    scored: int


@dataclass(frozen=True)
class Losses:
    """What one pass found, summed per document (arrays of shape [documents]).

    Attributes:
        ids, groups: identity and labels of each document.
        nll: sum of negative log-likelihoods of its scored tokens, nats.
        tokens: how many tokens were scored.
        bytes: UTF-8 bytes of the text that the scored tokens spell.
        hits: scored tokens that had the greatest logit.
        entropy: sum of the entropies of the predicted distributions, nats.
        correct: the hits, token by token in document order; bool, shape [all scored tokens].
        context, stride: window length and step, in tokens.
        skipped: documents of the selection that were too short to score.
        divergence: sum of `KL(base || edited)`, nats, if the base was run too.
        agreement: scored tokens at which base and edited have the same greatest logit.
    """

    ids: tuple[str, ...]
    groups: tuple[Mapping[str, str], ...]
    nll: NDArray[np.float64]
    tokens: NDArray[np.float64]
    bytes: NDArray[np.float64]
    hits: NDArray[np.float64]
    entropy: NDArray[np.float64]
    correct: NDArray[np.bool_] = field(repr=False)
    context: int
    stride: int
    skipped: int
    divergence: NDArray[np.float64] | None = None
    agreement: NDArray[np.float64] | None = None

    @property
    def note(self) -> str:
        """What a reader must know about the selection of tokens."""
        parts = [f"{int(self.tokens.sum()):,} tokens, context {self.context}"]
        if self.stride != self.context:
            parts.append(f"stride {self.stride}")
        if self.skipped:
            parts.append(f"{self.skipped} documents with fewer than two tokens left out")
        return ", ".join(parts)


@dataclass(frozen=True)
class Selection:
    """Windows to score, and the documents they come from."""

    windows: tuple[Window, ...]
    ids: tuple[str, ...]
    groups: tuple[Mapping[str, str], ...]
    bytes: NDArray[np.float64]
    context: int
    stride: int
    skipped: int


def nll(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = None,
    context: int = 512,
    stride: int | None = None,
    per_document: int | None = None,
    against_base: bool = False,
    keep_logits: list[Tensor] | None = None,
    base_logits: Sequence[Tensor] | None = None,
) -> Losses:
    """Score text with a causal language model, under whatever edits are installed.

    Args:
        model: a causal language model with a tokenizer.
        corpus: documents (objects with `.text`, `.id`, `.group`) or strings, at least one.
        tokens: about how many tokens to read; all if missing. Documents are taken in order.
        context: tokens in a window; cut to what the model can take.
        stride: step between windows; `context` (no overlap) if missing.
        per_document: tokens read of one document at most. With `tokens` given it defaults to
            `tokens // 32`, at least 64, so that there are documents enough for an interval.
        against_base: also run each batch without the installed edits and sum the divergence.
        keep_logits: a list to which the logits of each batch are appended (as wide as the vocabulary).
        base_logits: what a run without edits over the same text with the same options kept so; with it
            `against_base` needs no pass of its own.

    Returns:
        Sums per document.

    Raises:
        InputError: no documents, none with two tokens, a bad `tokens`, `context` or `stride`.
        ModelError: not a causal language model, or no tokenizer.
        NonFiniteError: NaN or infinity in the logits.
    """
    chosen = select(model, corpus, tokens=tokens, context=context, stride=stride, per_document=per_document)
    count = len(chosen.ids)
    sums = {k: np.zeros(count) for k in ("nll", "tokens", "hits", "entropy", "divergence", "agreement")}
    correct: dict[int, NDArray[np.bool_]] = {}
    planned = sum(len(w.ids) for w in chosen.windows)
    with progress("language model likelihood", total=planned, unit="tokens") as advance:
        for number, batch in enumerate(_batches(model, chosen.windows)):
            windows, base = [chosen.windows[i] for i in batch], None
            if base_logits is not None:
                if number >= len(base_logits) or len(base_logits[number]) != len(windows):
                    raise InputError("base_logits are not of the same text and options")
                base = base_logits[number]
            found = _score(model, windows, chosen.ids, against_base, base, keep_logits)
            for row, i in enumerate(batch):
                document = chosen.windows[i].document
                for key, rows in found.sums.items():
                    sums[key][document] += rows[row]
                correct[i] = found.correct[row]
            advance(sum(len(chosen.windows[i].ids) for i in batch))
    return Losses(
        ids=chosen.ids,
        groups=chosen.groups,
        nll=sums["nll"],
        tokens=sums["tokens"],
        bytes=chosen.bytes,
        hits=sums["hits"],
        entropy=sums["entropy"],
        correct=np.concatenate([correct[i] for i in sorted(correct)]),
        context=chosen.context,
        stride=chosen.stride,
        skipped=chosen.skipped,
        divergence=sums["divergence"] if against_base else None,
        agreement=sums["agreement"] if against_base else None,
    )


def select(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int | None = None,
    context: int = 512,
    stride: int | None = None,
    per_document: int | None = None,
) -> Selection:
    """Choose and cut the windows that `nll` scores; see there."""
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is a model of kind {model.kind}; a causal-lm is needed")
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer; give one to actlas.wrap(module, tokenizer)")
    for what, number in (("tokens", tokens), ("context", context), ("per_document", per_document)):
        if number is not None and number < 2:
            raise InputError(f"{what} must be at least 2, not {number}")
    context = min(context, model.context_length or context)
    if per_document is None and tokens is not None:
        per_document = max(64, tokens // 32)
    prefix = _prefix(model.tokenizer)
    room = context - len(prefix)
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise InputError(f"stride must lie between 1 and {room} tokens for context {context}, not {stride}")
    windows: list[Window] = []
    ids: list[str] = []
    groups: list[Mapping[str, str]] = []
    sizes: list[float] = []
    skipped, taken, seen = 0, 0, 0
    for seen, document in enumerate(corpus, 1):
        text = document if isinstance(document, str) else document.text
        limits = [n for n in (per_document, tokens and tokens - taken) if n is not None]
        pieces, ends = _tokenize(model.tokenizer, text, min(limits) if limits else None)
        cut = list(_cut(len(ids), pieces, prefix, room, stride))
        if not cut:
            skipped += 1
            continue
        windows += cut
        ids.append(str(getattr(document, "id", seen - 1)))
        groups.append(dict(getattr(document, "group", {})))
        sizes.append(_scored_bytes(text, ends, cut))
        taken += len(pieces)
        if tokens is not None and tokens - taken < 2:
            break
    if not seen:
        raise InputError("the corpus is empty; at least one document of two tokens is needed")
    if not windows:
        raise InputError(f"none of the {seen} documents has the two tokens that scoring needs")
    return Selection(tuple(windows), tuple(ids), tuple(groups), np.array(sizes), context, stride, skipped)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """The special token that this tokenizer puts before a text, if any."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"]
    return (int(bos),) if bos is not None and len(ids) and ids[0] == bos else ()


def _tokenize(tokenizer: Any, text: str, limit: int | None) -> tuple[list[int], list[int] | None]:
    """Return the first `limit` ids and, for fast tokenizers, the character at which each ends."""
    part = text if limit is None else text[: 32 * limit + 256]  # no need to tokenize a whole book
    fast = bool(getattr(tokenizer, "is_fast", False))
    options = {"return_offsets_mapping": True} if fast else {}
    out = tokenizer(part, add_special_tokens=False, verbose=False, **options)
    ids = [int(i) for i in out["input_ids"][:limit]]
    return ids, [int(end) for _, end in out["offset_mapping"][:limit]] if fast else None


def _cut(document: int, ids: list[int], prefix: tuple[int, ...], room: int, stride: int) -> Iterator[Window]:
    done = 0 if prefix else 1  # tokens that are scored already, or cannot be
    for start in range(0, len(ids), stride):
        stop = min(start + room, len(ids))
        first = max(done, start + (0 if prefix else 1))
        if stop > first:
            yield Window(document, prefix + tuple(ids[start:stop]), start, stop, first)
            done = stop


def _scored_bytes(text: str, ends: list[int] | None, windows: list[Window]) -> float:
    """UTF-8 bytes from the end of the token before the first scored one to the end of the last."""
    if ends is None:
        return float("nan")
    spans = ((ends[w.scored - 1] if w.scored else 0, ends[w.stop - 1]) for w in windows)
    return float(sum(len(text[a:b].encode("utf-8", "surrogatepass")) for a, b in spans))


def _batches(model: Model, windows: tuple[Window, ...]) -> Iterator[list[int]]:
    """Group windows of like length, longest first, so that little is padded."""
    width = model.vocab_size or 50_000
    most = max(1, LOGIT_BYTES // (4 * width))
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i].ids), i))
    batch: list[int] = []
    for i in order:
        longest = len(windows[batch[0]].ids) if batch else 0
        if batch and (longest * (len(batch) + 1) > most or len(batch) == _MOST_ROWS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Scores:
    sums: dict[str, list[float]]
    correct: list[NDArray[np.bool_]]


def _score(
    model: Model,
    windows: list[Window],
    names: tuple[str, ...],
    against_base: bool,
    base: Tensor | None = None,
    keep: list[Tensor] | None = None,
) -> _Scores:
    inputs = _pad(model, windows)
    if not against_base:
        base = None
    elif base is None:
        with model.without_edits():
            base = output_logits(model, inputs)
    logits = output_logits(model, inputs)
    if keep is not None:
        keep.append(logits)
    keys = ["nll", "tokens", "hits", "entropy"] + (["divergence", "agreement"] if against_base else [])
    sums: dict[str, list[float]] = {key: [] for key in keys}
    correct = []
    for row, window in enumerate(windows):
        target = torch.tensor(window.ids, device=logits.device)
        scored_from = len(window.ids) - (window.stop - window.scored)
        total = dict.fromkeys(keys, 0.0)
        flags = []
        step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
        for start in range(scored_from, len(window.ids), step):
            stop = min(start + step, len(window.ids))
            z = logits[row, start - 1 : stop - 1].float()
            log_z = z.logsumexp(-1)
            if not bool(torch.isfinite(log_z).all()):
                bad = start + int(torch.isfinite(log_z).logical_not().nonzero()[0])
                raise NonFiniteError(
                    f"the logits of {model.name} hold NaN or infinity at token {bad} of a window of "
                    f"document {names[window.document]!r}"
                )
            x = target[start:stop]
            top = z.argmax(-1)
            hit = top == x
            total["nll"] += float((log_z - z.gather(-1, x[:, None])[:, 0]).double().sum())
            total["tokens"] += stop - start
            total["hits"] += float(hit.sum())
            flags.append(hit.cpu().numpy())
            log_p = z - log_z[:, None]
            p = log_p.exp()
            total["entropy"] -= float(_times(p, log_p).sum())
            if base is not None:
                b = base[row, start - 1 : stop - 1].float()
                log_b = b - b.logsumexp(-1, keepdim=True)
                total["agreement"] += float((b.argmax(-1) == top).sum())
                total["divergence"] += float(_times(log_b.exp(), log_b - log_p).sum())
        for key in keys:
            sums[key].append(total[key])
        correct.append(np.concatenate(flags))
    return _Scores(sums, correct)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """`sum p * x` over the last dimension in float32, with `0 * -inf = 0`; float64 [positions]."""
    product = p * x
    return torch.where(p > 0, product, torch.zeros_like(product)).sum(-1).double()


def _pad(model: Model, windows: list[Window]) -> dict[str, Tensor]:
    pad = getattr(model.tokenizer, "pad_token_id", None)
    longest = max(len(w.ids) for w in windows)
    ids = torch.full((len(windows), longest), pad if pad is not None else 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        mask[row, : len(window.ids)] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def output_logits(model: Model, inputs: dict[str, Any], **options: Any) -> Tensor:
    """Run a language model without a cache and return its logits, `[batch, pos, vocab]`."""
    if takes_option(model, "use_cache"):
        options["use_cache"] = False
    output = model.forward(inputs, **options)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ModelError(f"{model.name} gives no logits of shape [batch, pos, vocab]")
    return logits


def takes_option(model: Model, option: str) -> bool:
    """Return whether the module's forward names this keyword."""
    module = getattr(model.module, "_orig_mod", model.module)
    return option in inspect.signature(type(module).forward).parameters
