"""Images that are always there: scikit-learn's digits and sample photographs.

Pixels come as floats from 0 to 1 in `[n, 3, height, width]`; what a model expects beyond that (mean and
standard deviation) is its processor's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from actlas.core.errors import InputError, did_you_mean

NAMES = ("digits", "photos")
# Photographs that scikit-image carries in its wheel (others it would download), with what they show.
_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "camera", "hubble_deep_field")


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known about them.

    Attributes:
        name: what a report calls it.
        pixels: float32 from 0 to 1, `[n, 3, height, width]`.
        labels: the class of each image, int64 `[n]`, or `None` where there is none.
        names: one name an image, unique.
        classes: the classes' names, in the order of the labels' numbers.
    """

    name: str
    pixels: Tensor
    labels: Tensor | None
    names: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def images(name: str = "digits", n: int | None = None, *, size: int | None = None, seed: int = 0) -> ImageSet:
    """Return an image set.

    Args:
        name: `"digits"` (scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, enlarged; labelled) or
            `"photos"` (scikit-learn's two sample photographs and, where it is installed, scikit-image's).
        n: how many; default 64 digits, or every photograph. More photographs than there are become
            different square crops of them.
        size: height and width in pixels; default 32 for digits, 224 for photographs.
        seed: which digits, which crops.

    Raises:
        InputError: unknown name, `n` or `size` below 1, more digits than there are, or a library is missing.
    """
    if name not in NAMES:
        raise InputError(
            f"there is no image set {name!r}; the sets are {' and '.join(NAMES)}{did_you_mean(name, NAMES)}"
        )
    for what, value in (("n", n), ("size", size)):
        if value is not None and value < 1:
            raise InputError(f"{what}={value} makes no images; give at least 1")
    return _digits(n or 64, size or 32, seed) if name == "digits" else _photos(n, size or 224, seed)


def _digits(n: int, size: int, seed: int) -> ImageSet:
    from sklearn.datasets import load_digits

    data = load_digits()
    total = len(data.target)
    if n > total:
        raise InputError(f"there are {total:,} digits and {n:,} were asked for; ask for fewer")
    chosen = np.random.default_rng(seed).permutation(total)[:n]
    small = torch.from_numpy(data.images[chosen].astype(np.float32) / 16)[:, None]
    pixels = _resize(small, size).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(data.target[chosen].astype(np.int64))
    names = tuple(f"digit {index}" for index in chosen)
    return ImageSet("digits", pixels, labels, names, tuple("0123456789"))


def _photos(n: int | None, size: int, seed: int) -> ImageSet:
    found = list(_load_photos())
    count = len(found) if n is None else n
    generator = np.random.default_rng(seed)
    pixels, names = [], []
    for index in range(count):
        title, photo = found[index % len(found)]
        height, width = photo.shape[-2:]
        side, top, left = min(height, width), 0, 0
        if index < len(found):
            top, left = (height - side) // 2, (width - side) // 2
        else:
            side = int(side * generator.uniform(0.5, 0.9))
            top = int(generator.integers(0, height - side + 1))
            left = int(generator.integers(0, width - side + 1))
            title = f"{title}, crop {index // len(found)}"
        pixels.append(_resize(photo[None, :, top : top + side, left : left + side], size)[0])
        names.append(title)
    return ImageSet("photos", torch.stack(pixels), None, tuple(names))


def _load_photos() -> Iterator[tuple[str, Tensor]]:
    from sklearn.datasets import load_sample_images

    try:
        data = load_sample_images()
    except ImportError as error:
        raise InputError("photographs need Pillow; run: pip install 'actlas[vision]'") from error
    for file, image in zip(data.filenames, data.images, strict=True):
        yield Path(file).stem, _tensor(image)
    try:
        import skimage.data
        import skimage.io
    except ImportError:
        return
    folder = Path(skimage.data.__file__).parent
    for title in _SCIKIT_IMAGE:
        for file in (folder / f"{title}.png", folder / f"{title}.jpg"):
            if file.is_file():
                yield title.removesuffix("_left"), _tensor(skimage.io.imread(file))  # type: ignore[attr-defined,unused-ignore]


def _tensor(image: np.ndarray) -> Tensor:
    """Turn uint8 `[height, width]` or `[height, width, 3 or 4]` into float32 `[3, height, width]`, 0 to 1."""
    colour = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image[..., :3]
    return torch.from_numpy(np.array(colour)).permute(2, 0, 1).float() / 255


def _resize(pixels: Tensor, size: int) -> Tensor:
    """Resize `[n, channels, height, width]` to a square, smoothed where it shrinks."""
    resized = functional.interpolate(
        pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.clamp(0, 1)
