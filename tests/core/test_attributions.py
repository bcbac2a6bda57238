"""Integrated gradients: exact where they can be, complete, and refused where they cannot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actlas.core.answer_function import (
    answer_function,
    answer_start,
    attribute_pair,
    erased,
    text_baseline,
    token_ids,
)
from actlas.core.attributions import integrate, integrate_each
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.model import Model

from .tiny import tiny

PROMPT = "The committee met"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["gauss", "midpoint", "right"]))
def test_a_linear_function_is_attributed_exactly(seed: int, rule: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, start, w = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    found = integrate(lambda z: (z * w).sum((1, 2)), x, start, steps=3, rule=rule)  # type: ignore[arg-type]
    assert torch.allclose(found.values, w * (x - start))
    assert abs(found.gap) < 1e-9


def test_gauss_is_exact_for_polynomials_and_agrees_with_the_closed_form() -> None:
    x = torch.tensor([0.7, -1.2, 2.0], dtype=torch.float64)

    def cubic(z: Tensor) -> Tensor:
        return z[:, 0] ** 3 * z[:, 1] + z[:, 2] ** 2

    found = integrate(cubic, x, 0.0, steps=4)
    product = float(x[0] ** 3 * x[1])  # homogeneous of degree 4: three quarters go to x0, one to x1
    wanted = torch.tensor([0.75 * product, 0.25 * product, float(x[2] ** 2)], dtype=torch.float64)
    assert torch.allclose(found.values, wanted, atol=1e-12)
    assert abs(integrate(cubic, x, 0.0, steps=4, rule="right").gap) > 1e-3


def test_batches_do_not_matter_and_several_outputs_are_each_their_own() -> None:
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def both(z: Tensor) -> Tensor:
        return torch.stack([z.sin().sum(1), (z**2).prod(1)], 1)

    whole = integrate_each(both, x, 0.3, steps=32, batch=32)
    pieces = integrate_each(both, x, 0.3, steps=32, batch=5)
    for k in range(2):
        alone = integrate(lambda z, k=k: both(z)[:, k], x, 0.3, steps=32)  # type: ignore[misc]
        assert torch.allclose(whole[k].values, pieces[k].values)
        assert torch.allclose(whole[k].values, alone.values)


def test_bad_input_is_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(InputError, match="steps is 0"):
        integrate(lambda z: z.sum(1), x, steps=0)
    with pytest.raises(InputError, match="rule is 'simpson'"):
        integrate(lambda z: z.sum(1), x, rule="simpson")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="bfloat16"):
        integrate(lambda z: z.sum(1), x.bfloat16())
    with pytest.raises(ShapeError, match="baseline"):
        integrate(lambda z: z.sum(1), x, torch.ones(2))
    with pytest.raises(InputError, match="does not depend"):
        integrate(lambda z: torch.zeros(len(z)), x)
    with pytest.raises(NonFiniteError):
        integrate(lambda z: z.sum(1) * math.nan, x)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "opt"])
def test_an_answer_function_is_the_models_log_probability(family: str) -> None:
    model = tiny(family)
    answer = answer_function(model, PROMPT, " on")
    whole = model.logits(PROMPT + " on")[0].log_softmax(-1)
    ids, start = token_ids(model, PROMPT + " on"), len(token_ids(model, PROMPT))
    wanted = sum(float(whole[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert answer.prompt_length == start
    assert answer.function(answer.x.unsqueeze(0)).item() == pytest.approx(wanted, abs=1e-4)


def test_its_gradient_agrees_with_finite_differences_in_float64() -> None:
    model = tiny("gpt-neox")
    model = Model(model.module.double(), model.tokenizer)
    answer = answer_function(model, PROMPT, " a")
    x = answer.x
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = x.clone().unsqueeze(0).requires_grad_()
    (slope,) = torch.autograd.grad(answer.function(z)[:, 0].sum(), z)
    step = 1e-5
    ends = answer.function(torch.stack([x + step * direction, x - step * direction]))[:, 0].detach()
    assert float((slope[0] * direction).sum()) == pytest.approx(
        float(ends[0] - ends[1]) / (2 * step), rel=1e-6
    )


def test_the_baseline_keeps_the_first_token_and_is_the_same_vector_elsewhere() -> None:
    model = tiny("llama")
    ids = token_ids(model, PROMPT)
    plain = answer_function(model, ids, [ids[:1]]).x
    table = model.module.get_input_embeddings().weight.detach()  # type: ignore[operator]
    kept = text_baseline(model, ids)
    assert torch.equal(kept[0], plain[0])
    assert torch.allclose(kept[1:], table.mean(0).expand_as(kept[1:]), atol=1e-6)
    assert torch.equal(text_baseline(model, ids, "zero", keep_first=False), torch.zeros_like(kept))
    assert torch.allclose(text_baseline(model, ids, "pad")[3], table[0], atol=1e-6)
    with pytest.raises(InputError, match="baseline is 'noise'"):
        text_baseline(model, ids, "noise")  # type: ignore[arg-type]


def test_a_positional_table_stays_in_the_baseline() -> None:
    model = tiny("gpt2")
    ids = token_ids(model, PROMPT)
    table = model.module.transformer.wpe.weight.detach()  # type: ignore[union-attr]
    zero = text_baseline(model, ids, "zero", keep_first=False)
    assert torch.allclose(zero, table[: len(ids)], atol=1e-6)


def test_a_pair_is_attributed_alike_together_and_apart() -> None:
    model = tiny("gpt-neox")
    one, other = (token_ids(model, PROMPT + a) for a in ("e", "i"))  # one token each: one pass
    together, scores = attribute_pair(model, one, other, steps=16)
    start = answer_start(one, other)
    apart = answer_function(model, one[:start], [one[start:]])
    alone = integrate(lambda z: apart.function(z)[:, 0], apart.x, text_baseline(model, one[:start]), steps=16)
    assert torch.allclose(together[0].values, alone.values, atol=1e-5)
    assert torch.allclose(scores[0][:start], alone.values.sum(-1), atol=1e-5)
    assert float(scores[0][0]) == 0.0 and float(scores[0][-1]) == 0.0
    longer, _ = attribute_pair(model, token_ids(model, PROMPT + "et"), other, steps=64)
    assert len(longer[0].values) == len(one)  # the answer's first token is read, its last only predicted
    assert abs(longer[0].gap) < 0.05 * abs(longer[0].value - longer[0].baseline_value)


def test_half_precision_is_computed_in_float32() -> None:
    model = tiny("gpt-neox")
    half = Model(tiny("gpt-neox").module.bfloat16(), model.tokenizer)
    wanted = answer_function(Model(tiny("gpt-neox").module.bfloat16().float(), model.tokenizer), PROMPT, "e")
    found = answer_function(half, PROMPT, "e")
    assert found.x.dtype == torch.float32
    assert torch.equal(found.function(found.x.unsqueeze(0)), wanted.function(wanted.x.unsqueeze(0)))


def test_erasing_tokens() -> None:
    model = tiny("llama")
    ids = token_ids(model, PROMPT)
    padded = erased(model, ids, [1, 3])
    assert padded["input_ids"][0, [1, 3]].tolist() == [0, 0]
    assert torch.equal(padded["input_ids"][0, [0, 2]], ids[[0, 2]])
    hidden = erased(model, ids, [1], "mask")
    assert hidden["attention_mask"][0].tolist() == [1, 0] + [1] * (len(ids) - 2)
    with pytest.raises(InputError, match="outside a text"):
        erased(model, ids, [len(ids)])
    with pytest.raises(InputError, match="leave at least one"):
        erased(model, ids, range(len(ids)))
    with pytest.raises(InputError, match="replace is 'noise'"):
        erased(model, ids, [1], "noise")  # type: ignore[arg-type]


def test_texts_that_cannot_be_compared() -> None:
    model = tiny("llama")
    one = token_ids(model, PROMPT)
    with pytest.raises(InputError, match="shared beginning"):
        answer_start(one, token_ids(model, "xyz"))
    with pytest.raises(InputError, match="shared beginning"):
        answer_start(one, one[:-1])
    with pytest.raises(InputError, match="adds no tokens"):
        answer_function(model, PROMPT, "")
