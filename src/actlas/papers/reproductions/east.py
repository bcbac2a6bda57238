"""east: activations weighted by the entropy of the action they lead to, added back while the agent acts.

Rahn et al. 2024, "Controlling Large Language Model Agents with Entropic Activation Steering". The agent is
SmolLM2, the world a two-armed bandit that is told as text. The entropy of its choice is exact: the two arms
are one token each after the prompt. The vector is fitted on some histories and judged on others, in the
same words and in other ones, at the last token of the prompt, where the method acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.intervals import Array, bootstrap_statistic
from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.bandit_prompts import ACTIONS, Bandit, bandits
from actlas.papers.reproductions.prompt_only import LINE, WISHES, before, in_words, said

if TYPE_CHECKING:
    from actlas.circuits.last_token import LastToken
    from actlas.core.direction import Direction
    from actlas.core.model import Model

SITE = "blocks.15.resid_post"
BETA = 0.2
TOLD = 40  # histories that are also told with a wish
OVER, UNDER = "entropy gain over random directions' upper limit", "entropy gain over their lower limit"
TEMPERATURE = "entropy over the temperature of equal valid mass"
SAME, OTHER = "machines", "cafes"


def judge(m: Measured) -> list[Check]:
    """Central, at beta = 0.2 and -0.2 median residual norms on held-out histories in the words that the
    vector was fitted on: with +0.2 the mean entropy of the choice rises above what random directions of
    equal norm reach (the upper 95% limit for one more such direction), while the valid mass stays at 90% of
    the plain model's or more; with -0.2 it falls below their lower limit. Each by an interval over prompts
    beyond 0. Also: both in other words; more entropy than the temperature that leaves the same valid mass;
    a vector of shuffled entropies does less; the fit prompts' entropies span at least 0.3 nats (10th to
    90th percentile); and the vector is the covariance of activation and entropy (1 - cosine below 1e-5).
    """
    checks = []
    for words, central in ((SAME, True), (OTHER, False)):
        more = m.get(OVER, words=words, beta=f"{BETA:g}")
        kept = m.get("valid mass kept", words=words, beta=f"{BETA:g}")
        less = m.get(UNDER, words=words, beta=f"{-BETA:g}")
        name = f"more entropy than random directions ({words})"
        rises = Check.above(name, more, 0.0, central=central)
        if kept is not None and kept.value < 0.9:
            said = f"{rises.said}; but only {kept.value:.0%} of the valid mass is left"
            rises = Check(name, False, said, central)
        checks.append(rises)
        checks.append(Check.below(f"less entropy backwards ({words})", less, 0.0, central=central))
    checks.append(Check.above("more entropy than temperature", m.get(TEMPERATURE, words=SAME), 0.0))
    checks.append(
        Check.above(
            "more entropy than shuffled entropies", m.get("entropy gain over shuffled", words=SAME), 0.0
        )
    )
    checks.append(Check.above("the fit prompts span entropies", m.get("entropy span"), 0.3))
    checks.append(Check.below("the vector is a covariance", m.get("1 - cosine with the covariance"), 1e-5))
    return checks


@reproduction(
    "east",
    claim="A vector of activations weighted by the entropy of the action distribution raises the entropy "
    "of an agent's choices when it is added, lowers it when subtracted, and works on reworded prompts.",
    judge=judge,
    quick={"fit": 128, "test": 80, "other": 56, "rounds": 6, "randoms": 10, "shuffles": 3, "sites": (SITE,)},
    full={
        "fit": 400,
        "test": 200,
        "other": 200,
        "rounds": 12,
        "randoms": 20,
        "shuffles": 10,
        "sites": (SITE, "blocks.10.resid_post", "blocks.20.resid_post"),
    },
)
def east(
    *,
    seed: int,
    fit: int,
    test: int,
    other: int,
    rounds: int,
    randoms: int,
    shuffles: int,
    sites: Sequence[str],
) -> Findings:
    """Run it.

    Args:
        seed: of histories, controls and intervals.
        fit, test: histories to fit and to test on, in the same words.
        other: histories to test on in other words.
        rounds: at most so many payments in a history.
        randoms, shuffles: random directions, and vectors of shuffled entropies.
        sites: where; the first is judged.
    """
    from actlas.models import load

    model = load("smollm2")
    pool = bandits(fit + test, words=SAME, rounds=rounds, seed=seed)
    texts = {SAME: pool[fit:], OTHER: bandits(other, words=OTHER, rounds=rounds, seed=seed)}
    measured: list[Measurement] = []
    rows: list[dict[str, object]] = []
    for site in sites:
        found, points = _site(model, pool[:fit], texts, site, randoms, shuffles, seed)
        first = site == sites[0]
        measured += found if first else [m.with_group(site=site) for m in found]
        rows += points if first else []
    plot = Plot("Entropy of the choice, by strength", rows, "beta", "entropy (nats)", "direction")
    return Findings(measured, _headline(Measured(measured)), f"{NOTE} {said(measured)}", [plot])


NOTE = (
    "Published: Mixtral-8x7B and DBRX, logged episodes of the agent itself, entropies from 25 sampled "
    "completions after a written thought, hooks at the last position of every step. No official code was "
    "found; that the mean is taken over all prompts and that the sum is divided by the sum of entropies are "
    "read from a note on the paper. Ours: histories of random choices, no thought, and exact entropies of "
    "the next token; SmolLM2's choice hardly depends on which arm paid more, so that its entropy is not the "
    "uncertainty of a reasoning agent, only how undecided its next token is. Random directions are drawn "
    "anew for each seed and have the same norm; their limit is that of one more random direction. Tried "
    "before the stored run: the prompts alone (valid mass, span of entropies), and one run of the whole with "
    "28 histories to see that it works (every central check stayed open)."
)


def _site(
    model: Model,
    pool: Sequence[Bandit],
    texts: dict[str, list[Bandit]],
    site: str,
    randoms: int,
    shuffles: int,
    seed: int,
) -> tuple[list[Measurement], list[dict[str, object]]]:
    from actlas.measure.statistics import mean_measurement
    from actlas.steering.directions import fit_direction
    from actlas.steering.fits import fits

    logged = Choices(model, pool, site)
    prompts = [b.prompt for b in pool]
    entropy = logged.plain.entropy
    direction = fit_direction(model, prompts, site, method="cov", y=list(entropy))
    measured = [
        mean_measurement("entropy of the choice", "nats", entropy, seed=seed, over="prompts",
                         group={"words": SAME, "part": "fit"}),
        Measurement("entropy span", float(np.quantile(entropy, 0.9) - np.quantile(entropy, 0.1)), "nats",
                    len(entropy), note="10th to 90th percentile over the fit prompts"),
        Measurement("1 - cosine with the covariance",
                    1 - direction.cosine(_covariance(logged.values, entropy)), "cosine", len(entropy)),
        Measurement("length of the vector", direction.norm / direction.reference, "median norms",
                    len(entropy)),
    ]  # fmt: skip
    generator = np.random.default_rng(seed)
    weighted = fits()["cov"].function
    shuffled = [
        weighted(logged.values, torch.tensor(generator.permutation(entropy))) for _ in range(shuffles)
    ]
    random = [direction.random(seed + 1 + i).unit for i in range(randoms)]
    rows: list[dict[str, object]] = []
    for words, histories in texts.items():
        choices = Choices(model, histories, site)
        found, points = _judged(choices, direction, random, [_unit(v) for v in shuffled], words, seed)
        measured += found
        rows += points if words == SAME else []
        if words == SAME:
            measured += _told(model, choices, histories, direction, seed)
    return measured, rows


def _told(
    model: Model, choices: Choices, histories: Sequence[Bandit], direction: Direction, seed: int
) -> list[Measurement]:
    """Return the entropy of the choice when the agent is told to explore or to commit, beside the vector."""
    from actlas.measure.action_entropy import action_chances

    out = []
    for wish, beta in (("more", BETA), ("less", -BETA)):
        prompts = [before(WISHES[f"east, {wish}"], b.prompt) for b in histories[:TOLD]]
        words = action_chances(model, prompts, ACTIONS).entropy()
        own = choices.moved(direction.unit * direction.reference * beta).entropy[:TOLD]
        out += in_words(
            "entropy of the choice", "nats", own, words, asked=LINE, seed=seed, over="prompts", wish=wish
        )
    return out


@dataclass(frozen=True)
class Chosen:
    """Entropy of the choice (nats) and valid mass of each prompt, `[n]`."""

    entropy: Array
    valid: Array


class Choices:
    """What the agent chooses after each history, with a displacement at the last token.

    Attributes:
        values: `[n, d]`, the activations at the site.
        plain: choices of the plain model.
    """

    def __init__(self, model: Model, histories: Sequence[Bandit], site: str, batch: int = 32) -> None:
        from actlas.circuits.last_token import LastToken
        from actlas.measure.action_entropy import _action_ids

        prompts = [b.prompt for b in histories]
        self.ids = [_action_ids(model, prompt, ACTIONS) for prompt in prompts]
        starts = range(0, len(prompts), batch)
        self.runs: list[LastToken] = [LastToken(model, prompts[i : i + batch], site) for i in starts]
        self.values = torch.cat([run.values for run in self.runs])
        self.logits = torch.cat([run.logits() for run in self.runs])
        self.plain = self.read(self.logits)

    def moved(self, displacement: Tensor) -> Chosen:
        """Return the choices with `displacement` `[d]` added to each last token."""
        return self.read(torch.cat([run.logits(run.values + displacement) for run in self.runs]))

    def heated(self, temperature: float) -> Chosen:
        """Return the choices of the plain model at another sampling temperature."""
        return self.read(self.logits / temperature)

    def read(self, logits: Tensor) -> Chosen:
        from actlas.measure.action_entropy import entropy

        logp = logits.double().log_softmax(-1).gather(1, torch.tensor(self.ids))
        chance: NDArray[np.float64] = logp.softmax(-1).numpy()
        return Chosen(entropy(chance), logp.logsumexp(-1).exp().numpy())

    def temperature_of(self, valid: float) -> float:
        """Return the temperature from 1 to 8 whose mean valid mass is `valid`, or the nearest."""
        low, high = 1.0, 8.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self.heated(middle).valid.mean()) > valid else (low, middle)
        return low


def _judged(
    choices: Choices,
    direction: Direction,
    random: Sequence[Tensor],
    shuffled: Sequence[Tensor],
    words: str,
    seed: int,
) -> tuple[list[Measurement], list[dict[str, object]]]:
    """Return entropy gains by strength, with their controls at plus and minus `BETA`."""
    from actlas.measure.statistics import mean_measurement, paired_difference

    base = choices.plain
    out = [
        mean_measurement("entropy of the choice", "nats", base.entropy, seed=seed, over="prompts",
                         group={"words": words, "part": "test"}),
        mean_measurement("valid mass", "fraction", base.valid, seed=seed, over="prompts",
                         group={"words": words, "beta": "0"}),
    ]  # fmt: skip
    points: list[dict[str, object]] = [_point(0.0, base, "EAST")]
    scale = direction.reference
    for beta in (-BETA, -BETA / 2, -BETA / 4, BETA / 4, BETA / 2, BETA):
        group = {"words": words, "beta": f"{beta:g}"}
        own = choices.moved(direction.unit * scale * beta)
        gain = own.entropy - base.entropy
        points.append(_point(beta, own, "EAST"))
        out.append(mean_measurement("entropy gain", "nats", gain, seed=seed, over="prompts", group=group))
        kept = float(own.valid.mean() / base.valid.mean())
        out.append(Measurement("valid mass kept", kept, "ratio", len(gain), group=group))
        if abs(beta) < BETA:
            continue
        drawn = [choices.moved(u * scale * beta) for u in random]
        points += [_point(beta, r, f"random {i + 1}") for i, r in enumerate(drawn)]
        noise = np.array([r.entropy - base.entropy for r in drawn])
        out.append(
            mean_measurement("entropy gain, random directions", "nats", noise.mean(0), seed=seed,
                             over="prompts", group=group)
        )  # fmt: skip
        name, side = (OVER, 1) if beta > 0 else (UNDER, -1)
        out.append(over_limit(name, gain, noise, side, seed, group))
        if beta > 0:
            fooled = np.mean([choices.moved(u * scale * beta).entropy for u in shuffled], axis=0)
            hot = choices.temperature_of(float(own.valid.mean()))
            for what, rival, note in (
                ("entropy gain over shuffled", fooled, f"mean of {len(shuffled)} vectors"),
                (TEMPERATURE, choices.heated(hot).entropy, f"temperature {hot:.2f}"),
            ):
                gap = paired_difference(rival, own.entropy, seed=seed)
                out.append(
                    Measurement(what, gap.value, "nats", gap.n, gap.low, gap.high,
                                "paired bootstrap over prompts", seed, group={"words": words}, note=note)
                )  # fmt: skip
    return out, points


def over_limit(
    name: str, own: Array, noise: Array, side: int, seed: int, group: dict[str, str]
) -> Measurement:
    """Return the mean of `own` beyond the 95% limit for one more random direction.

    Args:
        name, group: of the measurement.
        own: gain of each prompt, `[n]`.
        noise: gains under random directions, `[directions, n]`.
        side: 1 for the upper limit, -1 for the lower.
        seed: of the bootstrap over prompts.
    """
    from scipy.stats import t

    s = len(noise)
    factor = float(t.ppf(0.975, s - 1)) * (1 + 1 / s) ** 0.5

    def statistic(counts: Array) -> Array:
        share = counts / counts.sum(1, keepdims=True)
        means = share @ noise.T
        limit = means.mean(1) + side * factor * means.std(1, ddof=1)
        found: Array = share @ own - limit
        return found

    value = float(statistic(np.ones((1, len(own))))[0])
    low, high = bootstrap_statistic(statistic, len(own), seed=seed)
    return Measurement(
        name, value, "nats", len(own), low, high, "bootstrap over prompts", seed, group=group,
        note=f"{'upper' if side > 0 else 'lower'} 95% limit for one more direction, from {s}",
    )  # fmt: skip


def _covariance(x: Tensor, y: Array) -> Tensor:
    """The covariance of each channel with y, as numpy computes it."""
    rows: Array = x.double().numpy()
    return torch.from_numpy(((rows - rows.mean(0)) * (y - y.mean())[:, None]).mean(0))


def _unit(vector: Tensor) -> Tensor:
    return (vector / vector.norm()).float()


def _point(beta: float, chosen: Chosen, series: str) -> dict[str, object]:
    return {"beta": beta, "entropy (nats)": float(chosen.entropy.mean()), "direction": series}


def _headline(m: Measured) -> str:
    said = []
    for beta in (BETA, -BETA):
        own = m.get("entropy gain", words=SAME, beta=f"{beta:g}")
        noise = m.get("entropy gain, random directions", words=SAME, beta=f"{beta:g}")
        if own is not None and noise is not None:
            said.append(
                f"beta {beta:+g}: entropy {own.value:+.3f} nats, random directions {noise.value:+.3f}"
            )
    return "; ".join(said)
