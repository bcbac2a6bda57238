"""A network that Actlas knows nothing about: every submodule is a site that can be read and edited.

python examples/any_module.py
"""

from __future__ import annotations

import torch
from torch import nn

import actlas


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 15 * 15, 10),
    )  # fmt: skip
    model = actlas.wrap(network, name="small-cnn")
    images = torch.rand(4, 3, 32, 32)

    print(*(site.name for site in actlas.sites(model)))
    trace = model.trace(images, "module:3")
    print(
        "activation:", list(trace["module:3"].shape), f"zero: {(trace['module:3'] == 0).float().mean():.0%}"
    )

    before = model.logits(images)
    with model.edit(actlas.Clamp("module:3", high=0.1)):
        after = model.logits(images)
    print(f"clamping at 0.1 moves the outputs by {(after - before).abs().max():.3f} at most")
    assert torch.equal(model.logits(images), before)  # nothing is left behind


if __name__ == "__main__":
    main()
