"""split_at and bake against the plain model, on every kind of architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.edits import Add, Clamp, HeadScale, ProjectOut, Scale, SwapModule, Zero
from actlas.core.errors import InputError, ShapeError, SiteError
from actlas.core.model import Model
from actlas.core.splitting import split_at
from actlas.core.swap import LowRankLinear
from tests.core.families import BY_NAME

DECODERS = ("llama", "gpt2", "gpt-neox", "opt", "bloom", "falcon", "gemma2", "mixtral")


@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit"])
@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "attn.z", "mlp.out"])
def test_tail_of_head_is_the_model(name: str, kind: str) -> None:
    family = BY_NAME[name]
    model = family.model()
    inputs = family.inputs(model.module)
    whole = model.forward(inputs).logits
    head, tail = split_at(model, f"blocks.1.{kind}")
    state = head(inputs)
    torch.testing.assert_close(tail(state).logits, whole, rtol=0, atol=0)
    vector = torch.randn(state.activation.shape[-1], generator=torch.Generator().manual_seed(0))
    with model.edit(Add(f"blocks.1.{kind}", vector)):
        expected = model.forward(inputs).logits
    torch.testing.assert_close(tail(state, state.activation + vector).logits, expected, rtol=1e-5, atol=1e-5)
    assert all("forward" not in m.__dict__ for m in model.module.modules())


def test_tail_runs_many_edits_of_one_prompt_at_once() -> None:
    model = BY_NAME["llama"].model()
    ids = torch.tensor([[3, 4, 5, 6]])
    head, tail = split_at(model, "blocks.0.resid_post")
    state = head(ids)
    vector = torch.ones(32)
    strengths = torch.tensor([0.0, 1.0, 2.0])
    many = tail(state, state.activation + strengths[:, None, None] * vector).logits
    for i, s in enumerate(strengths):
        torch.testing.assert_close(many[i : i + 1], tail(state, state.activation + s * vector).logits)


def test_tail_carries_gradients() -> None:
    model = BY_NAME["llama"].model()
    head, tail = split_at(model, "blocks.1.resid_post")
    state = head(torch.tensor([[3, 4, 5]]))
    x = state.activation.clone().requires_grad_()
    tail(state, x, grad=True).logits[0, -1, 7].backward()
    trace = model.trace(torch.tensor([[3, 4, 5]]), "blocks.1.resid_post", grad=True)
    expected = trace.gradients(lambda logits: logits[0, -1, 7])["blocks.1.resid_post"]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_split_refuses_wrong_shapes_and_patterns() -> None:
    model = BY_NAME["llama"].model()
    with pytest.raises(SiteError, match="names 3 sites"):
        split_at(model, "blocks.*.resid_post")
    head, tail = split_at(model, "blocks.1.resid_post")
    state = head(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ShapeError, match="must be"):
        tail(state, torch.zeros(1, 3, 31))


def test_a_module_without_layout_is_split_by_writing() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = Model(net)
    head, tail = split_at(model, "module:1")
    state = head(torch.randn(2, 4))
    torch.testing.assert_close(tail(state), net(state.encoded["_args"][0]))
    torch.testing.assert_close(tail(state, state.activation * 2), net[2](state.activation * 2))


BAKED = [
    ("blocks.1.resid_post", lambda s: Add(s, torch.linspace(-1, 1, 32)) * 2),
    ("blocks.0.mlp.out", lambda s: Add(s, torch.linspace(-1, 1, 32))),
    ("blocks.0.attn.out", lambda s: Add(s, torch.linspace(-1, 1, 32))),
    (
        "blocks.0.mlp.out",
        lambda s: ProjectOut(s, torch.randn(2, 32, generator=torch.Generator().manual_seed(0))),
    ),
    ("blocks.*.attn.out", lambda s: ProjectOut(s, torch.linspace(-1, 1, 32)) * 0.5),
    ("blocks.1.attn.z", lambda s: HeadScale(s, {0: 0.0, 2: 3.0})),
    ("blocks.1.attn.z[head=1]", lambda s: Zero(s)),
    ("blocks.1.mlp.act", lambda s: Scale(s, 0.5)),
    ("blocks.1.mlp.act[channel=3-30]", lambda s: Zero(s)),
    ("blocks.1.mlp.act[channel=5]", lambda s: Scale(s, 9.0)),
    ("blocks.1.mlp.out", lambda s: Zero(s)),
]


@pytest.mark.parametrize("case", range(len(BAKED)))
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "opt", "bloom"])
def test_bake_equals_install(name: str, case: int) -> None:
    site, make = BAKED[case]
    family = BY_NAME[name]
    model = family.model()
    inputs = family.inputs(model.module)
    edit = make(site)
    before = model.forward(inputs).logits
    with model.edit(edit):
        expected = model.forward(inputs).logits
    edit.bake(model)
    baked = model.forward(inputs).logits
    torch.testing.assert_close(baked, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(baked, before, atol=1e-3)


def test_bake_refuses_what_is_not_exact_and_changes_nothing() -> None:
    model = BY_NAME["llama"].model()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    v = torch.ones(32)
    good = Add("blocks.0.mlp.out", v)
    for bad in (
        Add("blocks.0.resid_post", v).at(phase="prompt"),
        Add("blocks.0.resid_pre", v),
        Clamp("blocks.0.mlp.out", low=0.0),
        ProjectOut("blocks.0.resid_post", v),
        Add("blocks.0.mlp.act", torch.ones(48)),
    ):
        with pytest.raises(InputError, match="cannot bake"):
            (good + bad).bake(model)
    with pytest.raises(InputError, match="a norm stands between"):
        Add("blocks.0.mlp.out", v).bake(BY_NAME["gemma2"].model())
    after = dict(model.module.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_baked_swap_stays() -> None:
    model = BY_NAME["llama"].model()
    linear = model.module.model.layers[0].mlp.down_proj
    SwapModule("model.layers.0.mlp.down_proj", LowRankLinear.of(linear, 4)).bake(model)
    assert isinstance(model.module.model.layers[0].mlp.down_proj, LowRankLinear)
