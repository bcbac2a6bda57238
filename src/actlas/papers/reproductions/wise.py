"""wise: counterfactual capitals, written one after the other into a side copy of one MLP matrix of SmolLM2.

Wang et al. 2024, "WISE". Beside WISE with one and with several shards stand: fine-tuning of the same matrix,
ROME, WISE's side memory without its router, a random side memory of equal norm behind the same kind of
router, and the unedited model. All write the same facts in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.prompt_only import WISHES, before, in_words, said
from actlas.papers.reproductions.wise_facts import counterfactuals, openings

if TYPE_CHECKING:
    from actlas.core.model import Model

FACTS = "facts said: WISE minus a random side memory"
LOCAL = "unrelated prompts kept: WISE minus fine-tuning"
ROUTED = "unrelated prompts kept: with the router minus without"
SHARDED = "surprise at the facts: several shards minus one"
AUC = "router: facts and paraphrases against unrelated prompts"


def judge(m: Measured) -> list[Check]:
    """Central, by paired 95% intervals above 0 after the last fact: WISE (several shards) says more of
    its facts than a random side memory of equal norm behind the same kind of router; it leaves more
    unrelated prompts as they were than fine-tuning of the same matrix; and several shards hold the facts
    better than one shard: the targets' surprise is lower, by an interval below 0 (open if it covers 0).
    Also: the router keeps more unrelated prompts than the same side memory without it; its reaction tells
    facts and paraphrases from unrelated prompts, with an AUC interval above 0.8; at least 0.9 of
    unrelated prompts are kept; and the first fact is said right after it was written.
    """
    first = m.get("reliability", editor="WISE, several shards", facts="1")
    kept = m.get("locality", editor="WISE, several shards")
    return [
        Check.above("WISE says its facts", m.get(FACTS), 0.0, central=True),
        Check.above("WISE keeps more than fine-tuning", m.get(LOCAL), 0.0, central=True),
        Check.below("shards help", m.get(SHARDED), 0.0, central=True),
        Check.above("the router protects unrelated prompts", m.get(ROUTED), 0.0),
        Check.above("the router knows its facts", m.get(AUC, editor="WISE, several shards"), 0.8),
        Check(
            "unrelated prompts stay as they were",
            None if kept is None else kept.value >= 0.9,
            "not measured" if kept is None else f"{kept}; wanted at least 0.9",
        ),
        Check(
            "the first fact is said",
            None if first is None else first.value == 1.0,
            "not measured" if first is None else f"{first}",
        ),
    ]


@reproduction(
    "wise",
    claim="A routed side copy of one MLP matrix, written shard by shard, keeps edited facts and leaves "
    "unrelated prompts alone, where fine-tuning the matrix does not.",
    judge=judge,
    quick={
        "facts": 8,
        "shards": (1, 2),
        "steps": 16,
        "contexts": 1,
        "locality": 20,
        "block": 25,
        "rome_steps": 8,
        "at": (1,),
        "neighbours": 0,
        "retrieve": False,
    },
    full={
        "facts": 20,
        "shards": (1, 2, 4),
        "steps": 40,
        "contexts": 3,
        "locality": 40,
        "block": 25,
        "rome_steps": 20,
        "at": (1, 5, 10),
        "neighbours": 12,
        "retrieve": True,
    },
)
def wise(
    *,
    seed: int,
    facts: int,
    shards: Sequence[int],
    steps: int,
    contexts: int,
    locality: int,
    block: int,
    rome_steps: int,
    at: Sequence[int],
    neighbours: int,
    retrieve: bool,
) -> Findings:
    """Run it.

    Args:
        seed: of facts, masks, contexts and bootstraps.
        facts: how many counterfactual capitals are written, one after the other.
        shards: into how many shards they are dealt; one WISE editor for each. The last counts as "several".
        steps, contexts: of WISE and of fine-tuning.
        locality: unrelated prompts.
        block: whose MLP output matrix is edited by WISE and fine-tuning.
        rome_steps: steps of ROME's value; 0 leaves ROME out.
        at: after how many facts to measure on the way.
        neighbours: capitals of other countries that should stay as well; 0 leaves them out.
        retrieve: also WISE in retrieve mode, with as many memories as there were shards at the most.
    """
    from actlas.measure.editing import clean_outputs, editing_measurements
    from actlas.models import load
    from actlas.steering.edit_tuning import TuningEditor
    from actlas.steering.editing import edit_stream
    from actlas.steering.rome import RomeEditor
    from actlas.steering.wise import WiseEditor, WiseSettings

    model = load("smollm2")
    requests = counterfactuals(model, facts, seed, locality=locality)
    clean = clean_outputs(model, requests, tokens=3)
    irrelevant = openings(8, seed + 100)
    where = min(block, (model.n_blocks or 1) - 1)
    editors: dict[str, Any] = {}
    for k in shards:
        sizes = WiseSettings(save_freq=-(-facts // k), steps=steps, contexts=contexts, seed=seed)
        editors[_name(k, shards)] = WiseEditor(model, where, irrelevant=irrelevant, settings=sizes)
    if retrieve:
        sizes = replace(sizes, mode="retrieve")
        editors["WISE, retrieve"] = WiseEditor(model, where, irrelevant=irrelevant, settings=sizes)
    editors["fine-tuning"] = TuningEditor(model, where, steps=steps, contexts=contexts, seed=seed)
    if rome_steps:
        more: dict[str, Any] = {} if contexts > 1 else {"contexts": 0, "kl": 0.0, "lr": 1.0}
        editors["ROME"] = RomeEditor(model, steps=rome_steps, seed=seed, **more)
    measured = [x.with_group(editor="none", facts="0") for x in editing_measurements(model, requests, clean)]
    last: dict[str, list[Measurement]] = {"none": measured[:]}
    made: dict[str, Any] = {}
    for name, editor in editors.items():
        made[name], found = edit_stream(
            model, editor, requests, at=[k for k in at if k < facts], clean=clean, name=name, seed=seed
        )
        measured += found
        last[name] = [x for x in found if x.group["facts"] == str(facts)]
    best = _name(shards[-1], shards)
    controls = {
        f"{best}, no router": replace(made[best], route=False),
        "random side memory": _random(model, made[best], requests, seed),
    }
    for name, edit in controls.items():
        with model.edit(edit):
            found = editing_measurements(model, requests, clean, seed=seed)
        last[name] = [x.with_group(editor=name, facts=str(facts)) for x in found]
        measured += last[name]
    measured += [
        _gap(FACTS, "reliability", last["random side memory"], last[best], seed),
        _gap(LOCAL, "locality", last["fine-tuning"], last[best], seed),
        _gap(ROUTED, "locality", last[f"{best}, no router"], last[best], seed),
    ]
    if len(shards) > 1:
        measured.append(_gap(SHARDED, "target-nll", last[_name(shards[0], shards)], last[best], seed))
    measured += [
        _router(model, made[best], requests, best, seed),
        _router(model, controls["random side memory"], requests, "random side memory", seed),
    ]
    measured += _told(model, requests, clean, last[best], seed)
    if neighbours:
        measured += _neighbours(model, {**made, **controls}, facts, seed, neighbours)
    reached = {n: {x.name: x.value for x in found} for n, found in last.items()}
    parts = [
        f"{n}: {v['reliability']:.2f} / {v['generality']:.2f} / {v['locality']:.2f}"
        for n, v in reached.items()
    ]
    rows = [
        {"facts": int(x.group["facts"]), "share": x.value, "editor": x.group["editor"]}
        for x in measured
        if x.name == "reliability" and x.group.get("facts", "0") != "0"
    ]
    return Findings(
        measured,
        headline=f"reliability / generality / locality after {facts} facts: {'; '.join(parts)}",
        note=f"{NOTE} {said(measured)}",
        plots=[Plot("Facts that are still said", rows, "facts", "share", "editor", "point")],
    )


NOTE = (
    "Published (Llama-2-7B, ZsRE, from memory): reliability 0.77, generality 0.72, locality 1.00 after "
    "1000 facts, 0.98 / 0.92 / 1.00 after one. Ours: SmolLM2-135M, counterfactual capitals in one "
    "template, whole greedy answers, block 25 of 30; SGD at rate 1.0, mask density 0.2, threshold at 0.88 "
    "of the least reaction and TIES density 0.53 as released; margins in proportion to the activations "
    "(released ones are for Llama-2). The router judges each row, padding does not count, and it holds "
    "its decision while generating; the released code judges a batch at once. ROME edits block 12, with "
    "contexts and the KL term in full mode only. Tried before the stored run, on the same seed with 3 to "
    "8 facts: rates 0.3 (facts not learned in 15 steps), 1 and 2; blocks 25 and 27 (27 reacts to every "
    "prompt's first token, whose activation is massive there); stops at 0.05 and 0.1; thresholds at 0.5 "
    "of the least reaction (which let unrelated prompts through). Prompts of one template differ little "
    "at this matrix, so facts overwrite each other, and capitals of countries that were not edited are "
    "routed to the side memory as well (neighbours, full mode)."
)


def _name(k: int, shards: Sequence[int]) -> str:
    if k == shards[-1] and len(shards) > 1:
        return "WISE, several shards"
    return "WISE, 1 shard" if k == 1 else f"WISE, {k} shards"


def _told(
    model: Model, requests: Sequence[Any], clean: Any, own: Sequence[Measurement], seed: int
) -> list[Measurement]:
    """Return what the unedited model says with all facts in the text before each prompt, beside WISE."""
    from actlas.measure.editing import CleanOutputs, editing_measurements

    facts = before(WISHES["wise"], " ".join(f"{r.prompt}{r.target}." for r in requests))

    def behind(prompt: str) -> str:
        return before(facts, prompt)

    told = [
        replace(
            r, prompt=behind(r.prompt), paraphrases=tuple(map(behind, r.paraphrases)),
            locality=tuple(map(behind, r.locality)),
        )
        for r in requests
    ]  # fmt: skip
    as_before = CleanOutputs(
        {behind(p): v for p, v in clean.tokens.items()},
        {behind(p): v for p, v in clean.log_probabilities.items()},
    )
    found = {x.name: x for x in editing_measurements(model, told, as_before, seed=seed)}
    out = []
    for mine in own:
        words = found[mine.name]
        if mine.name in ("reliability", "generality", "locality"):
            assert mine.samples is not None and words.samples is not None
            out += in_words(
                mine.name, "fraction", mine.samples, words.samples, asked="the facts in the text before",
                seed=seed, over="prompts",
            )  # fmt: skip
    return out


def _random(model: Model, edit: Any, requests: Sequence[Any], seed: int) -> Any:
    """Return a side memory that changes the same entries by random amounts of equal norm."""
    generator = torch.Generator().manual_seed(seed + 7)
    delta = torch.randn(edit.deltas.shape, generator=generator) * (edit.deltas != 0)
    delta = delta * (edit.deltas.norm() / delta.norm().clamp_min(1e-30))
    drawn = replace(edit, deltas=delta)
    reactions = drawn.routes(model, [r.prompt for r in requests])
    return replace(drawn, thresholds=0.88 * reactions.amin(0))


def _router(model: Model, edit: Any, requests: Sequence[Any], name: str, seed: int) -> Measurement:
    """Return how well the router's reaction tells its facts from unrelated prompts."""
    from actlas.measure.statistics import auc

    own = [p for r in requests for p in (r.prompt, *r.paraphrases)]
    other = [p for r in requests for p in r.locality]
    scores = edit.routes(model, own + other).amax(1).double().cpu().numpy()
    found = auc([1] * len(own) + [0] * len(other), scores, seed=seed)
    above = (edit.routes(model, other) > edit.thresholds).any(1).double().mean()
    return Measurement(
        AUC, found.value, "AUC", found.n, found.low, found.high, "bootstrap within classes", seed,
        group={"editor": name}, better="higher", details={"unrelated_routed_to_side": float(above)},
    )  # fmt: skip


