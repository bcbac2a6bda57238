"""Efficiency steering: a direction between a model's own shortest and longest right answers.

Two settings. (a) A chat model's answers to sums of two-digit numbers, if enough questions have two right
answers of different length. (b) A tiny model that was trained here to answer sums in two styles, where the
question is certainly testable: does one direction switch the style and leave the answer alone?
"""

from __future__ import annotations

from collections.abc import Sequence

import actlas
from actlas.core.contrast import Contrast, read_contrast
from actlas.core.direction import Direction
from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure.answer_length import Written, holds_answer
from actlas.measure.statistics import rate_measurement
from actlas.papers.reproduction import Check, Findings, Measured, reproduction
from actlas.papers.reproductions.answer_runs import AnswerRuns
from actlas.papers.reproductions.asc import AnswerPrice
from actlas.papers.reproductions.prompt_only import BRIEF, in_words, said
from actlas.papers.reproductions.style_sums import style_model, sums
from actlas.papers.reproductions.word_sums import plain_sums, solved, word_sums
from actlas.steering.self_contrast import Sampled, answer_readings, pair_answers, sample_answers
from actlas.steering.strength import level_of, search

SHARE = 15 / 40  # of questions that must give a pair, as planned: 15 of 40
STYLE, CHAT = "trained here", "smollm2"
FACTORS = (0.1, 0.2, 0.3, 0.4, 0.5)
PLACES = ("every step", "last prompt token")
EXAMPLE, TOLD = "a short sum before", "asked for brevity"


def judge(m: Measured) -> list[Check]:
    """Holds if, in the model trained here, steering along the direction between its own shortest and longest
    right answers takes more than 30% off the tokens of answers to questions that the direction was not
    fitted on (the 95% interval of the ratio lies below 0.7) and more than random directions of the same
    length do (paired interval below 0), and if in the chat model, provided that at least 15 of 40 questions
    give two right answers whose lengths differ by more than 30%, steered answers are shorter than plain ones
    (paired interval below 0). These are central. Besides: in the model trained here the share of right
    answers falls by at most 2 points and steering backwards makes answers longer; in the chat model steered
    answers are shorter than under random directions and right as often."""
    style = {"model": STYLE}
    ratio, random = (
        m.get("tokens, steered over plain", **style),
        m.get("tokens, steered minus random", **style),
    )
    fell, longer = (
        m.get("accuracy, steered minus plain", **style),
        m.get("tokens, backwards minus plain", **style),
    )
    checks = [
        Check.below("over 30% fewer tokens", ratio, 0.7, central=True),
        Check.below("fewer than random directions", random, 0.0, central=True),
        Check("right as often, to 2 points", None if fell is None else fell.value >= -0.02, str(fell)),
        Check.above("backwards is longer", longer, 0.0),
    ]
    shorter = m.get("tokens, steered minus plain", model=CHAT)
    if shorter is None:
        said = f"{m['questions with a pair']}; wanted {SHARE:.3g}: not testable on this model in this run"
        return [*checks, Check("the chat model's answers get shorter", None, said, central=True)]
    right = m.get("accuracy, steered minus plain", model=CHAT)
    return [
        *checks,
        Check.below("the chat model's answers get shorter", shorter, 0.0, central=True),
        Check.below(
            "shorter than random directions", m.get("tokens, steered minus random", model=CHAT), 0.0
        ),
        Check(
            "the chat model is right as often",
            None if right is None else right.high is None or right.high >= 0,
            str(right),
        ),
    ]  # fmt: skip


@reproduction(
    "efficiency-steering",
    claim="One direction, fitted between a model's own shortest and longest right answers, makes answers "
    "much shorter at equal accuracy.",
    judge=judge,
    quick={"questions": 10, "samples": 4, "test": 8, "cap": 64, "block": 20, "randoms": 2, "steps": 800},
    full={"questions": 40, "samples": 8, "test": 40, "cap": 64, "block": 20, "randoms": 5, "steps": 2000},
)
def efficiency_steering(
    *, seed: int, questions: int, samples: int, test: int, cap: int, block: int, randoms: int, steps: int
) -> Findings:
    """Run both settings."""
    found, style = _in_styles(seed, randoms, steps)
    chat, also = _in_chat(seed, questions, samples, test, cap, block, randoms)
    found += chat
    return Findings(found, f"{style}; {also}", f"{_NOTE} {said(found)}")


