"""Slots are found by what tensors do: kinds, indices, reasons, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.core.transforms import slots
from actlas.core.transforms.dataflow import probe_inputs
from actlas.core.transforms.norms import norm_use
from actlas.nn.ss_norm import SSNorm
from tests.core.families import BY_NAME


def _kinds(found) -> dict[str, int]:
    return {k: sum(s.kind == k for s in found) for k in ("norm", "head", "v_o", "up_down", "qk", "residual")}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("llama", {"norm": 6, "head": 1, "v_o": 3, "up_down": 3, "qk": 3, "residual": 1}),
        ("qwen3", {"norm": 6, "head": 1, "v_o": 3, "up_down": 3, "qk": 0, "residual": 1}),
        ("gpt2", {"norm": 6, "head": 1, "v_o": 3, "up_down": 0, "qk": 0, "residual": 1}),
        ("opt", {"norm": 6, "head": 1, "v_o": 3, "up_down": 3, "qk": 3, "residual": 1}),
        ("bert", {"norm": 1, "head": 1, "v_o": 3, "up_down": 0, "qk": 3, "residual": 0}),
        ("gemma2", {"norm": 6, "head": 1, "v_o": 3, "up_down": 3, "qk": 3, "residual": 0}),
    ],
)
def test_what_is_found(name, want) -> None:
    assert _kinds(slots(BY_NAME[name].model())) == want


def test_repeated_and_fused_heads_have_their_channels() -> None:
    llama = slots(BY_NAME["llama"].model()).reading("model.layers.1.self_attn.o_proj")
    head = torch.arange(8)
    assert llama.groups == 2 and torch.equal(llama.index, torch.cat([head, head, head + 8, head + 8]))
    phi = slots(BY_NAME["phi3"].model())  # queries, keys and values in one; gate and up in one
    fused = phi.reading("model.layers.0.self_attn.o_proj")
    assert torch.equal(fused.rows, torch.arange(48, 64)) and fused.groups == 2
    assert torch.equal(phi.reading("model.layers.0.mlp.down_proj").rows, torch.arange(48, 96))
    neox = slots(BY_NAME["gpt-neox"].model()).of("v_o")[0]  # interleaved: q, k, v of each head
    assert torch.equal(neox.rows, torch.cat([torch.arange(16, 24) + 24 * h for h in range(4)]))


def test_reasons_are_given() -> None:
    def said(name: str, kind: str) -> str:
        return " ".join(r.reason for r in slots(BY_NAME[name].model()).refused if r.kind == kind)

    assert "gelu; no scale passes" in said("bert", "up_down")
    assert "something else reads the value too" in said("bert", "norm")
    only = slots(BY_NAME["bert"].model()).of("norm")  # the last encoder norm, which no sum reads again
    assert [s.readers for s in only] == [("cls.predictions.transform.dense",)]
    assert "normalises before the product" in said("qwen3", "qk")
    assert "two linear maps of their own" in said("gpt2", "qk")
    assert "gelu writes to it" in said("whisper", "residual")
    assert "post_attention_layernorm writes to it" in said("gemma2", "residual")
    with pytest.raises(InputError, match="no up_down slot.*gelu"):
        slots(BY_NAME["bert"].model()).of("up_down")
    assert "gelu" in slots(BY_NAME["bert"].model()).why_not("bert.encoder.layer.0.output.dense")


class _Odd(nn.Module):
    """A network with names of its own: two branches that read one norm, one of them squared."""

    def __init__(self, squared: bool) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 10)
        self.c, self.d, self.squared = nn.Linear(10, 6, bias=False), nn.Linear(6, 6), squared

    def forward(self, x):
        h = self.a(x)
        y = self.c(torch.relu(self.b(h)))
        return y + self.d(h) + (h.square() if self.squared else 0)


def test_any_module_will_do_and_other_readers_are_noticed() -> None:
    x = {"x": torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(0))}
    found = slots(Model(_Odd(squared=False)), x)
    assert {(s.kind, s.producer, s.readers) for s in found if s.kind != "residual"} == {
        ("norm", "a", ("b", "d")),
        ("up_down", "b", ("c",)),
    }
    refused = slots(Model(_Odd(squared=True)), x)
    assert [s.producer for s in refused if s.kind == "norm"] == []
    assert any("something else reads" in r.reason for r in refused.refused)
    with pytest.raises(InputError, match="does not say what it reads"):
        slots(Model(_Odd(squared=False)))


def test_nothing_is_left_behind() -> None:
    model = BY_NAME["llama"].model()
    for p in list(model.module.parameters())[::2]:
        p.requires_grad_(False)
    wanted = [p.requires_grad for p in model.module.parameters()]
    before = model.module(**probe_inputs(model)).logits
    slots(model)
    assert [p.requires_grad for p in model.module.parameters()] == wanted
    assert torch.equal(model.module(**probe_inputs(model)).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert slots(model) is slots(model)


def test_how_norms_use_their_weights() -> None:
    llama = BY_NAME["llama"].model().module.model.norm
    gemma = BY_NAME["gemma"].model().module.model.norm
    assert (norm_use(llama).offset, norm_use(llama).centres, norm_use(llama).bias) == (0.0, False, False)
    assert (norm_use(gemma).offset, norm_use(gemma).centres) == (1.0, False)
    assert (norm_use(nn.LayerNorm(5)).centres, norm_use(nn.LayerNorm(5)).bias) == (True, True)
    assert norm_use(SSNorm(9)).single
    for other in (
        nn.Linear(5, 5),
        nn.Embedding(5, 5),
        nn.BatchNorm1d(5),
        nn.PReLU(5),
        nn.ReLU(),
        nn.GroupNorm(1, 5),
    ):
        assert norm_use(other) is None
