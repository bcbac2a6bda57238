"""Prompts with what follows: padding changes nothing, and the answers are those of generating."""

from __future__ import annotations

import pytest
import torch

from actlas.core.continuations import continuations, following
from actlas.core.errors import InputError, ModelError
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

PROMPTS = ["The committee met", "Why", "It was raining; the river"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_greedy_is_what_generating_says(family: str) -> None:
    model = tiny(family)
    said = [tuple(t.tolist()) for t in model.generate(PROMPTS, max_new_tokens=4, min_new_tokens=4).tokens]
    rows = continuations(model, PROMPTS, said)
    logits = rows.logits(model)
    assert rows.agree(logits).all()
    other = [(*ids[:-1], (ids[-1] + 1) % 67) for ids in said]
    assert not continuations(model, PROMPTS, other).greedy(model).any()


def test_losses_are_those_of_each_row_alone() -> None:
    model = tiny()
    follow = [" on Tuesday", " not", "."]
    rows = continuations(model, PROMPTS, follow)
    together = rows.losses(rows.logits(model)).sum(1)
    for i, (prompt, text) in enumerate(zip(PROMPTS, follow, strict=True)):
        ids = model.tokenizer(prompt + text)["input_ids"]
        n = len(model.tokenizer(prompt)["input_ids"])
        z = model.logits(torch.tensor(ids))[0].double().log_softmax(-1)
        alone = -sum(float(z[t - 1, ids[t]]) for t in range(n, len(ids)))
        assert float(together[i]) == pytest.approx(alone, rel=1e-4)
    assert rows.real.sum(1).tolist() == [len(f) for f in follow]


def test_bad_input() -> None:
    model = tiny()
    assert following(model, "It was", " so") == model.tokenizer(" so")["input_ids"]
    with pytest.raises(InputError, match="give as many"):
        continuations(model, PROMPTS, ["x"])
    with pytest.raises(InputError, match="nothing follows"):
        continuations(model, ["a"], [""])
    with pytest.raises(ModelError, match="causal-lm"):
        continuations(BY_NAME["bert"].model(), ["a"], ["b"])