_NOTE = (
    "Published: reasoning models of 7B and more on mathematics, many long samples a problem; no figures in "
    "the abstract, and the official code was not found. The vector is the mean over the tokens of short "
    "answers minus that over long ones, both right, paired within a question; unfinished samples are not "
    "used. It is added at the last prompt token and at every generated one (one account of the paper says "
    "the last token of the input: in the model trained here both are candidates). That model has two blocks "
    "and learns sums in two styles with random filler words; block, place and strength (0.1 to 0.5 times the "
    "vector) are those that shorten answers to the fitting questions most "
    "without losing more than 2 points there. The chat model is edited at block 20, at 0.1 nat of KL per "
    "answer token. The reinforcement learning half of the paper is a reference implementation with tests "
    "(`actlas.training.group_policy`), not a training run. Tried before the stored run, on seeds 5 and 6 of "
    "the model trained here: shorter wordy answers and strengths up to 4, which broke the answers. Changed "
    "after the first run that was stored, with the same numbers: keeping the share of right answers was a "
    "central check, so that a run without any shortening was judged 'partly'; now it is a side condition."
)


def _in_styles(seed: int, randoms: int, steps: int) -> tuple[list[Measurement], str]:
    """Train the model of two styles, fit on half of the questions, measure on the other half."""
    model = style_model(seed, steps=steps)
    asked = sums(seed)
    half = len(asked) // 2
    fit, test = asked[:half], asked[half:]
    contrast = pair_answers(_sampled(model, fit, 8, 32, seed))
    directions = [_direction(model, contrast, f"blocks.{i}.resid_post") for i in range(2)]

    def runs(pairs: Sequence[tuple[str, str]], shift: int) -> AnswerRuns:
        return AnswerRuns(
            model, [q for q, _ in pairs], [a for _, a in pairs],
            cap=32, seed=seed + shift, temperature=0.8, repeats=4, batch=256,
        )  # fmt: skip

    tried = runs(fit, 100)
    tried.write({"plain": None})
    choices = {
        f"{d.site} {where} {s}": (d, where, s) for d in directions for where in PLACES for s in FACTORS
    }
    for name, (d, where, s) in choices.items():
        tried.write({name: _edit(d, where) * s})
    least = tried.right("plain").mean() - 0.02
    kept = [name for name in choices if tried.right(name).mean() >= least] or list(choices)[:1]
    chosen = min(kept, key=lambda name: float(tried.tokens(name).mean()))
    direction, where, strength = choices[chosen]

    made = runs(test, 200)
    _write(made, direction, strength, randoms, seed, where)
    made.write_asked(EXAMPLE, "Q 1 + 1 A 2 .")  # it knows no words to ask with
    found = _compared(made, randoms, STYLE) + _in_words(made, EXAMPLE, STYLE)
    found.append(
        Measurement(
            "strength",
            strength,
            "factor",
            len(contrast),
            group={"model": STYLE},
            details={"site": direction.site, "where": where},
        )
    )
    said = (
        f"model trained here: {made.tokens('plain').mean():.1f} tokens become "
        f"{made.tokens('steered').mean():.1f}, right {made.right('plain').mean():.0%} -> "
        f"{made.right('steered').mean():.0%}"
    )
    return found, said


