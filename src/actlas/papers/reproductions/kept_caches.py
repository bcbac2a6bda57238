"""Runs of draft-approx: every arm's kept positions from one pass of the target over a prompt and an answer.

A prompt's own attention does not depend on what stands behind it. One pass over the prompt and an answer
gives the rows of SnapKV (the window's), those of SpecKV (and the answer's), and for the target's own answer
the attention that recall is measured with. The rules are those of the edits in `actlas.sparsity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from actlas.core.hooks import attach
from actlas.core.model import Model
from actlas.measure.kv_cache import cache_bytes, recall_of
from actlas.measure.void_edits import static_layer_skip
from actlas.sparsity.draft import draft_of
from actlas.sparsity.kv_policy import KeptLayer
from actlas.sparsity.kv_rules import RandomKV, SnapKV, StreamingWindow
from actlas.sparsity.spec_pc import Selector

ORACLE = "the target itself"


class KeptCaches:
    """Collects recall and answers of all arms, prompt by prompt."""

    def __init__(
        self,
        model: Model,
        drafts: Mapping[str, Sequence[int]],
        answer_tokens: int,
        capacities: Sequence[int],
        window: int,
        kernel: int,
        seed: int,
    ) -> None:
        assert model.tower is not None
        self.model, self.answer_tokens, self.capacities = model, answer_tokens, tuple(capacities)
        self.window, self.kernel, self.seed = window, kernel, seed
        self.kv_heads, self.blocks = model.tower.kv_heads, model.tower.n_blocks
        self.drafts = {name: draft_of(model, self._without(blocks)) for name, blocks in drafts.items()}
        self.recall: dict[tuple[int, str], list[float]] = {}
        self.agreement: dict[str, list[float]] = {name: [] for name in drafts}
        self.right: dict[str, list[bool]] = {}
        self.lengths: list[int] = []
        self.full_bytes = self.kept_bytes = 0.0

    def _without(self, blocks: Sequence[int]) -> Any:
        usage = [0.0 if i in blocks else 1.0 for i in range(self.blocks)]
        return static_layer_skip(self.model, usage, len(blocks))

    def add(self, prompt: str, code: str, *, compress: bool) -> None:
        """Run all arms on one prompt."""
        ids = self.model.encode(prompt)["input_ids"]
        n = ids.shape[1]
        answer = self._write(self.model, ids)
        cache, own = self._read(ids, answer)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :n], layer.values[:, :, :n]
        mass = [p[0, :, :, self.window :, :n].double().sum((1, 2)) for p in own]
        rows = {"SnapKV": [p[..., : self.window, :] for p in own], f"SpecKV, {ORACLE}": own}
        for name, draft in self.drafts.items():
            guess = self._write(draft, ids)
            both = min(guess.shape[1], answer.shape[1])
            self.agreement[name].append(float((guess[:, :both] == answer[:, :both]).float().mean()))
            rows[f"SpecKV, {name}"] = self._read(ids, guess)[1]
        for capacity in self.capacities:
            rule = SnapKV(capacity, self.window, self.kernel)
            kept = {arm: [rule.choose(KeptLayer(), p, n) for p in found] for arm, found in rows.items()}
            kept |= self._blind(capacity, n)
            for arm, columns in kept.items():
                self.recall.setdefault((capacity, arm), []).append(recall_of(mass, [c[0] for c in columns]))
                if capacity == self.capacities[-1]:
                    cut = _cut(cache, columns)
                    self.kept_bytes = cache_bytes(cut)
                    self._answer(arm, self._decode(cut, answer[:, :1], n), code)
        self._answer("full cache", answer, code)
        self.lengths.append(n)
        self.full_bytes = cache_bytes(cache)
        if compress:
            self._compress(ids, code)

    def _blind(self, capacity: int, n: int) -> dict[str, list[Tensor]]:
        layers = [KeptLayer(1000 * len(self.lengths) + i) for i in range(self.blocks)]
        for layer in layers:
            layer.positions = torch.arange(n).expand(1, self.kv_heads, n)
        random, last = RandomKV(capacity, self.window, self.seed), StreamingWindow(capacity, 4)
        return {
            "random": [random.choose(x, None, n) for x in layers],
            "first and last": [last.choose(x, None, n) for x in layers],
        }

    def _compress(self, ids: Tensor, code: str) -> None:
        """Answer the prompt compressed to half: by SpecPC with itself as the draft, and its last tokens."""
        half = ids.shape[1] // 2
        skipped = min(8, self.blocks // 3)
        select = Selector(half, self.window, pool=9, neighbors=9, skip_layers=skipped)
        chosen = select.choose(select.scores(self.model, ids))
        self._answer("SpecPC", self._write(self.model, ids[:, chosen]), code)
        self._answer("last tokens", self._write(self.model, ids[:, -half:]), code)

    def _write(self, model: Model, ids: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return model.generate(given, max_new_tokens=self.answer_tokens).sequences[:, ids.shape[1] :]

    def _read(self, ids: Tensor, answer: Tensor) -> tuple[Any, list[Tensor]]:
        """Return the cache, and the last rows of attention of each layer, `[1, kv_heads, group, rows, n]`."""
        found: list[Tensor] = [torch.empty(0)] * self.blocks

        def take(i: int) -> Any:
            def read(pattern: Tensor) -> Tensor:
                found[i] = pattern.unflatten(1, (self.kv_heads, -1))
                return pattern

            return read

        cache = DynamicCache(config=self.model.config)
        with ExitStack() as stack, torch.no_grad():
            for i, site in enumerate(
                self.model.resolve([f"blocks.{i}.attn.pattern" for i in range(self.blocks)])
            ):
                last = self.window + answer.shape[1]
                stack.callback(attach(self.model.module, site, take(i), last_rows=last).remove)
            self.model.module(
                input_ids=torch.cat([ids, answer], 1), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return cache, found

    def _decode(self, cache: Any, token: Tensor, n: int) -> Tensor:
        """Answer greedily with a cut cache, from the first token on; true positions."""
        made = [token]
        with torch.no_grad():
            for step in range(self.answer_tokens - 1):
                places = torch.tensor([[n + step]])
                out = self.model.module(
                    input_ids=made[-1], past_key_values=cache, use_cache=True, position_ids=places
                )
                made.append(out.logits[:, -1:].argmax(-1))
        return torch.cat(made, 1)

    def _answer(self, arm: str, tokens: Tensor, code: str) -> None:
        text = self.model.tokenizer.decode(tokens[0])
        self.right.setdefault(arm, []).append(code in text)


def _cut(cache: Any, columns: Sequence[Tensor]) -> Any:
    """Return a cache that holds these columns of each layer; the given one is left alone."""
    cut = DynamicCache()
    for i, (layer, kept) in enumerate(zip(cache.layers, columns, strict=True)):
        made = KeptLayer(i)
        made.update(layer.keys, layer.values)
        made.keep(kept)
        cut.layers.append(made)
    return cut
