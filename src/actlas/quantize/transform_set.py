"""A set of transforms of one model: rotations and scales with a value each, folded together.

    R_res   [d, d]           one for each residual stream
    R_ov    [groups, h, h]   one for each value head that keys share
    scales  [width]          v_o, up_down, norm (after the rotation, where norms' weights are 1), qk

Rotations start from one of three places:

    identity
    hadamard    random signs, Hadamard blocks, and a random rotation between blocks where the width is no
                power of two
    womi        V H: eigenvectors of the covariance of what reads the stream (or the head), times that. The
                eigenvectors make the weights' covariance diagonal, H spreads it evenly over the channels.

Scales start at 1 and are held as logarithms. What no rotation reaches (the down projection's inputs) is
rotated while the model runs, by Hadamard blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.hadamard import block_hadamard, largest_block
from actlas.core.stiefel import nearest_orthogonal
from actlas.core.transforms import Fold, Folding, Slot, Slots, slots

if TYPE_CHECKING:
    from actlas.core.model import Model

Start = Literal["womi", "hadamard", "identity"]
KINDS = ("res", "ov", "scale_ov", "scale_up_down", "scale_norm", "scale_qk")


class TransformSet(nn.Module):
    """See the module's text.

    Args:
        model: it is read, not changed.
        kinds: which transforms, of `KINDS`; those for which the model has no slot are left out.
        start: of the rotations.
        seed: of the random signs.
        found: the model's slots, if known.

    Raises:
        InputError: a kind or start that does not exist.
    """

    def __init__(
        self,
        model: Model,
        kinds: Collection[str] = KINDS,
        *,
        start: Start = "womi",
        seed: int = 0,
        found: Slots | None = None,
    ) -> None:
        super().__init__()
        wrong = [k for k in kinds if k not in KINDS]
        if wrong:
            raise InputError(f"there is no transform {wrong[0]!r}; there are {', '.join(KINDS)}")
        if start not in get_args(Start):
            raise InputError(f"start is {start!r}; it must be one of {', '.join(get_args(Start))}")
        self.model, self.kinds = (model,), tuple(kinds)  # in a tuple: not a submodule
        self.slots = slots(model) if found is None else found
        self.streams = [s for s in self.slots if s.kind == "residual"] if "res" in kinds else []
        self.heads = [s for s in self.slots if s.kind == "v_o"] if "ov" in kinds else []
        self.scaled = [s for s in self.slots if _scale_kind(s) in kinds]
        device = model.device
        self.residual = nn.ParameterList(
            nn.Parameter(self._start_residual(s, start, seed + i).float().to(device))
            for i, s in enumerate(self.streams)
        )
        self.values = nn.ParameterList(
            nn.Parameter(self._start_heads(s, start, seed + 100 + i).float().to(device))
            for i, s in enumerate(self.heads)
        )
        self.logs = nn.ParameterList(nn.Parameter(torch.zeros(s.width, device=device)) for s in self.scaled)

    def rotations(self) -> list[nn.Parameter]:
        """Return the orthogonal parameters."""
        return [*self.residual, *self.values]

    def put(self, folding: Folding) -> Folding:
        """Add all transforms to a folding, differentiably."""
        done: set[str] = set()
        for slot, rotation in zip(self.streams, self.residual, strict=True):
            folding.rotate_residual(_exact(rotation, folding), slot)
            done |= set(slot.readers)
        rest = [s for s in self.slots if s.kind == "norm" and s.producer not in done]
        if rest and "scale_norm" in self.kinds:
            folding.norms(rest)
        for slot, rotation in zip(self.heads, self.values, strict=True):
            folding.rotate_v_o(slot, _exact(rotation, folding))
        for slot, log in zip(self.scaled, self.logs, strict=True):
            folding.scale(slot, log.to(folding.dtype).exp())
        return folding

    def fold(self) -> Fold:
        """Return the transforms as they are now as one exact fold, computed in float64."""
        with torch.no_grad():
            folding = self.put(Folding(self.model[0], self.slots, untie=True))
            return folding.fold() if folding.values else Fold({})

    def online(self, paths: Collection[str]) -> dict[str, int]:
        """Return the Hadamard block for each linear map whose inputs no rotation of this set reaches.

        Args:
            paths: the linear maps that are rounded.
        """
        reached = {r for s in self.heads for r in s.readers}
        for slot in self.streams:
            reached |= {r for s in self.slots if s.producer in slot.readers for r in s.readers}
        found = {}
        for path in paths:
            if path not in reached:
                width = _columns(self.model[0], path)
                if (block := largest_block(width, 1 << 20)) > 1:
                    found[path] = block
        return found

    def _start_residual(self, slot: Slot, start: Start, seed: int) -> Tensor:
        if start == "womi":
            folding = Folding(self.model[0], self.slots, untie=True)
            own = [s for s in self.slots if s.producer in slot.readers]
            reading = [s for s in own if s.kind in ("norm", "single")]
            with torch.no_grad():
                folding.norms([s for s in reading if s.kind == "norm"])
                rows = [folding._matrix(path) for s in reading for path in s.readers]
            return _eigenvectors(rows, slot.width) @ mixing(slot.width, seed).to(rows[0])
        return mixing(slot.width, seed) if start == "hadamard" else torch.eye(slot.width)

    def _start_heads(self, slot: Slot, start: Start, seed: int) -> Tensor:
        head = slot.width // slot.groups
        if start == "identity":
            return torch.eye(head).repeat(slot.groups, 1, 1)
        mix = mixing(head, seed)
        if start == "hadamard":
            return mix.repeat(slot.groups, 1, 1)
        with torch.no_grad():
            matrix = Folding(self.model[0], self.slots)._matrix(slot.readers[0])
        group = slot.index.view(-1, head)[:, 0] // head
        blocks = matrix.view(len(matrix), -1, head)
        turns = [_eigenvectors([*blocks[:, group == g].unbind(1)], head) for g in range(slot.groups)]
        return torch.stack(turns) @ mix.to(matrix)


def _scale_kind(slot: Slot) -> str:
    return {"norm": "scale_norm", "v_o": "scale_ov", "up_down": "scale_up_down", "qk": "scale_qk"}.get(
        slot.kind, ""
    )


def _exact(rotation: Tensor, folding: Folding) -> Tensor:
    if folding.dtype == torch.float64 and not torch.is_grad_enabled():
        return nearest_orthogonal(rotation.double())
    return rotation.to(folding.dtype)


def _columns(model: Model, path: str) -> int:
    from actlas.core.layout import weight_matrix

    return int(weight_matrix(model.module.get_submodule(path)).shape[1])


def _eigenvectors(rows: list[Tensor], width: int) -> Tensor:
    """Return the eigenvectors of the covariance of weight rows `[n, width]`, mean removed, as columns."""
    count = sum(len(r) for r in rows)
    mean = sum(r.double().sum(0) for r in rows) / count
    cov = torch.zeros(width, width, dtype=torch.float64, device=rows[0].device)
    for r in rows:
        centred = r.double() - mean
        cov += centred.T @ centred
    vectors: Tensor = torch.linalg.eigh(cov / count)[1]
    return vectors


def mixing(width: int, seed: int = 0) -> Tensor:
    """Return an orthogonal matrix that spreads every channel over all others, float64 `[width, width]`.

    A Hadamard matrix with random signs where the width is a power of two; else its largest such factor's,
    times a random rotation of the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    block = largest_block(width, 1 << 20)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    spread = block_hadamard(torch.diag(signs), block)
    rest = width // block
    if rest == 1:
        return spread
    turn = torch.linalg.qr(torch.randn(rest, rest, generator=generator, dtype=torch.float64))[0]
    return spread @ torch.kron(turn.contiguous(), torch.eye(block, dtype=torch.float64))
