"""code-authorship: which model, or person, wrote a Python function?

Five authors go on from the same function headers of Python's standard library: the people who wrote it,
SmolLM2 greedily, SmolLM2 at temperature 1, SmolLM2 steered towards commented code, and SmolLM2 with 3-bit
weights. All get equally many tokens and are cut to one length for each header. A linear classifier reads
TF-IDF, or the states of MiniLM; folds keep a header whole.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions.prompt_only import without

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

SITE = "blocks.15.resid_post"
STRENGTH = 0.2
LEAST = 30  # characters of code that every author must have left
PARTS = ("comments", "docstrings")
AUTHORS = ("human", "greedy", "sampled", "steered", "3-bit")


def judge(m: Measured) -> list[Check]:
    """Holds if TF-IDF with a linear classifier, on headers that it was not fitted on, names the author more
    often than the share of the largest class, than the same procedure on shuffled authors, and than the
    text's length alone (all central, by intervals). Also: taking comments and documentation strings out
    lowers the accuracy, a random split (the same header on both sides) is optimistic, and confidence tells
    authors that were left out from known ones (mean AUC above 0.5). Whether an encoder beats TF-IDF is shown
    and not judged: the paper fine-tunes 770 million parameters on 32,000 programs.
    """
    own = {"features": "tfidf", "text": "whole"}
    accuracy = m.get("authorship accuracy", **own)
    chance = float(accuracy.details["chance"]) if accuracy is not None else 1.0
    return [
        Check.above("above the largest class", accuracy, chance, central=True),
        Check.above(
            "above shuffled authors",
            m.get("authorship accuracy above shuffled authors", **own),
            0.0,
            central=True,
        ),
        Check.above(
            "above length only", m.get("authorship accuracy above length only", **own), 0.0, central=True
        ),
        Check.above("comments give authors away", m.get("loss without comments"), 0.0),
        Check.above("a random split is optimistic", m.get("random split above grouped split", **own), 0.0),
        Check.above("unseen authors are less confident", m.get("unseen authors told by confidence"), 0.5),
    ]


@reproduction(
    "code-authorship",
    claim="Style tells which model or person wrote a piece of code, comments help, and splits that "
    "share prompts flatter the number.",
    judge=judge,
    quick={"prompts": 48, "tokens": 60, "authors": AUTHORS, "folds": 5},
    full={"prompts": 200, "tokens": 100, "authors": AUTHORS, "folds": 5},
)
def code_authorship(*, seed: int, prompts: int, tokens: int, authors: Sequence[str], folds: int) -> Findings:
    """Run it.

    Args:
        seed: of headers, sampling, folds and intervals.
        prompts: function headers.
        tokens: of each author's text.
        authors: who writes.
        folds: of the cross-validation.
    """
    from actlas.models import load
    from actlas.security.authorship import fit_authorship

    items, used = texts(authors, prompts, tokens, seed)
    encoder = load("minilm")
    out: list[Measurement] = []
    for features in ("tfidf", "encoder"):
        for text, strip in (("whole", ()), ("without comments", PARTS)):
            made = fit_authorship(
                encoder, items, features=features, strip=strip, characters=0, folds=folds, seed=seed
            )
            out += [m.with_group(features=features, text=text) for m in made.measurements]
    out += _compared(out, items, seed)
    return Findings(
        out,
        _headline(Measured(out)),
        f"{used} headers are left. {NOTE} {without('code-authorship')}",
        [_plot(out)],
    )


NOTE = (
    "Published: 32,000 C programs of eight models, the encoder of CodeT5+ 770M fine-tuned; there it beats "
    "TF-IDF with XGBoost by 5 points, and comments are worth 2 to 7 points. Official code: the same prompt "
    "is in training and test for different models, the test split chooses the checkpoint, and TF-IDF is "
    "fitted before splitting. Ours: bodies of Python functions after one-line headers; four of the five "
    "authors are one model in four settings, which is harder than different models; MiniLM is not a code "
    "encoder and is not fine-tuned. 3-bit weights are round-to-nearest in groups of 64; the steering edit "
    f"adds {STRENGTH} of the median residual norm along commented minus stripped code after block 15. Texts "
    "of a header are cut to the shortest of them. 'unseen author named' leaves each author out in turn. A "
    "random split is no advantage here: the other authors' texts of the same header may pull a text to "
    "them. Tried before: one run of 12 headers and 40 tokens with another seed, which left 4 headers, so "
    "that 30 characters of code are asked for and not 60. A run of these very settings was stored before "
    "with another note; only the note has changed."
)


def texts(
    authors: Sequence[str], prompts: int, tokens: int, seed: int
) -> tuple[list[tuple[str, str, str]], int]:
    """Return (text, author, header) of every author, cut to one length a header, and how many headers."""
    from actlas.models import load
    from actlas.security.code_text import without

    model = load("smollm2")
    wanted = _headers(model, prompts, tokens, seed)
    written: dict[str, list[str]] = {}
    for author in authors:
        if author == "human":
            written[author] = [_first(model, body, tokens) for _, body in wanted]
        else:
            written[author] = _write(author, model, [head for head, _ in wanted], tokens, seed)
    items, used = [], 0
    for i, (head, _) in enumerate(wanted):
        said = [written[a][i].strip("\n") for a in authors]
        short = [s[: min(map(len, said))] for s in said]
        if min(len(without(s, PARTS).strip()) for s in short) < LEAST:
            continue
        used += 1
        items += [(s, a, head) for s, a in zip(short, authors, strict=True)]
    return items, used


def _write(author: str, model: Model, heads: Sequence[str], tokens: int, seed: int) -> list[str]:
    """Return what one setting of the model writes after each header."""

    def say(writer: Model, temperature: float = 0.0) -> list[str]:
        out = []
        for start in range(0, len(heads), 40):
            some = list(heads[start : start + 40])
            made = writer.generate(some, max_new_tokens=tokens, temperature=temperature, seed=seed + start)
            out += made.texts
        return out

    if author == "greedy":
        return say(model)
    if author == "sampled":
        return say(model, 1.0)
    if author == "steered":
        with model.edit(_towards_comments(model, seed)):
            return say(model)
    return say(_three_bits(model))


def _towards_comments(model: Model, seed: int) -> Edit:
    """Return the edit that steers towards code with comments."""
    from actlas.core.contrast import Contrast, read_contrast
    from actlas.core.direction import Direction
    from actlas.data import corpus
    from actlas.security.code_text import without

    pairs = []
    for document in corpus("code", seed=seed):
        bare = without(document.text, PARTS)
        if len(bare[:400]) > 200 and bare[:400] != document.text[:400] and "#" in document.text[:200]:
            pairs.append((document.text[:400], bare[:400]))
        if len(pairs) == 12:
            break
    readings = read_contrast(model, Contrast.of(pairs), SITE, position="mean")[SITE]
    return Direction.of(readings, readings.difference.mean(0), "mean_diff").steer(STRENGTH)


def _three_bits(model: Model) -> Model:
    """Return a copy of the model with its linear layers rounded to 3 bits in groups of 64."""
    from actlas.core.model import Model
    from actlas.measure.rounding import SCHEMES, as_rows, from_rows, weighted_modules

    module = deepcopy(model.module)
    for part in weighted_modules(module).values():
        weight: Any = part.weight
        weight.data = from_rows(part, SCHEMES["w3-g64"].weight(as_rows(part, weight.data)))
    return Model(module, model.tokenizer, name=f"{model.name}, 3-bit")


def _headers(model: Model, prompts: int, tokens: int, seed: int) -> list[tuple[str, str]]:
    """Return one-line function headers of the standard library with the bodies that people wrote."""
    from actlas.data import corpus
    from actlas.security.code_text import without

    found: dict[str, str] = {}
    for document in corpus("code", seed=seed):
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        lines = document.text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.body[0].lineno == node.lineno:
                continue
            head = lines[node.lineno - 1].strip() + "\n"
            body = "\n".join(lines[node.lineno : node.end_lineno])
            kept = _first(model, body, tokens)
            long = len(model.tokenizer(body)["input_ids"]) >= tokens
            if head.endswith(":\n") and long and len(without(kept, PARTS).strip()) >= LEAST:
                found.setdefault(head, _dedent(body, lines[node.lineno - 1]))
        if len(found) >= prompts:
            break
    return list(found.items())[:prompts]


def _dedent(body: str, header: str) -> str:
    """Return a method's body with the indent of a function's."""
    indent = header[: len(header) - len(header.lstrip())]
    return "\n".join(line.removeprefix(indent) for line in body.split("\n"))


def _first(model: Model, text: str, tokens: int) -> str:
    """Return the first tokens of a text."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return str(model.tokenizer.decode(ids))


