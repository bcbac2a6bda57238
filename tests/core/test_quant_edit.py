"""The quantised layer and the edit that puts it in: exact, reversible, saved as stored, and one with other edits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import actlas
from actlas.core.edits import Add
from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.hadamard import block_hadamard, largest_block, random_hadamard
from actlas.core.numbers import QuantParams, QuantSpec, encode, integers, params_of, quantize
from actlas.core.quant_edit import QuantEdit, already_on_grid
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.core.skip_inputs import SkipInputs
from tests.core.tiny import TEXTS, tiny

PATHS = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")


def linear(seed: int = 0, rows: int = 24, columns: int = 64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias)


def rows(n: int = 5, columns: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed))


def edit_of(model: actlas.Model, spec: str = "int4-g16", **options: object) -> QuantEdit:
    modules = dict(model.module.named_modules())
    return QuantEdit({p: QuantLinear.of(modules[p], spec, **options) for p in PATHS}, method="rtn")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    ["int4-g16", "int3-g32", "int2-channel-sym", "int8-channel-sym", "int4-g32-float", "fp8-e4m3-channel",
     "fp4-e2m1-g32", "nf4-g64", "mxfp4", "mxfp8", "nvfp4", "binary2-channel", "int16-channel-sym"],
)  # fmt: skip
def test_layer_multiplies_with_the_weight_that_it_stores(spec: str) -> None:
    layer = linear()
    quant = QuantLinear.of(layer, spec)
    parsed = QuantSpec.parse(spec)
    params = params_of(layer.weight.detach(), parsed).stored(parsed)
    torch.testing.assert_close(
        quant.weight, quantize(layer.weight.detach(), parsed, params), rtol=1e-6, atol=1e-7
    )
    x = rows()
    torch.testing.assert_close(quant(x), x @ quant.weight.T + layer.bias, rtol=1e-5, atol=1e-5)
    again = QuantLinear.from_config(quant.config())
    again.load_state_dict(quant.state_dict())
    assert torch.equal(again(x), quant(x)) and again.stored_bytes == quant.stored_bytes
    if parsed.bits <= 8:  # more are kept in whole words; zero points of few bits in a byte
        assert quant.bits_per_weight == pytest.approx(
            parsed.bits_per_weight(24, 64, params.scale_bits), abs=0.35
        )


def test_all_parts_together_are_the_formula() -> None:
    layer, x = linear(), rows()
    scale = torch.rand(64) + 0.5
    up, down = torch.randn(24, 3).half(), torch.randn(3, 64).half()
    outliers = torch.zeros(24, 64)
    outliers[3, 5] = 2.5
    quant = QuantLinear.of(
        layer, "int4-g16", weight=layer.weight * scale, input_scale=scale, low_rank=(up, down),
        outliers=outliers, rotate=16, act=ActQuant(QuantSpec.parse("int8-token-sym")),
    )  # fmt: skip
    h = x / scale
    rotated = quantize(block_hadamard(h, 16), QuantSpec.parse("int8-channel-sym"))
    want = rotated @ quant.dequantized().T + layer.bias + h @ (up.float() @ down.float()).T
    torch.testing.assert_close(quant(x), want, rtol=1e-4, atol=1e-4)
    assert quant.dequantized()[3, 5] == 2.5
    plain = QuantLinear.of(layer, "int8-g16", weight=layer.weight * scale, input_scale=scale, rotate=16)
    assert float((plain.weight - layer.weight).detach().abs().max()) < 5e-3


def test_integer_arithmetic_gives_the_same_sums() -> None:
    layer, x = linear(bias=False), rows()
    act, weight = QuantSpec.parse("int8-channel-sym"), QuantSpec.parse("int8-channel-sym")
    quant = QuantLinear.of(layer, weight, act=ActQuant(act))
    px = params_of(x, act)
    xi = integers(encode(x, act, px), act, px)
    wi = integers(quant.unpacked, weight, quant.params)
    whole = (xi.long() @ wi.long().T).double() * px.scale.double() * quant.params.scale.double().T
    torch.testing.assert_close(quant(x).double(), whole, rtol=1e-5, atol=1e-5)


def test_static_ranges_of_columns_and_of_the_tensor() -> None:
    layer, x = linear(), rows()
    columns = x.abs().amax(0, keepdim=True) / 127
    spec = QuantSpec.parse("int8-channel-sym")
    quant = QuantLinear.of(layer, "int8-channel-sym", act=ActQuant(spec, QuantParams(columns)))
    want = (x / columns).round().clamp(-128, 127) * columns
    torch.testing.assert_close(quant(x), want @ quant.weight.T + layer.bias, rtol=1e-5, atol=1e-5)
    one = QuantLinear.of(
        layer,
        "int8-channel-sym",
        act=ActQuant(QuantSpec.parse("int8-tensor-sym"), QuantParams(torch.tensor([[0.02]]))),
    )
    want = (x / 0.02).round().clamp(-128, 127) * 0.02
    torch.testing.assert_close(one(x), want @ quant.weight.T + layer.bias, rtol=1e-5, atol=1e-5)


def test_edit_is_taken_back_bit_for_bit_and_saved(tmp_path: Path) -> None:
    model = tiny()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    objects = dict(model.module.named_modules())
    edit = edit_of(model)
    gain = model.module.model.norm.weight.detach() * 2
    both = QuantEdit(edit.modules, {"model.norm.weight": gain}, method="rtn", note="test")
    plain = model.logits(TEXTS[0])
    with model.edit(both):
        changed = model.logits(TEXTS[0])
    assert not torch.equal(plain, changed)
    assert torch.equal(model.logits(TEXTS[0]), plain)
    assert dict(model.module.named_modules()) == objects
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert all(m._dense is None for m in both.modules.values())
    both.save(tmp_path / "edit", model)
    loaded = actlas.Edit.load(tmp_path / "edit", model)
    assert (
        isinstance(loaded, QuantEdit) and loaded.method == "rtn" and loaded.stored_bytes == both.stored_bytes
    )
    with model.edit(loaded):
        assert torch.equal(model.logits(TEXTS[0]), changed)
    size = sum(f.stat().st_size for f in (tmp_path / "edit").rglob("*.safetensors"))
    assert size < both.stored_bytes + 20_000


def test_a_failed_installation_changes_nothing() -> None:
    model = tiny()
    edit = edit_of(model)
    wrong = QuantEdit({**edit.modules, "model.layers.0.mlp.sideways_proj": edit.modules[PATHS[0]]})
    misfit = QuantEdit({**edit.modules, "model.layers.0.mlp.up_proj": edit.modules[PATHS[0]]})
    shape = QuantEdit(edit.modules, {"model.norm.weight": torch.ones(3)})
    plain = model.logits(TEXTS[0])
    for bad, kind, said in ((wrong, InputError, "sideways_proj"), (misfit, ShapeError, "up_proj is"), (shape, ShapeError, "model.norm.weight is")):  # fmt: skip
        with pytest.raises(kind, match=said), model.edit(bad):
            pass
        assert torch.equal(model.logits(TEXTS[0]), plain)


def test_steering_skipping_and_reading_work_on_quantised_layers_in_any_order() -> None:
    model = tiny()
    quant = edit_of(model)
    d = model.module.config.hidden_size
    steer = Add("blocks.0.resid_post", torch.ones(d))
    skip = SkipInputs("blocks.0.mlp.act", threshold=0.01)
    results = []
    for edits in ((quant, steer, skip), (steer, skip, quant), (skip, quant, steer)):
        with model.edit(*edits):
            results.append(model.logits(TEXTS[0]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with model.edit(steer, skip), model.edit(quant):
        assert torch.equal(model.logits(TEXTS[0]), results[0])
    assert not torch.equal(model.logits(TEXTS[0]), results[0])
    with model.edit(quant):
        trace = model.trace(TEXTS[0], "blocks.1.attn.q")
        both = model.trace(TEXTS[0], "blocks.1.attn_norm")
        q = quant.modules[PATHS[1]](both["blocks.1.attn_norm"])
        torch.testing.assert_close(trace["blocks.1.attn.q"].flatten(), q.flatten())


def test_a_tied_head_is_untied_only_while_it_has_a_weight_of_its_own() -> None:
    model = tiny()
    module = model.module
    module.lm_head.weight = module.model.embed_tokens.weight
    table = module.model.embed_tokens.weight
    edit = QuantEdit(parameters={"lm_head.weight": table.detach() * 2})
    plain = model.logits(TEXTS[0])
    with model.edit(edit):
        torch.testing.assert_close(model.logits(TEXTS[0]), plain * 2)
        assert module.model.embed_tokens.weight is table
    assert module.lm_head.weight is table


def test_baking_writes_the_same_function() -> None:
    model = tiny()
    edit = edit_of(model)
    with model.edit(edit):
        want = model.logits(TEXTS[0])
    edit.bake(model)
    torch.testing.assert_close(model.logits(TEXTS[0]), want, rtol=1e-5, atol=1e-5)
    rounding = edit_of(tiny(), act=ActQuant(QuantSpec.parse("int8-token-sym")))
    with pytest.raises(InputError, match="changes its inputs"):
        rounding.bake(tiny())


def test_generate_with_a_cache_takes_it() -> None:
    model = tiny()
    with model.edit(edit_of(model)):
        text = model.generate(TEXTS[0], max_new_tokens=5)
    assert text


def test_grids_are_detected() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    assert already_on_grid(w) is None
    on = quantize(w, QuantSpec.parse("int4-g32-float"))
    assert already_on_grid(on) == (4, 32)


def test_bad_layers_are_named() -> None:
    layer = linear(columns=72)
    with pytest.raises(
        InputError,
        match=r"down_proj has rows of 72, which groups of 64 do not divide; legal sizes are none, or channel",
    ):
        QuantLinear.of(layer, "int4-g64", where="down_proj")
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="down_proj holds NaN"):
        QuantLinear.of(layer, "int4-channel", where="down_proj")
    with pytest.raises(InputError, match="nothing to change"):
        QuantEdit()
    with pytest.raises(InputError, match="no strength"):
        edit_of(tiny()) * 2


def test_hadamard_blocks() -> None:
    x = rows()
    h = torch.tensor([[1.0]])
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    torch.testing.assert_close(block_hadamard(x, 16), (x.view(5, 4, 16) @ h / 4).view(5, 64))
    torch.testing.assert_close(block_hadamard(block_hadamard(x, 32), 32), x)
    r = random_hadamard(576)
    torch.testing.assert_close(r @ r.T, torch.eye(576, dtype=torch.float64))
    assert largest_block(576) == 64 and largest_block(1536) == 128
    with pytest.raises(InputError, match="the largest is 64"):
        block_hadamard(torch.zeros(1, 576), 128)
    with pytest.raises(InputError, match="power of two"):
        block_hadamard(x, 12)
