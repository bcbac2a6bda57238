"""Activation codes against brute force and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from actlas.core.errors import InputError, NonFiniteError, SiteError
from actlas.measure.code_measures import (
    code_categorisation,
    hamming,
    linear_region_diameter,
    nearest,
    redundancy,
    redundancy_ratio,
)
from actlas.measure.codes import ActivationCode, unpack


def network(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 5), nn.ReLU6(), nn.Linear(5, 3)
    ).double()


class Functional(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.net[0](x))
        return self.net[4](nn.functional.relu6(self.net[2](x), inplace=True))


def test_bits_are_the_signs_of_the_rectifiers() -> None:
    net, x = network(), torch.randn(37, 4, dtype=torch.float64)
    first = net[0](x) > 0
    second = net[2](torch.relu(net[0](x))) > 0
    expected = torch.cat([first, second], 1).numpy()
    code = ActivationCode(net, batch=10)
    assert (code.bits(x) == expected).all() and code.width == 17
    assert (ActivationCode(Functional(net)).bits(x) == expected).all()
    assert (ActivationCode(net, ["0", "2"], 0.0).bits(x) == expected).all()


def test_constant_units_are_dropped_on_the_fitted_inputs_only() -> None:
    net, x = network(), torch.randn(20, 4, dtype=torch.float64)
    with torch.no_grad():
        net[0].bias[0], net[0].bias[1] = 100.0, -100.0
    whole = ActivationCode(net).bits(x)
    code = ActivationCode(net, batch=7).fit(x)
    varying = np.flatnonzero(whole.any(0) & ~whole.all(0))
    assert (code.kept == varying).all() and 0 not in varying and 1 not in varying
    assert (code.bits(x) == whole[:, varying]).all()


def test_redundancy_counts_repeats() -> None:
    bits = np.array([[1, 0, 1], [1, 0, 1], [0, 0, 1], [1, 0, 1]], dtype=bool)
    assert redundancy_ratio(bits) == 0.5
    assert redundancy_ratio(np.packbits(bits, axis=1)) == 0.5
    measured = redundancy(bits)
    assert measured.value == 0.5 and measured.low < 0.5 < measured.high
    with pytest.raises(InputError):
        redundancy_ratio(bits[:0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_hamming_is_brute_force(width: int, n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((n, width)) < 0.5, rng.random((m, width)) < 0.5
    pa, pb = np.packbits(a, axis=1), np.packbits(b, axis=1)
    assert (unpack(pa, width) == a).all()
    assert (hamming(pa, pb) == (a[:, None] != b[None]).sum(-1)).all()


def test_categorisation_agrees_with_sklearn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    centres = rng.random((3, 40)) < 0.5
    labels = rng.integers(0, 3, 240)
    bits = centres[labels] ^ (rng.random((240, 40)) < 0.15)
    packed = np.packbits(bits, axis=1)
    train, test = packed[:160], packed[160:]
    found = {m.name: m for m in code_categorisation(train, labels[:160], test, labels[160:], width=40)}
    assert set(found) == {
        "code-kmeans-accuracy", "code-kmeans-purity", "code-knn-accuracy", "code-logistic-accuracy",
    }  # fmt: skip
    assert all(m.value > 0.95 for m in found.values())
    other = KNeighborsClassifier(9, metric="hamming", algorithm="brute").fit(bits[:160], labels[:160])
    assert found["code-knn-accuracy"].value == pytest.approx(other.score(bits[160:], labels[160:]), abs=0.02)
    shuffled = rng.permutation(labels)
    chance = code_categorisation(train, shuffled[:160], test, shuffled[160:], width=40, methods=("knn",))[0]
    assert chance.value < 0.6


def test_knn_ties_go_to_the_nearer() -> None:
    codes = np.packbits(
        np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]], dtype=bool), axis=1
    )
    found = code_categorisation(codes, [0, 1, 0, 1], codes[:1], [0], methods=("knn",), k=2)
    assert found[0].value == 1.0
    assert nearest(codes[:1], codes, 2)[0].tolist() == [[0, 1]]


def test_regions_of_a_known_network() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU()).double()
    with torch.no_grad():
        net[0].weight[:] = 1.0
        net[0].bias[:] = torch.tensor([0.52, -0.52])  # kinks at -0.52 and 0.52
    measured = linear_region_diameter(net, torch.zeros(5, 1, dtype=torch.float64))
    assert measured.value == pytest.approx(1.0)  # ten steps of 0.05 each way
    far = linear_region_diameter(net, torch.full((1, 1), 100.0, dtype=torch.float64), reach=1.0)
    assert far.value == pytest.approx(2.0)


def test_bad_input() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(InputError, match="threshold"):
        ActivationCode(network(), ["0"])
    with pytest.raises(SiteError, match="no rectifiers"):
        ActivationCode(nn.Linear(4, 4).double()).encode(x)
    with pytest.raises(SiteError, match="no submodule"):
        ActivationCode(network(), ["9"], 0.0).encode(x)
    with pytest.raises(NonFiniteError):
        ActivationCode(network(), ["0"], 0.0).encode(x * torch.nan)
    with pytest.raises(InputError, match="unknown method"):
        code_categorisation(
            np.zeros((2, 1), np.uint8), [0, 1], np.zeros((1, 1), np.uint8), [0], methods=("svm",)
        )


def test_codes_of_a_language_model() -> None:
    from actlas.measure.code_measures import gate_code_neighbours
    from tests.measure.letter_models import TEXTS, llama

    model = llama()
    code = ActivationCode(model, "blocks.1.mlp.gate", 0.0)
    text = [TEXTS[0][:10], TEXTS[1][:10]]
    gate = model.trace(text, "blocks.1.mlp.gate")["blocks.1.mlp.gate"]
    assert (code.bits(text) == (gate > 0).flatten(1).numpy()).all()
    redundancy_, same = gate_code_neighbours(model, TEXTS, site="blocks.0.mlp.gate", tokens=200)
    assert redundancy_.value < 0.2 and same.baseline is not None
    assert same.value > same.baseline.value
