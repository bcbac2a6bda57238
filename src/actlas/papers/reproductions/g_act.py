"""g-act: clustered steering directions and probes that go on learning, for C++ instead of Python.

Differences between "Write C++ code to ..." and "Write Python code to ..." at the opening code fence are
clustered at several layers of SmolLM2; a probe at each layer reads "Write code to ..." and chooses a cluster.
Two claims are tested apart: that probes choose better after going on learning from new prompts, and that a
chosen direction steers further than the one mean direction of the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.measurement import Measurement
from actlas.measure.answer_length import render_prompt
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.prompt_only import WISHES, Way, ask, in_words, said

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

SITE = "blocks.20.resid_post"
PROBED = tuple(f"blocks.{i}.resid_post" for i in (4, 8, 12, 16, 20, 24))
ALPHA = "0.3"
FENCE = "```"
SHARE, GAIN = "share of C and C++", "gain in the share of C and C++"
OVER_RANDOM = "clusters minus random directions"
BETTER, LEARNED = "clusters minus the mean direction", "accuracy gained by learning on"


def judge(m: Measured) -> list[Check]:
    """Central: at block 20 and a length of 0.3 of the median norm, the direction that the online probe
    chooses among 3 clusters raises the share of C and C++ (of what follows the fence: `c` and `cpp` against
    `python`) more than random directions of the same length do, and more than the mean direction of the
    same length does (paired intervals over prompts above 0; below 0 it fails); and, over six layers, the
    probes choose the nearest centroid of held-out prompts more often after one step of Adam for each new
    prompt than before (likewise). Also: the mean direction beats random ones, the flipped one does not raise
    the share, and the chosen direction beats one that is drawn among the clusters at random.
    """
    return [
        Check.above("clusters beat random directions", m.get(OVER_RANDOM, alpha=ALPHA), 0.0, central=True),
        Check.above("clusters beat the mean direction", m.get(BETTER, alpha=ALPHA), 0.0, central=True),
        Check.above("probes choose better after learning on", m.get(LEARNED), 0.0, central=True),
        Check.above(
            "the mean direction beats random ones", m.get("mean direction minus random", alpha=ALPHA), 0.0
        ),
        Check.below("the flipped direction does not raise it", m.get(GAIN, of="flipped", alpha=ALPHA), 0.01),
        Check.above(
            "the chosen cluster beats one at random", m.get("clusters minus random choice", alpha=ALPHA), 0.0
        ),
    ]


@reproduction(
    "g-act",
    claim="Small probes that choose among clustered steering directions, and go on learning, steer a model "
    "to another programming language further than one mean direction does.",
    judge=judge,
    quick={"fit": 24, "stream": 16, "test": 24, "k": 3, "alphas": (0.1, 0.2, 0.3), "draws": 2, "written": 6},
    full={
        "fit": 24,
        "stream": 16,
        "test": 24,
        "k": 3,
        "alphas": (0.1, 0.2, 0.3, 0.4),
        "draws": 8,
        "written": 24,
    },
)
def g_act(
    *, seed: int, fit: int, stream: int, test: int, k: int, alphas: Sequence[float], draws: int, written: int
) -> Findings:
    """Run it.

    Args:
        seed: of the order of the tasks, k-means, random directions and intervals.
        fit: tasks that directions and probes are fitted on.
        stream: further tasks that the probes learn on from.
        test: tasks to measure on.
        k: clusters.
        alphas: lengths of what is added, in median residual norms.
        draws: random directions, and random choices of a cluster.
        written: test tasks for which 24 tokens are written out, with and without steering.
    """
    from actlas.core.contrast import Contrast
    from actlas.models import load
    from actlas.steering.cluster_fit import cluster_directions

    model = load("smollm2")
    tasks = _tasks(seed)[: fit + stream + test]
    sides = {w: [_prompt(model, w, t) for t in tasks] for w in ("C++ code", "Python code", "code")}

    def part(start: int, stop: int) -> tuple[Contrast, list[str]]:
        pairs = Contrast(tuple(sides["C++ code"][start:stop]), tuple(sides["Python code"][start:stop]))
        return pairs, sides["code"][start:stop]

    (fitted, asked), (streamed, more), (tested, held) = (
        part(0, fit), part(fit, fit + stream), part(fit + stream, fit + stream + test)
    )  # fmt: skip
    found = cluster_directions(model, fitted, PROBED, k=k, prompts=asked, seed=seed)
    online = found.observe(model, streamed, more, lr=0.01)
    measured = _probes(model, found, online, tested, held, seed)
    one = cluster_directions(model, fitted, SITE, k=1, prompts=asked, seed=seed)
    runner = _Shares(model, held, seed)
    for alpha in alphas:
        measured += _steering(runner, found, online, one, alpha, draws, seed)
    measured.append(_likeness(model, fitted, seed))
    measured += _asked(model, runner, tasks[fit + stream :][:test], online, seed)
    if written:
        measured += _written(model, held[:written], online.steer, seed)
    m = Measured(measured)
    return Findings(measured, _headline(m), f"{NOTE} {said(measured)}", [_plot(measured)])


NOTE = (
    "Published: Llama-3.2-3B and 3.3-70B; probe accuracy +15% on average and +61.5% in layers 0 to 6 over "
    "directions without learning on. The paper's text was not at hand: what the probes are told (here the "
    "nearest centroid of the measured difference, never their own choice), the length of a direction and the "
    "updates (here Adam, one step a prompt, rate 0.01) are our reading. Ours: SmolLM2-135M, one layer "
    "steered, all tokens, the choice held from the prompt on. Tried before: 12 of the 64 tasks, layers 10, "
    "15, 20 and 24, lengths 0.1 to 0.8, with the mean direction only; layer and length were fixed then (at "
    "block 24 the mean direction already does nearly everything, above 0.5 the model breaks). Where single "
    "differences are nearly parallel (see the cosine), one direction is all there is to find."
)


def _tasks(seed: int) -> list[str]:
    import random

    from actlas.papers.reproductions.gate_prompts import CODE_TASKS

    return random.Random(f"g-act/{seed}").sample(CODE_TASKS, len(CODE_TASKS))


def _prompt(model: Model, what: str, task: str) -> str:
    return render_prompt(model, f"Write {what} to {task}.") + FENCE


class _Shares:
    """What follows the fence, under one edit after the other; blocks up to the site are run once."""

    def __init__(self, model: Model, prompts: Sequence[str], seed: int) -> None:
        from actlas.core.splitting import split_at

        assert model.tokenizer is not None
        self.model, self.seed = model, seed
        head, self._tail = split_at(model, SITE)
        self._state = head(list(prompts))
        mask = self._state.encoded["attention_mask"]
        self._last = mask.sum(1) - 1
        self._c = [model.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("c", "cpp")]
        self._python = model.tokenizer("python", add_special_tokens=False)["input_ids"][0]
        self.base, self.base_mass = self.under(None)

    def under(self, edit: Edit | None) -> tuple[Tensor, Tensor]:
        """Return P(C or C++) over that and P(python), and all three together, each float64 `[n]`."""
        from contextlib import nullcontext

        with nullcontext() if edit is None else self.model.edit(edit):
            logits = self._tail(self._state).logits
        p = torch.softmax(logits[torch.arange(len(self._last)), self._last].double(), -1)
        ours, python = p[:, self._c].sum(1), p[:, self._python]
        return ours / (ours + python), ours + python


def _steering(
    runner: _Shares, found: Any, online: Any, one: Any, alpha: float, draws: int, seed: int
) -> list[Measurement]:
    from dataclasses import replace

    from actlas.core.edits import Add
    from actlas.measure.samples import mean_measurement
    from actlas.steering.clusters import ClusterSteer

    reference, at = one.references[SITE], {"alpha": f"{alpha:g}"}
    mean = one.centroids[SITE][0]
    unit = mean / mean.norm() * reference

    shares: dict[str, Tensor] = {}
    masses: dict[str, Tensor] = {}

    def run(name: str, edit: Edit) -> None:
        shares[name], masses[name] = runner.under(edit)

    run("mean direction", Add(SITE, unit) * alpha)
    run("flipped", Add(SITE, unit) * -alpha)
    run("clusters, probe fitted", _only(found.steer(alpha)))
    run("clusters, probe online", _only(online.steer(alpha)))
    run("clusters, mixed", _only(online.steer(alpha, soft=True)))
    generator = torch.Generator().manual_seed(seed)
    for draw in range(draws):
        drawn = torch.randn(len(unit), generator=generator)
        run(f"random {draw}", Add(SITE, drawn / drawn.norm() * reference) * alpha)
        chosen = _only(online.steer(alpha))
        assert isinstance(chosen, ClusterSteer)
        gate = chosen.gate
        arbitrary = replace(gate, weight=50 * torch.randn(gate.weight.shape, generator=generator))
        run(f"random choice {draw}", replace(chosen, gate=arbitrary))
    for kind in ("random", "random choice"):
        names = [f"{kind} {d}" for d in range(draws)]
        shares[kind] = torch.stack([shares.pop(n) for n in names]).mean(0)
        masses[kind] = torch.stack([masses.pop(n) for n in names]).mean(0)
    out = []
    for name, share in shares.items():
        gain = (share - runner.base).numpy()
        out.append(
            mean_measurement(
                GAIN, "fraction", gain, seed=seed, over="prompts", group={"of": name, **at}, better="higher",
                details={"share": float(share.mean()), "base share": float(runner.base.mean()),
                         "mass on python, c and cpp": float(masses[name].mean())},
            )
        )  # fmt: skip
    pairs = (
        (BETTER, "clusters, probe online", "mean direction"),
        (OVER_RANDOM, "clusters, probe online", "random"),
        ("mean direction minus random", "mean direction", "random"),
        ("clusters minus random choice", "clusters, probe online", "random choice"),
    )
    for name, more, less in pairs:
        difference = (shares[more] - shares[less]).numpy()
        out.append(mean_measurement(name, "fraction", difference, seed=seed, over="prompts", group=at))
    return out


def _asked(model: Model, runner: _Shares, tasks: Sequence[str], online: Any, seed: int) -> list[Measurement]:
    """Return the share of C and C++ when the model is asked for C++, and the chosen cluster's minus that."""
    own, _ = runner.under(_only(online.steer(float(ALPHA))))
    questions: dict[Way, list[str]] = {
        "system prompt": [ask(model, f"Write code to {t}.", WISHES["g-act"], "system prompt") for t in tasks],
        "question": [render_prompt(model, f"Write C++ code to {t}.") for t in tasks],
    }
    out = []
    for way, prompts in questions.items():
        words = _Shares(model, [p + FENCE for p in prompts], seed).base
        out += in_words(SHARE, "fraction", own, words, asked=way, seed=seed, over="prompts", alpha=ALPHA)
    return out


