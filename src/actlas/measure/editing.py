"""Knowledge editing: does the model say the new facts, also when asked otherwise, and nothing else new?

    clean = clean_outputs(model, requests)               # before anything is edited
    with model.edit(edit):
        editing_measurements(model, requests, clean)

* **reliability**: share of edited prompts after which greedy decoding gives exactly the target.
* **target-nll**: surprise of the targets after their prompts, in nats per token: the same as a number that
  also moves when no answer flips.
* **generality**: the same for paraphrases (a mean over facts of the share of its paraphrases).
* **locality**: share of unrelated prompts whose greedy continuation is, token by token, what the unedited
  model says; `locality-kl` is the divergence of the first token's distribution from the unedited model's.

The unedited outputs are taken first and kept, so that an edited model is never compared with itself.
Prompts are marked as prompts (`core.continuations`), so that an edit which decides on the prompt and holds
its decision is measured as it would generate.

Source: the measures of Wang et al. 2024, "WISE" (section 3.1), with whole answers instead of single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actlas.core.continuations import continuations
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.measure.registry import mark_under, measure
from actlas.measure.samples import mean_measurement, missing, rate_measurement

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.data.edit_requests import EditRequest

BATCH = 16


@dataclass(frozen=True, eq=False)
class CleanOutputs:
    """What the unedited model says after every locality prompt.

    Attributes:
        tokens: greedy continuation of each prompt.
        log_probabilities: of the first token, `[vocab]` each.
    """

    tokens: dict[str, tuple[int, ...]]
    log_probabilities: dict[str, Tensor]


def clean_outputs(model: Model, requests: Sequence[EditRequest], *, tokens: int = 4) -> CleanOutputs:
    """Return what the model says, without any edit, after all locality prompts of the requests.

    Args:
        model: a causal language model with a tokenizer; installed edits are taken out meanwhile.
        requests: the facts that will be written.
        tokens: how many tokens of the continuation must stay.
    """
    prompts = list(dict.fromkeys(p for r in requests for p in r.locality))
    said: dict[str, tuple[int, ...]] = {}
    first: dict[str, Tensor] = {}
    with model.without_edits():
        for start in range(0, len(prompts), BATCH):
            some = prompts[start : start + BATCH]
            found = model.generate(some, max_new_tokens=tokens)
            follow = [tuple(int(t) for t in row) for row in found.tokens]
            logits = continuations(model, some, follow).logits(model)
            for prompt, ids, z in zip(some, follow, logits, strict=True):
                said[prompt], first[prompt] = ids, z[0].float().log_softmax(-1)
    return CleanOutputs(said, first)


@mark_under
def editing_measurements(
    model: Model, requests: Sequence[EditRequest], clean: CleanOutputs, *, seed: int = 0, batch: int = BATCH
) -> list[Measurement]:
    """Measure the model as it is, with whatever edits are installed.

    Args:
        model: a causal language model with a tokenizer.
        requests: the facts.
        clean: what `clean_outputs` gave before.
        seed: of the bootstrap.
        batch: prompts in one pass.

    Returns:
        reliability, target-nll, generality, locality and locality-kl; `nan` with a note
        where there are no prompts.

    Raises:
        InputError: no requests, or a locality prompt whose clean output is not known.
    """
    if not requests:
        raise InputError("there are no edit requests to measure; give at least one")
    right, nll = _says(model, [r.prompt for r in requests], [r.target for r in requests], batch)
    out = [
        rate_measurement("reliability", right, seed=seed, better="higher"),
        mean_measurement("target-nll", "nats/token", nll, seed=seed, over="facts", better="lower"),
    ]
    asked = [(i, p, r.target) for i, r in enumerate(requests) for p in r.paraphrases]
    if asked:
        hits, _ = _says(model, [p for _, p, _ in asked], [t for _, _, t in asked], batch)
        owner = np.array([i for i, _, _ in asked])
        shares = [float(hits[owner == i].mean()) for i in np.unique(owner)]
        out.append(
            mean_measurement("generality", "fraction", shares, seed=seed, over="facts", better="higher",
                             note=f"{len(asked)} paraphrases")
        )  # fmt: skip
    else:
        out.append(missing("generality", "fraction", "the requests have no paraphrases"))
    return out + _locality(model, requests, clean, seed, batch)


def _locality(
    model: Model, requests: Sequence[EditRequest], clean: CleanOutputs, seed: int, batch: int
) -> list[Measurement]:
    prompts = list(dict.fromkeys(p for r in requests for p in r.locality))
    if not prompts:
        note = "the requests have no locality prompts"
        return [missing("locality", "fraction", note), missing("locality-kl", "nats", note)]
    unknown = next((p for p in prompts if p not in clean.tokens), None)
    if unknown is not None:
        raise InputError(f"the clean output of {unknown!r} is not known; take clean_outputs of all requests")
    same, divergence = np.zeros(len(prompts), bool), np.zeros(len(prompts))
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        rows = continuations(model, some, [clean.tokens[p] for p in some])
        logits = rows.logits(model)
        same[start : start + len(some)] = rows.agree(logits).cpu().numpy()
        for i, (prompt, z) in enumerate(zip(some, logits, strict=True)):
            base, now = clean.log_probabilities[prompt].double(), z[0].double().log_softmax(-1)
            divergence[start + i] = max(0.0, float((base.exp() * (base - now)).sum()))
    return [
        rate_measurement("locality", same, seed=seed, better="higher"),
        mean_measurement(
            "locality-kl", "nats", divergence, seed=seed, over="prompts", better="lower",
            details={"largest": float(divergence.max())},
        ),
    ]  # fmt: skip


def _says(
    model: Model, prompts: Sequence[str], targets: Sequence[str], batch: int
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return whether the model says each target after its prompt, and the target's nats per token."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    right, nll = np.zeros(len(prompts), bool), np.zeros(len(prompts))
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        rows = continuations(model, [prompts[i] for i in some], [targets[i] for i in some])
        logits = rows.logits(model)
        right[some] = rows.agree(logits).cpu().numpy()
        nll[some] = (rows.losses(logits).double().sum(1) / rows.real.sum(1)).cpu().numpy()
    return right, nll


def editing(model: Model, edit: Edit | None, requests: Sequence[Any], *, seed: int = 0) -> list[Measurement]:
    """Measure an edit: take the clean outputs, install it, measure, take it out.

    Args:
        model: a causal language model with a tokenizer.
        edit: what holds the facts; `None` measures the model as it is.
        requests: requests, or mappings with their fields.
        seed: of the bootstrap.

    Raises:
        InputError: unusable requests (see `data.edit_requests`).
    """
    from actlas.data.edit_requests import as_requests

    checked = as_requests(requests)
    clean = clean_outputs(model, checked)
    if edit is None:
        return editing_measurements(model, checked, clean, seed=seed)
    with model.edit(edit):
        return editing_measurements(model, checked, clean, seed=seed)


@measure(
    "editing",
    summary="whether new facts are said (reliability, generality) and nothing else changed (locality)",
    unit="fraction",
    needs=("causal-lm",),
    data="requests",
    source="Wang et al. 2024, WISE, section 3.1",
)
def measure_editing(model: Model, requests: Sequence[Any] | None, *, seed: int = 0) -> list[Measurement]:
    """Return reliability, generality and locality under the installed edits.

    Raises:
        InputError: no requests were given.
    """
    if requests is None:
        raise InputError("'editing' measures edit requests; give them, e.g. --data edits.jsonl")
    return editing(model, None, requests, seed=seed)
