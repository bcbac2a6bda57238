"""Tiny ViTs that know the handwritten digits 0 to 4, and what becomes of them when they learn 5 to 9.

model = digit_vit(seed=0)                        # 12 x 12 pixels, one token for 2 x 2 of them
train, test = new_digits(200, seed=0)            # (pixels, labels) each, labels from 0
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.model import Model

Images = tuple[Tensor, Tensor]


def digit_vit(seed: int, *, width: int = 48, layers: int = 4, epochs: int = 12) -> Model:
    """Return a ViT that was trained on all digits from 0 to 4 of scikit-learn's set.

    Args:
        seed: of the start and the order of the images.
        width, layers: of the model, which has 4 heads.
        epochs: passes over the 901 images, in batches of 32, AdamW at 2e-3 with cosine decay.
    """
    from transformers import ViTConfig, ViTForImageClassification

    pixels, labels = _digits()
    old = labels < 5
    pixels, labels = pixels[old], labels[old]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
            image_size=12,
            patch_size=2,
            num_channels=1,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        module = ViTForImageClassification(config)
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // 32))
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(labels), generator=order).split(32):
            loss = F.cross_entropy(module(pixel_values=pixels[part]).logits, labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return Model(module, name="digit ViT")


def new_digits(n: int, seed: int) -> tuple[Images, Images]:
    """Return `n` images of the digits 5 to 9 to learn from, and all others to test with; labels 0 to 4."""
    pixels, labels = _digits()
    new = (labels >= 5).nonzero()[:, 0]
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))]
    train, test = new[:n], new[n:]
    return (pixels[train], labels[train] - 5), (pixels[test], labels[test] - 5)


def right_answers(model: Model, images: Images) -> Tensor:
    """Return which images are classified rightly under the installed edits, float64 `[n]`."""
    with torch.no_grad():
        found = torch.cat([model.module(pixel_values=p).logits.argmax(-1) for p in images[0].split(256)])
    return (found == images[1]).double()


def _digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    pixels = F.interpolate(small, size=(12, 12), mode="bilinear", align_corners=False)
    return pixels, torch.from_numpy(data.target).long()
