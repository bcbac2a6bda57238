"""Mean ablation that knows the position: what an activation is on average, so many tokens before the end.

    x[t]  ->  mean over prompts of x, at the token as far from the prompt's end        (selected heads)

A mean over all tokens mixes names, verbs and full stops; a mean per position only takes away what differs
between prompts. Prompts are aligned at their ends, where the answer is formed. The first token stays (its
activations are massive and the same whatever the text says), tokens further from the end than in the prompts
that were averaged get the mean over all tokens, generated tokens that of the last one.

Source: Wang et al. 2022 (arXiv 2211.00593), section 2.2 (mean ablation over a reference distribution).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import ActivationEdit, Edit, Here, check_tensor, register_edit
from actlas.core.errors import InputError, ShapeError

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.core.model import Model
    from actlas.core.sites import Site

LEAST = 4
"""A position that fewer prompts have gets the mean over all tokens."""


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class PositionMeanAblate(ActivationEdit):
    """Set an activation to its mean at the position.

    Attributes:
        means: `[positions + 1, ...features]`; row i is for the token i before the prompt's last, the last
            row for all tokens further away.
        heads: which heads, at a site with heads; `None` means everything.
    """

    means: Tensor
    heads: tuple[int, ...] | None = None

    def check(self, site: Site) -> None:
        check_tensor(self.means, "PositionMeanAblate.means")
        features = tuple(site.features or ())
        if self.means.ndim < 2 or tuple(self.means.shape[1:]) != features:
            raise ShapeError(
                f"PositionMeanAblate.means has shape {list(self.means.shape)}, but {site.name} is"
                f" [{site.shape}]; give [positions, {', '.join(map(str, features))}]"
            )
        wrong = [h for h in self.heads or () if site.kind != "attn.z" or not 0 <= h < features[0]]
        if wrong:
            raise InputError(f"PositionMeanAblate names head {wrong[0]}, which {site.name} has not got")

    def value(self, x: Tensor, here: Here) -> Tensor:
        run = here.run
        if run.length is None or x.shape[1] != run.length:
            raise ShapeError(f"{here.site.name} has no token axis in this pass, so positions are not known")
        place = run.positions(x.device)
        ends = run.prompt_mask(x.device).sum(1, keepdim=True)
        offset = (ends - 1 - place).clamp(0, self.means.shape[0] - 1)
        new = self.means.to(x)[offset]
        keep = (place <= 0).reshape(*place.shape, *([1] * (x.ndim - 2)))
        if self.heads is not None:
            chosen = torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
            chosen[list(self.heads)] = True
            keep = keep | ~chosen.reshape(-1, *([1] * (x.ndim - 3)))
        return torch.where(keep, x, new)

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        heads = record.get("heads")
        return super()._rebuild({**record, "heads": None if heads is None else tuple(heads)}, tensors)


def position_means(model: Model, pairs: PromptPairs, *, batch: int = 8) -> dict[str, Tensor]:
    """Return the mean outputs of every head and MLP by position, over clean and corrupted prompts.

    Returns:
        site -> `[positions + 1, ...features]` float32, at `blocks.*.attn.z` and `blocks.*.mlp.out`; see
        `PositionMeanAblate`.
    """
    prefix = f"{model.tower.name}." if model.tower is not None and model.tower.name else ""
    kinds = ("attn.z", "mlp.out")
    sites = [s for kind in kinds for s in model.resolve(f"{prefix}blocks.*.{kind}")]
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(pairs.width, dtype=torch.float64)
    for start in range(0, len(pairs), batch):
        part = pairs.take(slice(start, start + batch))
        for side in (part.clean, part.corrupt):
            trace = model.trace(dict(side), sites)
            mask = side["attention_mask"].bool()
            mask = (mask & (mask.cumsum(1) > 1)).flip(1)
            counts[: part.width] += mask.sum(0).double().cpu()
            for site in sites:
                x = trace[site.name].flip(1).double()
                total = (x * mask.reshape(*mask.shape, *([1] * (x.ndim - 2)))).sum(0).cpu()
                whole = sums.setdefault(site.name, torch.zeros(pairs.width, *total.shape[1:]).double())
                whole[: part.width] += total
    if float(counts.sum()) == 0:
        raise InputError("the prompts have one token each, so there is no position to average over")
    found = {}
    for name, total in sums.items():
        shape = (-1, *([1] * (total.ndim - 1)))
        overall = (total.sum(0) / counts.sum()).unsqueeze(0)
        each = total / counts.clamp_min(1).reshape(shape)
        each = torch.where((counts >= LEAST).reshape(shape), each, overall)
        found[name] = torch.cat([each, overall]).float()
    return found
