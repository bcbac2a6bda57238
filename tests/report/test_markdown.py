"""Render, parse, render is a fixed point; escaping is undone exactly; other people's cards are read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.report.cards import Card
from actlas.report.content import Figure, Section, SectionResult, Table, Tile, plain, show_number
from actlas.report.markup import escape_markdown, pipe_table, split_row, to_html, unescape_markdown

words = st.text(
    st.one_of(st.characters(), st.sampled_from("|\\`*_[]<>&#-+=;.1\n\"'$~:/ é漢")), min_size=0, max_size=30
)
some_text = words.map(lambda t: t if plain(t) else "x")
numbers = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-(10**9), 10**9).map(float))


@st.composite
def measurements(draw: st.DrawFn, depth: int = 1) -> Measurement:
    low, high = draw(st.one_of(st.just((None, None)), st.tuples(numbers, numbers)))
    return Measurement(
        name=draw(some_text),
        value=draw(numbers),
        unit=draw(words),
        n=draw(st.integers(0, 10**7)),
        low=low,
        high=high,
        group=draw(st.dictionaries(some_text.map(plain), some_text, max_size=2)),
        under=tuple(draw(st.lists(some_text, max_size=2))),
        note=draw(words),
        baseline=draw(measurements(depth=0)) if depth and draw(st.booleans()) else None,
    )


titles = some_text.filter(lambda t: plain(t) not in ("Numbers", "Notes", "At a glance"))
tables = st.integers(1, 3).flatmap(
    lambda k: st.builds(
        Table,
        titles,
        st.tuples(*[words] * k),
        st.lists(st.tuples(*[words] * k), max_size=3).map(tuple),
        words,
    )
)


@st.composite
def cards(draw: st.DrawFn) -> Card:
    sections = [
        Section(
            f"s{i}",
            draw(titles),
            SectionResult(
                intro="\n\n".join(draw(st.lists(words, max_size=2))),
                measurements=draw(st.lists(measurements(), max_size=2)),
                figures=[Figure(draw(titles), draw(some_text)) for _ in range(draw(st.integers(0, 1)))],
                tables=draw(st.lists(tables, max_size=2)),
                notes=draw(st.lists(words, max_size=2)),
                reason=draw(words),
            ),
        )
        for i in range(draw(st.integers(0, 3)))
    ]
    return Card(
        name=draw(words),
        summary=draw(words),
        facts=tuple(draw(st.lists(st.tuples(some_text, words), max_size=2))),
        tiles=[Tile(draw(some_text), draw(measurements(depth=0))) for _ in range(draw(st.integers(0, 2)))],
        sections=sections,
        metadata=draw(
            st.dictionaries(st.sampled_from(["license", "tags", "x"]), st.one_of(words, st.lists(words)))
        ),
    )


@settings(max_examples=150, deadline=None)
@given(cards())
def test_render_parse_render_is_a_fixed_point(card: Card) -> None:
    once = card.render("md")
    assert Card.from_markdown(once).render("md") == once


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400))
def test_any_text_at_all_becomes_a_stable_card(text: str) -> None:
    try:
        once = Card.from_markdown(text).render("md")
    except InputError:  # front matter that is no YAML
        assert text.lstrip("\ufeff").lstrip().startswith("---")
        return
    assert Card.from_markdown(once).render("md") == once


@settings(max_examples=300, deadline=None)
@given(words)
def test_escaping_is_undone(text: str) -> None:
    line = plain(text)
    assert plain(line) == line
    assert unescape_markdown(escape_markdown(line, line_start=True)) == line
    row = pipe_table(["a", "b", "c"], [[line, "", line]])[-1]
    assert [unescape_markdown(c) for c in split_row(row)] == [line, "", line]


@settings(max_examples=300, deadline=None)
@given(numbers)
def test_printed_numbers_read_back_to_themselves(x: float) -> None:
    text = show_number(x)
    assert show_number(float(text.replace(",", ""))) == text
    if math.isfinite(x) and abs(x) > 1e-300:
        assert float(text.replace(",", "")) == pytest.approx(x, rel=6e-3)


def test_what_was_measured_survives_the_way_through_markdown() -> None:
    base = Measurement("bare speed", 318.0, "tokens/s", 3, 310.0, 322.5)
    m = Measurement(
        "speed", 312.4, "tokens/s", 1234, 300.0, 322.0, group={"a=b": "c; d", "k": "|v\\"}, under=("add; 4",), baseline=base,
        note="a `|` and <b>",
    )  # fmt: skip
    nothing = Measurement("accuracy", math.nan, "fraction", 0, note="n too small: there are no positives")
    card = Card("m", sections=[Section("cost", "Cost", SectionResult("Text.", [m, nothing]))])
    back = Card.from_markdown(card.render("md"))
    got, none = back.section("cost").result.measurements
    assert (got.value, got.low, got.high, got.n, got.unit) == (312.4, 300.0, 322.0, 1234, "tokens/s")
    assert dict(got.group) == {"a=b": "c; d", "k": "|v\\"}
    assert got.under == ("add; 4",)
    assert got.baseline is not None and (got.baseline.value, got.baseline.high) == (318.0, 322.5)
    assert math.isnan(none.value) and none.note == "n too small: there are no positives"


def test_headings_in_code_blocks_are_no_sections_and_later_titles_are() -> None:
    text = "# Name\n\nWhat it is.\n\n```\n# a comment\n## another\n```\n\n## Uses\n\nMany.\n\n# Training\n\nMuch.\n"
    card = Card.from_markdown(text)
    assert card.name == "Name"
    assert [s.title for s in card.sections] == ["Uses", "Training"]


def test_html_escapes_and_links_only_the_web() -> None:
    html = to_html("<script>x</script> `a<b` https://a.org/?q=1&r=2, javascript:alert(1)")
    assert "<script>" not in html and "<code>a&lt;b</code>" in html
    assert 'href="https://a.org/?q=1&amp;r=2"' in html and 'href="javascript' not in html


@pytest.mark.parametrize("title", ["Numbers", "Notes", "", " \n "])
def test_titles_that_would_break_the_way_back_are_refused(title: str) -> None:
    with pytest.raises(InputError):
        Table(title, ("a",), ())
