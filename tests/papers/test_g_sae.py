"""g-sae: its criterion on invented numbers, pairing by frequency, and windows that are cut and spliced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actlas.core.edits import Replace
from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions.g_sae import g_sae, judge
from actlas.papers.reproductions.gradient_runs import CHOSEN, crossed, matched_by_frequency
from actlas.papers.reproductions.spliced_windows import SplicedWindows
from tests.core.tiny import tiny


def numbers(plain: tuple[float, float], gradient: tuple[float, float], dead: float, push: float) -> Measured:
    made = [
        Measurement(CHOSEN, sum(ends) / 2, "", 10, *ends, group={"reading": reading}, details={"beta": "0.1"})
        for reading, ends in (("plain", plain), ("gradient", gradient))
    ]
    for name, value in (
        ("dead features over beta 0, chosen beta", dead),
        ("logit change over beta 0's features", push),
    ):
        made.append(Measurement(name, value, "", 10, value - 0.1, value + 0.1))
    return Measured(made)


@pytest.mark.parametrize(
    ("plain", "gradient", "dead", "push", "verdict"),
    [
        ((-0.3, -0.1), (-0.2, -0.1), -0.5, 0.5, "holds"),
        ((-0.3, 0.1), (-0.2, -0.1), -0.5, 0.5, "partly"),
        ((-0.3, -0.1), (-0.2, -0.1), 0.5, 0.5, "partly"),
        ((-0.3, 0.1), (-0.2, 0.05), -0.5, 0.5, "not testable here"),
        ((0.1, 0.3), (0.1, 0.2), -0.5, 0.5, "does not hold here"),
    ],
)
def test_criterion(
    plain: tuple[float, float], gradient: tuple[float, float], dead: float, push: float, verdict: str
) -> None:
    assert verdict_of(judge(numbers(plain, gradient, dead, push))) == verdict


def test_crossed_interval_covers_both_sources() -> None:
    g = np.random.default_rng(0)
    seeds, windows = g.normal(size=(5, 1)), 0.1 * g.normal(size=(1, 40))
    found = crossed("x", seeds + windows, 0, {})
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    by_seeds, by_windows = crossed("x", seeds + 0 * windows, 0, {}), crossed("x", 0 * seeds + windows, 0, {})
    assert (
        found.high - found.low > 0.9 * (by_seeds.high - by_seeds.low) > 2 * (by_windows.high - by_windows.low)
    )


def test_latents_are_paired_by_frequency() -> None:
    a = torch.tensor([0.0, 0.1, 0.01, 0.001])
    b = torch.tensor([0.0012, 0.0, 0.09, 0.011, 0.5])
    pairs = matched_by_frequency(a, b, 3, seed=0)
    assert set(pairs) == {(1, 2), (2, 3), (3, 0)}
    assert len(matched_by_frequency(a, b, 2, seed=0)) == 2
    assert matched_by_frequency(a, torch.zeros(3), 2, seed=0) == []


class Page:
    def __init__(self, text: str) -> None:
        self.text = text


def test_spliced_windows_are_the_model() -> None:
    model, site = tiny("llama"), "blocks.1.resid_post"
    texts = [f"a page of text, number {i}, that goes on." for i in range(6)]
    pages = [Page("short"), *(Page(t) for t in texts)]
    windows = SplicedWindows(model, pages, site, count=6, length=20, massive=1e9)
    plain = windows.cross_entropy(None)
    for i, text in enumerate(texts):
        ids = model.tokenizer(text)["input_ids"][:20]
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
        logits = model.forward(given).logits[0, :-1]
        assert plain[i] == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))), rel=1e-4
        )
    new = torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(0))
    spliced = windows.cross_entropy(new.flatten(0, 1))
    with model.edit(Replace(site, new[3:4])):
        logits = model.forward(
            {"input_ids": torch.tensor([model.tokenizer(texts[3])["input_ids"][:20]])}
        ).logits[0, :-1]
    labels = torch.tensor(model.tokenizer(texts[3])["input_ids"][1:20])
    assert spliced[3] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    # the gradient is that of the summed loss: a small step changes it by step . gradient
    step = 2e-3 * torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(1))
    moved = windows.cross_entropy((windows.activations + step).flatten(0, 1)) - plain
    expected = (step * windows.gradients).sum((1, 2)).double().numpy() / 19
    np.testing.assert_allclose(moved, expected, rtol=0.1, atol=3e-5)
    norms = windows.activations.norm(dim=-1)
    strict = SplicedWindows(model, pages, site, count=6, length=20, massive=float(norms.min()) / 2)
    np.testing.assert_allclose(strict.cross_entropy(new.flatten(0, 1)), plain, rtol=1e-4)


def test_pushes_are_measured_at_one_token() -> None:
    model, site = tiny("llama"), "blocks.1.resid_post"
    windows = SplicedWindows(
        model, [Page("some text that is long enough")] * 2, site, count=2, length=20, massive=1e9
    )
    directions = torch.nn.functional.normalize(
        torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    )
    found = windows.logit_change(directions, 0.5, windows=1, at=9)
    ids = torch.tensor([model.tokenizer("some text that is long enough")["input_ids"][:10]])
    x = model.trace({"input_ids": ids}, site)[site].clone()
    x[0, -1] += 0.5 * directions[35]
    base = model.forward({"input_ids": ids}).logits[0, -1]
    with model.edit(Replace(site, x)):
        pushed = model.forward({"input_ids": ids}).logits[0, -1]
    assert found[35] == pytest.approx(float((pushed - base).abs().mean()), rel=1e-3)


@pytest.mark.slow
def test_it_runs() -> None:
    found = g_sae(
        seed=0, betas=(0.1,), attribution=True, seeds=2, tokens=1024, width=640, k=16, steps=20, batch=256,
        windows=4, length=48, features=4,
    )  # fmt: skip
    assert len(judge(Measured(found.measured))) == 4
