"""ProbeGate: a softmax probe over a few choices, which goes on learning from new labelled rows.

    pi(h) = softmax(A z + b),    z = (h - centre) / spread                  h: activation at the probe's site

An update is one step of Adam (Kingma and Ba 2015) on the cross-entropy of one row, with the moments kept in
the probe, so that a saved probe learns on exactly as the one in memory would:

    g = (pi - onehot(label)) [z, 1]^T          m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    (A, b) <- (A, b) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8)

The label is always measured or given. A probe that learns from its own choices drifts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens, check_finite

B1, B2, EPS = 0.9, 0.999, 1e-8


@dataclass(kw_only=True, eq=False)
class ProbeGate(Lens):
    """A probe that chooses one of k.

    Attributes:
        weight: float32 `[k, d + 1]`; the last column is the bias.
        centre, spread: float32 `[d]`.
        first, second: Adam's moments, `[k, d + 1]`.
        steps: updates so far.
    """

    weight: Tensor
    centre: Tensor
    spread: Tensor
    first: Tensor
    second: Tensor
    steps: int = 0

    def __post_init__(self) -> None:
        k, d = (self.weight.shape[0], len(self.centre)) if self.weight.ndim == 2 else (0, 0)
        shapes = [tuple(t.shape) for t in (self.weight, self.first, self.second)]
        if k < 1 or set(shapes) != {(k, d + 1)} or len(self.spread) != d:
            raise ShapeError(f"a probe gate needs weight, first and second [k, d + 1], not {shapes}")
        check_finite("ProbeGate", weight=self.weight, centre=self.centre, spread=self.spread)

    @classmethod
    def fresh(cls, site: str, rows: Tensor, choices: int, **fields: Any) -> ProbeGate:
        """Return the probe that knows nothing yet, standardised by rows `[n, d]`."""
        spread = rows.float().std(0) if len(rows) > 1 else torch.ones(rows.shape[1])
        spread = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-30), spread, torch.ones_like(spread))
        zero = torch.zeros(choices, rows.shape[1] + 1)
        centre = rows.float().mean(0)
        return cls(site=site, weight=zero, first=zero, second=zero, centre=centre, spread=spread, **fields)

    @classmethod
    def fitted(
        cls, site: str, rows: Tensor, labels: Tensor, choices: int, *, penalty: float = 1.0, **fields: Any
    ) -> ProbeGate:
        """Return the probe of L2-regularised softmax regression (scikit-learn's `C = 1 / penalty`)."""
        from sklearn.linear_model import LogisticRegression

        probe = cls.fresh(site, rows, choices, **fields)
        seen = torch.unique(labels)
        weight = torch.zeros_like(probe.weight)
        weight[:, -1] = -1e3  # a choice that no row has is never made
        if len(seen) == 1:
            weight[seen[0], -1] = 0.0
            return replace(probe, weight=weight)
        z = ((rows.float() - probe.centre) / probe.spread).double().numpy()
        made = LogisticRegression(C=1 / penalty, max_iter=2000).fit(z, labels.numpy())
        coef, bias = torch.tensor(made.coef_).float(), torch.tensor(made.intercept_).float()
        if len(seen) == 2:  # scikit-learn gives one row for two classes
            coef, bias = torch.cat([-coef, coef]) / 2, torch.cat([-bias, bias]) / 2
        weight[seen] = torch.cat([coef, bias.unsqueeze(1)], 1)
        return replace(probe, weight=weight)

    @property
    def channels(self) -> int:
        return len(self.centre)

    @property
    def choices(self) -> int:
        """How many choices there are."""
        return len(self.weight)

    def encode(self, x: Tensor) -> Tensor:
        """Return the probability of every choice, `[..., k]`."""
        return torch.softmax(self._logits(x), -1)

    def score(self, x: Tensor) -> Tensor:
        """Return the probability of the likeliest choice, `[...]`: how sure the probe is."""
        return self.encode(x).amax(-1)

    def choose(self, x: Tensor) -> Tensor:
        """Return the likeliest choice, int64 `[...]`."""
        return self._logits(x).argmax(-1)

    def updated(self, rows: Tensor, labels: Tensor, lr: float = 0.01) -> ProbeGate:
        """Return the probe after one step of Adam on each row in turn.

        Args:
            rows: `[n, d]`.
            labels: the right choices, int64 `[n]`.
            lr: size of a step.

        Raises:
            InputError: labels that are no choices, as many rows as labels are missing, or lr not above 0.
        """
        if len(rows) != len(labels) or rows.ndim != 2:
            raise InputError(
                f"an update needs rows [n, d] and n labels, not {list(rows.shape)}, {len(labels)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.choices:
            raise InputError(
                f"a label is {int(labels.max())}; this probe has choices 0 to {self.choices - 1}"
            )
        if not lr > 0:
            raise InputError(f"lr is {lr}; it must be above 0")
        weight, first, second, steps = self.weight.clone(), self.first, self.second, self.steps
        for row, label in zip(self._inputs(rows), labels.tolist(), strict=True):
            error = torch.softmax(weight @ row, 0)
            error[label] -= 1
            gradient = error.unsqueeze(1) * row
            steps += 1
            first = B1 * first + (1 - B1) * gradient
            second = B2 * second + (1 - B2) * gradient.square()
            scale = (second / (1 - B2**steps)).sqrt() + EPS
            weight = weight - lr * (first / (1 - B1**steps)) / scale
        return replace(self, weight=weight, first=first, second=second, steps=steps, measurements=())

    def _inputs(self, x: Tensor) -> Tensor:
        flat = self.flat(x)
        z = (flat.to(self.weight.dtype) - self.centre.to(flat.device)) / self.spread.to(flat.device)
        return torch.cat([z, torch.ones_like(z[..., :1])], -1)

    def _logits(self, x: Tensor) -> Tensor:
        return self._inputs(x) @ self.weight.to(x.device).T
