"""The lean decoding loop gives transformers' tokens."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import ActlasError
from actlas.core.model import Model
from actlas.kernels.loading import native
from actlas.kernels.packed import pack
from actlas.models.decoder import FastDecoder, why_not
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels")


@pytest.mark.parametrize("family", [f for f in ("llama", "mistral", "qwen2", "qwen3") if f in BY_NAME])
def test_logits_are_those_of_the_model(family: str) -> None:
    model = tiny(family)
    if why_not(model) is not None:
        pytest.skip(why_not(model))
    fast = FastDecoder(model, length=32)
    ids = torch.randint(4, 60, (13,), generator=torch.Generator().manual_seed(0))
    want = model.logits(ids)[0]
    found = fast.feed(ids[:9].tolist())
    assert torch.allclose(found, want[8], atol=1e-4)
    for i in range(9, 13):
        assert torch.allclose(fast.feed([int(ids[i])]), want[i], atol=1e-4)


def test_greedy_tokens_are_those_of_generate() -> None:
    model = tiny()
    fast = FastDecoder(model, length=64)
    for prompt in ("hello there", "a"):
        want = model.generate(prompt, max_new_tokens=24).tokens[0].tolist()
        ids = model.encode(prompt)["input_ids"][0].tolist()
        assert list(fast.greedy(ids, 24, frozenset([2]))) == want


def test_packed_weights_are_those_of_a_model_with_the_rounded_ones() -> None:
    model = tiny()
    fast = FastDecoder(model, "q4", length=32)
    with torch.no_grad():
        for name, module in model.module.named_modules():
            if isinstance(module, torch.nn.Linear):
                format = "q8" if name.endswith("lm_head") else "q4"
                format = format if module.in_features % 32 == 0 else "f32"
                module.weight.data = pack(module.weight, format).dequantised()  # type: ignore[arg-type]
    ids = list(range(5, 15))
    found = fast.feed(ids)
    if not model.config.tie_word_embeddings:
        assert torch.allclose(found, model.logits(torch.tensor(ids))[0, -1], atol=2e-3)


def test_what_cannot_run_says_why() -> None:
    gpt2 = Model(BY_NAME["gpt2"].model().module)
    assert "gpt2" in (why_not(gpt2) or "")
    with pytest.raises(ActlasError, match="cannot run on the lean loop"):
        FastDecoder(gpt2)


def test_a_full_cache_is_refused() -> None:
    fast = FastDecoder(tiny(), length=8)
    with pytest.raises(ActlasError, match="cache of 8"):
        fast.feed(list(range(4, 13)))
    with pytest.raises(ActlasError, match="at least one"):
        fast.feed([])
