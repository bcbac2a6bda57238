"""Bits by gradient: mixtures of widths, the allocation against brute force, and the search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from actlas.core.bit_mixture import mix_bits, shares
from actlas.core.errors import InputError, ModelError
from actlas.core.numbers import QuantSpec, params_of, quantize
from actlas.training.bit_search import allocate, bit_search, entropy_weight
from actlas.training.language_loop import corpus_tokens, train_language, windows
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

SPECS = [QuantSpec.parse(f"int{b}-g16") for b in (2, 4)]
SMALL = {"form": "g16", "steps": 4, "batch": 2, "context": 16, "tokens": 400}


def test_noise_has_the_variance_of_the_rule_and_passes_the_gradient_whole():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, generator=generator).requires_grad_(True)
    p = torch.tensor([0.6, 0.4], requires_grad=True)
    w = torch.tensor([1 / 3, 0.6, 0.4]) / (1 / 3 + 1.0)
    torch.testing.assert_close(shares(p).detach(), w)
    drawn = torch.stack([mix_bits(x, SPECS, p, generator=generator) - x for _ in range(1500)]).detach()
    want = sum(0.25 * (w[i + 1] * params_of(x.detach(), s).scale).square() for i, s in enumerate(SPECS))
    torch.testing.assert_close(drawn.var(0).mean(1), want[:, 0], rtol=0.06, atol=0)
    assert drawn.mean(0).abs().max() < 0.1 * float(want.max().sqrt()) + 0.03
    gx, gp = torch.autograd.grad((mix_bits(x, SPECS, p) * 2).sum(), [x, p])
    assert torch.equal(gx, torch.full_like(gx, 2.0)) and bool((gp != 0).all())


def test_rounding_mixes_the_rounded_values():
    x, p = torch.randn(3, 32), torch.tensor([0.3, 0.7])
    w = shares(p)
    want = w[0] * x + w[1] * quantize(x, SPECS[0]) + w[2] * quantize(x, SPECS[1])
    torch.testing.assert_close(mix_bits(x, SPECS, p, how="ste"), want)


@pytest.mark.parametrize("mean_bits", [2.0, 2.5, 3.0, 3.4, 4.0, 7.0])
def test_allocation_keeps_the_target_and_leaves_no_room(mean_bits):
    generator = torch.Generator().manual_seed(int(10 * mean_bits))
    bits, sizes = (2, 3, 4), {"a": 100, "b": 300, "c": 50, "d": 200}
    p = {k: torch.randn(3, generator=generator).softmax(0).tolist() for k in sizes}
    found = allocate(p, sizes, bits, mean_bits)
    total = sum(sizes.values())
    mean = sum(sizes[k] * b for k, b in found.items()) / total
    assert mean <= mean_bits + 1e-9
    room = (mean_bits - mean) * total
    assert all(b == 4 or sizes[k] > room + 1e-6 for k, b in found.items())


def test_allocation_of_equal_layers_is_the_best_one():
    bits, sizes = (2, 4), dict.fromkeys("abcdef", 10)
    generator = torch.Generator().manual_seed(3)
    p = {k: torch.randn(2, generator=generator).softmax(0).tolist() for k in sizes}
    found = allocate(p, sizes, bits, 3.0)

    def likelihood(choice):
        return sum(math.log(p[k][bits.index(b)]) for k, b in choice.items())

    best = max(
        (dict(zip(sizes, c, strict=True)) for c in itertools.product(bits, repeat=6) if sum(c) == 18),
        key=likelihood,
    )
    assert found == best


def test_entropy_comes_late():
    w = [entropy_weight(t, 101) for t in range(101)]
    assert w[:25] == [0.0] * 25 and w == sorted(w) and w[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("how", ["noise", "ste"])
def test_bit_search_keeps_the_target_and_the_model(how):
    model = tiny()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    edit = bit_search(model, TEXTS * 2, bits="2,3,4", mean_bits=3.0, how=how, **SMALL)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    weights = sum(m.in_features * m.out_features for m in edit.modules.values())
    mean = sum(m.in_features * m.out_features * m.spec.bits for m in edit.modules.values()) / weights
    assert 2.8 < mean <= 3.0
    assert {m.group.get("over") for m in edit.measurements} >= {"uniform"}


def test_the_search_gives_more_bits_to_what_matters():
    model = tiny()
    tokens = corpus_tokens(model, TEXTS * 4, 16)
    drawn = windows(tokens, steps=60, batch=4, context=16, seed=0)
    train_language(model, drawn, list(model.module.parameters()), steps=60, lr=1e-2)
    with torch.no_grad():  # block 1's MLP does nothing
        model.module.model.layers[1].mlp.down_proj.weight.zero_()
    options = {**SMALL, "steps": 30, "entropy": 0.0, "lr": 0.2, "how": "ste"}
    edit = bit_search(model, TEXTS * 4, bits=(2, 8), mean_bits=4.0, **options)
    bits = {path: m.spec.bits for path, m in edit.modules.items()}
    assert [bits[f"model.layers.1.mlp.{n}_proj"] for n in ("gate", "up")] == [2, 2]
    assert 8 in bits.values()


def test_bad_input():
    model = tiny()
    for options in (
        {"bits": "2,x"}, {"bits": "2,2"}, {"bits": "1,2"}, {"bits": "9"}, {"mean_bits": 1.5},
            {"penalty": -1.0},
        {"how": "dither"}, {"form": "g20"},
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            bit_search(model, TEXTS, **{**SMALL, **options})
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError):
        bit_search(BY_NAME["bert"].model(), TEXTS, **SMALL)
    with pytest.raises(InputError, match="one each"):
        mix_bits(torch.randn(2, 16), SPECS, torch.ones(3))
    with pytest.raises(InputError, match="even steps"):
        mix_bits(torch.randn(2, 64), [QuantSpec.parse("nf4-g64")], torch.ones(1))
    with pytest.raises(InputError, match="cut"):
        mix_bits(torch.randn(2, 64), [SPECS[0], QuantSpec.parse("int4-channel")], torch.ones(2))
