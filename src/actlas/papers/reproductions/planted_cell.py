"""Digits with a stroke thickness, and a classifier that has hardly seen one digit in one thickness.

scikit-learn's 1,797 handwritten digits (8 x 8) are drawn three times as large and, by chance,
left as they are (thin) or widened with a grey dilation of 3 (medium) or 5 pixels (thick). That makes
30 cells, digit x thickness, of about 60 images. Every image is judged by one of five classifiers
that did not train on it; in training, one cell may be cut to a share of its natural size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THICKNESS = ("thin", "medium", "thick")
_WIDEN = (1, 3, 5)
FOLDS = 5


@dataclass(frozen=True)
class Digits:
    """Images of one drawing of thicknesses.

    Attributes:
        pixels: float64 [n, 144], 0 to 1.
        digits: labels, int [n].
        thickness: names, [n].
    """

    pixels: NDArray[np.float64]
    digits: NDArray[np.int64]
    thickness: NDArray[np.str_]

    def inside(self, cell: tuple[int, str]) -> NDArray[np.bool_]:
        """Return which images are of a cell (digit, thickness)."""
        return (self.digits == cell[0]) & (self.thickness == cell[1])

    @property
    def items(self) -> list[dict[str, str]]:
        """The images as items for `actlas.report.evaluate`: label and factors."""
        pairs = zip(self.digits, self.thickness, strict=True)
        return [{"label": str(d), "digit": str(d), "thickness": str(t)} for d, t in pairs]


def draw_digits(seed: int) -> Digits:
    """Return the digits with thicknesses drawn with this seed."""
    drawn, digits = _every_thickness()
    which = np.random.default_rng(seed).integers(0, 3, len(digits))
    return Digits(drawn[which, np.arange(len(digits))], digits, np.array(THICKNESS)[which])


def predictions(
    data: Digits, seed: int, *, cell: tuple[int, str] | None = None, drop: int = 0, share: float = 0.05
) -> list[str]:
    """Return for each image the label given by a classifier that did not train on it.

    Args:
        data: the images.
        seed: of the folds and of what is left out.
        cell: the cell (digit, thickness) that training keeps only `share` of.
        drop: instead, how many training images to leave out at random in each fold (the control).
        share: what is kept of `cell`, at least one image a fold.
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import SVC

    rng = np.random.default_rng(seed)
    said = np.zeros(len(data.digits), dtype=np.int64)
    strata = [f"{d} {t}" for d, t in zip(data.digits, data.thickness, strict=True)]
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(data.pixels, strata):
        if cell is not None:
            planted = data.inside(cell)[train]
            inside = train[planted]
            kept = rng.choice(inside, max(1, round(share * len(inside))), replace=False)
            train = np.concatenate([train[~planted], kept])
        elif drop:
            train = rng.choice(train, len(train) - drop, replace=False)
        classifier = SVC(C=5.0).fit(data.pixels[train], data.digits[train])
        said[test] = classifier.predict(data.pixels[test])
    return [str(s) for s in said]


@functools.cache
def _every_thickness() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All digits in all thicknesses, [3, n, 144], and their labels."""
    from scipy import ndimage
    from sklearn.datasets import load_digits

    images, digits = load_digits().images / 16, load_digits().target
    out = np.empty((3, len(digits), 144))
    for i, image in enumerate(images):
        large = ndimage.zoom(np.pad(image, 2), 3, order=1)
        for t, size in enumerate(_WIDEN):
            wide = ndimage.grey_dilation(large, size=(size, size))
            out[t, i] = ndimage.uniform_filter(wide, 3)[1::3, 1::3].ravel()
    return out, digits.astype(np.int64)
