"""How undecided is an agent? The entropy of its distribution over actions, not over tokens.

    H = -sum_a pi(a) log pi(a)        pi(a): the chance that the model takes action a after a prompt, nats

* `mode="logits"`: actions that are one token each; pi is their next-token probability, divided by their
  sum. That sum is the *valid mass*: what the model gives to actions at all.
* `mode="sample"`: pi is estimated from sampled continuations, each read as the first action that it names;
  the valid mass is the share that names one. A sample of M underestimates H by about (k - 1) / 2M, k the
  number of actions seen; `correct=True` adds that (Miller 1955).

Entropy can rise because the model is broken and answers at random, so the valid mass is always reported
beside it.

Source: Rahn et al. 2024, "Controlling Large Language Model Agents with Entropic Activation Steering",
section 3 (25 samples a prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.data.single_token import Tokens
from actlas.measure.registry import mark_under, measure
from actlas.measure.samples import mean_measurement
from actlas.measure.tasks import BATCH, _answer_ids, _tasks, last_logits

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.data.task_items import Task

ENTROPY, VALID = "action-entropy", "action-valid-mass"
Parse = Callable[[str], int | None]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ActionChances:
    """What a model does after each prompt.

    Attributes:
        chance: `[n, actions]`, rows sum to 1; NaN where no valid action was seen.
        valid: `[n]`, probability (or share of samples) of naming an action at all.
        samples: valid samples behind each row; 0 for exact probabilities.
    """

    chance: Array
    valid: Array
    samples: NDArray[np.int64]

    def entropy(self, correct: bool = False) -> Array:
        """Return the entropy of each prompt, nats, `[n]`.

        Args:
            correct: add Miller's correction for sampled chances.
        """
        h = entropy(self.chance)
        if correct:
            seen = (self.chance > 0).sum(1)
            h = h + np.where(self.samples > 0, (seen - 1) / (2 * np.maximum(self.samples, 1)), 0.0)
        return h


def entropy(chance: Array) -> Array:
    """Return `-sum p log p` over the last axis, nats; 0 log 0 is 0."""
    p = np.asarray(chance, dtype=np.float64)
    total: Array = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), np.where(np.isnan(p), p, 0.0)).sum(
        -1
    )
    return np.maximum(total, 0.0)  # maximum keeps NaN; -0.0 becomes 0.0


def action_chances(
    model: Model,
    prompts: Sequence[str],
    actions: Sequence[str],
    *,
    mode: Literal["logits", "sample"] = "logits",
    samples: int = 25,
    max_new_tokens: int = 16,
    temperature: float = 1.0,
    parse: Parse | None = None,
    seed: int = 0,
    batch: int = BATCH,
) -> ActionChances:
    """Return the distribution over actions after each prompt.

    Args:
        model: a causal language model with a tokenizer.
        prompts: what the agent reads.
        actions: the texts of the actions, as they stand after the prompt, e.g. `" A"`.
        mode: `"logits"` (exact) or `"sample"`; see the module docstring.
        samples, max_new_tokens, temperature: of sampling.
        parse: continuation -> number of the action, or `None`; default the action named first.
        seed: of sampling.
        batch: prompts in one forward pass.

    Raises:
        InputError: fewer than two actions, an action that is not one token of its own after a prompt
            (`"logits"`), or no valid action in any sample.
    """
    actions = list(actions)
    if len(actions) < 2 or len(set(actions)) < len(actions):
        raise InputError(f"entropy needs at least two different actions, not {actions}")
    if not prompts:
        raise InputError("there are no prompts to act on; give at least one")
    if mode == "logits":
        ids = [_action_ids(model, prompt, actions) for prompt in prompts]
        return _exact(model, list(prompts), ids, batch)
    if mode != "sample":
        raise InputError(f"mode is {mode!r}; it must be 'logits' or 'sample'")
    if samples < 2:
        raise InputError(f"samples is {samples}; an entropy needs at least 2 samples a prompt")
    read = parse or _first_named(actions)
    counts = np.zeros((len(prompts), len(actions)))
    for i, prompt in enumerate(prompts):
        texts = model.generate(
            [prompt] * samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + i
        ).texts
        for text in texts:
            if (action := read(text)) is not None:
                counts[i, action] += 1
    seen = counts.sum(1)
    if not seen.any():
        raise InputError(
            f"none of {samples * len(prompts)} samples names one of the actions {', '.join(actions)}"
        )
    with np.errstate(invalid="ignore"):
        chance = counts / seen[:, None]
    return ActionChances(chance, seen / samples, seen.astype(np.int64))


@mark_under
def action_entropy(
    model: Model,
    prompts: Sequence[str],
    actions: Sequence[str],
    *,
    mode: Literal["logits", "sample"] = "logits",
    samples: int = 25,
    correct: bool = False,
    seed: int = 0,
    **options: object,
) -> list[Measurement]:
    """Measure the mean action entropy and the mean valid mass.

    Args:
        model, prompts, actions, mode, samples: see `action_chances`, which also takes the `options`.
        correct: add Miller's correction to sampled entropies.
        seed: of sampling and of the bootstrap.

    Returns:
        Entropy (over prompts with a valid action; the note counts the others) and valid mass.
    """
    found = action_chances(model, prompts, actions, mode=mode, samples=samples, seed=seed, **options)  # type: ignore[arg-type]
    return _measured(found, seed, correct, {})


def _measured(found: ActionChances, seed: int, correct: bool, group: dict[str, str]) -> list[Measurement]:
    h = found.entropy(correct)
    known = np.isfinite(h)
    left_out = int((~known).sum())
    note = f"{left_out} prompts without a valid action left out" if left_out else ""
    actions = found.chance.shape[1]
    return [
        mean_measurement(
            ENTROPY, "nats", h[known], seed=seed, over="prompts", group=group, note=note,
            details={"most": float(np.log(actions)), "actions": actions},
        ),
        mean_measurement(
            VALID, "fraction", found.valid, seed=seed, over="prompts", group=group, better="higher"
        ),
    ]  # fmt: skip


@mark_under
def task_action_entropy(
    model: Model, task: Task | Iterable[Task], *, seed: int = 0, items: int | None = None, batch: int = BATCH
) -> list[Measurement]:
    """Measure how undecided the model is between the answers that each item of a task offers.

    Args:
        model: a causal language model with a tokenizer.
        task: one task or several; an item's actions are its right and wrong answers.
        seed: of the bootstrap.
        items: use only so many items of each task.
        batch: prompts in one forward pass.
    """
    out = []
    for one in _tasks(task):
        chosen = list(one.items)[:items]
        right, wrong = _answer_ids(model, chosen)
        ids = [[r, *w] for r, w in zip(right, wrong, strict=True)]
        found = _exact(model, [item.prompt for item in chosen], ids, batch)
        out += _measured(found, seed, False, {"task": one.name})
    return out


@measure(
    ENTROPY,
    summary="how undecided the model is between the answers offered",
    unit="nats",
    needs=("causal-lm",),
    data="task",
    quick={"items": 12},
    source="Rahn et al. 2024 (EAST)",
    together=task_action_entropy,
)
def task_entropy(
    model: Model, task: Task, *, seed: int = 0, items: int | None = None, batch: int = BATCH
) -> Measurement:
    """Return the mean entropy over the answers of an item, nats."""
    return task_action_entropy(model, task, seed=seed, items=items, batch=batch)[0]


@measure(
    VALID,
    summary="probability that the model gives to the answers offered, all together",
    unit="fraction",
    needs=("causal-lm",),
    data="task",
    quick={"items": 12},
    source="Rahn et al. 2024 (EAST)",
    together=task_action_entropy,
)
def task_valid_mass(
    model: Model, task: Task, *, seed: int = 0, items: int | None = None, batch: int = BATCH
) -> Measurement:
    """Return the mean probability of naming one of an item's answers."""
    return task_action_entropy(model, task, seed=seed, items=items, batch=batch)[1]


