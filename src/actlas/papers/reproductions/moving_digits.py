"""Clips of handwritten digits that move over photographs: synthetic video with known speed."""

from __future__ import annotations

import torch
from torch import Tensor


def clips(
    count: int, seed: int, *, held_out: bool, side: int = 24, frames: int = 8, speed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return clips `[count, frames, 1, side, side]` in [0, 1], and their digits `[count]`.

    Args:
        count: how many.
        seed: of digits, background crops, starts and directions.
        held_out: take digits from the last third of scikit-learn's, which training never sees.
        side: height and width; a digit is two thirds as large.
        frames: in a clip.
        speed: pixels a frame along either axis; default 0 to 2, drawn for each clip.
    """
    from actlas.data.pictures import images

    inner = side * 2 // 3
    generator = torch.Generator().manual_seed(seed)
    digits = images("digits", 1797, size=inner, seed=0)
    photos = images("photos", 2, size=96, seed=0).pixels.mean(1)
    first, last = (1200, 1797) if held_out else (0, 1200)
    which = torch.randint(first, last, (count,), generator=generator)
    out = torch.empty(count, frames, 1, side, side)
    for i, digit in enumerate(which.tolist()):
        photo = photos[int(torch.randint(len(photos), (), generator=generator))]
        y, x = torch.randint(96 - side, (2,), generator=generator).tolist()
        background = 0.3 * photo[y : y + side, x : x + side]
        drawn = int(torch.randint(3, (), generator=generator)) if speed is None else speed
        step = drawn * (2 * torch.randint(2, (2,), generator=generator) - 1)
        place = torch.randint(side - inner + 1, (2,), generator=generator)
        for t in range(frames):
            frame = background.clone()
            top, left = (place + t * step).remainder(side - inner + 1).tolist()
            window = frame[top : top + inner, left : left + inner]
            window.copy_(torch.maximum(window, digits.pixels[digit, 0]))
            out[i, t, 0] = frame
    assert digits.labels is not None
    return out, digits.labels[which]


def unrelated(x: Tensor, seed: int) -> Tensor:
    """Return clips whose every frame is of another clip: as many frames, nothing that lasts."""
    generator = torch.Generator().manual_seed(seed)
    columns = [x[torch.randperm(len(x), generator=generator), t] for t in range(x.shape[1])]
    return torch.stack(columns, 1)
