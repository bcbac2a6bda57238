"""Hidden dimensions that tokens use: by hand, against brute force, and with controls that show nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from actlas.core.errors import InputError, ShapeError
from actlas.measure import measure
from actlas.measure.hidden_dims import hidden_dim_usage, neighbour_overlap, shared_dims, used_dims
from tests.core.tiny import tiny


def test_the_fewest_dimensions_that_hold_the_energy() -> None:
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 9.0]])
    assert used_dims(x, 0.9).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert used_dims(x, 0.6).int().tolist()[0] == [0, 1, 0, 0]  # 16 of 25
    assert hidden_dim_usage(x, 0.9).tolist() == [0.5, 1.0, 0.25]


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
def test_no_smaller_set_would_do(energy: float) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    for row, used in zip(x.double().square(), used_dims(x, energy), strict=True):
        enough = [
            k
            for k in range(1, 7)
            if any(row[list(c)].sum() >= energy * row.sum() for c in itertools.combinations(range(6), k))
        ]
        assert int(used.sum()) == min(enough)


def test_a_rotation_takes_the_preference_away() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator) * torch.where(torch.arange(64) < 6, 10.0, 0.1)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    assert hidden_dim_usage(x).mean() < 0.1 and hidden_dim_usage(x @ turn).mean() > 0.3


def test_neighbours_overlap_within_documents_only() -> None:
    used = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1]]).bool()
    documents = np.array([0, 0, 1, 1])
    assert neighbour_overlap(used, documents).tolist() == [0.5, 0.5]  # not of tokens 1 and 2
    strangers = neighbour_overlap(used, documents, shuffled=True, seed=0)
    assert set(strangers) <= {0.0, 1 / 3}
    with pytest.raises(InputError, match="follow each other"):
        neighbour_overlap(used, np.arange(4))
    with pytest.raises(InputError, match="one document only"):
        neighbour_overlap(used, np.zeros(4, int), shuffled=True)


def test_dimensions_of_nearly_every_token_of_a_stretch() -> None:
    used = torch.zeros(25, 4, dtype=torch.bool)
    used[:, 0] = True
    used[:9, 1] = True  # 9 of the first 10 tokens
    shares, owners = shared_dims(used, np.array([0] * 20 + [1] * 5), stretch=10)
    assert shares.tolist() == [0.5, 0.25] and owners.tolist() == [0, 0]
    with pytest.raises(InputError, match="no document has 26 tokens"):
        shared_dims(used, np.zeros(25, int), stretch=26)


def test_the_measure_reads_a_model() -> None:
    model = tiny("llama")
    texts = ["the cat sat on the mat and the dog ran to the house " * 8] * 2
    found = measure(model, ["hidden-dim-usage"], texts)
    own = next(m for m in found if m.name == "hidden-dim-usage" and "control" not in m.group)
    assert 0 < own.value <= 1 and own.group["site"].endswith("resid_post")


def test_bad_input() -> None:
    for energy in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="energy is a share"):
            used_dims(torch.ones(2, 3), energy)
    with pytest.raises(ShapeError, match="tokens, dimensions"):
        used_dims(torch.ones(3))
