"""factual-recall-heads: single heads decide between a memorised and an in-context answer.

Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models". The context
says that the capital of a country is another city; SmolLM2 answers from memory. Which heads push which answer
is read from their direct effect on the logits, one head and a factor on it are chosen on half of the
countries, and what they do is measured on the other half, on another relation, and beside random heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.head_runs import Head, HeadRuns
    from actlas.core.model import Model
    from actlas.data.facts_table import Country
    from actlas.papers.reproductions.capital_prompts import Draw

FIRST = 20  # random heads and the causal order come from this block on
BEYOND = "rate beyond twice the random heads'"


def judge(m: Measured) -> list[Check]:
    """Holds if, on countries that the head was not chosen on, (1) without any edit the context wins fewer
    than 20% of prompts, (2) scaling one head raises that by more than 25 points (central), (3) to more than
    twice what random heads of blocks 20 to 29 reach at the same factor (central), (4) to more than 50%, and
    (5) a third answer wins fewer than half of the prompts; (6) the order of heads by direct logit attribution
    agrees with their causal order (rank correlation above 0); (7) the same edit raises the in-context rate
    for another relation, a country's continent. Intervals are over countries; a check whose interval covers
    its boundary is undecided. How frequencies matter is exploratory and not judged."""
    one, rates = {"heads": "one", "relation": "capital"}, {"outcome": "answer"}
    return [
        Check.below("memory wins without any edit", m.get("rate", **one, **rates, edit="none"), 0.2),
        Check.above("one head raises the in-context rate", m.get(GAIN, **one), 0.25, central=True),
        Check.above("random heads reach less than half of it", m.get(BEYOND, **one), 0.0, central=True),
        Check.above("the context wins most prompts", m.get("rate", **one, **rates, edit="tuned"), 0.5),
        Check.below(
            "the model still says one of the two", m.get("rate", **one, outcome="other", edit="tuned"), 0.5
        ),
        Check.above("attribution orders heads as their effects do", m.get(AGREEMENT), 0.0),
        Check.above(
            "it carries over to another relation", m.get(GAIN, heads="one", relation="continent"), 0.0
        ),
    ]


GAIN, AGREEMENT = "gain in the answer rate", "rank correlation of attribution and effect"


@reproduction(
    "factual-recall-heads",
    claim="Scaling the output of one attention head makes the in-context answer win over the memorised one.",
    judge=judge,
    quick={
        "each": 4,
        "candidates": 6,
        "alphas": (-1.0, 0.0, 0.5, 2.0, 4.0, 6.0),
        "controls": 20,
        "tokens": 1024,
    },
    full={
        "each": 12,
        "candidates": 24,
        "alphas": (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
        "controls": 80,
        "tokens": 8192,
    },
)
def factual_recall_heads(
    *, seed: int, each: int, candidates: int, alphas: Sequence[float], controls: int, tokens: int
) -> Findings:
    """Run it.

    Args:
        seed: seed of contexts, halves, random heads and intervals.
        each: wrong contexts of every country.
        candidates: heads that are tried, half of either sign of attribution.
        alphas: factors that are tried on each.
        controls: random heads.
        tokens: tokens of prose for the price.
    """
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.head_knob import halves, head_effect, strongest, sweep_heads
    from actlas.circuits.head_runs import HeadRuns
    from actlas.models import load
    from actlas.papers.reproductions.capital_prompts import known_capitals, plain_pair, wrong_contexts

    model = load("smollm2")
    known = known_capitals(model)
    draws = wrong_contexts(known, known, each=each, seed=seed)
    countries = [d[0].name for d in draws]
    pairs = PromptPairs.from_task(model, [plain_pair(d) for d in draws], n=len(draws), force=True)
    dev, test = halves(len(pairs), countries, seed)
    runs, held = HeadRuns(model, pairs.take(dev)), HeadRuns(model, pairs.take(test))
    clusters = [countries[i] for i in test]
    tried = strongest(runs, candidates)
    best, sweep = sweep_heads(runs, tried, alphas)
    asked = [c for c in known if c.name in set(clusters)]
    other, names = continents(model, asked, each, seed)
    others = HeadRuns(model, other)
    one, two = {best[0]: best[1]}, _with_second(runs, best, sweep)
    measured: list[Measurement] = []
    for heads, relation, factors, prompts, labels, random in (
        ("one", "capital", one, held, clusters, controls),
        ("two", "capital", two, held, clusters, controls // 2),
        ("one", "continent", one, others, names, controls // 2),
    ):
        found = head_effect(
            prompts, factors, tried=tried, clusters=labels, controls=random, first=FIRST, seed=seed
        )  # fmt: skip
        measured += [x.with_group(heads=heads, relation=relation) for x in found]
    measured[0] = replace(measured[0], details={**measured[0].details, "sweep": sweep})
    measured += _orders(runs, seed)
    measured += _frequencies(model, pairs, draws, seed)
    measured.append(_price(model, best, tokens, seed))
    return Findings(measured, _headline(Measured(measured), best), NOTE, [_plot(sweep)])


NOTE = (
    "Published: GPT-2 and Pythia families; all country-capital pairs as questions ('Q: ... A:'); one head "
    "of Pythia-1.4B scaled gives up to 88% in-context answers. Ours: SmolLM2-135M-Instruct, completions "
    "('The capital of X is the city of C. The capital of X is the city of'), because a small model begins "
    "an answer with a filler; countries that it knows without context; cities of one token. The factor is "
    "on the head's z at the last token, which equals scaling its columns of W_O there. The best of "
    "candidates x factors is chosen on half of the countries by the rate of in-context answers. The rate "
    "of other answers stands beside it because a logit difference can rise while nothing sensible is "
    "said. Two heads: the best factor on the best second candidate, chosen on the same half with the "
    "first in place. The causal order is the change of the logit difference when a head of blocks 20 to "
    "29 is set to 0, on the first half. Frequencies are exploratory: the rank of the token in the "
    "vocabulary (merges come in order of frequency) stands for the in-context city, and the model's own "
    "logit margin for the country. The price is on prose with the head scaled at every "
    "token. Tried before: two contexts a country and four random heads, with seed 5."
)


def _head(name: str) -> Head:
    block, head = name.split(".")
    return int(block), int(head)


def _with_second(
    runs: HeadRuns, best: tuple[Head, float], sweep: Sequence[dict[str, Any]]
) -> dict[Head, float]:
    """Return the best factors with a second head, chosen with the first in place."""
    tops: dict[Head, tuple[float, float]] = {}
    for row in sweep:  # every other candidate at the factor that is best for it alone
        head = _head(row["head"])
        if head != best[0]:
            tops[head] = max(tops.get(head, (-1.0, 0.0)), (row["answer"], row["alpha"]))
    rates = {h: runs.scaled({best[0]: best[1], h: alpha}).rate() for h, (_, alpha) in tops.items()}
    second = max(rates, key=lambda h: rates[h])
    return {best[0]: best[1], second: tops[second][1]}


def _orders(runs: HeadRuns, seed: int) -> list[Measurement]:
    """Return the rank correlation between direct attribution and the effect of removing a head."""
    from actlas.measure.statistics import spearman

    attribution = runs.attribution().mean(0)
    clean = runs.scaled({}).difference
    heads = [(b, h) for b in range(FIRST, runs.blocks) for h in range(runs.heads)]
    effect = [float((clean - runs.scaled({head: 0.0}).difference).mean()) for head in heads]
    direct = [float(attribution[b, h]) for b, h in heads]
    found = spearman(direct, effect, seed=seed)
    order = sorted(zip(heads, direct, effect, strict=True), key=lambda row: row[1])
    details = {
        "heads": [
            {"head": f"{b}.{h}", "attribution": a, "effect": e} for (b, h), a, e in [*order[:5], *order[-5:]]
        ]
    }
    return [
        Measurement(
            AGREEMENT, found.value, "correlation", found.n, found.low, found.high, "bootstrap over heads",
            seed, details=details, note=f"heads of blocks {FIRST} to {runs.blocks - 1}; p={found.p:.2g}",
        )
    ]  # fmt: skip


def continents(
    model: Model, countries: Sequence[Country], each: int, seed: int
) -> tuple[PromptPairs, list[str]]:
    """Return pairs that ask for a country's continent under a wrong context, and each pair's country."""
    import random

    from actlas.circuits.batch import PromptPairs

    frame = "{0} is a country on the continent of {1}. {0} is a country on the continent of"
    draw = random.Random(f"continents/{seed}")
    places = ("Europe", "Asia", "Africa", "America")
    rows, names = [], []
    for country in countries:
        wrong = [p for p in places if p != country.continent]
        for place in draw.sample(wrong, min(each, len(wrong))):
            if country.continent in places:
                clean, corrupt = (frame.format(country.name, p) for p in (place, country.continent))
                rows.append(
                    {
                        "clean": clean,
                        "corrupt": corrupt,
                        "answer": f" {place}",
                        "wrong": f" {country.continent}",
                    }
                )
                names.append(country.name)
    return PromptPairs.from_task(model, rows, n=len(rows), force=True), names


def _frequencies(model: Model, pairs: PromptPairs, draws: Sequence[Draw], seed: int) -> list[Measurement]:
    """Return rank correlations of the logit difference with stand-ins for frequency; exploratory."""
    from actlas.measure.statistics import spearman
    from actlas.papers.reproductions.capital_prompts import QUERY

    difference = pairs.difference.double().numpy()
    names = sorted({d[0].name for d in draws})
    logits = model.logits(model.encode([QUERY.format(n) for n in names], padding_side="left"))[:, -1]
    top = logits.topk(2, dim=1).values
    margin = dict(zip(names, (top[:, 0] - top[:, 1]).tolist(), strict=True))
    signs = {
        "rank of the in-context city's token": np.asarray(pairs.answer_ids.tolist(), dtype=float),
        "zero-shot margin of the country": np.asarray([margin[d[0].name] for d in draws]),
    }
    found = []
    for name, values in signs.items():
        fit = spearman(values, difference, seed=seed)
        found.append(
            Measurement(
                "rank correlation with the logit difference", fit.value, "correlation", fit.n, fit.low,
                fit.high, "bootstrap over prompts", seed, group={"of": name}, note="exploratory",
            )
        )  # fmt: skip
    return found


def _price(model: Model, best: tuple[Head, float], tokens: int, seed: int) -> Measurement:
    """Return the perplexity of prose with the head scaled at every token, over that without."""
    from actlas.core.edits import HeadScale
    from actlas.data import corpus
    from actlas.measure.likelihood import nll
    from actlas.measure.paired import perplexity_ratio

    (block, head), alpha = best
    text = lambda: corpus("prose", seed=seed)  # noqa: E731
    base = nll(model, text(), tokens=tokens, context=128)
    with model.edit(HeadScale(f"blocks.{block}.attn.z", factors={head: alpha})):
        other = nll(model, text(), tokens=tokens, context=128)
    return perplexity_ratio(base, other, seed=seed, group={"heads": "one"})


def _headline(m: Measured, best: tuple[Head, float]) -> str:
    def rate(edit: str, heads: str = "one", outcome: str = "answer") -> str:
        found = m.get("rate", heads=heads, relation="capital", edit=edit, outcome=outcome)
        return "?" if found is None else f"{found.value:.0%}"

    (block, head), alpha = best
    return (
        f"scaling head {block}.{head} by {alpha:g} raises in-context answers on held-out countries from "
        f"{rate('none')} to {rate('tuned')} (random heads {rate('random heads')}); with a second head "
        f"{rate('tuned', 'two')}"
    )


def _plot(sweep: Sequence[dict[str, Any]]) -> Plot:
    rows = [{"factor": r["alpha"], "in-context answers": r["answer"], "head": r["head"]} for r in sweep]
    return Plot(
        "Scaling one head, on the countries it is chosen on", rows, "factor", "in-context answers", "head"
    )
