"""context-knob: one direction decides between what the context says and what the model remembers.

Minder et al. 2024, "Controllable Context Sensitivity and the Knob Behind It". A copy of SmolLM2 is taught
to answer capitals from the context or from memory, as an intent line says. Where in depth the intent is
turned into an answer is searched, a direction is fitted there on the training countries, and then used in
the original model, which was never taught anything, on held-out countries and without any intent line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

if TYPE_CHECKING:
    pass

SITE = "blocks.20.resid_post"


def judge(m: Measured) -> list[Check]:
    """Holds if, on countries that nothing was fitted on, (1) the tuned copy answers both intents of more
    than 80% of the (context, query) pairs; (2) setting the mean-difference direction at block 20 to the
    other intent's mean turns more than 50% of the tuned copy's answers (central); (3) in the original model,
    without any intent line, the context value gives more context answers than random directions that move
    the activation as far, by more than 25 points (central), and (4) more than the prior value, by more than
    25 points (central); (5) the prior value leaves more memory answers than random directions; (6) the
    learned direction (DAS) turns more than 50% too; (7) once the answer is fetched (block 26) swapping the
    whole activation still turns more answers than swapping the direction, so the knob is not merely the
    answer; (8) the illusion test calls the direction faithful. Intervals are over countries,
    or prompts of the tuned copy; a check whose interval covers its boundary is undecided."""
    transfer = {"knob": "mean_diff"}
    verdict = m.get("share of the parts", knob="mean_diff")
    said = verdict.note if verdict is not None else "not measured in this run"
    return [
        Check.above("the tuned copy follows both intents", m.get("pair accuracy", model="tuned"), 0.8),
        Check.above("the direction turns answers", _turned(m, "mean_diff"), 0.5, central=True),
        Check.above(
            "its context value gives context answers in the original model, beyond random directions",
            m.get("context share beyond random", **transfer),
            0.25,
            central=True,
        ),
        Check.above(
            "its two values give different answers there",
            m.get("context share, context minus prior value", **transfer),
            0.25,
            central=True,
        ),
        Check.above(
            "its prior value gives memory answers, beyond random directions",
            m.get("memory share beyond random", **transfer),
            0.0,
        ),
        Check.above("a learned direction turns answers too", _turned(m, "das"), 0.5),
        Check.above(
            "after the answer is fetched the direction is not enough",
            m.get("turned by everything minus by the direction", block="26"),
            0.0,
        ),
        Check(
            "the direction is no illusion",
            None if verdict is None or said.startswith("undecided") else said.startswith("faithful"),
            said,
        ),
    ]


def _turned(m: Measured, knob: str) -> Measurement | None:
    return m.get("turned", knob=knob, by="set")


@reproduction(
    "context-knob",
    claim="A direction fitted in a copy that was taught to follow an intent decides between context and "
    "memory in the original model too.",
    judge=judge,
    quick={"each": 2, "steps": 20, "das_steps": 40, "blocks": (16, 18, 20, 22, 26), "tokens": 512},
    full={"each": 8, "steps": 60, "das_steps": 80, "blocks": tuple(range(12, 30)), "tokens": 8192},
)
def context_knob(
    *, seed: int, each: int, steps: int, das_steps: int, blocks: Sequence[int], tokens: int
) -> Findings:
    """Run it.

    Args:
        seed: seed of the countries' split, contexts, tuning, learning and intervals.
        each: wrong contexts of every country.
        steps: steps of teaching the copy (8 prompts each).
        das_steps: steps of learning a direction.
        blocks: where the whole activation and the direction are swapped, for the course over depth.
        tokens: tokens of prose for the price.
    """
    import random

    from actlas.circuits.depth_search import depth_search
    from actlas.circuits.knob import contrast_swaps, fit_dial
    from actlas.core.contrast import Contrast
    from actlas.models import load
    from actlas.papers.reproductions.capital_prompts import (
        answer,
        intent_pair,
        known_capitals,
        prompt,
        wrong_contexts,
    )
    from actlas.papers.reproductions.context_knob_runs import (
        on_held_out,
        over_depth,
        pair_accuracy,
        price,
        transfer,
    )
    from actlas.training.skill_tuning import tune_skill

    model = load("smollm2")
    known = known_capitals(model)
    random.Random(f"context-knob/{seed}").shuffle(known)
    taught, held = known[:16], known[16:]
    learned = wrong_contexts(taught, known, each=each, seed=seed)
    test = wrong_contexts(held, known, each=each, seed=seed + 1)
    items = [(prompt(d, intent), answer(d, intent)) for d in learned for intent in ("context", "prior")]
    tuned = tune_skill(model, items, steps=steps, batch=8, lr=1e-3, train="lora", seed=seed)
    measured = [
        pair_accuracy(which, test, name, seed) for which, name in ((model, "original"), (tuned, "tuned"))
    ]

    pairs, held_pairs = (
        Contrast.of([(prompt(d, "context"), prompt(d, "prior")) for d in draws]) for draws in (learned, test)
    )
    first = f"blocks.{min(blocks)}.resid_post"
    swaps, held_swaps = (contrast_swaps(tuned, c, first) for c in (pairs, held_pairs))
    knobs = {
        "mean_diff": fit_dial(swaps.at(SITE), "mean_diff"),
        "das": fit_dial(swaps.at(SITE), "das", steps=das_steps, seed=seed),
    }
    for method, made in knobs.items():
        measured += on_held_out(tuned, made, held_swaps.at(SITE), method, seed)
    depth = depth_search(tuned, [intent_pair(d) for d in test[:16]], seed=seed)
    measured += [x.with_group(search="depth") for x in depth.measurements]
    measured += over_depth(swaps, held_swaps, blocks, seed)
    for method, made in knobs.items():
        measured += transfer(model, made, test, method, seed)
    measured += price(model, knobs["mean_diff"], tokens, seed)
    layers = ", ".join(map(str, depth.layers))
    note = (
        f"{NOTE} {len(known)} capitals are known, {len(taught)} taught. Depth search: attention outputs of "
        f"blocks {depth.first} to {depth.last - 1} carry the choice, mostly {layers}, found in "
        f"{depth.evaluations} patched runs."
    )
    return Findings(measured, _headline(Measured(measured)), note, [_plot(measured)])


NOTE = (
    "Published: Llama-3.1-8B and others, Fakepedia contexts, LoRA (r = 64) on 2,048 examples, DAS on "
    "pairs of opposite intent; knob layer 16 with values 6 and -6. Ours: SmolLM2-135M-Instruct, capitals "
    "with wrong contexts, low-rank changes (r = 16) of the attention maps, the block of the knob taken "
    "from a pilot, values that are the two intents' own means. The tuned copy and its knob use intent "
    "lines ('Answer from the context.' / 'Answer from your memory.'); the original model is asked without "
    "any. Random directions move each last-token activation exactly as far as the knob does. The price is "
    "on prose with the knob set at every token, which is what generating a long text with it means. "
    "Values as far again beyond the two means are shown beside them, for the first answer token alone. "
    "Tried before: tuning with these settings and the knob at blocks 18 and 20 of one other split of the "
    "countries, and smaller settings with seed 5 (where 8 steps of DAS were too few). This is the second "
    "stored run with these settings; nothing but this note's wording differs from the first."
)


def _headline(m: Measured) -> str:
    def rate(name: str, outcome: str) -> str:
        found = m.get("answers of the original model", knob="mean_diff", set=name, outcome=outcome)
        return "?" if found is None else f"{found.value:.0%}"

    return (
        f"in the original model the context wins {rate('nothing', 'context')} of held-out prompts, "
        f"{rate('context value', 'context')} with the knob at its context value (random directions "
        f"{rate('random directions, context value', 'context')}); at its prior value memory wins "
        f"{rate('prior value', 'memory')} ({rate('nothing', 'memory')} without)"
    )


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows = [
        {"block": int(m.group["block"]), "share of answers turned": m.value, "swap": m.group["swap"]}
        for m in measured
        if m.name == "turned over depth"
    ]
    return Plot(
        "Swapping the last token's activation between intents",
        rows,
        "block",
        "share of answers turned",
        "swap",
    )