def _only(edit: Edit) -> Edit:
    """Return the part of a clustered edit that acts at `SITE`."""
    from actlas.steering.clusters import ClusterSteer

    return next(p for p in edit.parts() if isinstance(p, ClusterSteer) and p.site == SITE)


def _probes(
    model: Model, found: Any, online: Any, tested: Any, held: list[str], seed: int
) -> list[Measurement]:
    from actlas.measure.samples import mean_measurement

    before, after = found.hits(model, tested, held), online.hits(model, tested, held)
    out = []
    for site in PROBED:
        for name, hits in (("probe fitted", before), ("probe online", after)):
            out.append(
                mean_measurement(
                    "choice accuracy", "fraction", hits[site].double().numpy(), seed=seed, over="prompts",
                    group={"site": site, "gate": name}, better="higher",
                    details={"cluster sizes": list(found.sizes[site]),
                             "always the largest": max(found.sizes[site]) / sum(found.sizes[site])},
                )
            )  # fmt: skip
    gained = torch.stack([after[s].double() - before[s].double() for s in PROBED]).mean(0)
    said = "mean over six layers, paired"
    return [*out, mean_measurement(LEARNED, "fraction", gained.numpy(), seed=seed, over="prompts", note=said)]


def _likeness(model: Model, fitted: Any, seed: int) -> Measurement:
    from actlas.core.contrast import read_contrast
    from actlas.measure.samples import mean_measurement
    from actlas.steering.cluster_fit import likeness

    rows = read_contrast(model, fitted, SITE)[SITE].difference
    return mean_measurement(
        "cosine with the mean difference", "cosine", likeness(rows).numpy(), seed=seed, over="pairs"
    )