def _exact(model: Model, prompts: list[str], ids: list[list[int]], batch: int) -> ActionChances:
    most = max(map(len, ids))
    chance, valid = np.zeros((len(prompts), most)), np.zeros(len(prompts))
    for i, z in last_logits(model, prompts, batch=batch, what="actions"):
        logp = z.double().log_softmax(-1)[ids[i]]
        chance[i, : len(ids[i])] = logp.softmax(-1).cpu().numpy()
        valid[i] = float(torch.logsumexp(logp, -1).exp())
    return ActionChances(chance, valid, np.zeros(len(prompts), np.int64))


def _action_ids(model: Model, prompt: str, actions: Sequence[str]) -> list[int]:
    tokens = Tokens(model.tokenizer)
    found = [tokens.one(prompt, action) for action in actions]
    for action, token in zip(actions, found, strict=True):
        if token is None:
            raise InputError(
                f"the action {action!r} is not one token for {model.name} after {prompt[-30:]!r}; "
                "name actions with one token, or use mode='sample'"
            )
    known = [t for t in found if t is not None]
    if len(set(known)) < len(known):
        raise InputError(f"two of the actions {actions} are the same token for {model.name}")
    return known


def _first_named(actions: Sequence[str]) -> Parse:
    """Return the reader that finds the action that a text names first (the longer one at one place)."""
    names = [action.strip() for action in actions]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"the actions {list(actions)} must differ in more than spaces to be read from text")

    def read(text: str) -> int | None:
        places = [(text.find(n), -len(n), i) for i, n in enumerate(names) if n in text]
        return min(places)[2] if places else None

    return read
