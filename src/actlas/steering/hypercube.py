"""HyperBox: a lens that says whether an activation lies in the hypercube of a skill's keys.

With mean m and standard deviation s of the fitted rows (for a query: the input of the last block's down
projection at its last token), and reach r = max_ij |x_ij - m_j| / s_j, the half side of the smallest
scaled cube around all of them,

    distance(x) = max_j |x_j - m_j| / s_j          score(x) = c r - distance(x)          inside: score > 0

"Key space detection" of Effective Skill Unlearning through Intervention and Abstention: inside means that
the query needs the skill, and the model abstains. Used as a gate it decides once, on the query's last
token (`box.guard(edit)`), and never on generated tokens.

A z-score among n rows cannot exceed (n - 1) / sqrt(n), and with many more channels than rows some channel
always comes near it, so r says little and the multiplier c carries everything. By default c is chosen on
texts that the box was not fitted on: the value in the middle (geometrically) of those with the most
detections less false alarms. Channels without variance would close the box; s is at least `FLOOR` times
the median of s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.contrast import Where
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens, check_finite
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.measure.samples import rate_measurement
from actlas.steering.gate_rows import GateTexts, read_gate_rows

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

FLOOR = 0.01


@dataclass(kw_only=True, eq=False)
class HyperBox(Lens):
    """A fitted hypercube.

    Attributes:
        mean, std: float32 `[d]`, of the fitted rows (unbiased, floored).
        reach: the distance of the farthest fitted row, in standard deviations.
        multiplier: c; the box is `multiplier * reach` standard deviations to each side.
        position: which token stands for a text.
        n: rows it was fitted on.
    """

    mean: Tensor
    std: Tensor
    reach: float
    multiplier: float = 1.0
    position: str | int = "last"
    n: int = 0

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ShapeError(
                f"a box needs mean and std [d], not {list(self.mean.shape)}, {list(self.std.shape)}"
            )
        check_finite("HyperBox", mean=self.mean, std=self.std)
        if not bool((self.std > 0).all()):
            raise InputError("a box has a side of length 0; every std must be above 0")
        if not self.multiplier > 0 or not self.reach > 0:
            raise InputError(
                f"a box needs a reach and a multiplier above 0, not {self.reach} and {self.multiplier}"
            )

    @classmethod
    def of(cls, site: str, rows: Tensor, multiplier: float = 1.0, **fields: Any) -> HyperBox:
        """Return the box of some rows `[n, d]`, n at least 2.

        Raises:
            InputError: fewer than two rows, or rows that are all the same.
        """
        if rows.ndim != 2 or len(rows) < 2:
            raise InputError(f"a box needs at least 2 rows [n, d], not {list(rows.shape)}")
        wide = rows.to(torch.float64)
        mean, std = wide.mean(0), wide.std(0, unbiased=True)
        if not bool((std > 0).any()):
            raise InputError("the rows of a box are all the same; give texts that differ")
        std = std.clamp_min(FLOOR * float(std[std > 0].median()))
        reach = float(((wide - mean).abs() / std).amax())
        given: dict[str, Any] = {"n": len(rows), **fields}
        return cls(site=site, mean=mean.float(), std=std.float(), reach=reach, multiplier=multiplier, **given)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def distance(self, x: Tensor) -> Tensor:
        """Return the largest coordinate distance in standard deviations, `[...]` for `[..., d]`."""
        flat = self.flat(x)
        gap = (flat.to(self.mean.dtype) - self.mean.to(flat.device)).abs() / self.std.to(flat.device)
        farthest: Tensor = gap.amax(-1)
        return farthest

    def score(self, x: Tensor) -> Tensor:
        """Return how far inside the box an activation lies, in standard deviations; below 0 is outside."""
        return self.multiplier * self.reach - self.distance(x)

    def inside(self, x: Tensor) -> Tensor:
        """Return whether activations lie in the box, bool `[...]`."""
        return self.score(x) > 0

    def widened(self, multiplier: float) -> HyperBox:
        """Return the box with another multiplier."""
        return replace(self, multiplier=multiplier, measurements=())

    def guard(self, edit: Edit) -> Edit:
        """Return an edit that applies where the query's last token lies in the box, decided once."""
        return edit.when(self, per="sequence", reduce="last")