def _compared(
    found: Sequence[Measurement], items: Sequence[tuple[str, str, str]], seed: int
) -> list[Measurement]:
    """Return the loss without comments, the encoder against TF-IDF, and unseen authors' mean AUC."""
    from actlas.measure.samples import mean_measurement

    m = Measured(found)
    heads = [head for _, _, head in items]

    def paired(name: str, one: dict[str, str], other: dict[str, str]) -> Measurement:
        sides = []
        for group in (one, other):
            got = m.get("authorship accuracy", **group)
            assert got is not None and got.samples is not None
            sides.append(dict(zip(got.details["texts"], got.samples, strict=True)))
        both = sorted(set(sides[0]) & set(sides[1]))
        gaps = [sides[0][i] - sides[1][i] for i in both]
        clusters = [heads[i] for i in both]
        return mean_measurement(name, "fraction", gaps, seed=seed, over="headers", clusters=clusters)

    whole = {"features": "tfidf", "text": "whole"}
    out = [
        paired("loss without comments", whole, {**whole, "text": "without comments"}),
        paired("encoder above TF-IDF", {**whole, "features": "encoder"}, whole),
    ]
    left = m.every("unseen author told by confidence", **whole)
    if left and left[0].value == left[0].value:
        out.append(
            mean_measurement(
                "unseen authors told by confidence", "AUC", [x.value for x in left], seed=seed, over="authors"
            )
        )
    return out


