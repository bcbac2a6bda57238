"""What the reproduction of context-knob measures: pair accuracy, swaps over depth, transfer, price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from actlas.circuits.das import faithfulness_of
from actlas.circuits.knob import knob_measures
from actlas.circuits.last_token import LastToken
from actlas.circuits.subspace import interchange
from actlas.core.measurement import Measurement
from actlas.core.scope import Scope
from actlas.data import corpus
from actlas.measure.likelihood import Losses, nll, output_logits, takes_option
from actlas.measure.paired import perplexity_ratio
from actlas.measure.samples import mean_measurement
from actlas.papers.reproductions.capital_prompts import answer_ids, prompt

if TYPE_CHECKING:
    from actlas.circuits.interchange import Interchange
    from actlas.circuits.knob import SetProjection
    from actlas.core.model import Model
    from actlas.papers.reproductions.capital_prompts import Draw

OUTCOMES = ("context", "memory", "other")
CONTROLS = 10


def pair_accuracy(model: Model, draws: Sequence[Draw], name: str, seed: int) -> Measurement:
    """Return the share of (context, query) pairs with both intents answered rightly."""
    right = np.ones(len(draws))
    options = {"logits_to_keep": 1} if takes_option(model, "logits_to_keep") else {}
    for intent in ("context", "prior"):
        texts = model.encode([prompt(d, intent) for d in draws], padding_side="left")
        said = output_logits(model, texts, **options)[:, -1].argmax(1).cpu()
        right *= (said == answer_ids(model, draws, intent, intent)).double().numpy()
    return _share("pair accuracy", right, _countries(draws), seed, model=name)


def on_held_out(
    tuned: Model, made: SetProjection, swap: Interchange, method: str, seed: int
) -> list[Measurement]:
    """Return what a knob turns on held-out prompts of the tuned copy, and the illusion test there."""
    found = knob_measures(made, swap, controls=CONTROLS, seed=seed)
    found += faithfulness_of(tuned, swap, made.unit, seed=seed).measurements
    return [x.with_group(knob=method) for x in found]


def over_depth(
    learned: Interchange, test: Interchange, blocks: Sequence[int], seed: int
) -> list[Measurement]:
    """Return how many answers a swap of everything, and of the mean difference alone, turns at each block."""
    half = len(test) // 2
    groups = [i % half for i in range(len(test))]
    found = []
    for block in blocks:
        site = f"blocks.{block}.resid_post"
        own, at = learned.at(site).base, test.at(site)
        middle = len(own) // 2
        vector = (own[:middle] - own[middle:]).mean(0)
        hits = {}
        for what, values in (
            ("everything", at.source),
            ("the direction", interchange(at.base, at.source, vector)),
        ):
            said = at.run(values).hits
            assert said is not None
            hits[what] = said.double().cpu().numpy()
            found.append(_share("turned over depth", hits[what], groups, seed, block=str(block), swap=what))
        gap = hits["everything"] - hits["the direction"]
        name = "turned by everything minus by the direction"
        found.append(_share(name, gap, groups, seed, block=str(block)))
    return found


def transfer(
    model: Model, made: SetProjection, draws: Sequence[Draw], method: str, seed: int
) -> list[Measurement]:
    """Return what the original model says, without an intent line, under the knob and its controls."""
    runs = LastToken(model, [prompt(d) for d in draws], made.site)
    ids = {
        "context": answer_ids(model, draws, "", "context"),
        "memory": answer_ids(model, draws, "", "prior"),
    }
    countries = _countries(draws)
    x, unit = runs.values, made.unit
    high, low = made.means

    def said(values: Tensor) -> dict[str, np.ndarray]:
        first = runs.logits(values).argmax(1).cpu()
        out = {name: (first == i).double().numpy() for name, i in ids.items()}
        return {**out, "other": 1 - out["context"] - out["memory"]}

    def moved(to: float) -> Tensor:
        return to - x @ unit

    settings = {
        "nothing": x,
        "context value": x + moved(high).unsqueeze(1) * unit,
        "prior value": x + moved(low).unsqueeze(1) * unit,
        "twice as far to context": x + moved(2 * high - low).unsqueeze(1) * unit,
        "twice as far to prior": x + moved(2 * low - high).unsqueeze(1) * unit,
    }
    rates = {name: said(values) for name, values in settings.items()}
    generator = torch.Generator().manual_seed(seed)
    for name, to in (("context value", high), ("prior value", low)):
        drawn = torch.randn(CONTROLS, len(unit), generator=generator)
        each = [said(x + moved(to).unsqueeze(1) * d / d.norm()) for d in drawn]
        rates[f"random directions, {name}"] = {o: np.mean([e[o] for e in each], axis=0) for o in OUTCOMES}
    group = {"knob": method}
    found = [
        _share("answers of the original model", rates[name][o], countries, seed, **group, set=name, outcome=o)
        for name in rates
        for o in OUTCOMES
    ]
    for outcome, name in (("context", "context value"), ("memory", "prior value")):
        gap = rates[name][outcome] - rates[f"random directions, {name}"][outcome]
        found.append(_share(f"{outcome} share beyond random", gap, countries, seed, **group))
    gap = rates["context value"]["context"] - rates["prior value"]["context"]
    found.append(_share("context share, context minus prior value", gap, countries, seed, **group))
    return found


def price(model: Model, made: SetProjection, tokens: int, seed: int) -> list[Measurement]:
    """Return the perplexity of prose with the knob set at every token, over that without."""

    def score() -> Losses:
        return nll(model, corpus("prose", seed=seed), tokens=tokens, context=128)

    base, found = score(), []
    for name in made.names:
        everywhere = replace(made.set(name), scope=Scope())
        with model.edit(everywhere):
            found.append(perplexity_ratio(base, score(), seed=seed, group={"set": f"{name} value"}))
    return found


def _share(name: str, values: np.ndarray, groups: Sequence[object], seed: int, **group: str) -> Measurement:
    return mean_measurement(
        name, "fraction", values, seed=seed, clusters=list(groups), over="countries", group=group
    )


def _countries(draws: Sequence[Draw]) -> list[str]:
    return [asked.name for asked, _ in draws]