def _gap(
    name: str, of: str, base: Sequence[Measurement], other: Sequence[Measurement], seed: int
) -> Measurement:
    """Return the paired difference of one measure between two editors."""
    from actlas.measure.statistics import paired_difference

    a, b = (next(x for x in some if x.name == of) for some in (base, other))
    assert a.samples is not None and b.samples is not None
    found = paired_difference(a.samples, b.samples, seed=seed)
    low, high = (None if np.isnan(v) else float(v) for v in (found.low, found.high))
    return Measurement(
        name, found.value, a.unit, found.n, low, high, "paired bootstrap over prompts", seed,
        details={"p": found.p},
    )  # fmt: skip


def _neighbours(model: Model, edits: dict[str, Any], facts: int, seed: int, most: int) -> list[Measurement]:
    """Return whether capitals of countries that were not edited stay, for every edit."""
    from actlas.measure.editing import clean_outputs, editing_measurements

    found = counterfactuals(model, facts, seed, neighbours=True)
    prompts = tuple(p for r in found for p in r.locality)[:most]
    request = [replace(found[0], locality=prompts, paraphrases=())]
    clean = clean_outputs(model, request, tokens=3)
    out = []
    for name, edit in edits.items():
        with model.edit(edit):
            measured = editing_measurements(model, request, clean, seed=seed)
        kept = next(x for x in measured if x.name == "locality")
        out.append(replace(kept, name="neighbours kept", group={"editor": name}))
    return out
