"""Token ablation (GrAInS): erase the tokens that an answer rests on, and steer along what that changed.

For a prompt x with a preferred answer y+ and another y-, F = log p(y+ | x) - log p(y- | x):

1. Integrated gradients of F give every token of (x, y+) and of (x, y-) a score. S+ are the k tokens of
   largest, S- the k of smallest score.
2. Erase S+ in both texts, and read the last token's activation before and after:
       D+ = {h(x, y+) - h(x, y+ without S+)}  and  {h(x, y-) - h(x, y- without S+)}      over all rows
   D- in the same way with S-.
3. v+ = |mean D+| PC1(D+), its sign that of the mean; v- likewise; the direction is v+ - v-.

F is a sum of two parts that depend on one text each, so the scores of (x, y+) come from log p(y+ | x) and
those of (x, y-) from -log p(y- | x). Only tokens of the prompt are erased by default.

    d = fit_direction(model, pairs, "blocks.25.resid_post", method="token_ablation", k=1)
    model.edit(d.steer(0.2, keep_norm=True))

Source: Nguyen et al. 2025, "GrAInS: Gradient-based Attribution for Inference-Time Steering of LLMs and
VLMs", section 3, and its released code: zero baseline, 20 steps, k = 10, PC1 of centred differences, unit
length, norm kept afterwards. Here the baseline holds the first token, without which the gradients do not
add up (`core.answer_function`); `baseline="zero"` and `rule="right"` are the published ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.answer_function import (
    BaselineKind,
    answer_start,
    attribute_pair,
    erased,
    text_baseline,
    token_ids,
)
from actlas.core.attributions import Rule
from actlas.core.calibration.reading import check_row_sites
from actlas.core.contrast import Contrast, Readings, read_rows
from actlas.core.direction import Direction
from actlas.core.edits import Replace
from actlas.core.errors import InputError
from actlas.core.progress import progress
from actlas.steering.fits import direction_fit

if TYPE_CHECKING:
    from actlas.core.model import Model

#: (model, ids of a text, first id of the answer) -> a score for every id; larger supports the answer.
Attribution = Callable[["Model", Tensor, int], Tensor]


@direction_fit("token_ablation", data="texts", summary="what erasing the most attributed tokens changes")
def token_ablation(
    model: Model,
    data: Any,
    sites: str | Sequence[str],
    *,
    k: int | float = 0.2,
    attribution: Literal["ig", "random"] | Attribution = "ig",
    steps: int = 20,
    baseline: BaselineKind = "mean",
    rule: Rule = "gauss",
    replace: Literal["pad", "mask", "mean"] = "pad",
    tokens: Literal["prompt", "all"] = "prompt",
    whole_answer: bool = True,
    mode: Literal["both", "positive"] = "both",
    reduce: Literal["pca", "mean"] = "pca",
    seed: int = 0,
) -> dict[str, Direction]:
    """Fit directions from the effect of erasing the most attributed tokens, one attribution for all sites.

    Args:
        model: a causal language model.
        data: pairs (anything `Contrast.of` takes); the answers are what follows the shared beginning.
        sites: names or patterns of sites with channels.
        k: tokens to erase in each text: a number, or a fraction of the tokens that may be erased (at
            least one). Published: 10.
        attribution: `"ig"`, `"random"` (the control: tokens drawn with the seed), or a function.
        steps, rule, baseline: of the integrated gradients.
        replace: what stands where a token was: the `"pad"` token, the `"mean"` embedding of the
            vocabulary, or nothing that can be attended to (`"mask"`).
        tokens: which may be erased: those of the `"prompt"`, or `"all"`.
        whole_answer: score the whole answer, not only its last token (as the released code does).
        mode: `"both"` is v+ - v-, `"positive"` only v+.
        reduce: the first principal component of the differences, or their mean.
        seed: of the random control.

    Raises:
        InputError: k is 0 or reaches the number of tokens, an unknown option, or a model without a
            token to put in the erased ones' place.
        SiteError: a site that does not exist or has no channels.
    """
    for name, value, known in (
        ("replace", replace, ("pad", "mask", "mean")),
        ("tokens", tokens, ("prompt", "all")),
        ("mode", mode, ("both", "positive")),
        ("reduce", reduce, ("pca", "mean")),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    contrast = Contrast.of(data)
    names = [s.name for s in check_row_sites(model.resolve(sites))]
    generator = random.Random(seed)
    read: dict[str, list[dict[str, Tensor]]] = {"plain": [], "top": [], "bottom": []}
    with progress("token attribution", len(contrast), "pairs") as advance:
        for pair in zip(contrast.positive, contrast.negative, strict=True):
            texts = tuple(token_ids(model, text) for text in pair)
            start = answer_start(*texts)
            scores = _scores(model, texts, start, attribution, steps, baseline, rule, whole_answer)
            for side, ids, score in zip((True, False), texts, scores, strict=True):
                allowed = len(ids) if tokens == "all" else start
                count = _count(k, allowed)
                if score is None:
                    chosen = generator.sample(range(allowed), min(2 * count, allowed))
                    top, bottom = chosen[:count], chosen[-count:]
                else:
                    order = ((1 if side else -1) * score[:allowed]).argsort(descending=True).tolist()
                    top, bottom = order[:count], order[-count:]
                erasures = [(), top, bottom] if mode == "both" else [(), top]
                for kind, row in zip(read, _read(model, ids, erasures, names, replace), strict=False):
                    read[kind].append(row)
            advance()
    _, references = read_rows(model, contrast.texts, names)
    method = "random token_ablation" if attribution == "random" else "token_ablation"
    about = {"data": contrast.hash, "n": len(contrast), "fingerprint": model.fingerprint}
    found = {}
    for name in names:
        rows = {kind: torch.stack([r[name] for r in given]) for kind, given in read.items() if given}
        vector = _component(rows["plain"] - rows["top"], reduce)
        if mode == "both":
            vector = vector - _component(rows["plain"] - rows["bottom"], reduce)
        readings = Readings(name, rows["plain"][::2].float(), rows["plain"][1::2].float(), references[name])
        found[name] = Direction.of(readings, vector, method, **about)
    return found


def _count(k: int | float, allowed: int) -> int:
    count = max(1, round(k * allowed)) if isinstance(k, float) and 0 < k < 1 else k
    if isinstance(count, bool) or count != int(count) or not 1 <= count < allowed:
        raise InputError(
            f"k is {k}; with {allowed} tokens that may be erased it must be 1 to {allowed - 1}, or a fraction"
        )
    return int(count)


def _scores(
    model: Model,
    texts: tuple[Tensor, ...],
    start: int,
    attribution: Any,
    steps: int,
    baseline: BaselineKind,
    rule: Rule,
    whole_answer: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return for both texts the score `[pos]` of every token for log p of the text's own answer."""
    if attribution == "random":
        return None, None
    if callable(attribution):
        one, other = (torch.as_tensor(attribution(model, ids, start)).double() for ids in texts)
        return one, other
    if attribution != "ig":
        raise InputError(f"attribution is {attribution!r}; it must be 'ig', 'random' or a function")
    _, scores = attribute_pair(
        model,
        *texts,
        steps=steps,
        baseline=baseline,
        rule=rule,
        keep_first=baseline != "zero",
        whole_answer=whole_answer,
    )
    return scores[0], scores[1]


