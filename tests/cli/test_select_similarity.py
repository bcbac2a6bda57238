"""`actlas select` and `actlas similarity` on tiny models."""

from __future__ import annotations

import json

import pytest

from actlas.cli.main import COMMANDS


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name in ("select", "similarity"):
        monkeypatch.setitem(COMMANDS, name, COMMANDS.get(name, name))


@pytest.fixture
def pool(tmp_path):
    """Twelve texts of two kinds, and two examples of one of them."""
    cats = [f"the cat sat on the mat and the cat ran to house {i}" for i in range(6)]
    dogs = [f"{i} dogs! {i} houses! {i} mats! {i} dogs! {i} houses!" for i in range(6)]
    files = {
        "pool.jsonl": [t for pair in zip(cats, dogs, strict=True) for t in pair],
        "wanted.jsonl": cats[:1],
    }
    files["wanted.jsonl"] = ["the cat sat on the mat, the cat ran", "a cat ran to the mat and sat"]
    for name, texts in files.items():
        lines = [json.dumps({"text": t}) for t in texts]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "pool.jsonl", tmp_path / "wanted.jsonl"


@pytest.mark.parametrize("lens", ["itda", "raw"])
def test_select_writes_the_nearest_texts(actlas, tiny, pool, tmp_path, lens):
    chosen = tmp_path / "chosen.jsonl"
    said = actlas("select", tiny, *pool, "--lens", lens, "--k", "8", "--ratio", "0.5", "-o", chosen, "--json")
    assert said.status == 0, said.err
    records = [json.loads(line) for line in chosen.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 6 and said.json["of"] == 12
    assert sum(r["text"].startswith("the cat") for r in records) >= 5
    assert records == said.json["chosen"] and records[0]["score"] >= records[-1]["score"]
    assert ("«" in records[0]["shared"][0]["what"]) == (lens == "itda")
    assert [m["group"]["choice"] for m in said.json["measurements"]] == ["best", "random"]
    shown = actlas("select", tiny, *pool, "--lens", "raw")
    assert shown.status == 0 and "shared most" in shown.out


def test_select_reads_a_saved_dictionary(actlas, tiny, pool, tmp_path):
    from actlas.data import corpus
    from actlas.dictionaries.itda import fit_itda
    from actlas.models import load

    model = load(tiny)
    lens = fit_itda(model, corpus(pool[0]), "blocks.0.resid_post", k=4, cos_min=0.8)
    lens.save(tmp_path / "lens", model)
    assert actlas("select", tiny, *pool, "--lens", tmp_path / "lens", "--json").json["lens"]
    assert (
        "reads blocks.0.resid_post"
        in actlas(
            "select", tiny, *pool, "--lens", tmp_path / "lens", "--site", "blocks.1.resid_post"
        ).failed()
    )
    assert "ratio is 2" in actlas("select", tiny, *pool, "--ratio", "2", "--lens", "raw").failed()
    assert "give more rows or a smaller k" in actlas("select", tiny, *pool).failed()
    assert "there is no corpus" in actlas("select", tiny, "nowhere", pool[1]).failed()


@pytest.mark.parametrize("kind", ["cka", "svcca", "relative", "linreg", "itda"])
def test_a_model_is_most_like_itself(actlas, tiny, kind):
    said = actlas("similarity", tiny, tiny, "prose", "--kind", kind, "--tokens", "300", "--json")
    assert said.status == 0, said.err
    matrix = said.json["similarity"]
    assert len(matrix) == 3 and all(max(row) == row[i] for i, row in enumerate(matrix))
    assert said.json["measurements"][0]["value"] == 1.0


def test_similarity_of_other_models(actlas, tiny, wider, tmp_path):
    said = actlas("similarity", tiny, wider, "prose", "--tokens", "200", "--site", "blocks.0-1.resid_post")
    assert said.status == 0 and "layer matching" in said.out and "*" in said.out
    assert "did you mean cka?" in actlas("similarity", tiny, tiny, "prose", "--kind", "ckaa").failed()
