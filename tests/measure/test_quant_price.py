"""One protocol for quantised variants: against two passes of the likelihood engine, pairs, kept logits."""

from __future__ import annotations

import math

import pytest

from actlas.core.errors import InputError
from actlas.measure.likelihood import nll
from actlas.measure.quant_price import losses_of, output_prices, quant_prices
from actlas.quantize.rtn import fit_rtn
from tests.core.tiny import TEXTS, tiny

OPTIONS = {"tokens": 200, "context": 32}


def test_prices_are_those_of_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    coarse, fine = (fit_rtn(model, bits=b, group_size=16, evaluate=0) for b in (2, 4))
    found = quant_prices(model, TEXTS, {"2": coarse, "4": fine}, pairs=[("4", "2")], **OPTIONS)
    by = {(m.name, m.group["variant"], m.group.get("over")): m for m in found}
    base = nll(model, TEXTS, **OPTIONS)
    with model.edit(coarse):
        other = nll(model, TEXTS, against_base=True, **OPTIONS)
    assert other.divergence is not None
    kl = other.divergence.sum() / other.tokens.sum()
    assert by["kl-to-base", "2", None].value == pytest.approx(kl, rel=1e-9)
    rise = (other.nll.sum() - base.nll.sum()) / base.tokens.sum()
    assert by["perplexity-ratio", "2", None].value == pytest.approx(math.exp(rise), rel=1e-9)
    extra = by["extra-kl", "4", "2"]
    assert extra.value == pytest.approx(by["kl-to-base", "4", None].value - kl, abs=1e-12)
    assert extra.high is not None
    assert extra.high < 0
    assert by["bits-per-weight", "2", None].value == pytest.approx(2 + 24 / 16)

    # The same where the base's logits are too large to be kept.
    monkeypatch.setattr("actlas.measure.quant_price.KEEP_BYTES", 10)
    again = losses_of(model, TEXTS, {"2": coarse}, **OPTIONS)[1]["2"]
    assert again.divergence is not None
    assert again.divergence == pytest.approx(other.divergence)


def test_bad_input() -> None:
    model = tiny()
    edit = fit_rtn(model, bits=4, group_size=16, evaluate=0)
    with pytest.raises(InputError, match="'b' is not one of the variants; given a"):
        quant_prices(model, TEXTS, {"a": edit}, pairs=[("a", "b")], **OPTIONS)
    with pytest.raises(InputError, match="variants are wanted"):
        quant_prices(model, TEXTS, {}, **OPTIONS)
    kept: list = []  # type: ignore[type-arg]
    nll(model, TEXTS, keep_logits=kept, **OPTIONS)
    with pytest.raises(InputError, match="not of the same text"):
        nll(model, TEXTS[:2], against_base=True, base_logits=kept[:0], **OPTIONS)


def test_encoders_are_priced_by_their_outputs() -> None:
    model = tiny("bert")
    coarse, fine = (fit_rtn(model, bits=b, group_size=16, evaluate=0) for b in (2, 5))
    texts = [text[:40] for text in TEXTS]  # the model takes 64 tokens
    found = output_prices(model, texts, {"2": coarse, "5": fine}, pairs=[("5", "2")])
    by = {(m.name, m.group["variant"]): m for m in found}
    assert by["output-distance", "2"].value > by["output-distance", "5"].value > 0
    extra = by["extra-distance", "5"]
    assert extra.value == pytest.approx(by["output-distance", "5"].value - by["output-distance", "2"].value)
    assert extra.n == len(TEXTS)
    with pytest.raises(InputError, match="no items"):
        output_prices(model, [], {"2": coarse})
