"""The task evaluation: a dictionary that loses nothing scores 1, one without features 0, controls are there."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from actlas.core.codes import Codes
from actlas.core.errors import FingerprintError, InputError
from actlas.core.pca import PCA
from actlas.data import TaskItem, task
from actlas.dictionaries.attribute_f1 import attribute_f1
from actlas.dictionaries.evaluation.controls import Offset, UnitDirections
from actlas.dictionaries.occlusion import occlusion, over_splitting
from actlas.dictionaries.task_eval import SHORT, TaskReport, dictionary_task_eval
from actlas.dictionaries.task_measures import parts_of_value, share_measure, structure_measures
from actlas.dictionaries.task_runs import TaskRuns
from tests.core.families import BY_NAME
from tests.dictionaries.test_task_runs import SITE, reader

MS = (1, 4, 64)


@cache
def telling(n: int = 140) -> list[TaskItem]:
    """Prompts on which the untrained model happens to do the task, so that there is an effect to share."""
    items = [i for i in task("ioi", reader().tokenizer, n=700, words=4) if len(i.variants) == 3]
    runs = TaskRuns(reader(), items, SITE)
    changed = TaskRuns(reader(), [i.counterfactual for i in items if i.counterfactual], SITE)
    base = runs.run({SITE: runs.values[SITE].mean(0).expand_as(runs.values[SITE])}).difference
    effect = runs.clean.difference - torch.maximum(runs.run(changed.values).difference, base)
    return [items[i] for i in sorted(effect.argsort(descending=True)[:n].tolist())]


@cache
def report(kind: str) -> TaskReport:
    items = telling()
    centre = TaskRuns(reader(), items[:100], SITE).values[SITE].mean(0)
    dictionary = {
        # 32 orthonormal atoms read with 32 steps: nothing is lost
        "whole": UnitDirections(site=SITE, directions=torch.eye(32), centre=centre, k=32),
        "empty": Offset(site=SITE, centre=centre),
        "none": None,
    }[kind]
    return dictionary_task_eval(
        reader(), dictionary, items, site=SITE, test=40, exchanges=MS, changes=("IO", "Pos", "all"), sign="any"
    )  # fmt: skip


def test_a_dictionary_that_loses_nothing_is_sufficient_necessary_and_controls() -> None:
    r = report("whole")
    for what in ("sufficiency", "necessity"):
        found = r.get(what, dictionary="dictionary")
        assert found.value == pytest.approx(1.0, abs=1e-3) and found.low == pytest.approx(1.0, abs=1e-2)
    for change in ("IO", "Pos", "all"):
        for choice in ("agnostic", "f1", "random features"):
            every = {"dictionary": "dictionary", "change": change, "choice": choice, "exchanges": "64"}
            assert r.get("edit success", **every).value == 1.0
            effect = r.get("edit effect", **every)
            assert np.isnan(effect.value) or effect.value == pytest.approx(1.0, abs=1e-3)
            assert r.get("weight removed", **every).value == pytest.approx(1.0, abs=1e-3)
    assert r.get("edit effect", change="all", choice="unedited").value == 0.0


def test_more_exchanges_bring_the_greedy_edit_nearer() -> None:
    r = report("whole")
    weights = [
        r.get(
            "weight removed", dictionary="dictionary", change="all", choice="agnostic", exchanges=str(m)
        ).value
        for m in MS
    ]
    assert weights[0] < weights[1] < weights[2]
    one = r.get("weight removed", dictionary="dictionary", change="all", choice="agnostic", exchanges="1")
    assert one.details["features exchanged"] == 1.0


def test_a_dictionary_without_features_does_nothing() -> None:
    r = report("empty")
    for what in ("sufficiency", "necessity"):
        assert r.get(what, dictionary="dictionary").value == pytest.approx(0.0, abs=1e-3)
    edit = {"dictionary": "dictionary", "change": "all", "choice": "f1", "exchanges": "4"}
    assert r.get("edit effect", **edit).value == 0.0
    assert r.get("edit success", **edit).value == r.get("edit success", change="all", choice="unedited").value
    short = r.get(SHORT, **edit)
    supervised = r.get("edit effect", dictionary="supervised mean", change="all")
    assert short.value == pytest.approx(supervised.value)


def test_controls_and_supervised_dictionaries_are_always_there() -> None:
    r = report("whole")
    dictionaries = {m.group["dictionary"] for m in r.measurements if m.name == "sufficiency"}
    assert dictionaries == {
        "dictionary", "random atoms", "random directions", "supervised mean", "supervised mse"
    }  # fmt: skip
    names = {m.name for m in r.measurements}
    assert {"attribute F1", "attribute F1, shuffled labels", "attribute size", "features per value"} <= names
    for m in r.measurements:
        counted = m.interval.startswith("none") or np.isnan(m.value)
        assert counted or (m.low is not None and m.high is not None and m.low <= m.value <= m.high), m
    assert json.loads(json.dumps(r.to_json()))["note"] == r.note and "100 prompts to fit" in r.note
    assert "edit success" in str(r)
    alone = report("none")
    assert {m.group.get("dictionary") for m in alone.measurements} == {
        "none",
        "supervised mean",
        "supervised mse",
    }
    full = alone.get("edit effect", change="all", choice="full patch")
    assert full.value == 1.0


def test_a_share_of_nothing_is_not_a_number() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(50, generator=g)
    found = share_measure("x", noise, noise - noise.mean(), 0, {})
    assert np.isnan(found.value) and "not distinguishable from 0" in found.note
    found = share_measure("x", torch.full((50,), 0.5) + 0.1 * noise, torch.ones(50), 0, {})
    assert found.low is not None and found.low < found.value < (found.high or 0)


def test_parts_of_a_split_value_are_counted() -> None:
    labels = ["a"] * 10 + ["b"] * 10
    z = torch.zeros(20, 6)
    z[0:4, 0] = z[4:8, 1] = z[7:10, 2] = 1  # three pure parts of a
    z[0:20, 3] = 1  # fires everywhere
    z[10:19, 4] = 1  # one feature for 90% of b
    codes = Codes.from_dense(z)
    table, on = attribute_f1(codes, labels), codes.dense() > 0
    assert [parts_of_value(table, v, on, labels) for v in range(2)] == [3, 1]
    z[:, :3] = 0
    codes = Codes.from_dense(z)
    assert parts_of_value(attribute_f1(codes, labels), 0, codes.dense() > 0, labels) is None


def test_structure_is_what_it_says() -> None:
    labels = [{"who": "ab"[i % 2], "where": "xyz"[i % 3]} for i in range(60)]
    x = torch.tensor([[3.0 * (a["who"] == "a"), 1.0 * (a["where"] == "x")] for a in labels])
    z = torch.zeros(60, 3)
    z[:, 0] = torch.tensor([a["who"] == "a" for a in labels]).float()
    z[:, 1] = torch.tensor([a["where"] in "xy" for a in labels]).float()
    codes = Codes.from_dense(z)
    tables = {k: attribute_f1(codes, [a[k] for a in labels]) for k in ("who", "where")}
    found = structure_measures(tables, codes, x, labels, "positive", {"dictionary": "d"})
    by = {(m.name, m.group.get("attribute", "")): m.value for m in found}
    total = float((x - x.mean(0)).square().sum())
    who = 60 * 0.25 * 9.0 / total
    assert by["attribute size", "who"] == pytest.approx(who)
    assert by["attribute size", "who"] + by["attribute size", "where"] == pytest.approx(1.0)
    assert by["values with a feature", "who"] == 0.5 and by["features per value", "who"] == 1.0
    # feature 1 is F1 0.8 at most for "x" or "y" alone, and 1 for their union
    assert by["interpretable features", ""] == 0.5 and by["interpretable features, with unions", ""] == 1.0


def test_the_smaller_of_two_attributes_is_hidden_when_features_are_few() -> None:
    options = {"sizes": (0.7,), "values": 12, "rows": 1024, "passes": 60, "seeds": 2}
    tight = {m.name + m.group.get("attribute", ""): m for m in occlusion("topk", k=1, **options)}
    assert tight["occluded"].value > 0.8 and tight["occluded"].n == 2
    enough = {m.name + m.group.get("attribute", ""): m for m in occlusion("topk", k=2, **options)}
    assert enough["occluded"].value < 0.2 and enough["values with a featureshrunk"].value > 0.8
    with pytest.raises(InputError, match="positive sizes"):
        occlusion(sizes=(0.0,))


def test_a_binary_attribute_splits_when_there_is_noise_around_it() -> None:
    found = over_splitting("topk", k=1, noises=(0.02, 0.2), seeds=1)
    parts = [m.value for m in found if m.name == "features per value"]
    best = [m.value for m in found if m.name == "best F1"]
    assert parts[0] == 1.0 and parts[1] > 3 and best[0] > 0.95 and best[1] < 0.6


def test_bad_input() -> None:
    model, tok = reader(), reader().tokenizer
    items = task("ioi", tok, n=60, words=4)
    with pytest.raises(InputError, match="neither a dictionary nor a site"):
        dictionary_task_eval(model, None, items)
    with pytest.raises(InputError, match="too few"):
        dictionary_task_eval(model, None, items, site=SITE, test=50)
    with pytest.raises(InputError, match="no prompt has the change 'Poss'"):
        dictionary_task_eval(model, None, items, site=SITE, test=20, changes=("Poss",))
    wrong = UnitDirections(site=SITE, directions=torch.eye(7), centre=torch.zeros(7), k=2)
    with pytest.raises(InputError, match="reads 7 channels"):
        dictionary_task_eval(model, wrong, items, test=20)
    pca = PCA(
        site=SITE, mean=torch.zeros(32), components=torch.eye(32)[:2], variance=torch.ones(2), total=2.0, count=9
    )  # fmt: skip
    with pytest.raises(InputError, match="a PCA is no dictionary"):
        dictionary_task_eval(model, pca, items, test=20)  # type: ignore[arg-type]
    foreign = UnitDirections(
        site=SITE, directions=torch.eye(32), centre=torch.zeros(32), fingerprint=BY_NAME["gpt2"].model().fingerprint
    )  # fmt: skip
    with pytest.raises(FingerprintError):
        dictionary_task_eval(model, foreign, items, test=20)
    many = task("ioi", tok, n=60)
    with pytest.raises(InputError, match="the fit has not seen IO="):
        dictionary_task_eval(model, None, many, site=SITE, test=20)
    bare = [replace(item, counterfactual=None) for item in items]
    with pytest.raises(InputError, match="only 0 of the 20 prompts for testing have all of"):
        dictionary_task_eval(model, None, bare, site=SITE, test=20)
    plain = [replace(item, attributes={}, group={}) for item in items]
    with pytest.raises(InputError, match="no attributes"):
        dictionary_task_eval(model, None, plain, site=SITE, test=20)


def test_any_task_with_counterfactuals_will_do() -> None:
    items = task("sentiment", reader().tokenizer, n=60)
    found = dictionary_task_eval(reader(), None, items, site=SITE, test=20, codebooks=("mse",))
    assert {m.group["change"] for m in found.measurements if m.name == "edit success"} == {"all"}
