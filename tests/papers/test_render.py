"""The pages: complete, safe in tables, and up to date."""

from pathlib import Path

import pytest

from actlas.papers import papers, render_docs
from actlas.papers.prompt_only_page import prompt_only_page
from actlas.papers.render import draw, overview
from actlas.papers.reproduction import Plot, stored

DOCS = Path(__file__).parents[2] / "docs"


def test_the_overview_lists_every_paper():
    text = overview()
    assert all(f"| {p.number} | {p.slug} | " in text for p in papers())
    for p in papers(status="reproduced"):
        assert f"(papers/{p.slug}.md)" in text and p.result.split(":")[0] in text


def test_docs_are_up_to_date():
    assert (DOCS / "papers.md").read_text(encoding="utf-8") == overview(), "run python -m actlas.papers"
    assert (DOCS / "prompt-only.md").read_text(encoding="utf-8") == prompt_only_page()
    for p in papers(status="reproduced"):
        result = stored(p.slug)
        text = (DOCS / "papers" / f"{p.slug}.md").read_text(encoding="utf-8")
        assert result is not None and result.headline in text and result.criterion in text
        for i in range(1, len(result.plots) + 1):
            assert (DOCS / "papers" / f"{p.slug}-{i}.svg").is_file()


def test_docs_are_written_where_asked(tmp_path):
    files = render_docs(tmp_path, plots=False)
    assert (tmp_path / "papers.md") in files
    assert {f.stem for f in files if f.parent.name == "papers"} == {
        p.slug for p in papers(status="reproduced")
    }


@pytest.mark.parametrize("mark", ["line", "point", "bar"])
def test_a_plot_is_drawn_offline(mark):
    rows = [{"width": 4, "loss": 0.1, "kind": "a"}, {"width": 8, "loss": 0.01, "kind": "b"}]
    svg = draw(Plot("Loss by width", rows, "width", "loss", "kind", mark, log="xy"))
    assert svg.startswith("<svg") and "Loss by width" in svg
