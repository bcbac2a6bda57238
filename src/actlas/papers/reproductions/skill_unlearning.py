"""skill-unlearning: refuse inside the hypercube of a skill's keys, and adjust a skill's MLP neurons.

Two methods are tested apart on SmolLM2. Key space detection: a hypercube around the keys of one skill's
queries (sums, programming, capitals) should hold that skill's queries also in templates that it has not
seen, and no others; what it holds is refused, so the skill falls by as much as is detected. Neuron
adjustment: text of solved sums should become less likely while code and prose do not, more so than when the
same neurons are set to 0 or other neurons are adjusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.prompt_only import LINE, in_words, said
from actlas.papers.reproductions.unlearning_in_words import refused_in_words, texts_in_words

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.steering.hypercube import HyperBox

LAST = "blocks.29.mlp.act"
CUBES = (0.8, 1.0, 1.4, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
HELD, NEW = "held-out queries", "held-out templates"
BEST = "detection in held-out templates at the best multiplier"
GAP = "rise of the loss on sums minus on the rest"


def judge(m: Measured) -> list[Check]:
    """Central: at the last block, over three skills, some multiplier c of at most 12 gives less than 10%
    false alarms on the other skills' queries and detects more than 80% of queries in templates that the box
    has not seen (whole interval above 0.8; below it fails); and adjusting neurons raises the loss on solved
    sums more than on code and prose (interval of the difference above 0; below 0 it fails). Also: so does
    the c that is chosen on held-out queries of known templates (detection in new templates above 0.8, false
    alarms below 0.1); a box around random queries detects less; adjusting neurons has a larger such
    difference than setting the same neurons to 0, and than adjusting as many random neurons; the installed
    edit refuses what the box holds and leaves every other answer as it was.
    """
    detected, alarms = (
        m.get("detection", gate="box, all skills"),
        m.get("false alarms", gate="box, all skills"),
    )
    random = m.get("box detection minus random box", on=NEW)
    return [
        Check.above("some box detects the skill in new templates", m.get(BEST), 0.8, central=True),
        Check.above("adjusting neurons forgets sums more than the rest", m.get(GAP, of="adjust"), 0.0,
                    central=True),
        Check.above("the chosen box detects the skill in new templates", detected, 0.8),
        Check.below("and seldom anything else", alarms, 0.1),
        Check.above("a box around random queries detects less", random, 0.0),
        Check.above("adjusting is more selective than pruning", m.get(GAP, of="adjust minus prune"), 0.0),
        Check.above("and than adjusting random neurons", m.get(GAP, of="adjust minus random"), 0.0),
        Check.above("the edit refuses what the box holds", m.get("answers as the gate says"), 0.7),
    ]  # fmt: skip


@reproduction(
    "skill-unlearning",
    claim="Refusing queries whose MLP keys lie in a skill's hypercube, or remapping the skill's MLP neurons, "
    "takes away one skill and leaves the others.",
    judge=judge,
    quick={"fit": 30, "test": 24, "layers": (9, 19, 29), "top": 0.03, "texts": 6, "length": 96, "asked": 4},
    full={"fit": 60, "test": 60, "layers": (4, 9, 14, 19, 24, 29), "top": 0.03, "texts": 24, "length": 256,
          "asked": 12},
)  # fmt: skip
def skill_unlearning(
    *, seed: int, fit: int, test: int, layers: Sequence[int], top: float, texts: int, length: int, asked: int
) -> Findings:
    """Run it.

    Args:
        seed: of queries, texts, random boxes and neurons, and intervals.
        fit: queries of each skill that a box is fitted on; half as many more choose its multiplier.
        test: queries of each skill, of known and of new templates each, to measure on.
        layers: blocks whose keys are tried, the last one among them.
        top: share of the neurons that is adjusted.
        texts: texts of each kind (sums, code, prose) to fit on, and as many to measure on.
        length: tokens of each.
        asked: queries of each skill that are answered under the edit.
    """
    from actlas.models import load

    model = load("smollm2")
    queries = Queries(model, fit, test, tuple(f"blocks.{i}.mlp.act" for i in layers), seed)
    measured = _boxes(queries, seed)
    measured.append(_answers(model, queries, asked))
    measured += _neurons(model, top, texts, length, seed)
    measured += refused_in_words(model, queries, 2 * asked, seed)
    return Findings(measured, _headline(Measured(measured)), f"{NOTE} {said(measured)}", [_plot(measured)])


NOTE = (
    "Published: detection removes over 80% of a skill and under 10% of others for most tasks on 2B to 70B "
    "models; neuron adjustment does less, and both do more than pruning. Official code: the spread of the "
    "running statistics is the variance and not its root, and one random number serves a whole row; here it "
    "is as the paper says. A refusal counts as a lost answer, so the fall of a skill is what the box "
    "detects. It is abstention and not unlearning: the weights keep the skill. Queries come from templates, "
    "so what counts is the templates that the box has not seen. Queries are read in the chat template, at "
    "its last token, where the gate decides. Tried before, on other queries: boxes of 40 of known templates "
    "(in the card); 12 of each skill without the chat template, c up to 2 (no box reached new templates); 16 "
    "with it, c up to 6 (several wanted a larger one, since c counts in units of a reach that is small for "
    "few queries). And on 2 short texts a kind: adjusting the first token of a text too, which the paper "
    "does not exclude, cost code and prose as much as sums or more ('adjust, first token too' shows it here "
    "on the same neurons); leaving it out is ours. The neurons are adjusted at `mlp.act` of all blocks, 3% "
    "of them, the paper's share for mathematics."
)


class Queries:
    """Keys of three skills' queries at some sites: to fit, to choose c, to test, in new templates."""

    def __init__(self, model: Model, fit: int, test: int, sites: tuple[str, ...], seed: int) -> None:
        from actlas.core.contrast import read_rows
        from actlas.measure.answer_length import render_prompt
        from actlas.papers.reproductions.gate_prompts import SKILLS, skill

        self.sites, self.skills, self.fit = sites, SKILLS, fit
        self.texts: dict[tuple[str, str], list[str]] = {}
        for name in SKILLS:
            known = skill(name, fit + fit // 2 + test, seed)
            self.texts[name, "fit"] = known[:fit]
            self.texts[name, "choose"] = known[fit : fit + fit // 2]
            self.texts[name, HELD] = known[fit + fit // 2 :]
            self.texts[name, NEW] = skill(name, test, seed, held_out=True)
        self.last = LAST
        self.new = {name: self.texts[name, NEW] for name in SKILLS}
        self.texts = {k: [render_prompt(model, q) for q in own] for k, own in self.texts.items()}
        flat = [t for part in self.texts.values() for t in part]
        read, _ = read_rows(model, flat, sites)
        self.rows: dict[tuple[str, str, str], Tensor] = {}
        start = 0
        for (name, part), own in self.texts.items():
            for site in sites:
                self.rows[name, part, site] = read[site][start : start + len(own)]
            start += len(own)

    def others(self, name: str, part: str, site: str) -> Tensor:
        """Return the other skills' rows of a part."""
        return torch.cat([self.rows[s, part, site] for s in self.skills if s != name])

    def box(self, name: str) -> HyperBox:
        """Return the box of a skill at the last block, with the multiplier that held-out queries choose."""
        from actlas.steering.hypercube import HyperBox, best_multiplier

        choose = torch.cat([self.rows[name, "choose", LAST], self.others(name, "choose", LAST)])
        y = (torch.arange(len(choose)) < len(self.rows[name, "choose", LAST])).float()
        box = HyperBox.of(LAST, self.rows[name, "fit", LAST])
        return box.widened(best_multiplier(box, choose, y))


def _boxes(queries: Queries, seed: int) -> list[Measurement]:
    from actlas.measure.samples import mean_measurement, rate_measurement
    from actlas.steering.hypercube import HyperBox, best_multiplier

    out: list[Measurement] = []
    generator = np.random.default_rng(seed)
    chosen: dict[str, list[np.ndarray[Any, Any]]] = {NEW: [], HELD: [], "alarms": [], "random": []}
    grid: dict[float, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {c: [] for c in CUBES}
    for site in queries.sites:
        for name in queries.skills:
            box = HyperBox.of(site, queries.rows[name, "fit", site])
            choose = torch.cat([queries.rows[name, "choose", site], queries.others(name, "choose", site)])
            y = (torch.arange(len(choose)) < len(queries.rows[name, "choose", site])).float()
            auto = box.widened(best_multiplier(box, choose, y))
            false = torch.cat([queries.others(name, p, site) for p in (HELD, NEW)])
            for part in (HELD, NEW):
                hits = auto.inside(queries.rows[name, part, site]).numpy()
                group = {"skill": name, "site": site, "on": part}
                out.append(rate_measurement("detection", hits, group=group, details={"c": auto.multiplier}))
            alarms = auto.inside(false).numpy()
            out.append(rate_measurement("false alarms", alarms, group={"skill": name, "site": site}))
            if site != LAST:
                continue
            pool = torch.cat([queries.rows[s, "fit", site] for s in queries.skills])
            drawn = HyperBox.of(site, pool[generator.permutation(len(pool))[: queries.fit]])
            drawn = drawn.widened(best_multiplier(drawn, choose, y))
            for part in (HELD, NEW):
                chosen[part].append(auto.inside(queries.rows[name, part, site]).numpy())
            chosen["random"].append(drawn.inside(queries.rows[name, NEW, site]).numpy())
            chosen["alarms"].append(alarms)
            for c in CUBES:
                wide = box.widened(c)
                grid[c].append(
                    (wide.inside(queries.rows[name, NEW, site]).numpy(), wide.inside(false).numpy())
                )
    everywhere = {"gate": "box, all skills", "site": LAST}
    out.append(
        rate_measurement("detection", np.concatenate(chosen[NEW]), group={**everywhere, "templates": NEW})
    )
    known = rate_measurement("detection, known templates", np.concatenate(chosen[HELD]), group=everywhere)
    out += [known, rate_measurement("false alarms", np.concatenate(chosen["alarms"]), group=everywhere)]
    gap = np.concatenate(chosen[NEW]).astype(float) - np.concatenate(chosen["random"])
    out.append(
        mean_measurement(
            "box detection minus random box", "fraction", gap, seed=seed, over="queries", group={"on": NEW}
        )
    )
    return out + _grid(grid)


def _grid(grid: Mapping[float, list[tuple[Any, Any]]]) -> list[Measurement]:
    """Return detection and false alarms by multiplier, all skills together, and the best one's detection."""
    from actlas.measure.samples import missing, rate_measurement

    out, best = [], None
    for c, found in grid.items():
        hits, alarms = (np.concatenate([f[i] for f in found]) for i in (0, 1))
        group = {"multiplier": f"{c:g}", "site": LAST}
        detection = rate_measurement("detection by multiplier", hits, group=group)
        out += [detection, rate_measurement("false alarms by multiplier", alarms, group=group)]
        if alarms.mean() < 0.1 and (best is None or hits.mean() > best[1].mean()):
            best = (c, hits)
    if best is None:
        return [*out, missing(BEST, "fraction", "every multiplier has 10% false alarms or more")]
    note = f"c = {best[0]:g}, chosen with hindsight: the largest detection with under 10% false alarms"
    return [*out, rate_measurement(BEST, best[1], note=note)]


def _answers(model: Model, queries: Queries, asked: int) -> Measurement:
    """Ask under the edit that refuses sums: refused must be what the box holds, and nothing else changed."""
    from actlas.measure.samples import rate_measurement
    from actlas.steering.abstain import Abstain

    message, box = "I cannot answer that.", queries.box(queries.skills[0])
    texts = [t for s in queries.skills for t in queries.texts[s, NEW][:asked]]
    inside = torch.cat([box.inside(queries.rows[s, NEW, LAST][:asked]) for s in queries.skills]).tolist()
    base = model.generate(texts, max_new_tokens=8).texts
    with model.edit(Abstain.say(model, message).guarded(box)):
        said = model.generate(texts, max_new_tokens=8).texts
    right = [s == message if i else s == b for s, b, i in zip(said, base, inside, strict=True)]
    return rate_measurement("answers as the gate says", right, note=f"{sum(inside)} of {len(texts)} refused")


def _neurons(model: Model, top: float, count: int, length: int, seed: int) -> list[Measurement]:
    from actlas.measure.likelihood import nll
    from actlas.steering.neuron_adjust import NeuronMoments

    kinds = _texts(model, 2 * count, length, seed)
    fit = {k: t[:count] for k, t in kinds.items()}
    moments = NeuronMoments.of(model, fit["sums"], fit["code"] + fit["prose"])
    neurons, drawn = moments.top(top), moments.random(top, seed)
    edits: dict[str, Edit] = {
        "adjust": moments.adjust(neurons, seed),
        "prune": moments.prune(neurons),
        "random": moments.adjust(drawn, seed),
        "prune random": moments.prune(drawn),
        "adjust, first token too": moments.adjust(neurons, seed, first=True),
    }
    base = {k: nll(model, t[count:], context=length) for k, t in kinds.items()}
    per_text: dict[str, dict[str, Any]] = {}
    out = []
    for name, edit in edits.items():
        with model.edit(edit):
            found = {k: nll(model, t[count:], context=length) for k, t in kinds.items()}
        per_text[name] = {k: (found[k].nll - base[k].nll) / base[k].tokens for k in kinds}
        out += [_rise(per_text[name][k], name, k, base[k], seed) for k in kinds]
    told = texts_in_words(model, {k: t[count:] for k, t in kinds.items()}, base)
    for k in kinds:
        out += in_words(
            "rise of the loss", "nats/token", per_text["adjust"][k], told[k], asked=LINE, seed=seed,
            over="texts", on=k,
        )  # fmt: skip
    rises = {n: (p["sums"], np.concatenate([p["code"], p["prose"]])) for n, p in per_text.items()}
    for name, rise in rises.items():
        out.append(_gap(rise[0], rise[1], name, seed))
    for other in ("prune", "random"):
        sums, rest = (rises["adjust"][i] - rises[other][i] for i in (0, 1))
        out.append(_gap(sums, rest, f"adjust minus {other}", seed))
    return out


def _rise(values: Any, name: str, kind: str, base: Any, seed: int) -> Measurement:
    from actlas.measure.samples import mean_measurement

    return mean_measurement(
        "rise of the loss", "nats/token", values, seed=seed, over="texts", group={"of": name, "on": kind},
        details={"loss before": float(base.nll.sum() / base.tokens.sum())},
    )  # fmt: skip


def _gap(sums: Any, rest: Any, name: str, seed: int) -> Measurement:
    """Return the mean over sums less the mean over the rest, both resampled."""
    from actlas.core.intervals import percentiles, resample_counts

    draws = []
    for values, own in ((sums, seed), (rest, seed + 1)):
        counts = np.concatenate(list(resample_counts(len(values), 1000, own)))
        draws.append(counts @ values / len(values))
    low, high = percentiles(draws[0] - draws[1], min(len(sums), len(rest)))
    value = float(np.mean(sums) - np.mean(rest))
    return Measurement(
        GAP, value, "nats/token", len(sums) + len(rest), low, high, "bootstrap over texts", seed,
        group={"of": name},
    )  # fmt: skip


def _texts(model: Model, count: int, length: int, seed: int) -> dict[str, list[str]]:
    """Return texts of solved sums, of Python source and of prose, each cut to `length` tokens."""
    from itertools import islice

    from actlas.data import corpus
    from actlas.papers.reproductions.gate_prompts import sums

    assert model.tokenizer is not None
    lines = sums(3 * count * max(1, length // 96), seed)
    per = len(lines) // count
    found = {"sums": ["\n".join(lines[i * per : (i + 1) * per]) for i in range(count)]}
    for kind in ("code", "prose"):
        long = (d.text for d in corpus(kind, seed=seed) if len(d.text) > 8 * length)
        found[kind] = list(islice(long, count))

    def cut(text: str) -> str:
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length]
        return str(model.tokenizer.decode(ids))

    return {kind: [cut(t) for t in own] for kind, own in found.items()}


def _headline(m: Measured) -> str:
    detected, alarms = (
        m.get("detection", gate="box, all skills"),
        m.get("false alarms", gate="box, all skills"),
    )
    adjust, prune = m.get(GAP, of="adjust"), m.get(GAP, of="prune")
    assert detected is not None and alarms is not None and adjust is not None and prune is not None
    return (
        f"a box detects {detected.value:.0%} of a skill in new templates with {alarms.value:.1%} false "
        f"alarms; adjusting neurons raises the loss on sums by {adjust.value:+.2f} nats a token more than on "
        f"the rest, pruning them by {prune.value:+.2f}"
    )


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows = [
        {
            "multiplier": float(x.group["multiplier"]),
            "share": x.value,
            "of": x.name.removesuffix(" by multiplier"),
        }
        for x in measured
        if x.name.endswith(" by multiplier")
    ]
    return Plot("What lies in the box of a skill, by its multiplier", rows, "multiplier", "share", "of")