@method(
    "hyper-box",
    room="steering",
    returns="Lens",
    data="labelled",
    summary="a gate: does a query lie in the hypercube of a skill's keys (label 1)?",
    example="actlas fit hyper-box smollm2 queries.jsonl -o box/",
    papers=("skill-unlearning",),
)
def fit_hyper_box(
    model: Model,
    data: Any,
    site: str | None = None,
    *,
    multiplier: float | Literal["auto"] = "auto",
    position: Where = "last",
    held_out: float = 0.25,
    seed: int = 0,
) -> HyperBox:
    """Fit a box around queries that need a skill.

    Args:
        model: whose activations are read.
        data: labelled queries: 1 needs the skill, 0 does not.
        site: where; default `blocks.<last>.mlp.act`, the keys of the last block's MLP.
        multiplier: c, or `"auto"` for the best one on held-out queries of both labels.
        position: which token stands for a query.
        held_out: share of the queries to choose c on, and as many again to measure on.
        seed: of the split and of the control.

    Returns:
        The box; its `measurements` are detection and false alarms on queries that neither fitted nor chose
        anything, beside a box around as many random queries of both labels.

    Raises:
        InputError: one class only with `"auto"`, too few queries, or a multiplier that is not above 0.
    """
    auto = multiplier == "auto"
    if not auto and (not isinstance(multiplier, (int, float)) or not multiplier > 0):
        raise InputError(f"multiplier is {multiplier!r}; it must be a number above 0 or 'auto'")
    texts = GateTexts.of(data, "a hyper box", both=auto)
    if site is None:
        if not model.n_blocks:
            raise InputError(f"{model.name} has no known blocks; name a site to fit the box at")
        site = f"blocks.{model.n_blocks - 1}.mlp.act"
    where = model.resolve(site)
    if len(where) != 1:
        raise InputError(f"a box reads one site, and {site!r} names {len(where)}; give one")
    fit, choose, test = texts.split((held_out, held_out), seed)
    rows = read_gate_rows(model, texts.texts, where[0].name, position)
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(np.concatenate([fit, choose]))
    count = int(texts.y[fit].sum())
    measured: list[Measurement] = []
    boxes = []
    for name, chosen in (("box", fit[texts.y[fit].numpy() == 1]), ("random box", drawn[:count])):
        box = HyperBox.of(
            where[0].name,
            rows[chosen],
            1.0 if auto else float(multiplier),
            position=position,
            fingerprint=model.fingerprint,
        )
        if auto:
            box = replace(box, multiplier=best_multiplier(box, rows[choose], texts.y[choose]))
        measured += box_rates(box, rows[test], texts.y[test], name, seed)
        boxes.append(box)
    return replace(boxes[0], measurements=tuple(measured))


def best_multiplier(box: HyperBox, rows: Tensor, y: Tensor) -> float:
    """Return the c with the most detections less false alarms on rows `[n, d]` with labels `y`.

    A row is inside from c = distance / reach on, so only these values matter; between two neighbours with
    the same rates their geometric mean is taken, and beyond the last one 1.1 times it.
    """
    needs = (box.distance(rows).double() / box.reach).clamp_min(1e-9)
    order = torch.unique(needs)
    hits = (needs[y == 1].unsqueeze(0) <= order.unsqueeze(1)).double().mean(1)
    alarms = (needs[y == 0].unsqueeze(0) <= order.unsqueeze(1)).double().mean(1)
    best = int((hits - alarms).argmax())
    after = float(order[best + 1]) if best + 1 < len(order) else 1.21 * float(order[best])
    return float((order[best] * after) ** 0.5)


def box_rates(
    box: HyperBox, rows: Tensor, y: Tensor, name: str, seed: int, **group: str
) -> Iterable[Measurement]:
    """Return the share of rows with label 1 (detection) and with label 0 (false alarms) in the box."""
    inside = box.inside(rows).numpy()
    details = {"multiplier": box.multiplier, "reach": box.reach, "fitted on": box.n}
    named = {"gate": name, "site": box.site, **group}
    for label, what, better in ((1, "detection", "higher"), (0, "false alarms", "lower")):
        chosen = inside[y.numpy() == label]
        if len(chosen):
            yield rate_measurement(
                what,
                chosen,
                seed=seed,
                better=better,  # type: ignore[arg-type]
                group=named,
                details=details,
            )
