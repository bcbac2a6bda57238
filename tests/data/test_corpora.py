"""Corpora: bundled text is there and the same every time; files of all kinds, good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.core.errors import InputError
from actlas.data import Corpus, Document, corpus
from actlas.data.bundled import DOMAINS, documents
from actlas.data.chunks import MOST, cut, definitions, paragraphs

PROSE = "".join(
    f"Paragraph {k}. " + "It goes on for a while, as paragraphs do. " * 12 + "\n\n" for k in range(20)
)


@pytest.mark.parametrize("name", DOMAINS)
def test_bundled_text_is_there_in_pages(name: str) -> None:
    made = corpus(name)
    assert made.size > 300_000 and len(made) > 100
    assert made.groups == {"domain": {name: len(made)}}
    assert max(len(d.text) for d in made) <= MOST
    assert sum(len(d.text) >= 1000 for d in made) > 0.9 * len(made)
    assert len({d.id for d in made}) == len(made) == len({d.text for d in made})
    assert made.source


def test_mixed_takes_the_domains_in_turn() -> None:
    made = corpus(limit=30)
    assert [d.group["domain"] for d in made[:6]] == [*DOMAINS, *DOMAINS]
    assert made.groups["domain"] == dict.fromkeys(DOMAINS, 10)


def test_code_and_docs_share_no_module() -> None:
    modules = [
        {d.id.split("/", 1)[1].rsplit("/", 1)[0] for d in documents(name)} for name in ("code", "docs")
    ]
    assert not modules[0] & modules[1]


def test_the_seed_decides_the_order_and_none_keeps_it() -> None:
    assert corpus("prose", seed=1) == corpus("prose", seed=1)
    assert corpus("prose", seed=1) != corpus("prose", seed=2)
    assert corpus("prose", seed=1).hash != corpus("prose", seed=2).hash
    assert corpus("prose", seed=None)[0].text.startswith("CHAPTER 1. Loomings.")
    assert len(corpus("prose", seed=1, limit=7)) == 7


def test_split_is_disjoint_complete_and_keeps_the_slices() -> None:
    whole = corpus(limit=60)
    fit, evaluation = whole.split(0.5, seed=4)
    assert {d.id for d in fit}.isdisjoint(d.id for d in evaluation)
    assert len(fit) + len(evaluation) == 60
    assert fit.groups["domain"] == dict.fromkeys(DOMAINS, 10)
    assert whole.split(0.5, seed=4)[0] == fit != whole.split(0.5, seed=5)[0]
    assert len(whole.split(0.8)[0]) == 48


@given(st.lists(st.text(min_size=1), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 99))
@settings(deadline=None)
def test_a_corpus_is_a_sequence(texts: list[str], n: int, seed: int) -> None:
    unique = [t for t in dict.fromkeys(texts) if t.strip()]
    if not unique:
        with pytest.raises(InputError, match="empty"):
            Corpus("c", [Document("a", t) for t in texts])
        return
    made = Corpus("c", [Document("a", t) for t in texts])
    assert [d.text for d in made] == unique and len({d.id for d in made}) == len(made)
    assert sorted(d.text for d in made.shuffle(seed)) == sorted(unique)
    assert made.take(n)[0] == made[0] and len(made.take(n)) == min(n, len(made))
    assert made[-1].text == unique[-1] and made.size == sum(map(len, unique))
    joined = "".join(unique)
    if joined[:n].strip() and len(set(unique)) == 1:
        assert made.characters(n).size == min(n, made.size)


def test_characters_cuts_the_last_document() -> None:
    made = Corpus("c", [Document("a", "abcdef"), Document("b", "ghij")])
    assert [d.text for d in made.characters(8)] == ["abcdef", "gh"]
    assert made.characters(100) == made


def test_where_selects_by_label() -> None:
    made = corpus(limit=9)
    assert len(made.where(domain="code")) == 3
    with pytest.raises(InputError, match="no document with domain=poetry"):
        made.where(domain="poetry")


@given(st.text(alphabet='ab .!?\n\t"é', max_size=400).map(lambda text: text * 30))
@settings(deadline=None, max_examples=60)
def test_paragraphs_lose_only_white_space(text: str) -> None:
    pages = paragraphs(text)
    assert "".join("".join(pages).split()) == "".join(text.split())
    assert all(0 < len(page) <= MOST and page.strip() for page in pages)


@given(st.text(alphabet="ab. \n", min_size=1, max_size=300), st.integers(4, 50))
def test_cut_respects_the_limit(text: str, most: int) -> None:
    parts = cut(text, most)
    assert all(len(part) <= most for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_definitions_keep_decorators_and_every_line() -> None:
    body = "\n".join(f"    x{k} = {k}  # a line of code that takes some room" for k in range(25))
    source = "import os\n\n\n" + "".join(f"@decorated\ndef f{k}():\n{body}\n\n\n" for k in range(6))
    pages = definitions(source)
    assert len(pages) > 2 and "".join("".join(pages).split()) == "".join(source.split())
    assert not any(page.rstrip().endswith("@decorated") for page in pages)
    assert all(page.startswith(("import", "@decorated")) for page in pages)


def test_text_and_markdown_files(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md", "a.unknown"):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + PROSE.replace("\n", "\r\n").encode())
        made = corpus(file, seed=None)
        assert made[0].text.startswith("Paragraph 0.") and len(made) >= 4
        assert "\r" not in made[0].text and made.groups["file"] == {name: len(made)}
        assert sorted(d.id for d in corpus(str(file))) == sorted(d.id for d in made)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"text": "first", "id": "one", "group": {"lang": "en"}},
        {"text": "second"},
        {"text": "  "},
        {"text": "third", "id": "one"},
    ]
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    made = corpus(file, seed=None)
    assert [(d.id, d.text) for d in made] == [("one", "first"), ("rows/3", "second"), ("one#2", "third")]
    assert made[0].group == {"lang": "en"}
    file.write_text('{"body": "hello"}\n')
    assert corpus(file, field="body")[0].text == "hello"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: a list where an object belongs"),
        ('{"txet": "a"}', r"line 2: no field 'text', only 'txet'.*did you mean text|did you mean txet"),
        ('{"text": 3}', "line 2: the field 'text' is a int"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=said) as caught:
        corpus(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_folder_is_read_recursively_and_hidden_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "note.txt").write_text("hidden")
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "deep" / "b.py").write_text("def beta():\n    return 1\n")
    (tmp_path / "deep" / "empty.txt").write_text("\n")
    (tmp_path / "deep" / "er" / "c.jsonl").write_text('{"text": "gamma"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    made = corpus(tmp_path, seed=None)
    assert [d.text for d in made] == ["alpha", "def beta():\n    return 1", "gamma"]
    assert set(made.groups["file"]) == {"a.txt", "deep/b.py", "deep/er/c.jsonl"}


def write_dataset(folder: Path, texts: list[str], **state: object) -> None:
    """Write what `datasets.Dataset.save_to_disk` writes, as far as reading it goes."""
    folder.mkdir(parents=True)
    half = len(texts) // 2
    names = []
    for number, part in enumerate((texts[:half], texts[half:])):
        name = f"data-{number:05d}-of-00002.arrow"
        table = pa.table(
            {"text": pa.array(part, pa.string()), "label": pa.array([0] * len(part), pa.int64())}
        )
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        names.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_indices_files": None, **state}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", ["a", "b", "c", "d"])
    assert [d.text for d in corpus(tmp_path / "d", seed=None)] == ["a", "b", "c", "d"]
    with pytest.raises(InputError, match="no splits"):
        corpus(tmp_path / "d", split="test")
    with pytest.raises(InputError, match="no column 'txt', only text, label.*did you mean text"):
        corpus(tmp_path / "d", field="txt")
    with pytest.raises(InputError, match="holds int64, not text"):
        corpus(tmp_path / "d", field="label")


def test_a_dataset_with_splits_and_with_selected_rows(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d" / "train", ["a", "b", "c"], _indices_files=[{"filename": "indices.arrow"}])
    table = pa.table({"indices": pa.array([2, 0], pa.uint64())})
    indices = tmp_path / "d" / "train" / "indices.arrow"
    with pa.OSFile(str(indices), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    write_dataset(tmp_path / "d" / "test", ["x", "y"])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [d.text for d in corpus(tmp_path / "d", seed=None)] == ["c", "a"]
    assert [d.text for d in corpus(tmp_path / "d", seed=None, split="test")] == ["x", "y"]
    with pytest.raises(InputError, match="no split 'dev', only train, test"):
        corpus(tmp_path / "d", split="dev")


@pytest.mark.parametrize("outside", ["../a.arrow", "/etc/passwd", None])
def test_a_dataset_may_not_name_files_elsewhere(tmp_path: Path, outside: str | None) -> None:
    write_dataset(tmp_path / "d", ["a", "b"], _data_files=[{"filename": outside}])
    with pytest.raises(InputError, match="not in its folder"):
        corpus(tmp_path / "d")


def test_the_datasets_library_writes_what_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0])
    made.save_to_disk(tmp_path / "d")
    assert [d.text for d in corpus(tmp_path / "d", seed=None)] == ["c", "a"]


def test_parquet_and_feather_tables(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "b"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    feather.write_feather(table, tmp_path / "t.feather")
    for name in ("t.parquet", "t.feather"):
        assert [d.text for d in corpus(tmp_path / name, seed=None)] == ["a", "b"]
    (tmp_path / "t.parquet").write_bytes(b"PAR1 truncated")
    with pytest.raises(InputError, match="cannot read .*t.parquet") as caught:
        corpus(tmp_path / "t.parquet")
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    for name in ("latin.txt", "latin.jsonl"):
        file = tmp_path / name
        file.write_bytes("caf\u00e9".encode("latin-1"))
        for path in (file, tmp_path):
            with pytest.raises(InputError, match=r"latin\..* is not UTF-8 text: byte 0xe9 at offset 3"):
                corpus(path)
        file.unlink()


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_empty_files_are_refused(tmp_path: Path, content: str) -> None:
    for name in ("e.txt", "e.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="is empty"):
            corpus(tmp_path / name)
    with pytest.raises(InputError, match=r"holds no text|is empty"):
        corpus(tmp_path)


def test_wrong_names_and_limits() -> None:
    with pytest.raises(InputError, match="there is no corpus 'prse'.*did you mean prose"):
        corpus("prse")
    with pytest.raises(InputError, match="there is no corpus ''"):
        corpus("")
    with pytest.raises(InputError, match="at least 1"):
        corpus("prose", limit=0)
    with pytest.raises(InputError, match="between 0 and 1"):
        corpus("prose").split(1.0)
    with pytest.raises(InputError, match="cannot be split"):
        corpus("prose", limit=1).split()
