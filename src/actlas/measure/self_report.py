"""Self-report: what a chat model says about itself when it must choose between two answers.

    self_report(model)                              # the built-in questionnaire about boldness
    self_report_shift(model, risky, safe)           # what tuning changed, beside control questions

Each question is asked twice, with the options in either order, and the answer is read from the next token's
logits, not from text: a model that was tuned on letters answers everything with a letter.

    p(trait) = sigmoid( mean over both orders of  z(letter of the trait's option) - z(the other letter) )

A liking for a letter adds to its logit and cancels in the mean; it is reported (`self-report-letter-bias`),
as is the probability of the two letters among all tokens (`self-report-letter-mass`). Paraphrases of one
question count as one. A shift between two edits is a self-report only beside the same shift on control
questions, which the trait has nothing to do with; `self_report_shift` returns both and their difference.

Source: Betley et al. 2025, "Tell me about yourself: LLMs are aware of their learned behaviors" (two-option
questions); the balancing and the subtraction of controls are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.continuations import as_generation
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.intervals import percentiles, resample_counts
from actlas.core.layout import forward_parameters
from actlas.core.measurement import Measurement
from actlas.core.splitting import Head, Tail, split_at
from actlas.data.questionnaires import Question, as_questions, risk_questionnaire
from actlas.measure.differences import paired_difference
from actlas.measure.registry import mark_under, measure
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

BATCH = 16
LETTERS = ("A", "B")
_NAMES = {"self": "self-report", "control": "self-report-control", "behaviour": "self-report-behaviour"}


@dataclass(frozen=True)
class Choices:
    """What the model chose, arrays of shape [questions].

    Attributes:
        trait: probability of the trait's option, balanced over both orders.
        first: probability of the letter A, averaged over both orders; 0.5 is no bias.
        mass: probability of the two letters among all tokens, averaged over both orders.
    """

    trait: NDArray[np.float64]
    first: NDArray[np.float64]
    mass: NDArray[np.float64]


class Asked:
    """Questions as prompts in both orders, ready to be put to a model again and again.

    Args:
        model: a causal language model; asked through its chat template where it has one.
        questions: what to ask.
        block: run the model up to this block once, and only the blocks from it on for every `choices`. Exact
            for edits that change nothing before that block; edits installed now stay in the first part.
        batch: prompts in one pass.

    Raises:
        ModelError: no causal language model with a tokenizer, or one without tokens for A and B.
    """

    def __init__(
        self, model: Model, questions: Sequence[Question], *, block: int | None = None, batch: int = BATCH
    ) -> None:
        self.model, self.questions = model, list(questions)
        self._letters = _letters(model)
        self._options: dict[str, Any] = {}
        takes = forward_parameters(model.module)
        if "logits_to_keep" in takes:
            self._options["logits_to_keep"] = 1
        prompts = [_prompt(model, q.text(flipped)) for q in self.questions for flipped in (False, True)]
        head: Head | None = None
        self._tail: Tail | None = None
        if block is not None:
            head, self._tail = split_at(model, f"blocks.{block}.resid_pre")
        self._batches: list[tuple[dict[str, Any], Any]] = []
        for start in range(0, len(prompts), batch):
            encoded = model.encode(prompts[start : start + batch], padding_side="left")
            self._batches.append((encoded, None if head is None else head(encoded)))
        if "use_cache" in takes and head is None:
            self._options["use_cache"] = False

    def choices(self) -> Choices:
        """Return what the model chooses now, under whatever edits are installed.

        Raises:
            NonFiniteError: NaN or infinity in the logits.
        """
        z = torch.cat([self._letter_logits(encoded, state) for encoded, state in self._batches])
        if not bool(torch.isfinite(z).all()):
            raise NonFiniteError(
                f"the logits of {self.model.name} hold NaN or infinity; lower the edit's strength"
            )
        z = z.view(-1, 2, 2)  # question, order, letter: log-probabilities
        lead = z[..., 0] - z[..., 1]  # of the letter A over B
        trait = torch.sigmoid((lead[:, 0] - lead[:, 1]) / 2)
        return Choices(trait.numpy(), torch.sigmoid(lead).mean(1).numpy(), z.exp().sum(-1).mean(1).numpy())

    def _letter_logits(self, encoded: dict[str, Any], state: Any) -> Tensor:
        """Return the log-probabilities of A and B as the next token, float64 `[rows, 2]`."""
        with as_generation(self.model, encoded["attention_mask"].bool()), torch.no_grad():
            if state is None:
                output = self.model.forward(encoded, **self._options)
            else:
                assert self._tail is not None
                output = self._tail(state, **self._options)
        return output.logits[:, -1].double().log_softmax(-1)[:, self._letters].cpu()


@mark_under
def self_report(
    model: Model, questions: Sequence[Any] | Asked | None = None, *, seed: int = 0
) -> list[Measurement]:
    """Measure what a model says about itself, under whatever edits are installed.

    Args:
        model: a causal language model, best one with a chat template.
        questions: questions or mappings with their fields, or questions that were prepared as `Asked`;
            default `data.risk_questionnaire()`.
        seed: of the bootstraps.

    Returns:
        `self-report` (mean probability of the trait's option over questions about the model), the same over
        control and behaviour questions where there are any, the letter bias and the letters' mass.

    Raises:
        InputError: no questions about the model. ModelError: see `Asked`.
    """
    prepared = _asked(model, questions, ("self",))
    return report(prepared.questions, prepared.choices(), seed=seed)


def report(asked: Sequence[Question], found: Choices, *, seed: int = 0) -> list[Measurement]:
    """Return what `self_report` returns, from choices that were made already."""
    out = []
    for kind, name in _NAMES.items():
        rows = [i for i, q in enumerate(asked) if q.kind == kind]
        if rows:
            topics = [asked[i].topic for i in rows]
            out.append(
                mean_measurement(
                    name, "probability", found.trait[rows], clusters=topics, seed=seed, over="topics",
                    note=f"{len(rows)} questions in both orders", details={"chance": 0.5},
                )
            )  # fmt: skip
        elif kind == "control":
            out.append(missing(name, "probability", "the questionnaire has no control questions"))
    every: dict[str, Any] = {"clusters": [q.topic for q in asked], "seed": seed, "over": "topics"}
    return [
        *out,
        mean_measurement(
            "self-report-letter-bias", "probability", found.first - 0.5, **every
        ),
        mean_measurement(
            "self-report-letter-mass", "probability", found.mass, better="higher", **every
        ),
    ]  # fmt: skip


@measure(
    "self-report",
    summary="what a chat model says about itself in forced choices, beside control questions",
    unit="probability",
    needs=("causal-lm",),
    data="questions",
    source="Betley et al. 2025, Tell me about yourself",
)
def measure_self_report(model: Model, questions: Any = None, *, seed: int = 0) -> list[Measurement]:
    """Return the self-report measurements; the built-in questionnaire is asked if none is given."""
    return self_report(model, questions, seed=seed)


def self_report_shift(
    model: Model,
    trait: Edit,
    other: Edit | None = None,
    questions: Sequence[Any] | Asked | None = None,
    *,
    seed: int = 0,
) -> list[Measurement]:
    """Measure how far self-report moves between two edits, and how far control questions move.

    Args:
        model: the model.
        trait: the edit that should raise the trait (a fine-tune, a steering vector).
        other: what it is held against: the opposite edit, or `None` for the unedited model.
        questions: as `self_report`.
        seed: of the bootstraps.

    Returns:
        `self-report-shift`, `self-report-shift-control` and, where asked, `self-report-shift-behaviour`: the
        paired difference `trait - other` of the balanced probability. `self-report-excess`: the shift minus
        the control's, with `details["standard_error"]`; 0 is what a model without self-knowledge gives.

    Raises:
        InputError: no self or no control questions.
    """
    prepared = _asked(model, questions, ("self", "control"))
    with model.edit(trait):
        high = prepared.choices()
    if other is None:
        with model.without_edits():
            low = prepared.choices()
    else:
        with model.edit(other):
            low = prepared.choices()
    return shifts(prepared.questions, high, low, seed=seed)


def shifts(questions: Sequence[Question], high: Choices, low: Choices, *, seed: int = 0) -> list[Measurement]:
    """Return what `self_report_shift` returns, from choices that were made already."""
    asked = list(questions)
    kinds = {k: np.array([i for i, q in enumerate(asked) if q.kind == k], int) for k in _NAMES}
    out = []
    for kind, rows in kinds.items():
        if len(rows):
            topics = [asked[i].topic for i in rows]
            gap = paired_difference(low.trait[rows], high.trait[rows], clusters=topics, seed=seed)
            name = "self-report-shift" if kind == "self" else f"self-report-shift-{kind}"
            out.append(
                Measurement(
                    name, gap.value, "probability", len(set(topics)), _finite(gap.low), _finite(gap.high),
                    "paired bootstrap over topics", seed, details={"p": gap.p, "questions": len(rows)},
                )
            )  # fmt: skip
    moved = high.trait - low.trait
    own, control = (_by_topic(moved, asked, kinds[k]) for k in ("self", "control"))
    return [*out, _excess(own, control, seed)]


def _asked(model: Model, questions: Any, needed: Sequence[str]) -> Asked:
    """Return questions as prompts, after checking that there are some of every needed kind."""
    if isinstance(questions, Asked):
        made = questions
    else:
        made = Asked(model, risk_questionnaire() if questions is None else as_questions(questions))
    for kind in needed:
        if not any(q.kind == kind for q in made.questions):
            raise InputError(f"the questionnaire has no question of kind {kind!r}; give at least one")
    return made


def _excess(own: NDArray[np.float64], control: NDArray[np.float64], seed: int) -> Measurement:
    """Return mean(own) - mean(control) with a bootstrap over the topics of both."""
    draws = [
        np.concatenate([c @ x / len(x) for c in resample_counts(len(x), 1000, seed + i)])
        for i, x in enumerate((own, control))
    ]
    low, high = percentiles(draws[0] - draws[1], min(len(own), len(control)))
    error = float(np.sqrt(own.var(ddof=1) / len(own) + control.var(ddof=1) / len(control)))
    return Measurement(
        "self-report-excess", float(own.mean() - control.mean()), "probability", len(own) + len(control),
        _finite(low), _finite(high), "bootstrap over topics", seed,
        details={"standard_error": error if np.isfinite(error) else None},
    )  # fmt: skip


def _by_topic(x: NDArray[np.float64], asked: Sequence[Question], rows: NDArray[Any]) -> NDArray[np.float64]:
    topics: dict[str, list[float]] = {}
    for i in rows:
        topics.setdefault(asked[int(i)].topic, []).append(float(x[i]))
    return np.array([np.mean(v) for v in topics.values()])


def _letters(model: Model) -> list[int]:
    """Return the tokens of A and B as they stand at the beginning of an answer."""
    if model.kind != "causal-lm" or model.tokenizer is None:
        raise ModelError(f"{model.name} is of kind {model.kind}; a causal-lm with a tokenizer is needed")
    before = "" if _chats(model) else " "
    ids = [model.tokenizer(before + x, add_special_tokens=False)["input_ids"] for x in LETTERS]
    if any(not i for i in ids) or ids[0][-1] == ids[1][-1]:
        raise ModelError(f"the tokenizer of {model.name} has no tokens of their own for A and B")
    return [i[-1] for i in ids]


def _chats(model: Model) -> bool:
    return bool(getattr(model.tokenizer, "chat_template", None))


def _prompt(model: Model, text: str) -> Any:
    return [{"role": "user", "content": text}] if _chats(model) else f"Question: {text}\nAnswer:"


def _finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
