"""`docs/prompt-only.md`: every method that steers beside the same wish in words, from the stored results."""

from __future__ import annotations

from actlas.core.measurement import Measurement, format_number
from actlas.papers.catalogue import papers
from actlas.papers.reproduction import Measured, Reproduction, stored
from actlas.papers.reproductions.prompt_only import ASKED, NONE, OVER

_TEXT = (
    "# Steering or asking",
    "",
    "A chat model can also simply be told what is wanted. This page puts each reproduction that changes "
    "behaviour beside that baseline: the same wish, said to the same model in words, on the same items "
    "with the same measure. The last column is the method minus the words, with a 95% interval (paired, "
    "bootstrap). None of it is judged, and no wording was tuned. The effect against random directions of "
    "the same norm is in each paper's page. This page is written by `python -m actlas.papers` from the "
    "stored results.",
    "",
    "| paper | quantity | how it was asked | in words | method minus words |",
    "| --- | --- | --- | --- | --- |",
)


def prompt_only_page() -> str:
    """Return the page as Markdown."""
    lines, without = list(_TEXT), []
    for p in papers(status="reproduced"):
        result = stored(p.slug)
        rows = [] if result is None else _rows(result)
        lines += [f"| [{p.slug}](papers/{p.slug}.md) | {' | '.join(row)} |" for row in rows]
        if p.slug in NONE and not rows:
            without.append(f"* [{p.slug}](papers/{p.slug}.md): {NONE[p.slug]}.")
    return "\n".join([*lines, "", "Without such an arm:", "", *without, ""])


def _rows(result: Reproduction) -> list[tuple[str, ...]]:
    """Return quantity, way, value in words and difference of each comparison of a stored result."""
    m = Measured(result.measured)
    found: list[tuple[dict[str, str], str, Measurement | None, Measurement]]
    if result.slug == "asc":  # it had its arm before the others, under names of its own
        words, gap = (
            m.get("answer-length", run="asked for brevity"),
            m.get("tokens, steered minus asked for brevity"),
        )
        found = [] if gap is None else [({"quantity": "tokens an answer"}, "question", words, gap)]
    else:
        found = [
            (dict(gap.group), gap.group["asked"], m.get(ASKED, **gap.group), gap) for gap in m.every(OVER)
        ]
    out: list[tuple[str, ...]] = []
    for group, asked, words, gap in found:
        rest = ", ".join(v for k, v in group.items() if k not in ("quantity", "asked"))
        quantity = f"{group['quantity']} ({rest})" if rest else group["quantity"]
        out.append((quantity, asked, "" if words is None else format_number(words.value), _interval(gap)))
    return out


def _interval(m: Measurement) -> str:
    if m.low is None or m.high is None:
        return format_number(m.value)
    return f"{format_number(m.value)} [{format_number(m.low)}, {format_number(m.high)}] {m.unit}"