def _written(model: Model, prompts: list[str], steer: Any, seed: int) -> list[Measurement]:
    """Write code with and without steering, and count what looks like C or C++ and what parses as Python."""
    from actlas.measure.samples import rate_measurement

    edit = _only(steer(float(ALPHA)))
    out = []
    for name, edits in (("none", ()), ("clusters, probe online", (edit,))):
        with model.edit(*edits):
            texts = model.generate(prompts, max_new_tokens=24).texts
        hits = [_like_c(t) for t in texts]
        out.append(
            rate_measurement(
                "written like C or C++", hits, seed=seed, group={"of": name}, details={"texts": texts[:4]}
            )
        )
    return out


def _like_c(text: str) -> bool:
    """Say whether a text has C's marks (`#include`, `std::`, a type before a name and brackets, `;` at the
    end of a line) and none of Python's (`def`, `import`, `print(` without `;`)."""
    import re

    body = text.split("\n", 1)[1] if "\n" in text else text
    c = re.search(r"#include|std::|\b(int|void|double|float|string)\s+\w+\s*\(|;\s*$", body, re.M)
    python = re.search(r"^\s*(def |import |from \w+ import )", body, re.M)
    return c is not None and python is None


def _headline(m: Measured) -> str:
    said = []
    for of in ("mean direction", "clusters, probe online", "random"):
        gain = m.get(GAIN, of=of, alpha=ALPHA)
        if gain is not None:
            said.append(f"{of} {gain.value:+.2f}")
    learned, alike = m.get(LEARNED), m.get("cosine with the mean difference")
    tail = "" if learned is None else f"; learning on changes the probes' accuracy by {learned.value:+.2f}"
    tail += "" if alike is None else f"; single differences have cosine {alike.value:.2f} with their mean"
    return f"share of C and C++: {', '.join(said)}{tail}"


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows = [
        {"length": float(x.group["alpha"]), "gain": x.value, "direction": x.group["of"]}
        for x in measured
        if x.name == GAIN
    ]
    return Plot("What steering does to the share of C and C++", rows, "length", "gain", "direction")
