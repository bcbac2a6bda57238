"""How far an edit may go: the largest strength whose price stays within a budget.

For logits f and p = softmax f, with u the derivative of f in the strength s,

    KL(p_0 || p_s) = s^2 / 2 Var_p(u) + O(s^3),    so    s_max(eps) = sqrt(2 eps / E[Var_p(u)])

(`method="fisher"`, the closed form of Activation Steering for Chain-of-Thought Compression). It is right
for small budgets and underestimates the price several times at the strengths that people use, so the
default measures: the strength is bisected on the true KL, with the closed form's square law as the guess
between two points.

A budget on the mean says little about a single prompt. With `share=0.95` the strength is such that 95% of
prompts like those that were given stay within it, with confidence 0.9: as many of the n given prompts may
exceed it as a one-sided tolerance limit allows (none below n = 77). Fewer than 45 prompts cannot carry that
confidence by counting; there the limit of a normal distribution of log KL is kept too, if it is stricter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from actlas.core.edit import Edit
from actlas.core.errors import InputError, NonFiniteError
from actlas.steering.price import Array, Suffix

if TYPE_CHECKING:
    from actlas.core.model import Model

BUDGET = 0.1
CONFIDENCE = 0.9
_TRIES = 14
_GROWTH = 8.0
_CLOSE = 0.9  # a price between this share of the budget and the budget is near enough


@dataclass(frozen=True)
class Strength:
    """A strength with its price; `edit * strength` and `float(strength)` work.

    Attributes:
        value: the strength.
        level: the price that was held under the budget (of the worst allowed prompt, or the mean), nats.
        kl: KL per token of each prompt there; empty for the closed form.
        tried: `(strength, level)` of each strength that was measured, in order.
        note: what a reader must know.
    """

    value: float
    level: float
    kl: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    tried: tuple[tuple[float, float], ...] = ()
    note: str = ""

    def __float__(self) -> float:
        return self.value


def kl_budget(
    model: Model,
    edit: Edit,
    texts: Sequence[str],
    eps: float = BUDGET,
    *,
    method: Literal["bisect", "fisher"] = "bisect",
    share: float | None = 0.95,
    groups: Sequence[int] | None = None,
    start: float = 1.0,
) -> Strength:
    """Return the largest factor of an edit whose price on prompts like `texts` stays within `eps`.

    Args:
        model: a causal language model.
        edit: the edit; the result multiplies its strength.
        texts: prompts to measure on, 45 or more for a firm 95%.
        eps: the budget, nats of KL per token.
        method: `"bisect"` measures; `"fisher"` is the closed form.
        share: of prompts that must stay within the budget; `None` for the mean over prompts, as published.
        groups: number of each text's source; texts of one source (the two of a pair) count as one prompt,
            the dearest of them, because they are no independent evidence.
        start: a first guess of the strength.

    Raises:
        InputError: `eps` is not positive, no texts, or an edit that cannot change the output.
    """
    check_budget(eps, share)
    run = Suffix(model, edit, texts)
    level = level_of(share, groups)
    if method == "fisher":
        return _closed_form(run, edit, eps, level, start)
    if method != "bisect":
        raise InputError(f"method is {method!r}; it must be 'bisect' or 'fisher'")
    return search(lambda s: run.outcome(edit * s).kl, eps, level, start=start, what=edit.describe())


def fisher_price(model: Model, edit: Edit, texts: Sequence[str], *, step: float | None = None) -> Array:
    """Return Var_p(u) / 2 of each text, `[n]`: the closed form's price at strength 1, in nats per token.

    Args:
        model, edit, texts: see `kl_budget`.
        step: of the central difference; found when `None` (where the price is about 1e-4).

    Raises:
        InputError: the edit cannot change the output.
    """
    return _curvature(Suffix(model, edit, texts), edit, step, 1.0)


def search(
    price: Callable[[float], Array],
    eps: float,
    level: Callable[[Array], float],
    *,
    start: float = 1.0,
    what: str = "the edit",
) -> Strength:
    """Return the largest strength s with `level(price(s)) <= eps`, to within 10% of the budget.

    Args:
        price: strength -> KL per token of each prompt; a NonFiniteError counts as infinite.
        eps: the budget.
        level: prices -> the number that is held under the budget.
        start: first guess.
        what: the edit's name, for errors.
    """
    tried: list[tuple[float, float]] = []
    low, high = (0.0, 0.0, np.zeros(0)), (math.inf, math.inf)
    s, note = start, ""
    for _ in range(_TRIES):
        try:
            kl = price(s)
            found = level(kl)
        except NonFiniteError:
            kl, found = np.zeros(0), math.inf
        tried.append((s, found))
        if found <= eps:
            if not math.isfinite(high[0]) and _saturates(low[:2], (s, found)):
                low, note = (s, found, kl), "the price stops growing below the budget"
                break
            low = (s, found, kl)
        else:
            high = (s, found)
        if low[1] >= _CLOSE * eps or high[0] <= 1.01 * low[0]:
            break
        s = _next(low[:2], high, eps)
    if low[1] <= 0:
        raise InputError(
            f"{what} does not change the model's output at strength {tried[-1][0]:g}; it has no price"
        )
    return Strength(low[0], low[1], low[2], tuple(tried), note)


def level_of(share: float | None, groups: Sequence[int] | None = None) -> Callable[[Array], float]:
    """Return the function from the prompts' prices to the number that is held under the budget.

    Args:
        share: of prompts that must stay within it (see the module docstring), or `None` for the mean.
        groups: see `kl_budget`.

    Raises:
        InputError: (from the function) as many groups as prices are needed.
    """
    if share is None:
        return lambda kl: float(kl.mean())

    def level(kl: Array) -> float:
        kl = kl if groups is None else _dearest(kl, groups)
        worst = np.sort(kl)[::-1]
        held = float(worst[allowed(len(kl), share)])
        return max(held, _normal_limit(kl, share)) if share ** len(kl) > 1 - CONFIDENCE else held

    return level


def _dearest(kl: Array, groups: Sequence[int]) -> Array:
    if len(groups) != len(kl):
        raise InputError(f"there are {len(kl)} texts but {len(groups)} groups; give one for each")
    names, code = np.unique(np.asarray(groups), return_inverse=True)
    found = np.full(len(names), -math.inf)
    np.maximum.at(found, code, kl)
    return found


def allowed(n: int, share: float, confidence: float = CONFIDENCE) -> int:
    """Return how many of n prompts may exceed the budget if a share of all must not, with confidence.

    The largest k with P(Binomial(n, 1 - share) <= k) <= 1 - confidence; 0 if there is none.
    """
    from scipy.stats import binom

    within = binom.cdf(np.arange(n), n, 1 - share) <= 1 - confidence
    return max(int(within.sum()) - 1, 0)


def check_budget(eps: float, share: float | None = None) -> None:
    """Raise InputError unless the budget is positive and the share lies between 0 and 1."""
    if not (eps > 0 and math.isfinite(eps)):
        raise InputError(f"the budget is {eps} nats per token; it must be a positive number, e.g. 0.1")
    if share is not None and not 0 < share < 1:
        raise InputError(f"share is {share}; it must lie between 0 and 1, e.g. 0.95")


def _normal_limit(kl: Array, share: float) -> float:
    """The upper tolerance limit of a normal distribution of log KL (noncentral t); the maximum for n = 1."""
    from scipy.stats import nct, norm

    n = len(kl)
    if n < 2 or float(kl.min()) <= 0:
        return float(kl.max())
    x = np.log(kl)
    factor = float(nct.ppf(CONFIDENCE, n - 1, norm.ppf(share) * math.sqrt(n))) / math.sqrt(n)
    return float(math.exp(min(x.mean() + factor * x.std(ddof=1), 700.0)))


def _saturates(before: tuple[float, float], now: tuple[float, float]) -> bool:
    """Whether the price grows with less than the tenth power of the strength (a square is usual)."""
    if not before[1] > 0 or now[0] < 1.2 * before[0]:
        return False
    return math.log(now[1] / before[1]) < 0.1 * math.log(now[0] / before[0]) if now[1] > 0 else False


def _next(low: tuple[float, float], high: tuple[float, float], eps: float) -> float:
    """Return the next strength: on the line through both ends in logarithms, else by the square law."""
    aim = eps * (1 + _CLOSE) / 2
    if not math.isfinite(high[0]):
        factor = math.sqrt(aim / low[1]) if low[1] > 0 else _GROWTH
        return low[0] * min(max(factor, 1.05), _GROWTH)
    if not low[0]:
        factor = math.sqrt(aim / high[1]) if math.isfinite(high[1]) else 0.0
        return high[0] * min(max(factor, 1 / _GROWTH), 0.95)
    a, b = math.log(low[0]), math.log(high[0])
    if low[1] <= 0 or not math.isfinite(high[1]):
        return math.exp((a + b) / 2)
    along = (math.log(aim) - math.log(low[1])) / (math.log(high[1]) - math.log(low[1]))
    return math.exp(a + (b - a) * min(max(along, 0.1), 0.9))


def _curvature(run: Suffix, edit: Edit, step: float | None, start: float) -> Array:
    """Return Var_p(u) / 2 of each text, with a step at which the price is about 1e-4."""
    if step is not None:
        return run.fisher(edit, step) / 2
    half, step = np.zeros(0), start * 1e-2
    for _ in range(6):
        half = run.fisher(edit, step) / 2
        mean = float(half.mean())
        if not mean > 0:
            step *= 10
            continue
        wanted = math.sqrt(1e-4 / mean)
        if 1 / 3 < wanted / step < 3:
            return half
        step = wanted
    if not half.size or not float(half.mean()) > 0:
        raise InputError(f"{edit.describe()} does not change the model's output; it has no price")
    return half


def _closed_form(
    run: Suffix, edit: Edit, eps: float, level: Callable[[Array], float], start: float
) -> Strength:
    half = level(_curvature(run, edit, None, start))
    return Strength(
        math.sqrt(eps / half), eps, note="closed form; the true price is higher for large budgets"
    )
