"""What a smaller key-value cache costs: divergence of the next tokens that are predicted from it, and bytes.

A prompt is read up to some token under an edit; the text that follows is then read in small steps against the
stored cache, as in decoding, and its predictions are compared with those of the plain model on the whole
text:

    cache-kl     KL(plain || edited), nats per token, over the text behind the prompt
    cache-share  bytes of the cache under the edit over bytes without it

All variants read the same tokens, so that differences are paired over prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.installation import EditHadNoEffect
from actlas.core.measurement import Measurement
from actlas.measure.kv_cache import cache_bytes, corpus_prompts, read_prompt
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model


def cache_price(
    model: Model,
    corpus: Iterable[Any],
    variants: Mapping[str, Edit],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    prompts: int = 4,
    tokens: int = 192,
    step: int = 8,
    seed: int = 0,
) -> list[Measurement]:
    """Measure edits of the cache.

    Args:
        model: a causal language model with a tokenizer, without other edits of the cache.
        corpus: text; its first `prompts` documents of `tokens` tokens are read.
        variants: edits by name.
        pairs: (a, b): also the difference of a's divergence minus b's, paired over prompts.
        prompts, tokens: of the text; the last quarter of each is predicted from the cache.
        step: tokens read at once behind the prompt.
        seed: of the bootstrap.

    Returns:
        For each variant `cache-kl` and `cache-share`, for each pair `extra-cache-kl`.

    Raises:
        InputError: fewer than 8 tokens, a pair that names no variant, or text that is too short.
    """
    if tokens < 8 or step < 1:
        raise InputError(f"tokens is {tokens} and step {step}; at least 8 and 1 are needed")
    for name in (n for pair in pairs for n in pair):
        if name not in variants:
            raise InputError(f"the pair names {name!r}; the variants are {', '.join(variants)}")
    texts = corpus_prompts(model, corpus, prompts, tokens)
    start = tokens - tokens // 4
    plain = [_whole(model, ids, start) for ids in texts]
    bytes_before = [cache_bytes(read_prompt(model, ids)) for ids in texts]
    found: list[Measurement] = []
    divergence: dict[str, NDArray[np.float64]] = {}
    where = f"{start} tokens of prompt, {tokens - start} predicted"
    for name, edit in variants.items():
        rows, shares = [], []
        for ids, base, size in zip(texts, plain, bytes_before, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EditHadNoEffect)
                with model.edit(edit):
                    logits = _from_cache(model, ids, start, step)
                    shares.append(cache_bytes(read_prompt(model, ids)) / size)
            rows.append(_divergence(base, logits, name))
        divergence[name] = np.asarray(rows)
        group = {"variant": name}
        found.append(
            mean_measurement(
                "cache-kl", "nats", rows, seed=seed, over="prompts", better="lower", group=group, note=where
            )
        )
        share = Measurement(
            "cache-share", float(np.mean(shares)), "ratio", len(shares), better="lower", group=group
        )
        found.append(share)
    for a, b in pairs:
        gap = divergence[a] - divergence[b]
        group = {"variant": a, "against": b}
        found.append(
            mean_measurement(
                "extra-cache-kl", "nats", gap, seed=seed, over="prompts", group=group, note=where
            )
        )
    return found


@torch.no_grad()
def _whole(model: Model, ids: Tensor, start: int) -> Tensor:
    """Return the plain model's logits of the tokens behind the prompt, `[tokens - start, vocab]`."""
    with model.without_edits():
        out = model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    logits: Tensor = out.logits
    return logits[0, start - 1 : -1].float()


@torch.no_grad()
def _from_cache(model: Model, ids: Tensor, start: int, step: int) -> Tensor:
    """Return the same from a cache that was filled with the first `start` tokens."""
    cache = read_prompt(model, ids[:, : start - 1])
    parts = []
    for at in range(start - 1, ids.shape[1] - 1, step):
        piece = ids[:, at : min(at + step, ids.shape[1] - 1)]
        mask = torch.ones(1, at + piece.shape[1], dtype=torch.long, device=ids.device)
        out = model.module(input_ids=piece, attention_mask=mask, past_key_values=cache, use_cache=True)
        parts.append(out.logits[0].float())
    return torch.cat(parts)


def _divergence(base: Tensor, other: Tensor, name: str) -> float:
    log_p, log_q = base.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).double().mean()
    if not bool(torch.isfinite(kl)):
        raise NonFiniteError(f"the predictions under {name!r} hold NaN or infinity")
    return float(kl)
