"""The runs behind g-sae: autoencoders for every beta and seed, and what each of them costs the model.

At one seed all betas share first weights and the order of rows, so that differences are paired. The best
beta is chosen on the even windows and judged on the odd ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.intervals import percentiles, resample_counts
from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Plot

if TYPE_CHECKING:
    from actlas.dictionaries.gradient import GradientSAE
    from actlas.dictionaries.objective import Batch
    from actlas.papers.reproductions.spliced_windows import SplicedWindows

READINGS = {"plain": "plain TopK", "gradient": "gradient-aware choice"}
CHOSEN = "loss over beta 0, chosen beta"
Array = NDArray[np.float64]


class GradientRuns:
    """Trained autoencoders for every beta and seed, and what was measured with them."""

    def __init__(
        self,
        site: str,
        rows: Batch,
        cut: SplicedWindows,
        *,
        width: int,
        k: int,
        steps: int,
        batch: int,
        seed: int,
    ) -> None:
        self.site, self.rows, self.cut, self.seed = site, rows, cut, seed
        self.sizes = {"width": width, "k": k, "steps": steps, "batch": batch}
        self.loss: dict[tuple[float, str], list[Array]] = {}
        self.unexplained: dict[float, list[float]] = {}
        self.dead: dict[float, list[float]] = {}
        self.first: dict[float, GradientSAE] = {}

    def train(self, beta: float, s: int) -> None:
        """Train and measure one autoencoder; at one `s` all betas share first weights and order of rows."""
        from actlas.dictionaries.gradient import GradientSAE
        from actlas.dictionaries.objective import TrainSettings
        from actlas.dictionaries.sources import RowsSource
        from actlas.dictionaries.training import train

        choice: dict[str, Any] = {"beta": beta} if beta < math.inf else {"selection": "attribution"}
        start = 1000 * self.seed + s
        d = self.rows.x.shape[1]
        sae = GradientSAE.create(self.site, d, self.sizes["width"], seed=start, k=self.sizes["k"], **choice)
        settings = TrainSettings(
            tokens=self.sizes["steps"] * self.sizes["batch"], batch=self.sizes["batch"], seed=start
        )
        train(sae, RowsSource(self.rows.x, gradient=self.rows.gradient), settings, show=False)
        x, g = self.cut.rows, self.cut.gradients.flatten(0, 1)
        codes = {"plain": sae.encode(x), "gradient": sae.encode_with_gradient(x, g)}
        for reading, found in codes.items():
            loss = self.cut.cross_entropy(sae.decode(found))
            self.loss.setdefault((beta, reading), []).append(loss)
        fired = codes["plain"].counts() + sae.encode(self.rows.x).counts()
        self.dead.setdefault(beta, []).append(float((fired == 0).double().mean()))
        kept = x[~self.cut.massive.flatten()]
        error = (sae.reconstruct(kept) - kept).square().sum() / (kept - kept.mean(0)).square().sum()
        self.unexplained.setdefault(beta, []).append(float(error))
        self.first.setdefault(beta, sae)

    @property
    def betas(self) -> list[float]:
        return list(self.dead)

    def measurements(self) -> list[Measurement]:
        """Loss, unexplained variance and dead features, for every beta."""
        from actlas.measure.statistics import mean_measurement

        out = []
        for (beta, reading), losses in self.loss.items():
            group = {"beta": _name(beta), "reading": reading}
            out.append(crossed("loss with the reconstruction", np.stack(losses), self.seed, group))
        for beta in self.betas:
            for name, values in (
                ("fraction of variance unexplained", self.unexplained),
                ("dead features", self.dead),
            ):
                out.append(
                    mean_measurement(
                        name, "fraction", values[beta], seed=self.seed, over="seeds", better="lower",
                        group={"beta": _name(beta)},
                    )
                )  # fmt: skip
        return out

    def gain(self, beta: float, reading: str) -> Array:
        """Return the loss over that of beta 0, `[seeds, windows]`."""
        return np.stack(self.loss[beta, reading]) - np.stack(self.loss[0.0, reading])

    def best(self, reading: str) -> float:
        """Return the beta above 0 of least loss on the even windows."""
        return min(self.betas[1:], key=lambda beta: float(self.gain(beta, reading)[:, ::2].mean()))

    def differences(self) -> list[Measurement]:
        """Every beta against 0, and the chosen one on the windows that did not choose it."""
        from actlas.measure.statistics import mean_measurement

        out = []
        for reading in READINGS:
            for beta in self.betas[1:]:
                group = {"beta": _name(beta), "reading": reading}
                out.append(crossed("loss over beta 0", self.gain(beta, reading), self.seed, group))
            chosen = self.best(reading)
            found = self.gain(chosen, reading)[:, 1::2]
            out.append(crossed(CHOSEN, found, self.seed, {"reading": reading}, {"beta": _name(chosen)}))
        for beta in self.betas[1:]:
            more = np.asarray(self.dead[beta]) - np.asarray(self.dead[0.0])
            options: dict[str, Any] = {"seed": self.seed, "over": "seeds", "better": "lower"}
            name = "dead features over beta 0"
            out.append(mean_measurement(name, "fraction", more, group={"beta": _name(beta)}, **options))
            if beta == self.best("plain"):
                out.append(
                    mean_measurement("dead features over beta 0, chosen beta", "fraction", more, **options)
                )
        return out

    def steering(self, features: int) -> list[Measurement]:
        """How far a push moves the logits: along features of beta 0, of the chosen beta, at random."""
        from actlas.measure.statistics import mean_measurement, paired_difference

        chosen = self.best("plain")
        plain, other = self.first[0.0], self.first[chosen]
        pairs = matched_by_frequency(self._frequency(plain), self._frequency(other), features, self.seed)
        d = self.rows.x.shape[1]
        noise = torch.randn(len(pairs), d, generator=torch.Generator().manual_seed(self.seed))
        pushed = {
            "beta 0": plain.W_dec[[a for a, _ in pairs]],
            f"beta {_name(chosen)}": other.W_dec[[b for _, b in pairs]],
            "random directions": noise / noise.norm(dim=1, keepdim=True),
        }
        size = 0.1 * float(self.rows.x.norm(dim=1).mean())
        change = {name: self.cut.logit_change(unit, size) for name, unit in pushed.items()}
        note = "a push of a tenth of the mean norm at one token"
        out = [
            mean_measurement(
                "logit change of a push", "logits", values, seed=self.seed, over="features", note=note,
                group={"along": name},
            )
            for name, values in change.items()
        ]  # fmt: skip
        first, second, _ = change.values()
        found = paired_difference(first, second, seed=self.seed)
        out.append(
            Measurement(
                "logit change over beta 0's features", found.value, "logits", found.n, found.low, found.high,
                "paired bootstrap over features", self.seed, details={"beta": _name(chosen)},
            )
        )  # fmt: skip
        return out

    def _frequency(self, sae: GradientSAE) -> Tensor:
        return sae.encode(self.rows.x).counts().double() / len(self.rows)

    def plot(self) -> Plot:
        """The loss over that of beta 0 against beta."""
        rows = [
            {"beta": _name(beta), "loss over beta 0": float(self.gain(beta, reading).mean()), "reading": said}
            for reading, said in READINGS.items()
            for beta in self.betas
        ]
        return Plot(
            "Loss with the reconstruction in place", rows, x="beta", y="loss over beta 0", color="reading"
        )


def matched_by_frequency(a: Tensor, b: Tensor, n: int, seed: int) -> list[tuple[int, int]]:
    """Return pairs of latents, one of each dictionary, that fire about as often; each at most once.

    Args:
        a, b: how often each latent fires, `[m]`; those that never do are left out.
        n: how many pairs; fewer if there are not enough latents.
    """
    alive = a.nonzero().squeeze(1)
    order = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))]
    free = b > 0
    pairs: list[tuple[int, int]] = []
    for i in order.tolist():
        if len(pairs) == n or not bool(free.any()):
            break
        distance = (b.clamp_min(1e-12).log() - a[i].log()).abs().masked_fill(~free, math.inf)
        j = int(distance.argmin())
        free[j] = False
        pairs.append((i, j))
    return pairs


def crossed(
    name: str, values: Array, seed: int, group: dict[str, str], details: dict[str, str] | None = None
) -> Measurement:
    """Return the mean of `[seeds, windows]`; its interval draws seeds and windows anew, each apart."""
    seeds, windows = values.shape
    draws = np.concatenate(
        [
            np.einsum("bs,sw,bw->b", s, values, w) / (seeds * windows)
            for s, w in zip(
                resample_counts(seeds, 2000, seed), resample_counts(windows, 2000, seed + 1), strict=True
            )
        ]
    )
    low, high = percentiles(draws, seeds)
    return Measurement(
        name, float(values.mean()), "nats/token", seeds * windows, low, high,
        "bootstrap over seeds and documents", seed, group=group, better="lower",
        note=f"{seeds} seeds, {windows} documents", details=details or {},
    )  # fmt: skip


def _name(beta: float) -> str:
    return "attribution alone" if math.isinf(beta) else f"{beta:g}"
