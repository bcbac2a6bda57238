"""Labelled texts and pairs from files and tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actlas.core.errors import InputError
from actlas.data import Pair, labelled


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_texts_with_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *({"text": f"t{k}", "label": k % 2 == 0} for k in range(9)))
    made = labelled(file, seed=1)
    assert sorted(made) == sorted((f"t{k}", float(k % 2 == 0)) for k in range(9))  # type: ignore[type-var]
    assert made == labelled(file, seed=1) != labelled(file, seed=2)
    assert labelled(file, n=3, seed=1) == made[:3]


def test_pairs_of_a_file_and_of_a_task(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", {"positive": "good", "negative": "bad"}, {"positive": "x", "negative": "y"}
    )
    made = labelled(file, only_pairs=True)
    assert {(p.positive, p.negative) for p in made if isinstance(p, Pair)} == {("good", "bad"), ("x", "y")}
    assert len(labelled("sentiment", n=20)) == 20


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: not valid JSON"),
        ("3", "line 2: a int where an object"),
        ({"text": "a"}, "line 2: it has 'text'; give 'text' and 'label'"),
        ({"text": "a", "label": "yes"}, "the label is 'yes'"),
        ({"text": " ", "label": 1}, "'text' is not a text"),
        ({"positive": "a", "negative": 3}, "'negative' is not a text"),
        ({"positive": "a", "negative": "b"}, "mixes labelled texts and pairs"),
    ],
)
def test_bad_lines(tmp_path: Path, row: object, said: str) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "fine", "label": 0}, row)
    with pytest.raises(InputError, match=said):
        labelled(file)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean sentiment"):
        labelled("sentimnt")
    with pytest.raises(InputError, match="is not .jsonl"):
        labelled(write(tmp_path / "a.txt", "text"))
    with pytest.raises(InputError, match="where pairs are needed"):
        labelled(write(tmp_path / "a.jsonl", {"text": "a", "label": 1}), only_pairs=True)
