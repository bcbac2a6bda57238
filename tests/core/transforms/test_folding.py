"""Every fold leaves the function as it is, over architecture families, and is taken back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import actlas
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.transforms import (
    Folding,
    fold_norms,
    fold_scale,
    fold_shift,
    rotate_residual,
    rotate_v_o,
    slots,
)
from actlas.core.transforms.probing import final_output
from tests.core.families import BY_NAME

DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gpt2",
    "opt",
    "whisper",
    "phi3",
    "gpt-neox",
    "falcon-new",
    "t5-gated",
)
ALL = (*DECODERS, "bert", "bloom", "t5", "vit", "gemma2", "mixtral")


def _model(name: str) -> actlas.Model:
    """Return a family's model whose norms and biases all differ from 1 and 0."""
    model = BY_NAME[name].model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.module.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def _logits(model: actlas.Model, name: str) -> Tensor:
    with torch.no_grad():
        return final_output(model.module(**BY_NAME[name].inputs(model.module))).double()


def _moved(model: actlas.Model, name: str, fold) -> float:
    before = _logits(model, name)
    held = {n: (p, p.detach().clone()) for n, p in model.module.named_parameters(remove_duplicate=False)}
    with model.edit(fold.edit()):
        after = _logits(model, name)
        changed = dict(model.module.named_parameters(remove_duplicate=False))
    for n, p in model.module.named_parameters(remove_duplicate=False):
        assert p is held[n][0] and torch.equal(p, held[n][1])
    assert torch.equal(_logits(model, name), before)
    assert any(n not in changed or not torch.equal(changed[n], held[n][1]) for n in held)
    return float((after - before).abs().max() / before.abs().max())


def _scale(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    sign = torch.randn(n, generator=g, dtype=torch.float64).sign()
    return torch.exp(0.7 * torch.randn(n, generator=g, dtype=torch.float64)) * sign


def _rotation(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


@pytest.mark.parametrize("name", ALL)
def test_a_scale_of_every_slot_changes_nothing(name: str) -> None:
    model = _model(name)
    found = slots(model)
    folding = Folding(model, found, untie=True)
    kinds = set()
    for i, slot in enumerate(s for s in found if s.kind != "residual"):
        s = _scale(slot.width, i)
        # a relu passes on positive factors only
        relu = slot.kind == "up_down" and name in ("opt", "t5")
        folding.scale(slot, s.abs() if relu else s)
        kinds.add(slot.kind)
    assert {"v_o"} <= kinds
    assert _moved(model, name, folding.fold()) < 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_folding_norms_and_rotating_the_stream_changes_nothing(name: str) -> None:
    model = _model(name)
    assert _moved(model, name, fold_norms(model, untie=True)) < 1e-4
    rotation = _rotation(32)
    stream = [s for s in slots(model) if s.kind == "residual"]
    assert stream
    fold = rotate_residual(model, rotation, slot=stream[-1], untie=True)
    assert _moved(model, name, fold) < 1e-4
    first = stream[-1].producer
    before = _norm_input(model, name, first)
    with model.edit(fold.edit()):
        after = _norm_input(model, name, first)
    centre = stream[-1].norm.centres
    want = (before - before.mean(-1, keepdim=True) if centre else before) @ rotation
    torch.testing.assert_close(after, want, atol=1e-4, rtol=1e-4)


def _norm_input(model: actlas.Model, name: str, path: str) -> Tensor:
    seen = []
    module = model.module.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
    _logits(model, name)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma", "gpt2", "opt", "bert", "whisper", "bloom", "phi3", "vit"]
)
def test_rotating_value_heads_changes_nothing(name: str) -> None:
    model = _model(name)
    for slot in slots(model).of("v_o"):
        head = slot.width // slot.groups
        assert head == (8 if name != "none" else 0)
        one = rotate_v_o(model, slot, _rotation(head))
        assert _moved(model, name, one) < 1e-4
    many = torch.stack([_rotation(head, i) for i in range(slot.groups)])
    assert _moved(model, name, rotate_v_o(model, slot, many)) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "opt", "whisper", "gpt-neox"])
def test_a_shift_changes_nothing(name: str) -> None:
    model = _model(name)
    folding = Folding(model, untie=True)
    for i, slot in enumerate(folding.slots.of("norm", "head", "v_o")):
        folding.shift(slot, _scale(slot.width, i))
    assert _moved(model, name, folding.fold()) < 1e-4


