"""What the reproduction of observable propagation measures: one function a question.

error       the propagated vector against autograd through the model's own modules
on_prose    norms' projections and couplings on prose tokens
low_data    the vector, made without data, against probes with a few labelled names
cause       adding it: does the pronoun follow?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from actlas.core.measurement import Measurement

if TYPE_CHECKING:
    from actlas.circuits.propagate import FeatureVector
    from actlas.core.model import Model
    from actlas.papers.reproductions.gendered_words import Labelled

SIZES = (2, 4, 8, 32)
TOLD = "I was told about {}"
SAID = "{} said that"


def error(model: Model, observable: Any, node: Any, seed: int) -> Measurement:
    """Compare the exact vector with autograd through the model's own norm, value map, output map and head."""
    from actlas.circuits.propagate import propagate
    from actlas.core.layout import find

    site, last = f"blocks.{node.block}.resid_pre", f"blocks.{(model.n_blocks or 1) - 1}.resid_post"
    trace = model.trace(SAID.format("Mary"), [site, last], stop=False)
    state, end = trace[site][0, 1], trace[last][0, -1]
    exact = propagate(model, observable, [node], at={site: state, last: end}).vector
    block, values = model.block(node.block), model.resolve(f"blocks.{node.block}.attn.v")[0]
    tower = model.tower
    assert tower is not None
    norm = find(model.module, model.resolve(f"blocks.{node.block}.attn_norm")[0].module)
    project, out = find(model.module, values.module), find(block, tower.out_proj)
    assert norm is not None and project is not None and out is not None
    head, final = model.unembed_module, model.final_norm_module
    assert head is not None and final is not None
    ids, coefficients = observable.ids(model)
    with torch.enable_grad():
        x = state.detach().clone().requires_grad_()
        v = values.read(project(norm(x)[None, None])).repeat_interleave(
            tower.heads // (tower.kv_heads or 1), 2
        )
        keep = torch.nn.functional.one_hot(torch.tensor(node.index), tower.heads).to(v)[:, None]
        moved = end.detach() + out((v * keep).flatten(2))[0, 0]
        moved = moved - (moved - end).detach()  # the value of the state, the gradient of the path
        value = (head(final(moved))[ids].double() * coefficients).sum()
        (expected,) = torch.autograd.grad(value, x)
    error = float((exact - expected).norm() / expected.norm())
    return Measurement(
        "error against autograd", error, "fraction", 1, group={"component": node.label},
        note="relative, at one token of one prompt, norms' gradients included",
    )  # fmt: skip


