"""AdaRound: hardening by brute force, objectives by their definitions, the text method end to end."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from actlas.core.errors import InputError, NonFiniteError
from actlas.core.numbers import QuantSpec, decode, quantize
from actlas.quantize.adaround import kfac_losses, learn_rounding, output_error
from actlas.quantize.soft_layers import SoftLayer, rounding_share, start_of


def layer(out: int = 2, columns: int = 4, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, out)


def test_start_is_the_float_weight_within_its_range() -> None:
    soft = SoftLayer(layer(6, 32), "int4-g16", search=False)
    soft.mode = "soft"
    inside = (soft.weight - soft.matrix).abs() < 1e-5
    assert (
        float(inside.double().mean()) > 0.9
    )  # the largest entry of a group may round out of the 16-bit range
    share = torch.linspace(0, 0.999, 50)
    assert torch.allclose(rounding_share(start_of(share)), share, atol=1e-5)


@pytest.mark.parametrize("name", ["int4-channel", "int3-g16", "int4-channel-sym", "int4-g16-float"])
def test_nearest_is_the_core_grid(name: str) -> None:
    soft = SoftLayer(layer(5, 32), name, search=False)
    soft.mode = "nearest"
    want = quantize(soft.matrix.detach(), soft.spec, soft.params[0])
    assert torch.allclose(soft.weight, want, atol=1e-6)
    soft.nearest()
    soft.mode = "hard"
    assert torch.allclose(soft.weight, want, atol=1e-6)


def test_export_is_the_hard_weight() -> None:
    soft = SoftLayer(layer(5, 32), "int3-g16")
    soft.mode = "hard"
    with torch.no_grad():
        soft.v.copy_(torch.randn_like(soft.v))
    made = soft.export()
    assert torch.equal(made.weight, decode(made.unpacked, made.spec, made.params))  # type: ignore[attr-defined]
    assert torch.allclose(made.weight, soft.weight.detach(), atol=1e-6)  # type: ignore[arg-type]
    x = torch.randn(3, 32)
    assert torch.allclose(made(x), soft(x).detach(), atol=1e-5)


def test_finds_nearly_the_best_of_all_roundings() -> None:
    """For 2 x 6 weights all 2^6 roundings of a row are tried."""
    torch.manual_seed(1)
    linear = layer(2, 6, seed=1)
    x = torch.randn(200, 6) @ torch.randn(6, 6)  # correlated inputs, so that nearest is not best
    soft = SoftLayer(linear, "int3-channel", search=False)
    a = x.T @ x / len(x)
    loss, exact = kfac_losses(soft, a)
    found = learn_rounding({"l": soft}, loss, exact, iterations=1000, lr=2e-2, relative=True)
    place = ((soft.matrix - soft.offset) / soft.s).detach().floor()
    best = 0.0
    for row in range(2):
        errors = []
        for up in itertools.product((0.0, 1.0), repeat=6):
            code = (place[row] + torch.tensor(up) + soft.z[row]).clamp(0, 7)
            d = soft.s[row] * (code - soft.z[row]) - soft.matrix[row].detach()
            errors.append(float((x @ d).square().mean()))
        best += min(errors)
    assert found.kept and found.learned <= found.nearest
    assert best <= found.learned * 1.0001 <= 1.3 * best
    assert best < 0.8 * found.nearest


def test_kfac_is_its_trace_and_the_layer_error() -> None:
    torch.manual_seed(0)
    linear = layer(3, 5)
    x, g = torch.randn(40, 5), torch.randn(40, 3)
    soft = SoftLayer(linear, "int2-channel", search=False)
    soft.mode = "nearest"
    d = (soft.weight - soft.matrix).detach().double()
    a, f = (x.T @ x / 40).double(), (g.T @ g / 40).double()
    _, plain = kfac_losses(soft, a)
    assert plain() == pytest.approx(float((x.double() @ d.T).square().sum(1).mean()), rel=1e-4)
    _, fisher = kfac_losses(soft, a, f)
    f = f / f.diagonal().mean()
    assert fisher() == pytest.approx(float(torch.trace(f @ d @ a @ d.T)), rel=1e-4)
    blocks = torch.stack([a[:2, :2], a[2:4, 2:4]])
    grouped = SoftLayer(nn.Conv2d(4, 6, 1, groups=2), "int2-channel", search=False)
    grouped.mode = "nearest"
    d = (grouped.weight - grouped.matrix).detach().double()
    want = sum(
        float(torch.trace(d[3 * i : 3 * i + 3] @ blocks[i] @ d[3 * i : 3 * i + 3].T)) for i in range(2)
    )
    assert kfac_losses(grouped, blocks)[1]() == pytest.approx(want, rel=1e-4)


def test_kfac_gradient_is_that_of_the_trace() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(40, 5), torch.randn(40, 3)
    soft = SoftLayer(layer(3, 5), "int2-channel", search=False)
    soft.mode = "soft"
    soft.v.requires_grad_(True)
    with torch.no_grad():
        soft.v.add_(0.5 * torch.randn_like(soft.v))
    a, f = x.T @ x / 40, g.T @ g / 40
    loss, _ = kfac_losses(soft, a, f)
    got = torch.autograd.grad(loss(torch.Generator()), soft.v)[0]
    d = soft.weight - soft.matrix
    want = torch.autograd.grad(torch.trace(f / f.diagonal().mean() @ d @ a @ d.T), soft.v)[0]
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-6)


def test_fisher_diag_weighs_by_squared_gradients() -> None:
    a, b, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    assert float(output_error(a, b)) == 5
    assert float(output_error(a, b, g)) == pytest.approx((9 * 1 + 1 * 4) / 5)


def test_worse_than_nearest_is_taken_back() -> None:
    soft = SoftLayer(layer(), "int3-channel", search=False)
    wrong = lambda g: -(soft.weight - soft.matrix).square().sum()  # noqa: E731
    found = learn_rounding(
        {"l": soft}, wrong, lambda: float((soft.weight - soft.matrix).square().sum()), iterations=50, lr=0.1
    )
    assert not found.kept and found.learned > found.nearest
    want = quantize(soft.matrix.detach(), soft.spec, soft.params[0])
    assert torch.allclose(soft.weight, want, atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="even steps"):
        SoftLayer(layer(), "nf4-channel")
    with pytest.raises(InputError, match="groups of 3"):
        SoftLayer(layer(), QuantSpec(4, group_size=3))
    with pytest.raises(InputError, match="ReLU"):
        SoftLayer(nn.ReLU(), "int4-channel")
    bad = layer()
    with torch.no_grad():
        bad.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        SoftLayer(bad, "int4-channel")
    soft = SoftLayer(layer(), "int4-channel")
    with pytest.raises(InputError, match="iterations"):
        learn_rounding({"l": soft}, lambda g: torch.zeros(()), lambda: 0.0, iterations=0)
    with pytest.raises(NonFiniteError, match="objective"):
        learn_rounding({"l": soft}, lambda g: soft.v.sum() * torch.nan, lambda: 0.0, iterations=3)
    with pytest.raises(InputError, match="factors"):
        kfac_losses(soft, torch.eye(3))


@pytest.mark.parametrize("by", ["layer", "block"])
def test_text_model(by: str) -> None:
    from actlas.papers.reproductions.byte_models import byte_model
    from actlas.quantize.adaround_text import fit_adaround
    from actlas.quantize.rtn import fit_rtn

    model = byte_model("silu", 0, width=32, layers=2)
    text = ["The whale swam by the ship, and the captain cried out to the men. " * 4] * 8
    edits = {
        "adaround": fit_adaround(
            model,
            text,
            bits=2,
            group_size=32,
            by=by,
            iterations=60,
            lr=2e-2,
            tokens=512,
            context=64,
            evaluate=0,
        ),
        "rtn": fit_rtn(model, text, bits=2, group_size=32, search=True, evaluate=0),
    }
    ids = model.encode(text[0][:64])
    errors = {}
    want = model.logits(ids)
    for name, edit in edits.items():
        with model.edit(edit):
            errors[name] = float((model.logits(ids) - want).square().mean())
    assert torch.equal(model.logits(ids), want)
    assert errors["adaround"] < 0.8 * errors["rtn"]
    assert len(edits["adaround"].modules) == 14  # type: ignore[attr-defined]


def test_text_model_bad_choice() -> None:
    from actlas.papers.reproductions.byte_models import byte_model
    from actlas.quantize.adaround_text import fit_adaround

    with pytest.raises(InputError, match="by layer or by block"):
        fit_adaround(byte_model("silu", 0, width=32, layers=1), ["text"], by="model")  # type: ignore[arg-type]
