"""SSNorm and embedding projections: the architecture of outlier-safe pre-training.

    SSNorm     gamma * x / rms(x), gamma one number: no channel can be singled out by a norm's weight, and
               the norm commutes with every rotation of the residual stream
    EmbProj    x_0 = E[tokens] P_in,   logits = (norm(x) P_out) W_head^T, P orthogonal at the start: the
               tables that Adam trains meet the stream only through a matrix that spreads their outliers

    safe = outlier_safe(model)        # a copy, before training
    plain = merged(safe)              # after training: P_in and P_out in the tables, norms as they were

Source: "Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language Models" (Park et al. 2025,
arXiv 2506.19697).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find, plain_module
from actlas.core.model import Model
from actlas.core.swap import register_module
from actlas.core.transforms.norms import norm_use


@register_module
class SSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` with a weight of one number.

    Args:
        width: channels, for people: any width is normalised.
        eps: under the root.
        gain: the weight at the start.
    """

    def __init__(self, width: int, eps: float = 1e-6, gain: float = 1.0) -> None:
        super().__init__()
        if width < 1 or eps < 0:
            raise InputError(f"width={width}, eps={eps}: must be at least 1 and not negative")
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.tensor([float(gain)]))

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {"width": self.width, "eps": self.eps}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SSNorm:
        """Build one of this size."""
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(out) * out).to(x.dtype)


class ProjectedEmbedding(nn.Module):
    """`E[tokens] P`.

    Args:
        embedding: the table.
        seed: of the random orthogonal P.
    """

    def __init__(self, embedding: nn.Embedding, seed: int = 0) -> None:
        super().__init__()
        self.table = embedding
        self.projection = nn.Parameter(_orthogonal(embedding.weight, seed))

    @property
    def weight(self) -> Tensor:
        """The table itself, which a tied head shares."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.projection

    def merged(self) -> Tensor:
        """Return the table with P multiplied in, in float64 and rounded once."""
        return (self.table.weight.double() @ self.projection.double()).to(self.table.weight)


class ProjectedHead(nn.Module):
    """`head(x P)`.

    Args:
        head: the output layer.
        seed: of the random orthogonal P.
    """

    def __init__(self, head: nn.Linear, seed: int = 0) -> None:
        super().__init__()
        self.table = head
        self.projection = nn.Parameter(_orthogonal(head.weight, seed))

    @property
    def weight(self) -> Tensor:
        """The head's own weight."""
        return self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.table(x @ self.projection)
        return out

    def merged(self) -> Tensor:
        """Return the head's weight with P multiplied in."""
        return (self.table.weight.double() @ self.projection.double().T).to(self.table.weight)


def outlier_safe(model: Model, *, norms: bool = True, projections: bool = True, seed: int = 0) -> Model:
    """Return a copy of a causal language model with single-scale norms and projected embeddings.

    It is for training: a trained model's norms have weights that one number cannot hold.

    Args:
        model: with RMSNorms; it is not changed.
        norms: exchange the norms that read the residual stream (all RMSNorms).
        projections: add P_in and P_out.
        seed: of the projections.

    Raises:
        ModelError: no RMSNorms, or no embedding and head to project.
    """
    made = _copy(model, "outlier-safe")
    root = plain_module(made.module)
    if norms:
        found = [
            (p, m, u)
            for p, m in root.named_modules()
            if (u := norm_use(m)) and not u.centres and not u.single
        ]
        if not found:
            raise ModelError(f"{model.name} has no RMSNorms; single-scale norms take their place")
        for path, module, use in found:
            weight = module.weight
            assert isinstance(weight, Tensor)
            norm = SSNorm(weight.numel(), use.eps, use.offset + float(weight.detach().mean()))
            _put(root, path, norm.to(weight))
    if projections:
        embedding, head = _tables(root, model.name)
        root.set_input_embeddings(ProjectedEmbedding(embedding, seed))  # type: ignore[operator]
        root.set_output_embeddings(ProjectedHead(head, seed + 1))  # type: ignore[operator]
    return made


def merged(model: Model, *, norms_like: Model | None = None) -> Model:
    """Return a copy with P_in and P_out multiplied into the tables, which are two from then on.

    Args:
        model: made by `outlier_safe`, trained or not.
        norms_like: a model of the same architecture: its kind of norm takes the place of the single-scale
            ones, the one number repeated for every channel (for standard checkpoints).

    Raises:
        InputError: there is nothing to merge.
    """
    made = _copy(model, "merged")
    root = plain_module(made.module)
    changed = False
    embedding = root.get_input_embeddings()  # type: ignore[operator]
    head = root.get_output_embeddings()  # type: ignore[operator]
    if isinstance(embedding, ProjectedEmbedding) and isinstance(head, ProjectedHead):
        table, weight = embedding.merged(), head.merged()
        own, other = copy.copy(embedding.table), copy.copy(head.table)
        own._parameters, other._parameters = dict(own._parameters), dict(other._parameters)
        own.weight, other.weight = nn.Parameter(table.detach()), nn.Parameter(weight.detach())
        root.set_input_embeddings(own)  # type: ignore[operator]
        root.set_output_embeddings(other)  # type: ignore[operator]
        config: Any = getattr(root, "config", None)
        if config is not None:
            config.tie_word_embeddings = False
        changed = True
    if norms_like is not None:
        other_root = plain_module(norms_like.module)
        for path, module in list(root.named_modules()):
            like = find(other_root, path)
            if isinstance(module, SSNorm) and like is not None and (use := norm_use(like)) is not None:
                norm = copy.deepcopy(like)
                with torch.no_grad():
                    norm.weight.fill_(float(module.weight) - use.offset)  # type: ignore[operator]
                _put(root, path, norm)
                changed = True
    if not changed:
        raise InputError(f"{model.name} has no projections or single-scale norms to merge")
    return made


def _copy(model: Model, said: str) -> Model:
    return Model(
        copy.deepcopy(model.module),
        model.tokenizer,
        model.processor,
        f"{model.name} ({said})",
        kind=model.kind,
    )


def _tables(root: Any, name: str) -> tuple[nn.Embedding, nn.Linear]:
    try:
        embedding, head = root.get_input_embeddings(), root.get_output_embeddings()
    except (AttributeError, NotImplementedError) as error:
        raise ModelError(f"{name} does not say which its embedding and head are") from error
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(f"{name} has no plain embedding and linear head to project (or has them already)")
    return embedding, head


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    owner = find(root, parent) if parent else root
    assert owner is not None
    setattr(owner, name, module)


def _orthogonal(weight: Tensor, seed: int) -> Tensor:
    width = weight.shape[1]
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].to(weight)