def on_prose(model: Model, other: Any, ranked: Sequence[Any], tokens: int, seed: int) -> list[Measurement]:
    """Compare norms' projections and couplings with prose tokens."""
    from actlas.circuits.coupling import coupling_agreement, measured_coupling
    from actlas.circuits.propagate import propagate
    from actlas.core.calibration.massive import massive_rows
    from actlas.core.intervals import bootstrap_mean
    from actlas.data import corpus

    sites = [f"blocks.{r.path[0].block}.resid_pre" for r in ranked]
    text = corpus("prose", seed=seed).characters(8 * tokens)
    ids = model.tokenizer("\n".join(d.text for d in text))["input_ids"][:tokens]
    windows = torch.tensor(ids)[: len(ids) // 128 * 128].unflatten(0, (-1, 128))
    trace = model.trace(
        {"input_ids": windows, "attention_mask": torch.ones_like(windows)}, sorted(set(sites))
    )
    couplings, cosines = [], []
    for path, site in zip(ranked, sites, strict=True):
        x = trace[site].flatten(0, 1).float()
        x = x[~massive_rows(x)].double()
        normed = x / x.square().mean(1, keepdim=True).sqrt()
        theirs = propagate(model, other, path.path).vector
        couplings.append(measured_coupling(path.feature, theirs, normed))
        along = torch.nn.functional.cosine_similarity(path.feature[None], x, dim=1)
        cosines.append(float((1 - along.square()).sqrt().mean()))
    low, high = bootstrap_mean(cosines, seed=seed)
    return [
        coupling_agreement(couplings, seed=seed),
        Measurement(
            "cosine with the norm's projection", sum(cosines) / len(cosines), "cosine", len(cosines), low,
            high, "bootstrap over heads", seed, note=f"{len(x)} prose tokens; each head's vector against its "
            "part across the state",
        ),
    ]  # fmt: skip


def low_data(
    model: Model,
    best: FeatureVector,
    taught: Labelled,
    test: Labelled,
    jobs: Labelled,
    draws: int,
    seed: int,
) -> list[Measurement]:
    """Compare the vector with probes and mean differences that were fitted on a few names."""
    import numpy as np

    from actlas.core.contrast import read_rows
    from actlas.core.intervals import bootstrap_statistic
    from actlas.core.probe_quality import auc

    everyone = [*taught, *test, *jobs]
    x = read_rows(model, [TOLD.format(w) for w, _ in everyone], best.site)[0][best.site].double().numpy()
    cut, end = len(taught), len(taught) + len(test)
    y = np.array([label for _, label in test])
    own = x[cut:end] @ best.vector.double().numpy()

    def of(scores: Sequence[Any], labels: Any, against: Any = None) -> Any:
        def statistic(counts: Any) -> Any:
            mean = np.mean([auc(labels, s, counts) for s in scores], 0)
            return mean if against is None else against(counts) - mean

        value = float(np.asarray(statistic(np.ones((1, len(labels)))))[0])
        return value, *bootstrap_statistic(statistic, len(labels), seed=seed)

    def said(name: str, found: Any, n: int, **group: str) -> Measurement:
        value, low, high = found
        return Measurement(
            name, value, "AUC", n, low, high, "bootstrap over words", seed, group=group, better="higher"
        )

    jobs_y = np.array([label for _, label in jobs])
    measured = [
        said("AUC", of([own], y), len(y), direction="observable", names="0"),
        said("AUC on jobs", of([x[end:] @ best.vector.double().numpy()], jobs_y), len(jobs), names="0"),
        said(
            "AUC",
            of([x[cut:end] @ best.random(s).vector.double().numpy() for s in range(8)], y),
            len(y),
            direction="random",
            names="0",
        ),
    ]
    draw = random.Random(f"observable names/{seed}")
    women, men = (list(range(k, cut, 2)) for k in (0, 1))
    for size in SIZES:
        by_method: dict[str, list[Any]] = {"logistic": [], "means": []}
        for _ in range(draws if size < cut else 1):
            chosen = [i for pool in (women, men) for i in draw.sample(pool, size // 2)]
            labels = np.array([taught[i][1] for i in chosen], dtype=np.float64)
            difference = x[chosen][labels == 1].mean(0) - x[chosen][labels == 0].mean(0)
            by_method["means"].append(x[cut:end] @ difference)
            by_method["logistic"].append(_logistic(x[chosen], labels, x[cut:end]))
        found = {name: of(scores, y) for name, scores in by_method.items()}
        measured += [said("AUC", f, len(y), direction=name, names=str(size)) for name, f in found.items()]
        better = max(found, key=lambda name: found[name][0])
        gap = of(by_method[better], y, lambda counts: auc(y, own, counts))
        measured.append(said("AUC above the better probe", gap, len(y), names=str(size), probe=better))
    return measured


def _logistic(x: Any, y: Any, test: Any) -> Any:
    """Return the scores of a logistic regression without scaling of channels, which few rows cannot give."""
    from sklearn.linear_model import LogisticRegression

    scale = float((x - x.mean(0)).std()) or 1.0
    fitted = LogisticRegression(max_iter=1000).fit(x / scale, y)
    return fitted.decision_function(test / scale)


def cause(
    model: Model, observable: Any, best: FeatureVector, people: Labelled, strength: float, seed: int
) -> list[Measurement]:
    """Add the vector, and random ones of its length, to the person's last token; see what she - he does."""
    import numpy as np

    from actlas.core.contrast import read_rows
    from actlas.core.edits import Add
    from actlas.core.intervals import bootstrap_mean

    texts = [SAID.format(w[0].upper() + w[1:]) for w, _ in people]
    place = -1 - len(model.tokenizer(" said that", add_special_tokens=False)["input_ids"])
    length = strength * read_rows(model, texts, best.site, position=place)[1][best.site]
    before = observable.value(model, texts)
    directions = {"observable": [best.unit], "random": [best.random(s).unit for s in range(3)]}
    share: dict[str, Any] = {}
    measured = []
    for name, units in directions.items():
        right, size = [], []
        for unit in units:
            for sign in (1.0, -1.0):
                edit = Add(best.site, sign * length * unit).at(positions=[place])
                with model.edit(edit):
                    change = (observable.value(model, texts) - before) * sign
                right.append((change > 0).double().numpy())
                size.append(change.numpy())
        per_prompt = np.mean(right, 0)
        share[name] = per_prompt
        for what, x, unit_name in (
            ("moved as foretold", per_prompt, "fraction"),
            ("change of she - he", np.mean(size, 0), "logits"),
        ):
            low, high = bootstrap_mean(x, seed=seed)
            measured.append(
                Measurement(
                    what, float(x.mean()), unit_name, len(x), low, high, "bootstrap over prompts", seed,
                    group={"direction": name}, note=f"{strength:g} of the median norm, both signs",
                )
            )  # fmt: skip
    gap = share["observable"] - share["random"]
    low, high = bootstrap_mean(gap, seed=seed)
    measured.append(
        Measurement(
            "moved as foretold, above random directions", float(gap.mean()), "fraction", len(gap), low, high,
            "bootstrap over prompts", seed,
        )
    )  # fmt: skip
    return measured
