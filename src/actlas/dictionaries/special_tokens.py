"""Special tokens: which latents answer to a chat template's markers, and what happens along them.

    found = special_token_latents(sae, rows)             # most active on the template's tokens
    edit = special_token_edit(sae, found[0].latent, 40, model)
    special_token_steering(model, sae, prompts, [f.latent for f in found[:3]])

FAST (Li et al. 2025, section 6) steers with h + alpha d_k, alpha from 0 to 200, along latents k that are
most active on special tokens, and finds that moderate alpha changes answers for the better. Here d_k is the
unit decoder direction, so alpha is in the site's own units, and an effect is shown beside a random
direction of equal norm and the sign-flipped one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.edit import Edit
from actlas.core.edits import Add
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.dictionaries.conversations import TokenRows
from actlas.measure.samples import mean_measurement

if TYPE_CHECKING:
    from actlas.core.model import Model

Where = Literal["special", "everywhere"]


@dataclass(frozen=True)
class SpecialLatent:
    """How one latent behaves on the template's tokens and on the others.

    Attributes:
        latent: its number.
        special, other: its mean activation there, in the dictionary's units; not active counts as 0.
        rate_special, rate_other: the share of tokens at which it is active.
        token: the token id at which it is most active on average.
    """

    latent: int
    special: float
    other: float
    rate_special: float
    rate_other: float
    token: int


def special_token_latents(
    lens: Dictionary, rows: TokenRows, n: int = 10, *, massive: bool = False
) -> list[SpecialLatent]:
    """Return the latents that are most active on special tokens, by mean activation.

    Args:
        lens: the dictionary.
        rows: from `token_rows`, at the lens's site.
        n: how many.
        massive: count massive rows too; they are one token that no dictionary is fitted on by default.

    Raises:
        InputError: no special tokens among the rows, or `n` below 1.
    """
    if n < 1:
        raise InputError(f"cannot return {n} latents; ask for at least 1")
    kept = rows if massive else rows[~rows.massive]
    if not bool(kept.special.any()):
        raise InputError("no row is a special token; read conversations with a chat template")
    codes = lens.encode(kept.x)
    means, rates = {}, {}
    for name, where in (("special", kept.special), ("other", ~kept.special)):
        part = codes[where]
        count = max(int(where.sum()), 1)
        means[name], rates[name] = _sums(part) / count, part.counts().double() / count
    best = means["special"].topk(min(n, lens.features)).indices.tolist()
    return [
        SpecialLatent(
            latent,
            float(means["special"][latent]),
            float(means["other"][latent]),
            float(rates["special"][latent]),
            float(rates["other"][latent]),
            _top_token(codes.of(latent), kept.token),
        )
        for latent in best
        if float(means["special"][latent]) > 0
    ]


def special_token_edit(
    lens: Dictionary, latent: int, alpha: float, model: Model, *, where: Where = "special"
) -> Edit:
    """Return the edit h + alpha d_k, d_k the latent's unit direction.

    Args:
        lens: the dictionary.
        latent: k.
        alpha: length of what is added, in the units of the site; 0 changes nothing.
        model: whose special tokens are meant.
        where: on special tokens only, or on every token.

    Raises:
        InputError: no such latent, a direction of no length, or a tokenizer without special tokens.
    """
    direction = lens.direction(lens.check_feature(latent))
    length = float(direction.norm())
    if not length > 0:
        raise InputError(f"the direction of latent {latent} has no length; the dictionary has dead rows")
    return _scoped(lens.edit(latent, alpha / length), model, where)


@torch.no_grad()
def special_token_steering(
    model: Model,
    lens: Dictionary,
    prompts: Iterable[Any],
    latents: Sequence[int],
    *,
    alphas: Sequence[float] = (10.0, 50.0, 200.0),
    where: Where = "special",
    controls: int = 3,
    seed: int = 0,
) -> list[Measurement]:
    """Measure how far steering along latents moves the next-token prediction.

    Args:
        model, lens: as in `special_token_edit`.
        prompts: what `model.encode` takes, e.g. chats.
        latents: which; each alpha is averaged over them.
        alphas: lengths.
        where: as in `special_token_edit`.
        controls: random directions for each alpha.
        seed: of the random directions and the bootstrap.

    Returns:
        For each alpha `next-token KL` in nats along the latents, along their opposites and along random
        directions of equal length, and the paired difference between latents and random directions.

    Raises:
        InputError: no prompts, latents or alphas.
    """
    asked = list(prompts)
    if not asked or not latents or not alphas or controls < 1:
        raise InputError("steering needs at least one prompt, latent, alpha and control direction")
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(controls, lens.channels, generator=generator)
    random /= random.norm(dim=1, keepdim=True)
    base = [_last_log_probabilities(model, p) for p in asked]
    found = []
    for alpha in alphas:
        edits = {
            "latents": [special_token_edit(lens, k, alpha, model, where=where) for k in latents],
            "sign-flipped": [special_token_edit(lens, k, -alpha, model, where=where) for k in latents],
            "random": [_scoped(Add(lens.site, lens._shaped(alpha * r)), model, where) for r in random],
        }
        samples: dict[str, np.ndarray] = {}
        for kind, several in edits.items():
            moved = [[_moved(model, p, b, e) for p, b in zip(asked, base, strict=True)] for e in several]
            samples[kind] = np.array(moved).mean(0)
        samples["latents minus random"] = samples["latents"] - samples["random"]
        for kind, values in samples.items():
            group = {"direction": kind, "alpha": f"{alpha:g}"}
            found.append(
                mean_measurement("next-token KL", "nats", values, seed=seed, over="prompts", group=group)
            )
    return found


def _scoped(edit: Edit, model: Model, where: Where) -> Edit:
    if where == "everywhere":
        return edit
    if where != "special":
        raise InputError(f"where is {where!r}; it must be 'special' or 'everywhere'")
    ids = [int(i) for i in getattr(model.tokenizer, "all_special_ids", None) or []]
    if not ids:
        raise InputError(f"the tokenizer of {model.name} has no special tokens; use where='everywhere'")
    return edit.at(tokens=ids)


def _moved(model: Model, prompt: Any, base: Tensor, edit: Edit) -> float:
    with model.edit(edit):
        after = _last_log_probabilities(model, prompt)
    return float((base.exp() * (base - after)).sum())


def _last_log_probabilities(model: Model, prompt: Any) -> Tensor:
    return torch.log_softmax(model.logits(prompt)[0, -1].double(), -1)


def _sums(codes: Codes) -> Tensor:
    """Return the sum of each feature's values, float64 `[features]`."""
    total = torch.zeros(codes.features, dtype=torch.float64)
    return total.index_add_(0, codes.indices.flatten().cpu(), codes.values.flatten().double().cpu())


def _top_token(values: Tensor, tokens: Tensor) -> int:
    kinds, code, count = tokens.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(kinds), dtype=torch.float64).index_add_(0, code, values.double().cpu())
    return int(kinds[(sums / count).argmax()])