def _in_chat(
    seed: int, questions: int, samples: int, test: int, cap: int, block: int, randoms: int
) -> tuple[list[Measurement], str]:
    """Sample a chat model's answers; steer it if enough questions give a pair."""
    model = actlas.load("smollm2")
    asked = plain_sums(questions + test, seed)
    sampled = _sampled(model, asked[:questions], samples, cap, seed)
    try:
        contrast = pair_answers(sampled)
        n = len(contrast)
    except InputError:
        n = 0
    found = [
        rate_measurement(
            "questions with a pair", [1.0] * n + [0.0] * (questions - n), seed=seed, group={"model": CHAT},
            note=f"two right, finished answers of {samples} that differ by more than 30% in length",
        ),
        rate_measurement("samples that are right", [s.right for s in sampled], group={"model": CHAT}),
        rate_measurement("samples that end", [s.ended for s in sampled], group={"model": CHAT}),
    ]  # fmt: skip
    made = AnswerRuns(
        model, [q for q, _ in asked[questions:]], [a for _, a in asked[questions:]], cap=cap, seed=seed
    )
    if n < SHARE * questions:
        made.write({"plain": None})
        made.write_asked(TOLD, BRIEF)
        label = "tokens, asked for brevity minus plain"
        found.append(made.length_change(TOLD, "plain", label=label).with_group(model=CHAT))
        return found, f"smollm2: not testable, {n} of {questions} questions give a pair"
    direction = _direction(model, contrast, f"blocks.{block}.resid_post")
    some = [s for s in sampled if s.ended][:3]
    price = AnswerPrice(model, direction, _as_written(some))
    strength = search(lambda s: price.of(direction, s), 0.1, level_of(None), start=0.1).value
    pairs = solved(model, word_sums(12, seed))
    reading = read_contrast(model, pairs, direction.site, position="last")[direction.site]
    terse = Direction.of(reading, reading.difference.mean(0), "mean_diff")

    _write(made, direction, strength, randoms, seed)
    made.write_asked(TOLD, BRIEF)
    found += _compared(made, randoms, CHAT) + _in_words(made, TOLD, CHAT)
    found += [
        Measurement("strength", strength, "factor", n, group={"model": CHAT}),
        Measurement(
            "cosine with the direction of terse solutions", direction.cosine(terse), "cosine", n,
            note="the direction of the chain-of-thought compression reproduction, fitted on 12 pairs",
        ),
    ]  # fmt: skip
    said = (
        f"smollm2: {made.tokens('plain').mean():.0f} tokens become {made.tokens('steered').mean():.0f}, "
        f"right {made.right('plain').mean():.0%} -> {made.right('steered').mean():.0%} ({n} pairs)"
    )
    return found, said


def _sampled(
    model: Model, asked: Sequence[tuple[str, str]], samples: int, cap: int, seed: int
) -> list[Sampled]:
    answers = dict(asked)
    return sample_answers(
        model, list(answers), lambda q, text: holds_answer(text, answers[q]), samples,
        temperature=0.8, max_new_tokens=cap, seed=seed,
    )  # fmt: skip


def _direction(model: Model, contrast: Contrast, site: str) -> Direction:
    """Return the direction from long (negative) to short (positive) answers, mean over all their tokens."""
    reading = answer_readings(model, contrast, site)
    return Direction.of(reading, reading.difference.mean(0), "mean_diff", data=contrast.hash)


def _edit(direction: Direction, where: str = "every step") -> Edit:
    return direction.edit().at(positions="last" if where == "every step" else -1)


def _write(
    made: AnswerRuns,
    direction: Direction,
    strength: float,
    randoms: int,
    seed: int,
    where: str = "every step",
) -> None:
    controls = {f"random {i + 1}": direction.random(seed + 1 + i) for i in range(randoms)}
    edited = {"steered": direction, "backwards": direction.flipped(), **controls}
    made.write({"plain": None, **{name: _edit(d, where) * strength for name, d in edited.items()}})


def _compared(made: AnswerRuns, randoms: int, name: str) -> list[Measurement]:
    random = [f"random {i + 1}" for i in range(randoms)]
    found = [m for run in made.written for m in made.measured(run)]
    found += [
        made.length_ratio("steered", "plain", label="tokens, steered over plain"),
        made.length_change("steered", "plain", label="tokens, steered minus plain"),
        made.length_change("steered", *random, label="tokens, steered minus random"),
        made.length_change("backwards", "plain", label="tokens, backwards minus plain"),
        made.accuracy_change("steered", "plain", label="accuracy, steered minus plain"),
    ]
    return [m.with_group(model=name) for m in found]


def _in_words(made: AnswerRuns, name: str, model: str) -> list[Measurement]:
    own, words = made.tokens("steered"), made.tokens(name)
    return in_words("tokens", "tokens", own, words, asked=name, seed=made.seed, over="prompts", model=model)


def _as_written(some: Sequence[Sampled]) -> Written:
    import numpy as np

    return Written(
        tuple(s.rendered for s in some),
        tuple(s.text for s in some),
        np.array([s.tokens for s in some]),
        np.array([s.ended for s in some]),
        0.0,
    )