def _read(
    model: Model, ids: Tensor, erasures: Sequence[Sequence[int]], sites: Sequence[str], replace: str
) -> list[dict[str, Tensor]]:
    """Return the last token's activation at each site, float64 `[d]`, for each set of erased tokens."""
    whole = erased(model, ids, ())
    if replace == "mean":
        inputs = {k: v.expand(len(erasures), -1) for k, v in whole.items()}
        new = model.trace(inputs, "embed")["embed"].clone()
        for row, places in enumerate(erasures):
            empty = text_baseline(model, ids, "mean", keep_first=0 not in places)
            new[row, list(places)] = empty[list(places)].to(new)
        with model.edit(Replace("embed", new)):
            trace = model.trace(inputs, sites)
    else:
        rows = [erased(model, ids, places, replace) for places in erasures]  # type: ignore[arg-type]
        trace = model.trace({k: torch.cat([r[k] for r in rows]) for k in rows[0]}, sites)
    return [
        {site: trace[site][row, -1].flatten().double().cpu() for site in sites}
        for row in range(len(erasures))
    ]


def _component(differences: Tensor, reduce: str) -> Tensor:
    """Return the mean of rows `[n, d]`, or their centred PC1 with the mean's length and sign."""
    mean = differences.mean(0)
    if reduce == "mean" or len(differences) < 3:
        return mean
    first = torch.linalg.svd(differences - mean, full_matrices=False)[2][0]
    return first * mean.norm() * (1 if float(first @ mean) >= 0 else -1)
