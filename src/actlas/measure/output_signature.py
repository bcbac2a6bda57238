"""Output signatures: all that a model's outputs say about a text, without a look inside.

    los = output_signature(model, [("The capital of France is", " Paris, of course."), ...], top_k=1000)
    los.sorted        # [n, rows, K]   log-probabilities in descending order
    los.actual        # [n, rows]      log-probability of the token that came
    los.rank          # [n, rows]      how many tokens were likelier (its true rank, also beyond K)
    signature_scores(los)["min-k"]     # hand-made detectors of memorised or hallucinated text

Row t of a text is the distribution that predicted its token t. A text alone has no row for its first token
(unless the tokenizer begins with a special one); a pair (prompt, continuation), or the prompts and tokens of
a `Generation`, has one row for each token of the continuation.

| score | higher is likelier, by |
| --- | --- |
| `mean log-prob`, `min log-prob` | mean and minimum of `actual` |
| `entropy` | minus the mean entropy of the rows |
| `min-k` | mean of the lowest 20% of `actual` (Shi et al. 2023) |
| `min-k++` | the same of `(actual - E log p) / sd log p` under p (Zhang et al. 2024) |
| `rank` | minus the mean of log(1 + rank) |
| `length` | number of rows: no detector, but what a confounded data set gives away |

Source: "Learning on LLM Output Signatures for gray-box LLM Behavior Analysis" (2025) and its code (whose
tensors are log-probabilities although they are called probabilities, and which has no mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.artifact import load_artifact, save_artifact
from actlas.core.errors import ArtifactError, InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.generating import Generation
from actlas.core.progress import progress
from actlas.measure.likelihood import LOGIT_BYTES, output_logits, takes_option

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
SCORES = ("mean log-prob", "min log-prob", "entropy", "min-k", "min-k++", "rank", "length")
Ids = tuple[int, ...]


@dataclass(frozen=True)
class OutputSignature:
    """Signatures of n texts, padded to a common number of rows.

    Attributes:
        sorted: float32 `[n, rows, K]`, log-probabilities (nats) of the K likeliest tokens, descending.
        actual: float32 `[n, rows]`, log-probability of the token that came.
        rank: int64 `[n, rows]`, how many tokens have a greater log-probability (0: it was the first guess).
        mean, std: float32 `[n, rows]`, over the whole vocabulary; std with the unbiased estimator.
        entropy: float32 `[n, rows]`, nats.
        spread: float32 `[n, rows]`, standard deviation of log p under p.
        mask: bool `[n, rows]`; False where a text has no such row.
        vocabulary: size of the model's vocabulary.
    """

    sorted: Tensor
    actual: Tensor
    rank: Tensor
    mean: Tensor
    std: Tensor
    entropy: Tensor
    spread: Tensor
    mask: Tensor
    vocabulary: int

    def __post_init__(self) -> None:
        rows = self.mask.shape
        for name, x in self._tensors().items():
            if x.shape[:2] != rows or x.ndim != (3 if name == "sorted" else 2):
                raise ShapeError(f"a signature of {list(rows)} rows has {name} of shape {list(x.shape)}")
        if not bool(self.mask.any(1).all()):
            raise InputError(f"text {int((~self.mask.any(1)).nonzero()[0])} has no row to judge it by")
        for name, x in self._tensors().items():
            if x.is_floating_point() and not bool(torch.isfinite(x[self.mask]).all()):
                raise NonFiniteError(f"{name} of the signature holds NaN or infinity")

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def top_k(self) -> int:
        """How many log-probabilities of each row are kept."""
        return self.sorted.shape[2]

    def at(self, index: Any) -> OutputSignature:
        """Return the signatures of some texts (numbers, a slice, or a mask)."""
        return OutputSignature(
            **{n: x[index] for n, x in self._tensors().items()}, vocabulary=self.vocabulary
        )

    def cut(self, rows: int) -> OutputSignature:
        """Return the signatures with at most the first `rows` rows of each text."""
        if rows < 1:
            raise InputError(f"rows is {rows}; it must be at least 1")
        return OutputSignature(
            **{n: x[:, :rows] for n, x in self._tensors().items()}, vocabulary=self.vocabulary
        )

    def save(self, path: str | Path) -> Path:
        """Save as a folder of JSON and safetensors; log-probabilities go to float16, ranks stay whole."""
        held = self._tensors()
        held["sorted"] = held["sorted"].half()
        return save_artifact(path, "signature", {"vocabulary": self.vocabulary}, held)

    @classmethod
    def load(cls, path: str | Path) -> OutputSignature:
        """Load what `save` wrote.

        Raises:
            ArtifactError: not a whole, untampered signature.
        """
        manifest, tensors = load_artifact(path, "signature")
        wanted = {f.name for f in fields(cls)} - {"vocabulary"}
        if set(tensors) != wanted or not isinstance(manifest.get("vocabulary"), int):
            raise ArtifactError(f"{path} is no whole signature; save it again")
        tensors["sorted"] = tensors["sorted"].float()
        return cls(**tensors, vocabulary=manifest["vocabulary"])

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vocabulary"}


def output_signature(
    model: Model,
    texts: Sequence[str | tuple[str, str] | tuple[Sequence[int], Sequence[int]]] | Generation,
    *,
    top_k: int = 1000,
    rows: int = 100,
    batch: int = 16,
) -> OutputSignature:
    """Read the output signatures of texts, under whatever edits are installed.

    Args:
        model: a causal language model with a tokenizer.
        texts: strings, pairs (prompt, continuation) of strings or of token ids, or what
            `model.generate` returned for prompts that were strings.
        top_k: how many log-probabilities of each row to keep; all if the vocabulary is smaller, and
            refused above it unless it is the default.
        rows: at most so many rows, the first of each text.
        batch: texts in one forward pass.

    Raises:
        ModelError: not a causal language model, or no tokenizer.
        InputError: no texts, a text without a row, one longer than the context, or K above the vocabulary.
        NonFiniteError: NaN or infinity in the logits.
    """
    if model.kind != "causal-lm" or model.tokenizer is None:
        raise ModelError(f"{model.name} is of kind {model.kind}; a causal-lm with a tokenizer is needed")
    size = model.vocab_size or len(model.tokenizer)
    if top_k == 1000:
        top_k = min(top_k, size)
    if not 1 <= top_k <= size or rows < 1:
        raise InputError(f"top_k is {top_k} and rows {rows}; {model.name} has {size} tokens, rows start at 1")
    cut = [_ids(model, text, i) for i, text in enumerate(_listed(texts))]
    if not cut:
        raise InputError("there are no texts; give at least one")
    parts: dict[int, dict[str, Tensor]] = {}
    order = sorted(range(len(cut)), key=lambda i: -len(cut[i][0]))
    with progress("output signatures", total=len(cut), unit="texts") as advance:
        for some in _batches(order, cut, batch, size):
            parts.update(zip(some, _read(model, [cut[i] for i in some], top_k, rows), strict=True))
            advance(len(some))
    return _padded([parts[i] for i in range(len(cut))], size)


def signature_scores(los: OutputSignature, *, k: float = 0.2) -> dict[str, Array]:
    """Return the hand-made scores of the module's table, float64 `[n]` each.

    Args:
        los: signatures.
        k: share of the rows that Min-K% looks at, at least one row.

    Raises:
        InputError: k is not above 0 and at most 1.
    """
    if not 0 < k <= 1:
        raise InputError(f"k is {k}; it must be above 0 and at most 1")
    mask = los.mask.numpy()
    count = mask.sum(1)
    actual, rank = los.actual.double().numpy(), los.rank.double().numpy()
    entropy, spread = los.entropy.double().numpy(), los.spread.double().numpy()

    def mean(x: Array) -> Array:
        total: Array = np.where(mask, x, 0.0).sum(1) / count
        return total

    def lowest(x: Array) -> Array:
        ordered = np.sort(np.where(mask, x, np.inf), axis=1)
        least = np.maximum(1, np.floor(k * count)).astype(np.int64)
        kept = np.arange(x.shape[1])[None] < least[:, None]
        total: Array = np.where(kept, ordered, 0.0).sum(1) / least
        return total

    return {
        "mean log-prob": mean(actual),
        "min log-prob": np.where(mask, actual, np.inf).min(1),
        "entropy": -mean(entropy),
        "min-k": lowest(actual),
        "min-k++": lowest((actual + entropy) / np.maximum(spread, 1e-6)),
        "rank": -mean(np.log1p(rank)),
        "length": count.astype(np.float64),
    }


def _listed(texts: Any) -> list[Any]:
    if not isinstance(texts, Generation):
        return [texts] if isinstance(texts, str) else list(texts)
    if len(texts.prompts) != len(texts.tokens):
        raise InputError("this generation does not know its prompts as text; give pairs of token ids")
    return list(zip(texts.prompts, texts.tokens, strict=True))


def _ids(model: Model, text: Any, number: int) -> tuple[Ids, int]:
    """Return a text's ids and the first that has a row."""
    tokenize = model.tokenizer
    if isinstance(text, str):
        ids = tuple(int(i) for i in tokenize(text, verbose=False)["input_ids"])
        first = 1
    elif isinstance(text, tuple) and len(text) == 2:
        before, after = text
        if isinstance(before, str):
            start = tokenize(before, verbose=False)["input_ids"] if before else []
        else:
            start = list(before)
        if isinstance(after, str):
            after = tokenize(after, add_special_tokens=False, verbose=False)["input_ids"]
        ids = tuple(int(i) for i in [*start, *after])
        first = max(1, len(start))
    else:
        raise InputError(f"text {number} is {type(text).__name__}; give a string or (prompt, continuation)")
    if len(ids) <= first:
        raise InputError(
            f"text {number} has {len(ids)} tokens, none of which is predicted from one before it"
        )
    limit = model.context_length
    if limit is not None and len(ids) > limit:
        raise InputError(f"text {number} has {len(ids)} tokens; {model.name} has a context of {limit}")
    return ids, first


