"""Facts for knowledge editing: counterfactual capitals, their paraphrases, and prompts that must not change.

    requests = counterfactuals(model, n=20, seed=0)

Locality prompts have nothing to do with capitals: sentences, sums, names, agreement and reviews from the
library's tasks, and openings of Moby-Dick. `neighbours` asks for capitals of countries that were not edited.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from actlas.core.errors import InputError
from actlas.data import corpus, task
from actlas.data.edit_requests import EditRequest
from actlas.data.facts_table import COUNTRIES, Country
from actlas.data.single_token import Tokens

if TYPE_CHECKING:
    from actlas.core.model import Model

PROMPT = "The capital of {} is"
PARAPHRASES = ("{}'s capital is the city of", "The capital city of {} is")
TASKS = ("ioi", "agreement", "arithmetic", "sentiment")


def counterfactuals(
    model: Model, n: int, seed: int, *, locality: int = 40, neighbours: bool = False
) -> list[EditRequest]:
    """Return facts "The capital of X is Y" that are false, with one-token answers.

    Args:
        model: whose tokenizer decides which capitals are one token.
        n: how many facts.
        seed: of the draw.
        locality: how many unrelated prompts, dealt out over the facts.
        neighbours: use the capitals of countries that are not edited instead of unrelated prompts.

    Raises:
        InputError: fewer than `n + 2` countries have a capital of one token.
    """
    draw = random.Random(f"wise/{seed}")
    known = _known(model)
    if len(known) < n + 2:
        raise InputError(f"only {len(known)} capitals are one token for this tokenizer; ask for fewer facts")
    draw.shuffle(known)
    edited, rest = known[:n], known[n:]
    must_stay = [PROMPT.format(c.name) for c in rest] if neighbours else unrelated(model, locality, seed)
    found = []
    for i, country in enumerate(edited):
        false = draw.choice([c.capital for c in known if c.capital != country.capital])
        found.append(
            EditRequest(
                PROMPT.format(country.name),
                f" {false}",
                country.name,
                tuple(p.format(country.name) for p in PARAPHRASES),
                tuple(must_stay[i::n]),
            )
        )
    return found


def unrelated(model: Model, n: int, seed: int) -> list[str]:
    """Return `n` prompts that have nothing to do with capitals."""
    each = -(-n // (len(TASKS) + 1))
    kinds = [[i.prompt for i in task(t, model.tokenizer, n=max(each, 8), seed=seed)] for t in TASKS]
    kinds.append(openings(each, seed))
    return [kind[i] for i in range(each) for kind in kinds][:n]


def openings(n: int, seed: int) -> list[str]:
    """Return the first words of `n` pages of prose."""
    found = []
    for page in corpus("prose", seed=seed):
        words = page.text.split()[:10]
        if len(words) == 10:
            found.append(" ".join(words))
        if len(found) == n:
            break
    return found


def _known(model: Model) -> list[Country]:
    tokens = Tokens(model.tokenizer)
    return [c for c in COUNTRIES if tokens.one("The capital is", f" {c.capital}") is not None]
