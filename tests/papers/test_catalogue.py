"""The catalogue: complete, consistent with the code, and helpful with wrong names."""

import importlib.util
import json
import re

import pytest

from actlas.core.errors import InputError
from actlas.papers import paper, papers, reproduce, stored
from actlas.papers.catalogue import FOLDER, RESULTS
from actlas.papers.reproduction import Measured, recipe, verdict_of

ROOMS = {
    *("kernels", "core", "models", "data", "store", "measure", "dictionaries", "steering", "circuits"),
    *("explain", "sparsity", "quantize", "training", "nn", "security", "merge", "select", "report", "serve"),
}
FIRST = {"model-cards", "hf-model-reuse", "fast-model-scaling", "void", "sparsing-law", "hash-encoders"}


def test_every_paper_is_there_with_every_field():
    every = papers()
    assert len(every) == 135
    assert [p.number for p in every] == list(range(1, 136))
    assert (
        len({p.slug for p in every}) == len({p.title for p in every}) == len({p.claim for p in every}) == 135
    )
    for p in every:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", p.slug), p.slug
        assert p.room in ROOMS, p
        assert p.status in ("reproduced", "planned")
        assert p.command == f"actlas reproduce {p.slug}"
        assert 40 < len(p.claim) < 330 and p.claim.endswith(".") and p.claim[0].isupper(), p.claim
        assert p.claim.count(". ") == 0, f"one sentence: {p.claim}"


def test_the_data_file_has_exactly_the_documented_fields():
    records = json.loads((FOLDER / "papers.json").read_text(encoding="utf-8"))
    fields = {"slug", "number", "title", "room", "status", "claim", "command"}
    assert all(set(r) == fields for r in records)


def test_status_says_which_papers_have_a_reproduction():
    for p in papers():
        there = importlib.util.find_spec(p.module) is not None
        assert there == (p.status == "reproduced"), p.slug
    assert FIRST <= {p.slug for p in papers(status="reproduced")}


def test_filters_and_wrong_names():
    assert {p.slug for p in papers(room="report")} == {"model-cards", "hf-model-reuse"}
    assert {p.room for p in papers(room="explain", status="planned")} == {"explain"}
    with pytest.raises(InputError, match="did you mean void"):
        paper("voids")
    with pytest.raises(InputError, match="did you mean quantize"):
        papers(room="quantise")
    with pytest.raises(InputError, match="reproduced or planned"):
        papers(status="done")


def test_a_planned_paper_says_so_in_one_line():
    with pytest.raises(InputError, match="craft .* is planned and has no reproduction yet") as error:
        reproduce("craft")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("slug", sorted(FIRST))
def test_a_stored_result_is_whole_and_follows_from_its_own_numbers(slug):
    result = stored(slug)
    assert result is not None, f"actlas reproduce {slug} --store"
    assert result.slug == slug and result.title == paper(slug).title
    assert result.mode in ("quick", "full") and result.seconds > 0
    assert result.environment["versions"]["torch"] and result.environment["threads"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.date)
    made = recipe(slug)
    assert result.criterion == made.criterion, "the criterion changed after the run: run it again"
    assert result.settings == json.loads(
        json.dumps(dict(made.quick if result.mode == "quick" else made.full))
    )
    checks = made.judge(Measured(result.measured))
    assert [(c.name, c.passed) for c in checks] == [(c.name, c.passed) for c in result.checks]
    assert verdict_of(checks) == result.verdict == paper(slug).verdict
    assert paper(slug).result.startswith(result.verdict)


def test_results_belong_to_papers():
    known = {p.slug for p in papers(status="reproduced")}
    assert {f.stem for f in RESULTS.glob("*.json")} <= known
