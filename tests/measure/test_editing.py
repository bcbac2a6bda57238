"""Knowledge-editing measures: what is said, and what stayed, against what was said before."""

from __future__ import annotations

import math

import pytest
import torch

from actlas.core.edits import Add, Scale
from actlas.core.errors import InputError
from actlas.core.probe import Probe
from actlas.data.edit_requests import EditRequest, edit_requests
from actlas.measure import compare, measure
from actlas.measure.editing import clean_outputs, editing, editing_measurements
from tests.core.tiny import tiny

PROMPTS = ["The old bridge", "Nobody agreed", "Why"]
STAY = ("It was raining", "He said", "Open the door")


def requests(model, right: int) -> list[EditRequest]:
    """Return requests of which the model says the first `right` already."""
    said = [
        model.tokenizer.convert_ids_to_tokens(int(t[0]))
        for t in model.generate(PROMPTS, max_new_tokens=1).tokens
    ]
    other = [next(c for c in "abcdefg" if c != s) for s in said]
    return [
        EditRequest(p, s if i < right else o, paraphrases=(p,) if i == 0 else (), locality=STAY[i : i + 1])
        for i, (p, s, o) in enumerate(zip(PROMPTS, said, other, strict=True))
    ]


def by_name(found) -> dict:
    return {m.name: m for m in found}


@pytest.mark.parametrize("right", [0, 2, 3])
def test_reliability_counts_the_targets_that_are_said(right: int) -> None:
    model = tiny()
    asked = requests(model, right)
    found = by_name(editing(model, None, asked))
    assert found["reliability"].value == pytest.approx(right / 3) and found["reliability"].n == 3
    assert found["reliability"].low < right / 3 + 1e-9 < found["reliability"].high + 2e-9
    assert found["generality"].value == float(right > 0) and found["generality"].n == 1
    assert found["locality"].value == 1.0 and found["locality-kl"].value < 1e-6
    z = model.logits(asked[0].prompt)[0, -1].double().log_softmax(-1)
    ids = [model.tokenizer(r.target)["input_ids"][0] for r in asked]
    first = -float(z[ids[0]])
    assert found["target-nll"].samples[0] == pytest.approx(first, rel=1e-4)


def test_locality_is_against_the_unedited_model_even_if_an_edit_is_installed() -> None:
    model = tiny()
    asked = requests(model, 0)
    clean = clean_outputs(model, asked)
    breaks = Scale("blocks.*.resid_post", -1.0)
    with model.edit(breaks):
        again = clean_outputs(model, asked)
        broken = by_name(editing_measurements(model, asked, clean))
    assert again.tokens == clean.tokens
    assert broken["locality"].value < 1.0 and broken["locality-kl"].value > 0.01
    assert broken["locality"].under == (breaks.describe(),)
    base = clean.log_probabilities[STAY[0]].double()
    with model.edit(breaks):
        now = model.logits(STAY[0])[0, -1].double().log_softmax(-1)
    assert broken["locality-kl"].samples[0] == pytest.approx(
        float((base.exp() * (base - now)).sum()), rel=1e-3
    )


def test_an_edit_gated_on_the_prompt_is_measured_as_it_generates() -> None:
    model = tiny()
    d = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
    scores = [float(model.trace(p, "blocks.0.resid_post")["blocks.0.resid_post"][0, -1] @ d) for p in STAY]
    low, mid, _ = sorted(scores)
    middle = (low + mid) / 2
    probe = Probe(site="blocks.0.resid_post", weight=d, bias=torch.zeros(()), steer=d)
    edit = Add("blocks.1.resid_post", vector).when(probe, middle, per="sequence")
    asked = [EditRequest("Why", "x", locality=STAY)]
    clean = clean_outputs(model, asked, tokens=6)
    with model.edit(edit):
        said = model.generate(list(STAY), max_new_tokens=6).tokens
        found = by_name(editing_measurements(model, asked, clean))
    same = [tuple(t.tolist()) == clean.tokens[p] for t, p in zip(said, STAY, strict=True)]
    assert found["locality"].samples.tolist() == [float(s) for s in same]


def test_it_is_a_measure_that_wants_its_own_data(tmp_path) -> None:
    model = tiny()
    asked = requests(model, 1)
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "Why", "target": "x", "locality": "He said"}\n', encoding="utf-8")
    read = edit_requests(file)
    assert read == [EditRequest("Why", "x", locality=("He said",))]
    found = by_name(measure(model, ["editing"], asked))
    assert found["reliability"].value == pytest.approx(1 / 3)
    assert math.isnan(by_name(measure(model, ["editing"], read))["generality"].value)
    with pytest.raises(InputError, match="give them, e.g. --data"):
        measure(model, ["editing"])
    compared = compare(model, {"base": [], "half": [Scale("blocks.1.mlp.out", 0.5)]}, ["editing"], asked)
    assert {r.measurement.name for r in compared.rows} >= {"reliability", "locality", "target-nll"}


def test_bad_input(tmp_path) -> None:
    model = tiny()
    asked = requests(model, 1)
    with pytest.raises(InputError, match="clean output of 'He said' is not known"):
        editing_measurements(model, asked, clean_outputs(model, asked[:1]))
    with pytest.raises(InputError, match="no field 'targt'; did you mean target"):
        EditRequest.of({"prompt": "a", "targt": "b"})
    with pytest.raises(InputError, match="needs a target"):
        EditRequest.of({"prompt": "a"})
    with pytest.raises(InputError, match="not part of the prompt"):
        EditRequest("a", "b", subject="c")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "target": "b"}\nnot json\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2"):
        edit_requests(bad)
    with pytest.raises(InputError, match="is no file"):
        edit_requests(tmp_path / "none.jsonl")
