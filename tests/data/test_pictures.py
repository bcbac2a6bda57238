"""Images: shapes, range, labels, determinism."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError
from actlas.data import images


def test_digits_have_labels_that_fit_their_pixels() -> None:
    made = images("digits", n=40, size=16)
    assert made.pixels.shape == (40, 3, 16, 16) and made.pixels.dtype == torch.float32
    assert 0 <= made.pixels.min() and 0.9 < made.pixels.max() <= 1
    assert made.labels is not None and made.labels.dtype == torch.int64 and len(set(made.names)) == 40
    assert set(made.labels.tolist()) <= set(range(len(made.classes)))
    from sklearn.datasets import load_digits

    index = int(made.names[0].split()[1])
    assert load_digits().target[index] == made.labels[0]
    native = images("digits", n=1, size=8).pixels[0, 0]
    assert torch.equal(native, torch.tensor(load_digits().images[index] / 16, dtype=torch.float32))


def test_the_seed_decides() -> None:
    assert torch.equal(images("digits", n=8).pixels, images("digits", n=8).pixels)
    assert images("digits", n=8, seed=1).names != images("digits", n=8, seed=2).names
    assert torch.equal(images("photos", n=4, seed=1).pixels, images("photos", n=4, seed=1).pixels)


def test_photographs_and_their_crops() -> None:
    pytest.importorskip("PIL")
    every = images("photos")
    assert every.names[:2] == ("china", "flower") and every.labels is None
    assert every.pixels.shape == (len(every), 3, 224, 224)
    assert 0 <= every.pixels.min() and every.pixels.max() <= 1
    more = images("photos", n=2 * len(every) + 1, size=64)
    assert len(set(more.names)) == len(more) and more.names[: len(every)] == every.names
    assert len({tuple(p.flatten()[::97].tolist()) for p in more.pixels}) == len(more)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "digit"}, "did you mean digits"),
        ({"n": 0}, "n=0"),
        ({"size": -1}, "size=-1"),
        ({"n": 5000}, "1,797 digits"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        images(**arguments)  # type: ignore[arg-type]
