"""Agile-Quant: which sites get which format, log2 against even steps, the whole recipe, bad input."""

from pathlib import Path

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.quant_activations import QuantizeActivations
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import QuantLinear
from actlas.quantize.agile import ACT_KINDS, fit_agile, probabilities, static_acts
from tests.core.tiny import TEXTS, tiny

TEXTS = [t[:60] for t in TEXTS]
TEXT = TEXTS * 6
SMALL = {"tokens": 200, "context": 48, "evaluate": 0}


def test_every_kind_of_site_is_rounded_to_its_format() -> None:
    model = tiny("llama")
    formats = dict.fromkeys(ACT_KINDS, "int8-channel") | {
        "mlp.act": "int4-channel",
        "attn.v": "int8-tensor-sym",
    }
    made = static_acts(model, TEXTS, formats)
    assert [e.site for e in made] == [f"blocks.*.{k}" for k in formats]
    for edit in made:
        kind = edit.site.removeprefix("blocks.*.")
        assert edit.spec == formats[kind] and edit.scale is not None and len(edit.scale) == 3
        site = f"blocks.0.{kind}"
        x = torch.cat([model.trace(t, [site])[site][0] for t in TEXTS]).double().flatten(1)
        with model.edit(edit):
            got = torch.cat([model.trace(t, [site])[site][0] for t in TEXTS]).double().flatten(1)
        low, high = x.amin(0).clamp_max(0), x.amax(0).clamp_min(0)
        bits = 4 if kind == "mlp.act" else 8
        step = (high - low) / (2**bits - 1)
        if kind == "attn.v":
            step = x.abs().max() / 127
        assert bool(((got - x).abs() <= step * 0.51 + step * (edit.zero is not None) * 0.5).all())
        assert float((got - x).abs().max()) > 0


def test_queries_and_keys_are_rounded_before_rotary_positions() -> None:
    """A key's rounded value does not depend on where the token stands."""
    model = tiny("llama")
    edit = QuantizeActivations("blocks.0.attn.k", "int3-token-sym")
    with model.edit(edit):
        one, two = (model.trace(t, ["blocks.0.attn.k"])["blocks.0.attn.k"][0] for t in ("aXc", "bbbXc"))
    assert torch.allclose(one[-2], two[-2], atol=1e-6)


def test_log2_beats_even_steps_on_long_tails() -> None:
    """Attention of many keys lies below the first even step, and vanishes there."""
    p = (4 * torch.randn(1, 2, 50, 50, generator=torch.Generator().manual_seed(0))).softmax(-1)
    v = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(1))
    from actlas.core.edit import Here
    from actlas.core.sites import Site

    model = tiny("llama")
    site: Site = model.resolve("blocks.0.attn.pattern")[0]
    here = Here(site, None, None)  # type: ignore[arg-type]
    exact = p @ v
    errors = {
        s: float((probabilities(s).value(p, here) @ v - exact).square().mean())
        for s in ("log2-4", "int4-tensor")
    }
    assert errors["log2-4"] > 0
    even = probabilities("int4-tensor").value(p, here)
    assert torch.allclose(even, (p * 15).round() / 15, atol=1e-6)
    small = p < 1 / 64
    assert float(even[small].abs().max()) == 0
    assert float(probabilities("log2-4").value(p, here)[small & (p > 2**-14)].min()) > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_recipe(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    edit = fit_agile(model, TEXT, **{**SMALL, "evaluate": 100})
    layers, *acts = edit.parts()
    assert isinstance(layers, QuantEdit)
    for module in layers.modules.values():
        assert isinstance(module, QuantLinear) and module.spec.bits == 4 and not module.spec.symmetric
    assert acts[-1].spec == "log2-4" and all(a.spec == "int8-channel" for a in acts[:-1])  # type: ignore[attr-defined]
    kinds = {a.site.removeprefix("blocks.*.") for a in acts}  # type: ignore[attr-defined]
    assert kinds == {*ACT_KINDS, "attn.pattern"}
    loaded = Edit.load(edit.save(tmp_path / "e", model), model)
    with model.edit(edit), torch.no_grad():
        a = model.forward(model.encode(TEXTS[0])).logits
    with model.edit(loaded), torch.no_grad():
        b = model.forward(model.encode(TEXTS[0])).logits
    with torch.no_grad():
        base = model.forward(model.encode(TEXTS[0])).logits
    assert torch.equal(a, b) and not torch.equal(a, base)
    assert [m.name for m in edit.measurements][:1] == ["bits-per-weight"]
    with model.edit(edit):
        assert model.generate("Why", max_new_tokens=3).sequences.shape[1] == 6


def test_parts_can_be_left_out() -> None:
    model = tiny("llama")
    only = fit_agile(model, TEXT, weights="none", acts="", **SMALL)
    assert isinstance(only, QuantizeActivations) and only.spec == "log2-4"
    some = fit_agile(model, TEXT, weights="none", softmax="int4-tensor", acts="int8-tensor", **SMALL)
    assert not any(isinstance(p, QuantEdit) for p in some.parts())


def test_bad_input() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="nothing is to be rounded"):
        fit_agile(model, TEXT, weights="none", acts="", softmax="", **SMALL)
    with pytest.raises(InputError, match="'gptq' or 'none'"):
        fit_agile(model, TEXT, weights="awq", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no number format"):
        fit_agile(model, TEXT, acts="eight", **SMALL)
    with pytest.raises(InputError, match="take log2-4 or int4-tensor"):
        probabilities("int4-token-sym")
    with pytest.raises(InputError, match="no blocks"):
        static_acts(model, TEXTS, {"attn.keys": "int8-channel"})
    with pytest.raises(InputError, match="groups"):
        static_acts(model, TEXTS, "int8-g16")
    with pytest.raises(InputError, match="legal"):
        fit_agile(model, TEXT, group_size=20, **SMALL)
