"""What a cut key-value cache still holds: bytes, and the attention that the true answer would pay to it.

    recall = sum of a_j over kept j / sum of a_j over all prompt positions j,
    a_j    = attention of the tokens of the full model's own answer on prompt position j

per layer and key-value head (query heads of a group add up), then averaged. Recall needs no dropped key to be
guessed at: the answer is the one that the full model writes, and its attention is read with nothing dropped.
Random positions have a recall of about their share, and a whole cache has 1.

Both measures run under whatever edits are installed; a cache policy is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError
from actlas.core.hooks import attach
from actlas.core.measurement import Measurement
from actlas.measure.registry import measure
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

Mass = list[Tensor]


def read_prompt(model: Model, ids: Tensor) -> Any:
    """Read a prompt under the installed edits and return the cache that decoding would start from.

    Args:
        model: a causal language model.
        ids: `[1, n]`.

    Raises:
        ModelError: the model keeps no cache of keys and values.
    """
    from transformers import DynamicCache

    if model.kind != "causal-lm" or model.tower is None:
        raise ModelError(f"{model.name} ({model.kind}) keeps no cache of keys and values")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.module(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache


def kept_positions(model: Model, ids: Tensor) -> list[Tensor]:
    """Return which prompt positions each layer keeps under the installed edits, `[kv_heads, kept]` each."""
    cache = read_prompt(model, ids)
    found = []
    for layer in cache.layers:
        positions = getattr(layer, "positions", None)
        if positions is None:
            heads = layer.keys.shape[1]
            positions = torch.arange(layer.keys.shape[2], device=ids.device).expand(1, heads, -1)
        found.append(positions[0])
    return found


def cache_bytes(cache: Any) -> int:
    """Return the size of the stored keys and values in bytes (of codes and scales, where they are coded)."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: Any) -> int:
    own = getattr(layer, "stored_bytes", None)
    return (
        own if isinstance(own, int) else sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    )


def answer_mass(model: Model, ids: Tensor, answer: Tensor) -> Mass:
    """Return how much attention an answer pays to each prompt position, without any edit.

    Args:
        model: a causal language model.
        ids: the prompt, `[1, n]`.
        answer: the tokens that follow it, `[1, m]`.

    Returns:
        One float64 `[kv_heads, n]` for each layer: summed over the answer's tokens and the query heads.
    """
    if answer.shape[1] < 1:
        raise InputError("the answer has no tokens, so that nothing attends to the prompt")
    n, m = ids.shape[1], answer.shape[1]
    tower = model.tower
    assert tower is not None
    mass: Mass = [torch.empty(0)] * tower.n_blocks

    def take(i: int) -> Any:
        def read(pattern: Tensor) -> Tensor:
            part = pattern[0, :, -m:, :n].double().sum(1)
            mass[i] = part.unflatten(0, (tower.kv_heads, -1)).sum(1)
            return pattern

        return read

    with model.without_edits(), ExitStack() as stack:
        for i, site in enumerate(model.resolve([f"blocks.{i}.attn.pattern" for i in range(tower.n_blocks)])):
            stack.callback(attach(model.module, site, take(i), last_rows=m).remove)
        model.forward({"input_ids": torch.cat([ids, answer], 1)})
    return mass


def recall_of(mass: Mass, kept: list[Tensor]) -> float:
    """Return the share of the answer's attention on the prompt that falls on kept positions.

    Averaged over layers and key-value heads; heads without any attention on the prompt do not count.
    """
    shares = []
    for whole, columns in zip(mass, kept, strict=True):
        total = whole.sum(-1)
        held = whole.gather(1, columns.to(whole.device)).sum(-1)
        shares.append((held / total)[total > 0])
    return float(torch.cat(shares).mean())


def exact_answers(
    model: Model, prompts: Iterable[Tensor], answers: Iterable[str], *, max_new_tokens: int = 32
) -> np.ndarray:
    """Return for each prompt whether the greedy answer under the installed edits contains the right text.

    Args:
        model: a causal language model with a tokenizer.
        prompts: ids `[1, n]` each.
        answers: the text that must occur.
        max_new_tokens: the cap of an answer.
    """
    right = []
    for ids, answer in zip(prompts, answers, strict=True):
        made = model.generate(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, max_new_tokens=max_new_tokens
        )
        right.append(answer in made.texts[0])
    return np.asarray(right)


def corpus_prompts(model: Model, data: Iterable[Any], prompts: int, tokens: int) -> list[Tensor]:
    """Return the first `tokens` tokens of documents that have so many, `[1, tokens]` each.

    Raises:
        InputError: no document is long enough.
    """
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so that no text can be read")
    found: list[Tensor] = []
    for document in islice(data, 50 * prompts):
        text = document if isinstance(document, str) else document.text
        ids = model.tokenizer(text[: 16 * tokens], return_tensors="pt")["input_ids"][:, :tokens]
        if ids.shape[1] == tokens:
            found.append(ids.to(model.device))
        if len(found) == prompts:
            break
    if not found:
        raise InputError(f"no text of the corpus has {tokens} tokens; ask for shorter prompts")
    return found


@measure(
    "attention-mass-recall",
    summary="how much of the attention of the full model's answer falls on what a cut cache kept",
    unit="fraction",
    needs=("causal-lm",),
    data="corpus",
    quick={"prompts": 3, "tokens": 192},
    source="Galim et al. 2025 (arXiv 2506.08373)",
)
def attention_mass_recall(
    model: Model, data: Any, *, seed: int = 0, prompts: int = 8, tokens: int = 384, answer_tokens: int = 16
) -> Measurement:
    """Measure the recall of the installed cache policy on prompts from a corpus; 1 without a policy.

    Args:
        model: a causal language model.
        data: a corpus.
        seed: of the bootstrap.
        prompts: how many.
        tokens: length of a prompt.
        answer_tokens: length of the full model's answer.
    """
    samples = []
    for ids in corpus_prompts(model, data, prompts, tokens):
        kept = kept_positions(model, ids)
        if all(k.shape[-1] == tokens for k in kept):
            samples.append(1.0)
            continue
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with model.without_edits():
            answer = model.generate(given, max_new_tokens=answer_tokens).sequences[:, tokens:]
        samples.append(recall_of(answer_mass(model, ids, answer), kept))
    return mean_measurement(
        "attention-mass-recall", "fraction", samples, seed=seed, over="prompts", better="higher"
    )


@measure(
    "kv-bytes",
    summary="size of the key-value cache after a prompt",
    unit="bytes",
    needs=("causal-lm",),
    data="corpus",
    quick={"prompts": 1, "tokens": 192},
)
def kv_bytes(model: Model, data: Any, *, seed: int = 0, prompts: int = 2, tokens: int = 384) -> Measurement:
    """Measure what is stored after a prompt of `tokens` tokens under the installed edits.

    Args:
        model: a causal language model.
        data: a corpus.
        seed: unused; a size has no chance in it.
        prompts: how many.
        tokens: length of a prompt.
    """
    sizes = [cache_bytes(read_prompt(model, ids)) for ids in corpus_prompts(model, data, prompts, tokens)]
    return Measurement(
        "kv-bytes",
        float(np.mean(sizes)),
        "bytes",
        len(sizes),
        better="lower",
        note=f"after a prompt of {tokens} tokens",
    )
