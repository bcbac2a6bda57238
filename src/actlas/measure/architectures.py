"""Descriptions of convolutional networks and decoders, small enough to scale and count by formula.

    ConvArch(stages=(Stage(depth, width, ...), ...), resolution=224, ...)
    DecoderArch(depth, heads, kv_heads, head_dim, d_mlp, vocab, ...)      DecoderArch.from_config(hf_config)

Sizes may be real numbers: scaling laws are exact only before rounding (`scaling`). `anynet.build_anynet`
builds a ConvArch, `arch_cost.closed_form` says what either costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actlas.core.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A run of residual blocks with one width.

    Attributes:
        depth: how many blocks; width: output channels; stride: of the first block.
        expansion: inner width over outer width (bottleneck) or over input width (inverted).
        group_width: channels of one group in the k x k convolution; 1 is depthwise.
        kernel: side of the k x k convolution.
    """

    depth: float
    width: float
    stride: int = 2
    expansion: float = 1.0
    group_width: float = 16
    kernel: int = 3


@dataclass(frozen=True)
class ConvArch:
    """A convolutional image classifier in the style of AnyNet (bottleneck) or EfficientNet (inverted).

    Attributes:
        stages: in order.
        resolution: side of the square input image in pixels.
        stem_width, stem_stride: of the first 3 x 3 convolution. Scaling leaves the stem as it is, as
            pycls does for AnyNet, unless `scale_ends`.
        head_width: channels of a last 1 x 1 convolution before pooling; 0 for none.
        block: `"bottleneck"` (1x1, k x k, 1x1, residual, with projection where the shape changes) or
            `"inverted"` (mobile inverted bottleneck without squeeze-excitation).
        scale_ends: whether stem and head grow with the width.
    """

    stages: tuple[Stage, ...]
    resolution: float = 224
    stem_width: float = 32
    stem_stride: int = 2
    head_width: float = 0
    classes: int = 10
    channels: int = 3
    block: Literal["bottleneck", "inverted"] = "bottleneck"
    scale_ends: bool = False


@dataclass(frozen=True)
class DecoderArch:
    """A decoder-only transformer in the style of Llama (gated MLP, no biases, RMS norms).

    `context` is the sequence length that plays the resolution's part.
    """

    depth: float
    heads: float
    kv_heads: float
    head_dim: int
    d_mlp: float
    vocab: int
    context: float = 256
    gated: bool = True
    tied: bool = True

    @property
    def width(self) -> float:
        """Width of the residual stream, `heads x head_dim`."""
        return self.heads * self.head_dim

    @classmethod
    def from_config(cls, config: object, context: int = 256) -> DecoderArch:
        """Read a Hugging Face Llama-like configuration.

        Raises:
            InputError: the configuration lacks one of the sizes.
        """
        try:
            heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
            width = int(config.hidden_size)  # type: ignore[attr-defined]
            head_dim = getattr(config, "head_dim", None) or width // heads
            return cls(
                depth=int(config.num_hidden_layers),  # type: ignore[attr-defined]
                heads=heads,
                kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
                head_dim=int(head_dim),
                d_mlp=int(config.intermediate_size),  # type: ignore[attr-defined]
                vocab=int(config.vocab_size),  # type: ignore[attr-defined]
                context=context,
                tied=bool(getattr(config, "tie_word_embeddings", False)),
            )
        except AttributeError as error:
            raise InputError(f"{type(config).__name__} is not a decoder configuration: {error}") from error
