"""Learned and fixed rotations: exact before rounding, better after, saved as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actlas
from actlas.core.errors import InputError, ModelError
from actlas.core.hadamard import block_hadamard
from actlas.core.numbers import QuantSpec, quantize
from actlas.core.transforms import Folding
from actlas.quantize.ostquant import Learning, fit_ostquant, kl_top, learn
from actlas.quantize.rotate import fit_rotate
from actlas.quantize.rounded_transforms import Formats, rounded, soft_round, token_windows
from actlas.quantize.transform_set import TransformSet, mixing
from tests.core.tiny import TEXTS, tiny

WORDS = [t.lower() for t in TEXTS * 6]


def _logits(model):
    ids = torch.randint(3, 67, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.module(input_ids=ids).logits.double()


def _spiky(family: str = "llama"):
    """A tiny model with planted outliers."""
    model = tiny(family)
    folding = Folding(model)
    for slot in folding.slots.of("v_o", "norm", "up_down"):  # those that the family has
        s = torch.ones(slot.width, dtype=torch.float64)
        s[:2] = 1 / 30
        folding.scale(slot, s)
    folding.fold().edit().bake(model)
    return model


def _kl(model, edit) -> float:
    base = _logits(model)
    with model.edit(edit):
        found = _logits(model)
    return float(kl_top(base, found, 67))


@pytest.mark.parametrize("spec", ["int4-channel", "int3-channel-sym", "int4-g8"])
def test_soft_rounding_is_the_core_rounding_with_gradients_through_scales(spec) -> None:
    spec = QuantSpec.parse(spec)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = soft_round(x, spec)
    torch.testing.assert_close(found.detach(), quantize(x.detach(), spec), atol=1e-5, rtol=1e-5)
    found.square().sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    # widening the range of a row moves all of its levels: the extreme entry's gradient knows it
    top = x.detach().abs().argmax(1)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    y = x.detach().clone().requires_grad_()
    (soft_round(y, spec) * weight).sum().backward()
    picked = y.grad[torch.arange(6), top] - weight[torch.arange(6), top]
    assert float(picked.abs().max()) > 1e-3


def test_the_loss_is_a_divergence_on_the_teachers_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 50, generator=g), torch.randn(5, 50, generator=g)
    whole = nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none")
    assert float(kl_top(a, b, 1000)) == pytest.approx(float(whole.sum(-1).mean()), rel=1e-5)
    assert float(kl_top(a, a, 7)) == pytest.approx(0, abs=1e-7) and float(kl_top(a, b, 7)) > 0
    c = b.clone()
    c[a < a.topk(7).values[:, -1:]] += 100  # tokens outside the top 7 do not matter
    assert float(kl_top(a, c, 7)) == pytest.approx(float(kl_top(a, b, 7)), rel=1e-5)


@pytest.mark.parametrize("width", [8, 48, 576 // 4])
def test_mixing_is_orthogonal_and_spreads(width) -> None:
    m = mixing(width, 3)
    torch.testing.assert_close(m.T @ m, torch.eye(width, dtype=m.dtype), atol=1e-12, rtol=0)
    spread = m.abs().amax(1)
    assert float(spread.max()) < 1.0 and float((m != 0).double().mean()) > 0.99


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_all_transforms_fold_exactly_and_online_rotations_do_too(family) -> None:
    model = tiny(family)
    base = _logits(model)
    made = TransformSet(model, start="womi")
    with torch.no_grad():
        for log in made.logs:
            log.add_(0.3 * torch.randn(log.shape, generator=torch.Generator().manual_seed(1)))
    edit = rounded(model, made, Formats(bits=8, act_bits=0, weight="int8-g8"), method="x")
    with model.edit(made.fold().edit()):
        assert float((_logits(model) - base).abs().max() / base.abs().max()) < 1e-4
    with model.edit(edit):  # eight bits in groups of eight
        assert float((_logits(model) - base).abs().max() / base.abs().max()) < 0.1
    assert torch.equal(_logits(model), base)
    turned = made.online([p for p, m in model.module.named_modules() if isinstance(m, nn.Linear)])
    down = {"llama": "mlp.down_proj", "gpt2": "lm_head", "qwen3": "mlp.down_proj", "gemma2": "mlp.down_proj"}
    assert any(p.endswith(down[family]) for p in turned) or family == "gpt2"


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "qwen3"])
def test_what_is_trained_is_what_is_fused(family) -> None:
    from actlas.quantize.ostquant import _loss

    model = _spiky(family)
    made = TransformSet(model, start="hadamard")
    formats = Formats()
    windows = token_windows(model, WORDS, 24)[:4]
    chosen = formats.targets(model)
    turned = made.online([t.path for t in chosen])
    with torch.no_grad():
        loss = float(_loss(model, made, windows, chosen, turned, formats, 1000))
        base = model.module(input_ids=windows).logits
        with model.edit(rounded(model, made, formats, method="x")):
            fused = float(kl_top(base, model.module(input_ids=windows).logits, 1000))
    assert fused == pytest.approx(loss, rel=0.05)


def test_learning_beats_its_start_hadamard_and_plain_rounding() -> None:
    model = _spiky()
    formats, windows = Formats(), token_windows(model, WORDS, 24)
    made = TransformSet(model, start="womi")
    before = [p.detach().clone() for p in made.rotations()]
    seen = learn(model, made, windows, formats, Learning(steps=25, watch=5))
    assert min(v for _, v in seen) < 0.9 * seen[0][1]
    assert all(not torch.equal(a, b) for a, b in zip(before, made.rotations(), strict=True))
    learned = _kl(model, rounded(model, made, formats, method="ostquant"))
    fixed = _kl(model, fit_rotate(model, WORDS, evaluate=0, context=24, tokens=64))
    plain = _kl(model, rounded(model, TransformSet(model, ()), formats, method="rtn", online=False))
    assert learned < fixed < plain


def test_the_method_saves_and_carries_its_price(tmp_path) -> None:
    model = _spiky()
    edit = fit_ostquant(
        model, WORDS, steps=2, tokens=96, context=24, evaluate=64, transforms=("res", "ov", "scale_up_down")
    )
    assert {m.name for m in edit.measurements} >= {"perplexity-ratio", "kl-to-base"}
    edit.save(tmp_path / "e", model)
    with model.edit(edit):
        want = _logits(model)
    with model.edit(actlas.Edit.load(tmp_path / "e", model)):
        assert torch.equal(_logits(model), want)


def test_gptq_on_the_rotated_model_beats_rounding() -> None:
    model = _spiky()
    common = {"bits": 3, "act_bits": 0, "online": False, "evaluate": 0, "context": 24, "tokens": 600}
    gptq = _kl(model, fit_rotate(model, WORDS, solver="gptq", **common))
    assert gptq < _kl(model, fit_rotate(model, WORDS, **common))


def test_bad_input_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="no transform 'ress'"):
        TransformSet(model, ("ress",))
    with pytest.raises(InputError, match="start is"):
        TransformSet(model, start="random")
    with pytest.raises(InputError, match="steps"):
        Learning(steps=0)
    with pytest.raises(InputError, match="online=False"):
        fit_rotate(model, WORDS, solver="gptq", context=24, tokens=64)
    with pytest.raises(InputError, match="solver"):
        fit_rotate(model, WORDS, solver="awq", context=24, tokens=64)
    with pytest.raises(ModelError, match="causal-lm"):
        fit_ostquant(tiny("bert"), WORDS)
    assert torch.equal(block_hadamard(block_hadamard(torch.eye(4), 4), 4), torch.eye(4))