def _headline(m: Measured) -> str:
    said = []
    for name, group, what in (
        ("authorship accuracy", {"features": "tfidf", "text": "whole"}, "TF-IDF names"),
        ("authorship accuracy", {"features": "encoder", "text": "whole"}, "MiniLM"),
        ("authorship accuracy, random split", {"features": "tfidf", "text": "whole"}, "with a random split"),
        ("authorship accuracy", {"features": "tfidf", "text": "without comments"}, "without comments"),
    ):
        found = m.get(name, **group)
        if found is not None:
            said.append(f"{what} {found.value:.0%} [{found.low:.0%}, {found.high:.0%}]")
    first = m.get("authorship accuracy", features="tfidf", text="whole")
    chance = f" (largest class {first.details['chance']:.0%})" if first is not None else ""
    return ", ".join(said) + chance


def _plot(measured: Sequence[Measurement]) -> Plot:
    rows: list[dict[str, Any]] = []
    for m in measured:
        if m.name == "authorship accuracy" and m.group["text"] == "whole":
            table = np.array(m.details["confusion (rows: true)"], dtype=float)
            for author, row in zip(m.details["authors"], table, strict=True):
                hits = row[m.details["authors"].index(author)] / row.sum()
                rows.append({"author": author, "recognised": hits, "features": m.group["features"]})
    title = "Share of each author's texts that are recognised"
    return Plot(title, rows, "author", "recognised", "features", "bar")
