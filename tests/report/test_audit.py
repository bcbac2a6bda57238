"""The audit: section detection on labelled cards, front matter, links, weights, hostile files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.report import audit
from actlas.report.auditing import completeness
from actlas.report.folder import read_header
from actlas.report.headings import find_sections_of_card, normalise_heading, sections_meant
from tests.report.cards_made_here import FILLER, HEADINGS, hub_template, labelled_cards, sections_text

CARDS = labelled_cards()


def of(found: list[Measurement], name: str, **group: str) -> Measurement:
    return next(m for m in found if m.name == name and dict(m.group) == group)


def test_there_are_thirty_labelled_cards_and_the_detector_agrees_with_them() -> None:
    assert len(CARDS) >= 30
    hits = wrong = missed = 0
    for name, text, truth in CARDS:
        found = {s for s, f in find_sections_of_card(text).items() if f.present}
        hits += len(found & truth)
        wrong += len(found - truth)
        missed += len(truth - found)
        assert not (found - truth), f"{name}: {found - truth}"
    assert hits / (hits + wrong) >= 0.95
    assert hits / (hits + missed) >= 0.95


@pytest.mark.parametrize(
    "name", ["hub template", "raw hub template", "more information needed", "headings only"]
)
def test_a_template_scores_nothing(name: str) -> None:
    text = next(t for n, t, _ in CARDS if n == name)
    assert completeness(text.replace("tags:", "").replace("license:", "")) == 0
    filled = text.replace("## Uses", f"## Uses\n\n{FILLER['en']}")
    if "## Uses" in text:
        assert completeness(filled) > completeness(text)


def test_more_template_text_never_raises_the_score() -> None:
    for name, text, _ in CARDS:
        if "code" not in name:
            assert completeness(f"{text}\n{hub_template()}") <= completeness(text) + 1e-9, name


@pytest.mark.parametrize(
    ("heading", "normal", "meant"),
    [
        ("## 3.1 **Training Data** 📚", "training data", ["training data"]),
        ("[Metrics](#metrics)", "metrics", ["metrics"]),
        ("Intended uses & limitations", "intended uses and limitations", ["intended use"]),
        ("Results on GLUE", "results on glue", ["quantitative analyses"]),
        ("Out-of-Scope Use [optional]", "out of scope use", ["intended use"]),
        ("Résultats", "resultats", ["quantitative analyses"]),
        ("How to install", "how to install", []),
        ("", "", []),
    ],
)
def test_headings(heading: str, normal: str, meant: list[str]) -> None:
    assert normalise_heading(heading.lstrip("# ")) == normal
    assert sections_meant(heading.lstrip("# ")) == meant


def write_model(folder: Path, **config: object) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(100, 8), "model.x.weight": torch.zeros(50, 24)}
    save_file(tensors, folder / "model.safetensors")
    whole = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps({**whole, **config}))
    vocab = {f"t{i}": i for i in range(90)}
    added = [{"id": 90 + i, "content": f"<{i}>"} for i in range(10)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))


def test_a_whole_and_well_documented_model(tmp_path: Path) -> None:
    write_model(tmp_path)
    front = (
        "---\nlicense: mit\nlanguage: [en]\ntags: [x]\ndatasets: [a/b]\nbase_model: a/c\n"
        "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {name: d, type: d}\n"
        "    metrics: [{type: acc, value: 1}]\n---\n"
    )
    body = "\n".join(sections_text(HEADINGS["en"], FILLER["en"]))
    (tmp_path / "plot one.png").write_bytes(b"x")
    more = "It has 2,000 parameters and a context length of 512 tokens. ![p](plot%20one.png) [w](https://a.b) [s](#metrics)\n"
    (tmp_path / "README.md").write_text(front + body + more)
    found = audit(tmp_path)
    assert of(found, "documentation completeness").value == 1
    for m in found:
        if m.name == "broken relative links":
            assert m.value == 0 and m.n == 1
        elif m.unit == "fraction":
            assert m.value == 1, m
    assert of(found, "parameters in weights").value == 2000


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        ({"vocab_size": 95}, "tokenizer fits config", "largest id 99, vocab_size 95"),
        ({"vocab_size": 120}, "embedding fits config", "100 rows, vocab_size is 120"),
        ({"dtype": "bfloat16"}, "dtype fits config", "config bfloat16, weights float32"),
        ({"max_position_embeddings": 2048}, "declared context fits config", "card 512, config 2,048"),
    ],
)
def test_inconsistent_parts_are_named(tmp_path: Path, config: dict, name: str, said: str) -> None:
    write_model(tmp_path, **config)
    (tmp_path / "README.md").write_text(
        "The context length is 512. It has 3M parameters. [gone](lost.md) ![](../x)\n"
    )
    found = audit(tmp_path)
    assert of(found, name).value == 0 and said in of(found, name).note
    assert of(found, "declared parameters fit weights").value == 0
    assert of(found, "broken relative links").value == 2
    assert of(found, "licence present").value == 0


def test_broken_weights_are_told_without_loading_them(tmp_path: Path) -> None:
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for data, said in (
        (whole[:-100], "truncated"),
        (whole[:4], "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
        (b"\xff" * 64, "no safetensors file"),
        ((10).to_bytes(8, "little") + b"[1, 2, 33]" + b"0" * 20, "not a JSON object"),
        ((20).to_bytes(8, "little") + b'{"a": {"dtype": "x"}' + b"0" * 20, ""),
    ):
        file.write_bytes(data)
        assert isinstance(read_header(file), str) and said in str(read_header(file))
        assert of(audit(tmp_path), "weights complete").value == 0
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    found = audit(tmp_path)
    assert math.isnan(of(found, "weights complete").value)
    assert of(found, "weights without pickle").value == 0
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert "model-00001.safetensors, which is missing" in of(audit(tmp_path), "weights complete").note


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\x00 not text",
        "# Größe\n".encode("latin-1"),
        b"---\nlicense: [\n---\n# T\n",
        b"---\n" + b"a: &a [x]\n" + b"b: [*a, *a]\n---\n",
        b"---\n- 1\n---\n",
        b"---\n" + b"[" * 100_000 + b"\n---\n",
        b"# " + b" " * 300_000 + b"x\n",
        b"# " + b"#" * 300_000 + b" x\n",
        b"|" * 300_000,
        b"[" * 300_000,
        b"[a](" * 100_000,
        b"<!--" * 100_000,
        b"**" * 200_000,
        b"\n" * 400_000,
        b"more information " * 30_000,
        b"x: " * 100_000,
        b"\x00" * 1000,
    ],
    ids=range(17),
)
def test_hostile_cards_neither_crash_nor_hang(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "README.md").write_bytes(data)
    found = audit(tmp_path)
    assert of(found, "documentation completeness").value <= 0.2


def test_huge_card_is_read_in_part_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("word " * 600_000)
    assert "only the first 2,000,000 characters" in of(audit(tmp_path), "documentation completeness").note


def test_hostile_json_and_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    (tmp_path / "README.md").write_text("[a](../../../../etc/passwd) [b](x\\x00y) [c](%2e%2e/x)\n")
    found = audit(tmp_path)
    assert of(found, "config readable").value == 0
    assert of(found, "broken relative links").value == 3
    with pytest.raises(InputError, match="does not exist"):
        audit(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no card"):
        audit(empty)
