"""`actlas fit steer` and the edit that it saves, from the command line, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import actlas, tiny  # noqa: F401  (fixtures)
from tests.steering.test_fit_steer import PAIRS, little_prose  # noqa: F401

SITE = "blocks.1.resid_post"


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"positive": p, "negative": n}) + "\n" for p, n in PAIRS))
    return str(file)


def test_fit_then_generate_and_measure(actlas, tiny, pairs, tmp_path) -> None:  # noqa: F811
    vec, plot = tmp_path / "vec", tmp_path / "curve.json"
    said = actlas("fit", "steer", tiny, pairs, "--method", "mean_diff", "-o", vec, "--plot", plot, "--json")
    assert said.status == 0, said
    assert {row["series"] for row in said.json["curve"]} == {"mean_diff", "random 1", "random 2"}
    assert "vega" in plot.read_text()
    names = {m["name"] for m in said.json["measurements"]}
    assert {"steering-effect", "kl-per-token", "within-budget", "effect-over-random"} <= names
    assert {m["group"].get("control") for m in said.json["measurements"]} >= {
        "random",
        "flipped",
        "shuffled pairs",
    }
    shown = actlas(
        "generate", tiny, "the cat", "--edit", f"{vec}*1.5", "--compare", "--max-new-tokens", 4, "--json"
    )
    assert shown.status == 0 and {"base", "edited"} <= set(shown.json)
    plain = actlas("fit", "steer", tiny, pairs, "--site", SITE, "--strength", "0.2", "-o", tmp_path / "two")
    assert plain.status == 0 and "steering-effect" in plain.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "mean_dif"), "did you mean mean_diff"),
        (("--site", "blocks.1.resid_pots"), "did you mean"),
        (("--budget", "0"), "the budget is 0"),
        (("--centr", "true", "--method", "pca_diff"), "did you mean centre"),
        (("--strength", "0.1"), "goes with one site"),
        (("--plot", "curve.pdf"), "a plot is one of"),
        (("--plot", "nowhere/curve.png"), "there is no folder nowhere"),
    ],
)
def test_bad_options(actlas, tiny, pairs, tmp_path, options, message) -> None:  # noqa: F811
    assert message in actlas("fit", "steer", tiny, pairs, "-o", tmp_path / "v", *options).failed()
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"positive": "good"}', "give 'text' and 'label', or 'positive' and 'negative'"),
        ('{"positive": "good", "negative": ""}', "'negative' is not a text"),
        ('{"positive": "good", "negative": "good"}', "the same text on both sides"),
        ('{"text": "good", "label": 1}', "pairs are needed"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_pairs(actlas, tiny, tmp_path, line, message) -> None:  # noqa: F811
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{line}\n" * 6)
    assert message in actlas("fit", "steer", tiny, file, "-o", tmp_path / "v").failed()
