"""EfficientNet-Lite0: an image classifier of inverted bottlenecks with ReLU6 and without squeeze-and-excite.

    stem 3x3/2 -> 16 inverted bottlenecks -> head 1x1 -> ReLU6 -> mean over positions -> linear

An inverted bottleneck widens its input six times with a 1x1 convolution, filters each channel by
itself, and narrows again:

    y = BN(W_project * relu6(BN(W_depthwise * relu6(BN(W_expand * x))))) [+ x where shapes agree]

The last of the three is linear, so block outputs can be negative; after the head all features lie in
[0, 6]. Convolutions pad as TensorFlow's "SAME" does, on the right and below where the amount is odd,
because the weights were trained with that. Every activation is a module of its own, so that each can be
read and edited at a `module:` site, and parameters have the names of the published checkpoint.

Source: Tan and Le, EfficientNet (ICML 2019); the Lite variant of the TensorFlow authors, 2020.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from actlas.core.errors import ModelError

# (how many blocks, kernel, stride of the first, widening, channels out)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280
MODEL_TYPE = "efficientnet-lite0"


@dataclass
class EfficientNetLiteConfig:
    """What `config.json` holds; `id2label` names the classes, by number where no names are known."""

    model_type: str = MODEL_TYPE
    image_size: int = 224
    num_labels: int = 1000
    id2label: dict[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> EfficientNetLiteConfig:
        """Read what `to_dict` wrote; JSON has made the class numbers strings."""
        labels = {int(number): str(name) for number, name in given.get("id2label", {}).items()}
        return cls(MODEL_TYPE, int(given.get("image_size", 224)), int(given.get("num_labels", 1000)), labels)


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(size / stride) positions, as TensorFlow's "SAME"."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d oh ow"]:
        """Pad by what is needed, half of it (rounded down) on the left and above, then convolve."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        if high or wide:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, None, self.stride, 0, self.dilation, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel, narrow; the input is added where the shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        wide = channels * widening
        self.adds_input = stride == 1 and channels == out
        self.widens = widening != 1
        if self.widens:
            self._expand_conv = SameConv2d(channels, wide, 1)
            self._bn0 = _norm(wide)
            self._expand_act = nn.ReLU6()
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._depthwise_act = nn.ReLU6()
        self._project_conv = SameConv2d(wide, out, 1)
        self._bn2 = _norm(out)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d oh ow"]:
        """Return the block's output; it is linear in its last convolution."""
        y = self._expand_act(self._bn0(self._expand_conv(x))) if self.widens else x
        y = self._depthwise_act(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x if self.adds_input else y


class EfficientNetLite0(nn.Module):
    """The classifier: 4.65 million parameters, 224 x 224 pixels, 1000 ImageNet classes."""

    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig | None = None) -> None:
        super().__init__()
        self.config = config or EfficientNetLiteConfig()
        self._conv_stem = SameConv2d(3, _STEM, 3, 2)
        self._bn0 = _norm(_STEM)
        self._stem_act = nn.ReLU6()
        blocks, channels = [], _STEM
        for count, kernel, stride, widening, out in _STAGES:
            for i in range(count):
                blocks.append(InvertedBottleneck(channels, out, kernel, stride if i == 0 else 1, widening))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels, _HEAD, 1)
        self._bn1 = _norm(_HEAD)
        self._head_act = nn.ReLU6()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(_HEAD, self.config.num_labels)

    def features(self, pixel_values: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 1280 fh fw"]:
        """Return the last feature map, each value in [0, 6]; 7 x 7 positions for 224 pixels."""
        x = self._stem_act(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        return self._head_act(self._bn1(self._conv_head(x)))

    def forward(self, pixel_values: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        """Return logits.

        Args:
            pixel_values: images as `ImageProcessor` makes them, in the model's dtype; any height and width.
        """
        pooled = self._avg_pooling(self.features(pixel_values)).flatten(1)
        return self._fc(self._dropout(pooled))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, which `load` reads again."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = json.dumps(self.config.to_dict(), indent=1) + "\n"
        (folder / "config.json").write_text(described, encoding="utf-8")
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def from_folder(cls, folder: Path, config: dict[str, Any]) -> EfficientNetLite0:
        """Load what `save_pretrained` wrote, without making random weights first.

        Raises:
            ModelError: weights are missing, damaged or of another shape.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with torch.device("meta"):
            module = cls(EfficientNetLiteConfig.from_dict(config))
        try:
            module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            said = str(error).splitlines()[0]
            raise ModelError(f"{folder} has no whole EfficientNet-Lite0 weights: {said}") from error
        return module.eval()


@dataclass
class ImageProcessor:
    """Turn images into what the classifier expects: the middle square at 224 pixels, (x - 0.498) / 0.502.

    The short side is scaled to 224 pixels with an antialiased bicubic filter, so that as much of the
    image as a square can hold is seen. (The published evaluation scales to 256 and keeps less.)
    """

    image_size: int = 224
    mean: float = 0.498
    deviation: float = 0.502

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, Float[Tensor, "batch 3 h w"]]:
        """Return `{"pixel_values": float32[batch, 3, 224, 224]}`.

        Args:
            images: one image or a list of them: a PIL image, an array `[h, w, 3]` or `[h, w]` of bytes
                0..255 or floats 0..1, a tensor `[3, h, w]` of the same ranges, or a batch of either.
            return_tensors: only `"pt"`; here because transformers' processors have it.

        Raises:
            ModelError: something that is no image.
        """
        return {"pixel_values": torch.stack([self._one(image) for image in _several(images)])}

    def _one(self, image: Any) -> Float[Tensor, "3 h w"]:
        x = _channels_first(image)
        scale = self.image_size / min(x.shape[-2:])
        size = [max(round(side * scale), self.image_size) for side in x.shape[-2:]]
        x = F.interpolate(x[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = ((side - self.image_size) // 2 for side in size)
        x = x[:, top : top + self.image_size, left : left + self.image_size]
        return (x - self.mean) / self.deviation


def _several(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return list(images)
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _channels_first(image: Any) -> Float[Tensor, "3 h w"]:
    """An image as float32 in 0..1, channels first."""
    if hasattr(image, "convert"):  # a PIL image of any mode
        image = image.convert("RGB")
    if isinstance(image, Tensor):
        x = image
    else:
        import numpy as np

        array = np.array(image)
        if array.dtype == object or array.ndim not in (2, 3):
            raise ModelError(
                f"an image is an array [h, w, 3], a tensor [3, h, w] or a PIL image, not {image!r:.80}"
            )
        x = torch.from_numpy(array)
        x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[0] not in (1, 3, 4):
        raise ModelError(f"an image must have 1, 3 or 4 channels, not the shape {tuple(x.shape)}")
    x = x.float() if x.is_floating_point() else x.float() / 255
    return x.expand(3, -1, -1) if x.shape[0] == 1 else x[:3]
