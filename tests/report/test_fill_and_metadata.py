"""The author's YAML file, and the metadata block that the Hub reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.report import load_fill, template
from actlas.report.content import NOT_PROVIDED, Section, SectionResult
from actlas.report.fill import FIELDS
from actlas.report.frontmatter import build_metadata, check_metadata, dump_metadata, split_metadata


def test_template_is_an_empty_fill_file_with_every_field(tmp_path: Path) -> None:
    path = tmp_path / "card.fill.yaml"
    text = template(path)
    assert path.read_text(encoding="utf-8") == text
    fill = load_fill(path)
    assert len(fill.missing()) == sum(len(fields) for _, fields in FIELDS.values())
    assert fill.get("intended_use", "primary_uses") == NOT_PROVIDED
    assert set(yaml.safe_load(text)) == set(FIELDS)
    with pytest.raises(InputError, match="exists already"):
        template(path)


def test_texts_lists_dates_and_norwegian(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(
        "model_details:\n  date: 2024-11-01\n  version: 1.10\n  language: [en, no]\n  developer: |\n    A\n    B\n"
        "intended_use:\n  out_of_scope: [medicine, law]\n", encoding="utf-8"
    )  # fmt: skip
    fill = load_fill(path)
    assert fill.get("model_details", "date") == "2024-11-01"
    assert fill.many("model_details", "language") == ("en", "no")
    assert fill.get("model_details", "developer") == "A B"
    assert fill.get("intended_use", "out_of_scope") == "medicine; law"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model_detials:\n  date: x\n", "no section 'model_detials'; did you mean model_details"),
        (b"model_details:\n  licence: x\n", "no field 'licence'; did you mean license"),
        (b"model_details: [a]\n", "must hold fields"),
        (b"model_details:\n  date: {a: b}\n", "not a mapping"),
        (b"model_details:\n  date: [[a]]\n", "list of texts"),
        (b"- a\n", "not list"),
        (b"a: [\n", "not valid YAML at line"),
        (b"a: !!python/object/apply:os.system [x]\n", "not valid YAML"),
        (b"a: &x [1]\nb: *x\n", "aliases"),
        (b"model_details:\n  date: caf\xe9\n", "not UTF-8"),
        (b"\x00", "not valid YAML"),
    ],
)
def test_a_bad_fill_file_is_one_clear_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        load_fill(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="does not exist"):
        load_fill(tmp_path / "none.yaml")


def metadata(**details: object) -> dict:
    ms = [
        Measurement("task-accuracy", 0.875, "fraction", 64, 0.77, 0.94, group={"task": "ioi"}),
        Measurement("task-accuracy", 0.5, "fraction", 32, group={"task": "ioi", "template": "ABBA"}),
        Measurement("loss-per-byte", 0.91234567, "bits/byte", 32, group={"domain": "code"}),
        Measurement("perplexity", float("nan"), "perplexity", 0, group={"domain": "code"}),
        Measurement("largest gap in x", 0.5, "fraction", 64, group={"task": "ioi"}),
        Measurement("parameters", 10.0, "count", 1),
    ]
    fill = load_fill({"model_details": {"language": ["en"], "tags": ["a: b", "#x"], **details}})
    return build_metadata("my model: 1", "causal-lm", [Section("s", "S", SectionResult("", ms))], fill)


def test_metadata_is_what_the_hub_reads() -> None:
    data = metadata(license="Apache-2.0", base_model="org/base")
    assert check_metadata(data) == []
    block = dump_metadata(data)
    card = ModelCard(block + "\n# my model\n")
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "pytorch" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["actlas", "activation-card", "a: b", "#x"]
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {("ioi", "task_accuracy"): 0.875, ("code", "loss_per_byte"): 0.912346}
    again = ModelCardData(**yaml.safe_load(block.strip("-\n")), ignore_metadata_errors=False)
    assert again.model_name == "my model: 1"
    name, parsed = model_index_to_eval_results(data["model-index"])
    assert name == "my model: 1" and {r.task_type for r in parsed} == {"text-generation"}


def test_an_unknown_licence_becomes_other_with_a_name() -> None:
    data = metadata(license="My Own Licence 2")
    assert (data["license"], data["license_name"]) == ("other", "my-own-licence-2")
    assert check_metadata(data) == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"license": "my-own"}, "not one that the Hub knows"),
        ({"license": 3}, "license must be a text"),
        ({"license": "other"}, "needs license_name"),
        ({"tags": [1]}, "tags must hold texts"),
        ({"language": ["en", False]}, "language must hold texts"),
        ({"model-index": []}, "list with one entry"),
        ({"model-index": [{"results": [{}]}]}, "needs a name"),
        ({"model-index": [{"name": "m", "results": []}]}, "list of results"),
        (
            {
                "model-index": [
                    {"name": "m", "results": [{"task": {}, "dataset": {"name": "d"}, "metrics": [{}]}]}
                ]
            },
            "task.type",
        ),
    ],
)
def test_the_validator_finds_what_the_hub_would_refuse(broken: dict, said: str) -> None:
    assert any(said in line for line in check_metadata(broken))


def test_front_matter_is_split_off_safely() -> None:
    assert split_metadata("no block\n---\nx") == ({}, "no block\n---\nx")
    assert split_metadata("---\n---\nbody") == ({}, "body")
    data, body = split_metadata("\ufeff---\r\nlicense: mit\r\n---\r\nbody")
    assert data == {"license": "mit"} and body == "body"
    for bad in ("---\na: [\n---\n", "---\njust text\n---\n", "---\na: &x 1\nb: *x\n---\n"):
        with pytest.raises(InputError, match="front matter"):
            split_metadata(bad)