def _batches(order: list[int], cut: Sequence[tuple[Ids, int]], batch: int, width: int) -> list[list[int]]:
    found: list[list[int]] = []
    for i in order:
        longest = len(cut[found[-1][0]][0]) if found else 0
        room = found and len(found[-1]) < batch and (len(found[-1]) + 1) * longest * width * 4 <= LOGIT_BYTES
        if room:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _read(model: Model, some: Sequence[tuple[Ids, int]], top_k: int, rows: int) -> list[dict[str, Tensor]]:
    width = max(min(len(ids), first + rows) for ids, first in some)
    ids = torch.full((len(some), width), model._encoder.pad_id)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(some):
        n = min(width, len(tokens))
        ids[row, :n] = torch.tensor(tokens[:n])
        mask[row, :n] = 1
    inputs = model.encode({"input_ids": ids, "attention_mask": mask}, padding_side="right")
    start = min(first for _, first in some) - 1
    options: dict[str, Any] = {}
    if takes_option(model, "logits_to_keep"):
        options["logits_to_keep"] = torch.arange(start, width, device=inputs["input_ids"].device)
    else:
        start = 0
    logits = output_logits(model, inputs, **options)
    out = []
    for row, (tokens, first) in enumerate(some):
        stop = min(len(tokens), first + rows)
        z = logits[row, first - 1 - start : stop - 1 - start].float()
        target = torch.tensor(tokens[first:stop], device=z.device)
        log_p = z.log_softmax(-1)
        if not bool(torch.isfinite(log_p).all()):
            raise NonFiniteError(f"the log-probabilities of {model.name} hold NaN or infinity")
        p = log_p.exp()
        actual = log_p.gather(1, target[:, None])[:, 0]
        entropy = -(p * log_p).sum(1)
        out.append(
            {
                "sorted": log_p.topk(top_k, dim=1).values,
                "actual": actual,
                "rank": (log_p > actual[:, None]).sum(1),
                "mean": log_p.mean(1),
                "std": log_p.std(1),
                "entropy": entropy,
                "spread": (p * (log_p + entropy[:, None]) ** 2).sum(1).sqrt(),
            }
        )
    return [{name: x.cpu() for name, x in found.items()} for found in out]


def _padded(parts: Sequence[dict[str, Tensor]], vocabulary: int) -> OutputSignature:
    lengths = torch.tensor([len(p["actual"]) for p in parts])
    made = {
        name: torch.nn.utils.rnn.pad_sequence([p[name] for p in parts], batch_first=True) for name in parts[0]
    }
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return OutputSignature(**made, mask=mask, vocabulary=vocabulary)
