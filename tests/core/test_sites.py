"""The site grammar: names, patterns, selectors, aliases, and what is said about wrong ones."""

from __future__ import annotations

import pytest
from torch import nn

from actlas.core.errors import SiteError
from actlas.core.model import Model
from tests.core.families import BY_NAME


@pytest.fixture(scope="module")
def model() -> Model:
    return BY_NAME["llama"].model()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.1.resid_post", ["blocks.1.resid_post"]),
        ("blocks.-1.resid_post", ["blocks.2.resid_post"]),
        ("blocks.*.resid_pre", ["blocks.0.resid_pre", "blocks.1.resid_pre", "blocks.2.resid_pre"]),
        ("blocks.1-2.mlp.act", ["blocks.1.mlp.act", "blocks.2.mlp.act"]),
        ("blocks.0,2.mlp.act", ["blocks.0.mlp.act", "blocks.2.mlp.act"]),
        ("blocks.1.attn.[qkv]", None),
        ("blocks.0.mlp.*", [f"blocks.0.mlp.{k}" for k in ("gate", "up", "act", "out")]),
        ("embed", ["embed"]),
        ("blocks.1.hook_resid_pre", ["blocks.1.resid_pre"]),
        ("blocks.1.attn.hook_z", ["blocks.1.attn.z"]),
        ("blocks.1.mlp.hook_pre", ["blocks.1.mlp.gate"]),
        ("blocks.1.mlp.hook_post", ["blocks.1.mlp.act"]),
        ("ln_final.hook_normalized", ["final_norm"]),
        ("blocks.1.attn.z[head=3]", ["blocks.1.attn.z[head=3]"]),
        ("blocks.*.attn.pattern[head=0-1]", [f"blocks.{i}.attn.pattern[head=0,1]" for i in range(3)]),
        ("module:model.layers.0.mlp", ["module:model.layers.0.mlp"]),
        ("module:model.layers.0.mlp.input", ["module:model.layers.0.mlp.input"]),
        ("module:lm_head.output", ["module:lm_head"]),
    ],
)
def test_patterns(model: Model, pattern: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(SiteError, match="selector"):
            model.resolve(pattern)
        return
    assert [s.name for s in model.resolve(pattern)] == names


def test_alias_of_an_ungated_mlp_is_its_up_projection() -> None:
    assert BY_NAME["gpt2"].model().resolve("blocks.0.mlp.hook_pre")[0].name == "blocks.0.mlp.up"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.1.resid_pots", "did you mean blocks.1.resid_post"),
        ("blocks.9.resid_post", "it has blocks 0 to 2, not 9"),
        ("blocks.1.moe.router", "the MLP is dense"),
        ("blocks.1.cross_attn.z", "no cross-attention"),
        ("blocks.1.attn.z[head=4]", "head 4 does not exist; this site has 4"),
        ("blocks.1.resid_post[head=0]", "cannot be selected by 'head'"),
        ("blocks.1.resid_post[channel=32]", "this site has 32"),
        ("blocks.1.attn.z[head=x]", "cannot read the selector"),
        ("module:model.layers.0.mpl", "did you mean"),
        ("", "no site"),
    ],
)
def test_wrong_names_say_what_would_be_right(model: Model, name: str, says: str) -> None:
    with pytest.raises(SiteError, match=says) as caught:
        model.resolve(name)
    assert "\n" not in str(caught.value)


def test_two_towers_need_their_name() -> None:
    model = BY_NAME["t5"].model()
    with pytest.raises(SiteError, match="towers encoder and decoder"):
        model.resolve("blocks.0.resid_post")
    assert len(model.resolve("encoder.blocks.*.resid_post")) == 3
    assert model.resolve("decoder.blocks.-1.cross_attn.z")[0].block == 2


def test_blocks_of_a_mixture_differ() -> None:
    model = BY_NAME["qwen2-moe"].model()
    assert [s.block for s in model.resolve("blocks.*.moe.router")] == [0, 2]
    assert [s.block for s in model.resolve("blocks.*.mlp.act")] == [1]
    with pytest.raises(SiteError, match="mixture of experts"):
        model.resolve("blocks.0.mlp.act")


def test_models_without_a_layout_have_module_sites() -> None:
    model = Model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert [s.name for s in model.sites()] == ["module:0", "module:1"]
    with pytest.raises(SiteError, match="no layout"):
        model.resolve("blocks.0.resid_post")


def test_order_follows_the_forward_pass(model: Model) -> None:
    sites = [s for s in model.sites() if s.absent is None]
    assert sorted(sites, key=lambda s: s.order) == sites
