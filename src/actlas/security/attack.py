"""How easily can activations hijack this model, and what would notice? One measured answer.

    report = attack(model, pairs, clean=texts)
    report.measurements

The trojan is fitted on some pairs and measured on others: at the layer its search chose and at every
layer, over strengths, beside random vectors of equal norm and its own opposite, with what it costs on
clean text. Then the defences meet it: injected in every way of `injection`, does the audit find it (and
does it stay silent on the plain model); at every strength, how often do monitors raise an alarm on
prompts, and how often on the same prompts without the attack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.contrast import Contrast
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.likelihood import nll
from actlas.measure.paired import perplexity_ratio
from actlas.security.defences import monitored, noticed
from actlas.security.margins import Margins, probability
from actlas.security.trojan import Trojan, find_trojan, measure_trojan

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True)
class AttackReport:
    """What `attack` found.

    Attributes:
        trojan: the fitted attack.
        measurements: all numbers, controls among them.
        layers: what the attack does at every layer that was tried: records with site, divergence, P.
    """

    trojan: Trojan
    measurements: tuple[Measurement, ...]
    layers: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "attack": self.trojan.edit.describe(),
            "site": self.trojan.site,
            "search": self.trojan.search,
            "layers": list(self.layers),
            "measurements": [m.to_json() for m in self.measurements],
        }


def attack(
    model: Model,
    data: Any,
    *,
    clean: Sequence[Any] | Any = None,
    held_out: float = 0.4,
    controls: int = 5,
    every: int = 3,
    tokens: int = 1000,
    monitor_site: str | None = None,
    trials: int = 2,
    seed: int = 0,
    **options: Any,
) -> AttackReport:
    """Attack one's own model, and measure the attack and the defences.

    Args:
        model: a causal language model with a layout.
        data: pairs (clean answer, adverse answer).
        clean: texts for the price on clean text and for calibrating monitors; without them neither is
            measured.
        held_out: share of the pairs that the attack is not fitted on.
        controls: random vectors of equal norm.
        every: try the attack at every so-manieth layer; 0 skips this.
        tokens: of clean text, for its perplexity.
        monitor_site: where monitors read; default three quarters up, or the last block if the attack
            comes later.
        trials: injections for each way.
        seed: of every random choice.
        options: of `find_trojan`, e.g. `search="margin"`.

    Raises:
        InputError: see `find_trojan`.
    """
    fit, test = Contrast.of(data).split(held_out, seed)
    trojan = find_trojan(model, fit, **options)
    found, _ = measure_trojan(model, trojan, test, controls=controls, seed=seed)
    layers: list[dict[str, Any]] = []
    if every:
        layers, rank = layer_scan(model, trojan, test, every=every, seed=seed)
        found.append(rank)
    if clean is not None:
        texts = list(clean) if not isinstance(clean, str) else [clean]
        found += stealth(model, trojan, texts, tokens=tokens, seed=seed)
        site = monitor_site or _monitor_site(model, trojan)
        found += monitored(model, trojan, prompts_of(test), {"clean text": texts}, site, seed=seed)
    found += noticed(model, trojan, trials=trials, seed=seed)
    return AttackReport(trojan, tuple(found), tuple(layers))


def layer_scan(
    model: Model, trojan: Trojan, test: Contrast, *, every: int = 1, seed: int = 0
) -> tuple[list[dict[str, Any]], Measurement]:
    """Attack at every so-manieth searched layer (the chosen one included).

    Returns:
        A record for each layer: site, the search's score, mean P(clean answer) under the attack and under
        one random vector of equal norm; and the rank of the chosen layer among them, as the share of
        layers where the attack does more (0 is the best).
    """
    names = list(trojan.directions)
    wanted = [n for i, n in enumerate(names) if i % every == 0 or n == trojan.site]
    margins = Margins(model, test)
    rows = []
    with progress("attack at every layer", len(wanted), "layers") as advance:
        for name in wanted:
            d = trojan.directions[name]
            attacked, random = probability(
                margins.under(name, [-trojan.strength * d.vector, trojan.strength * d.random(seed).vector])
            ).mean(1)
            rows.append({"site": name, "score": trojan.scores[name], "attack": attacked, "random": random})
            advance()
    own = next(r for r in rows if r["site"] == trojan.site)
    better = [r["attack"] < own["attack"] for r in rows if r is not own]
    rank = Measurement(
        "layers where the attack does more",
        float(np.mean(better)) if better else 0.0,
        "fraction",
        len(rows),
        group={"search": trojan.search},
        note=f"than at {trojan.site}, of {len(rows)} layers tried",
    )
    return rows, rank


def stealth(
    model: Model, trojan: Trojan, texts: Sequence[Any], *, tokens: int, seed: int
) -> list[Measurement]:
    """Return the perplexity on clean text under the attack, and under a random vector, over the plain one."""
    base = nll(model, texts, tokens=tokens, context=256)
    found = []
    random = trojan.direction.random(1000 * seed).steer(trojan.strength, unit="raw")
    for name, edit in (("attack", trojan.edit), ("random", random)):
        with model.edit(edit):
            other = nll(model, texts, tokens=tokens, context=256)
        group = {"under": name, "site": trojan.site}
        found.append(
            perplexity_ratio(base, other, name="perplexity on clean text, over plain", seed=seed, group=group)
        )
    return found


def prompts_of(contrast: Contrast) -> list[str]:
    """Return what a user would send: each pair's shared beginning, at a word's end, once."""
    found = []
    for one, other in zip(contrast.positive, contrast.negative, strict=True):
        pieces = itertools.takewhile(lambda p: p[0] == p[1], zip(one, other, strict=False))
        shared = "".join(p[0] for p in pieces)
        cut = shared.rfind(" ")
        found.append(shared[:cut] if cut > 0 else shared)
    return list(dict.fromkeys(text for text in found if text.strip()))


def _monitor_site(model: Model, trojan: Trojan) -> str:
    last = (model.n_blocks or 1) - 1
    place = max(3 * last // 4, int(trojan.site.split(".")[1]))
    return f"blocks.{place}.resid_post"
