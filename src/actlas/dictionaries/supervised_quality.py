"""How much of the variance a task's variables explain, on prompts that were not fitted, with its control.

The control is the same fit on shuffled attributes: with 512 prompts and 34 vectors, labels that say nothing
still explain part of the variance of the prompts they were fitted on, but none of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from actlas.core.intervals import Array, bootstrap_statistic, divide
from actlas.core.measurement import Measurement
from actlas.dictionaries.supervised_design import Attributes

if TYPE_CHECKING:
    from actlas.dictionaries.supervised_lens import SupervisedDictionary

_SHARE = 5  # one prompt in so many is held out


def held_out(
    x: Tensor,
    items: Sequence[Attributes],
    fit: Callable[[Tensor, Sequence[Attributes]], SupervisedDictionary],
    seed: int,
    note: str = "",
) -> tuple[Measurement, ...]:
    """Measure explained variance on a fifth of the prompts, the dictionary fitted on the others.

    Returns:
        Explained variance, the same with shuffled attributes, and their difference, each with a bootstrap
        interval over prompts. Held-out prompts with values that the others lack are left out.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(items))
    test, train = (
        np.sort(order[: max(2, len(items) // _SHARE)]),
        np.sort(order[max(2, len(items) // _SHARE) :]),
    )
    shuffled = [items[i] for i in generator.permutation(len(items))]
    errors: list[Array] = []
    real = fit(x[train], [items[i] for i in train])
    seen = [i for i in test if not real.missing([items[i]])]
    if len(seen) < 2:
        return ()
    centre = x[train].mean(0)
    total = (x[seen] - centre).square().sum(1).numpy()
    for labels in (items, shuffled):
        fitted = fit(x[train], [labels[i] for i in train])
        known = [i for i in seen if not fitted.missing([labels[i]])]
        error = (x[seen] - centre).square().sum(1)
        if known:
            guess = fitted.decode(fitted.encode_values([labels[i] for i in known])).double()
            error[torch.tensor([seen.index(i) for i in known])] = (x[known] - guess).square().sum(1)
        errors.append(error.numpy())

    def explained(error: Array) -> Callable[[Array], Array]:
        return lambda counts: 1 - divide(counts @ error, counts @ total)

    def measured(name: str, statistic: Callable[[Array], Array], more: str = "") -> Measurement:
        value = float(statistic(np.ones((1, len(seen))))[0])
        low, high = bootstrap_statistic(statistic, len(seen), seed=seed)
        return Measurement(
            name=name, value=value, unit="fraction", n=len(seen), low=low, high=high,
            interval="bootstrap over prompts", seed=seed, better="higher", group={"site": real.site},
            note=more,
        )  # fmt: skip

    own, control = explained(errors[0]), explained(errors[1])
    return (
        measured("explained variance", own, note),
        measured("explained variance, shuffled attributes", control),
        measured("explained variance above shuffled", lambda counts: own(counts) - control(counts)),
    )