def test_an_rms_norm_gets_a_bias_only_when_asked() -> None:
    model = _model("gemma")
    slot = slots(model).of("norm")[0]
    with pytest.raises(InputError, match="has no bias"):
        fold_shift(model, slot, torch.ones(32))
    fold = fold_shift(model, slot, torch.ones(32), add_bias=True)
    assert slot.producer in fold.modules
    assert _moved(model, "gemma", fold) < 1e-4


def test_everything_at_once_and_saved(tmp_path) -> None:
    model = _model("gpt2")
    folding = Folding(model, untie=True)
    folding.rotate_residual(_rotation(32))
    for slot in folding.slots.of("v_o"):
        folding.rotate_v_o(slot, _rotation(8)).scale(slot, _scale(slot.width))
    for slot in folding.slots.of("norm"):
        folding.scale(slot, _scale(slot.width))
    fold = folding.fold()
    assert _moved(model, "gpt2", fold) < 1e-4
    fold.edit().save(tmp_path / "fold", model)
    loaded = actlas.Edit.load(tmp_path / "fold", model)
    with model.edit(fold.edit()):
        want = _logits(model, "gpt2")
    with model.edit(loaded):
        assert torch.equal(_logits(model, "gpt2"), want)


def test_untied_rotary_pairs_would_change_the_scores() -> None:
    model = _model("llama")
    slot = slots(model).of("qk")[0]
    assert slot.width == 8 and slot.groups == 2  # two heads of eight channels, in pairs
    assert torch.equal(slot.tied[:8], torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    folding = Folding(model)
    folding.scale_rows("model.layers.0.self_attn.q_proj", 1 / _scale(16)[slot.index])
    folding.scale_rows("model.layers.0.self_attn.k_proj", _scale(16))
    with pytest.raises(InputError, match="would change the output"):
        folding.fold()


def test_gradients_pass_through_a_fold() -> None:
    model = _model("llama")
    rotation = _rotation(32).float().requires_grad_()
    folding = Folding(model, untie=True, dtype=torch.float32).rotate_residual(rotation)
    folding.values["model.layers.0.self_attn.q_proj.weight"].sum().backward()
    assert rotation.grad is not None and bool(rotation.grad.any())


def test_bad_input_is_refused_by_name() -> None:
    model = _model("llama")
    slot = slots(model).reading("model.layers.0.mlp.down_proj")
    with pytest.raises(ShapeError, match=r"takes \[48\]"):
        fold_scale(model, slot, torch.ones(3))
    with pytest.raises(InputError, match="zeros"):
        fold_scale(model, slot, torch.zeros(48))
    with pytest.raises(NonFiniteError):
        fold_scale(model, slot, torch.full((48,), float("inf")))
    with pytest.raises(InputError, match="not orthogonal"):
        rotate_residual(model, torch.ones(32, 32), untie=True)
    with pytest.raises(InputError, match="norm and v_o"):
        fold_shift(model, slot, torch.ones(48))
    with pytest.raises(InputError, match="is not read by linear maps alone"):
        rotate_residual(_model("bert"), _rotation(32))
    with pytest.raises(InputError, match="writes to it"):
        rotate_residual(_model("gemma2"), _rotation(32))


def test_a_shared_embedding_is_untied_only_when_allowed() -> None:
    model = _model("gpt2")
    assert model.module.lm_head.weight is model.module.transformer.wte.weight
    with pytest.raises(InputError, match="untie=True"):
        fold_norms(model)
    assert _moved(model, "gpt2", fold_norms(model, untie=True)) < 1e-4


@pytest.mark.slow
def test_smollm2_keeps_its_logits() -> None:
    model = actlas.load("smollm2")
    ids = torch.randint(10, 49000, (1, 24), generator=torch.Generator().manual_seed(0))
    folding = Folding(model, untie=True).rotate_residual(_rotation(576))
    for i, slot in enumerate(s for s in folding.slots if s.kind in ("v_o", "up_down", "qk")):
        if slot.kind == "v_o":
            folding.rotate_v_o(slot, _rotation(64, i))
        folding.scale(slot, _scale(slot.width, i))
    fold = folding.fold()
    with torch.no_grad():
        before = model.module(input_ids=ids).logits
        with model.edit(fold.edit()):
            after = model.module(input_ids=ids).logits
        assert torch.equal(model.module(input_ids=ids).logits, before)
    assert float((after - before).abs().max()) < 1e-3 * float(before.abs().max())
