"""What the commands do, on a tiny local model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len

from actlas.core.artifact import load_artifact

from .conftest import Said

Run = Callable[..., Said]
TEXT = "the cat sat on the mat. and the dog ran to the house.\n\n" * 12


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"{k} {TEXT}" for k in range(8)))
    return file


def test_sites(actlas: Run, tiny: str) -> None:
    said = actlas("sites", tiny)
    assert re.search(r"blocks\.\*\.resid_post +batch, pos, d_model=32 +3 blocks", said.out)
    assert "absent: " in said.out
    found = actlas("sites", tiny, "blocks.0-1.attn.z", "--json").json
    assert [s["name"] for s in found["sites"]] == ["blocks.0.attn.z", "blocks.1.attn.z"]
    assert found["kind"] == "causal-lm" and found["layout"] is True


def test_every_site_that_is_listed_as_present_can_be_traced(actlas: Run, tiny: str) -> None:
    found = actlas("sites", tiny, "--json").json["sites"]
    names = [s["name"] for s in found if s["absent"] is None]
    traced = actlas("trace", tiny, "the cat", "--json", "--sites", ",".join(names)).json
    assert [s["site"] for s in traced["sites"]] == names


def test_trace_json_is_the_models_own_answer_at_the_last_layer(actlas: Run, tiny: str) -> None:
    from actlas.models import load

    model = load(tiny)
    said = actlas("trace", tiny, "the cat sat", "--top", "2", "--json").json
    assert "".join(said["tokens"]) == "the cat sat"
    last = [row for row in said["lens"] if row["site"] == "blocks.2.resid_post"]
    logits = model.logits("the cat sat")[0]
    for row, expected in zip(last, logits.softmax(-1), strict=True):
        best = expected.topk(2)
        assert row["top"] == model.token_strings(best.indices)
        assert row["probabilities"] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert row["kl"] == pytest.approx(0, abs=1e-5) and row["agrees"]


@pytest.mark.parametrize("width", [40, 60, 100, 200])
@pytest.mark.parametrize("prompt", ["the", "the cat sat on the mat", "the cat sat on the mat and " * 5])
def test_the_grid_fits_the_terminal(
    actlas: Run, tiny: str, width: int, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = actlas("trace", tiny, prompt)
    assert said.status == 0
    lines = said.out.splitlines()
    assert all(cell_len(line) <= width for line in lines)
    assert [line.split()[0] for line in lines[1:4]] == ["2", "1", "0"]
    shown = re.search(r"(\d+) not shown", " ".join(lines))
    tokens = int(re.search(r"(\d+) tokens", " ".join(lines)).group(1))  # type: ignore[union-attr]
    assert (shown is not None) == (tokens > 8 if width == 100 else shown is not None)


def test_trace_writes_a_page_that_needs_nothing_else(actlas: Run, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "lens.html"
    prompt = "</script><b>@@DATA@@ the cat"
    assert actlas("trace", tiny, prompt, "--html", file, "--top", "4").status == 0
    page = file.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)
    assert "&lt;/script&gt;&lt;b&gt;@@DATA@@ the cat" in page and "<b>@@" not in page
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert "".join(data["tokens"]) == prompt
    assert len(data["names"]) == len(data["p"]) == 3 and len(data["names"][0]) == len(data["tokens"])
    assert all(len(cell) == 4 for row in data["p"] for cell in row)


def test_trace_saves_activations(actlas: Run, tiny: str, tmp_path: Path) -> None:
    from actlas.models import load

    said = actlas(
        "trace", tiny, "the cat", "--sites", "blocks.1.mlp.act", "--save", tmp_path / "acts", "--json"
    )
    assert said.json["saved"] == str(tmp_path / "acts")
    manifest, tensors = load_artifact(tmp_path / "acts", "trace")
    assert manifest["prompt"] == "the cat" and list(tensors) == ["blocks.1.mlp.act"]
    expected = load(tiny).trace("the cat", "blocks.1.mlp.act")["blocks.1.mlp.act"]
    assert torch.equal(tensors["blocks.1.mlp.act"], expected)


def test_trace_under_an_edit(actlas: Run, tiny: str, vector: str) -> None:
    plain = actlas("trace", tiny, "the cat", "--json").json
    zero = actlas("trace", tiny, "the cat", "--edit", f"{vector}*0", "--json").json
    moved = actlas("trace", tiny, "the cat", "--edit", f"{vector}*5", "--json").json
    assert plain["lens"] == zero["lens"] != moved["lens"]
    assert moved["edits"] == ["Add at blocks.1.resid_post x 5"]
    first = [row for row in moved["lens"] if row["site"] == "blocks.0.resid_post"]
    for row, before in zip(first, plain["lens"], strict=False):
        assert row["top"] == before["top"]  # the edit is at block 1, so block 0 is as it was


def test_generate_plain_edited_and_compared(actlas: Run, tiny: str, vector: str) -> None:
    plain = actlas("generate", tiny, "the cat", "--max-new-tokens", 8)
    again = actlas("generate", tiny, "the cat", "--max-new-tokens", 8, "--json").json
    assert plain.status == 0 and plain.out == again["base"] + "\n" and "edited" not in again
    both = actlas(
        "generate", tiny, "the cat", "--max-new-tokens", 8, "--edit", f"{vector}*30", "--compare", "--json"
    )
    assert both.json["base"] == again["base"] != both.json["edited"]
    zero = actlas("generate", tiny, "the cat", "--max-new-tokens", 8, "--edit", f"{vector}*0", "--json").json
    assert zero["edited"] == again["base"] and "base" not in zero
    sampled = [
        actlas("generate", tiny, "the", "--temperature", 2, "--seed", seed, "--json").json["base"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_measure_lists_and_measures(actlas: Run, tiny: str, book: Path) -> None:
    listed = actlas("measure", "--list", "--json").json["measures"]
    assert {"perplexity", "task-accuracy"} <= {m["name"] for m in listed}
    said = actlas(
        "measure", tiny, "perplexity", "parameters", "--data", book, "--tokens", "400", "--json"
    ).json
    found = {m["name"]: m for m in said["measurements"] if "domain" not in m["group"]}
    assert found["perplexity"]["low"] <= found["perplexity"]["value"] <= found["perplexity"]["high"]
    assert found["parameters"]["value"] > 1000
    assert "perplexity" in actlas("measure", tiny, "perplexity", "--data", book, "--tokens", "400").out


def test_measure_shows_the_paired_difference_that_an_edit_makes(
    actlas: Run, tiny: str, vector: str, book: Path
) -> None:
    arguments = ["measure", tiny, "perplexity", "--data", book, "--tokens", 400]
    rows = actlas(*arguments, "--edit", f"{vector}*9", "--json").json["comparison"]["rows"]
    base, edited = (next(r for r in rows if r["variant"] == v) for v in ("base", "edited"))
    change = edited["difference"]
    values = [r["measurement"]["value"] for r in (base, edited)]
    assert math.isclose(change["value"], values[1] - values[0], rel_tol=1e-9)
    assert change["low"] <= change["value"] <= change["high"]
    zero = actlas(*arguments, "--edit", f"{vector}*0", "--json").json["comparison"]["rows"]
    assert all(r["difference"]["value"] == 0 for r in zero if r["variant"] == "edited")
    table = actlas(*arguments, "--edit", f"{vector}*2", "--edit", f"{vector}*3", "--each").out
    assert "vec*2 - base" in table and "vec*3 - base" in table


def test_measure_on_a_task(actlas: Run, tiny: str) -> None:
    said = actlas("measure", tiny, "task-accuracy", "--data", "nothing-like-this").failed()
    assert "there is no corpus 'nothing-like-this'" in said and "ioi" in said


def test_calibrate_saves_what_the_library_reads(actlas: Run, tiny: str, book: Path, tmp_path: Path) -> None:
    from actlas.core.calibration import Calibration
    from actlas.models import load

    target = tmp_path / "cal"
    said = actlas(
        "calibrate", tiny, book, "--site", "blocks.*.mlp.act", "--stats", "moments,absmax", "--tokens", 300,
        "-o", target, "--json",
    )  # fmt: skip
    made = Calibration.load(target, load(tiny))
    assert (
        len(made) == 3 and said.json["stats"] == ["moments", "absmax"] and said.json["saved"] == str(target)
    )
    for row in said.json["sites"]:
        assert row["absolute maximum"] == pytest.approx(float(made[row["site"]].absmax.max()))
    again = actlas("calibrate", tiny, book, "--site", "blocks.1.resid_post", "--tokens", 100, "-o", target)
    assert again.status == 0 and list(Calibration.load(target)) == ["blocks.1.resid_post"]


def test_fit_saves_a_lens_that_steers(actlas: Run, tiny: str, tmp_path: Path) -> None:
    rows = [{"positive": f"the cat {k}", "negative": f"a dog {k}"} for k in range(24)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    target = tmp_path / "probe"
    said = actlas(
        "fit",
        "probe",
        tiny,
        data,
        "--site",
        "blocks.1.resid_post",
        "--option",
        "method=ridge",
        "-o",
        target,
        "--json",
    )
    assert said.status == 0, said
    assert said.json["saved"] == str(target) and said.json["measurements"]
    manifest, _ = load_artifact(target, "lens")
    assert manifest["lens"]["site"] == "blocks.1.resid_post"
    steered = actlas("generate", tiny, "the", "--edit", f"{target}#0*4", "--json")
    assert steered.json["edits"] and steered.json["edits"][0].startswith("Add at blocks.1.resid_post")


def test_fit_on_a_corpus(actlas: Run, tiny: str, book: Path, tmp_path: Path) -> None:
    said = actlas("fit", "pca", tiny, book, "--site", "blocks.0.resid_post", "-o", tmp_path / "pca")
    assert said.status == 0 and f"saved in {tmp_path / 'pca'}" in said.out


def test_methods(actlas: Run) -> None:
    assert {"probe", "pca"} <= {m["name"] for m in actlas("methods", "--json").json["methods"]}
    one = actlas("methods", "probe", "--json").json
    assert one["options"]["site"] == {"required": True}
    assert "did you mean probe" in actlas("methods", "prob").failed()
    assert "the rooms are" in actlas("methods", "--room", "cellar").failed()


def test_papers(actlas: Run) -> None:
    every = actlas("papers", "--json").json["papers"]
    assert len(every) == 135 and len({p["slug"] for p in every}) == 135
    assert actlas("papers", "void", "--json").json["slug"] == "void"
    assert "Void in Language Models" in actlas("papers", "void").out
    assert "no paper is called" in actlas("papers", "viod").failed()
    assert "room" in actlas("papers", "--room", "cellar").failed()


def test_reproduce_wants_one_paper_that_can_be_run(actlas: Run) -> None:
    planned = next(p for p in actlas("papers", "--json").json["papers"] if p["status"] == "planned")
    assert "no reproduction yet" in actlas("reproduce", planned["slug"]).failed()
    assert "no paper is called" in actlas("reproduce", "no-such-paper").failed()
    assert "name one paper" in actlas("reproduce").failed()
    assert "name one paper" in actlas("reproduce", "void", "--all").failed()


def test_reproduce_runs_the_paper_as_asked_and_prints_its_record(
    actlas: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import actlas.papers as room
    from actlas.papers import Reproduction
    from actlas.papers.environment import environment

    asked: list[tuple[str, dict[str, Any]]] = []

    def run(slug: str, **options: Any) -> Reproduction:
        asked.append((slug, options))
        return Reproduction(
            slug=slug, title="T", claim="a claim", criterion="c", measured=[], checks=[], verdict="holds",
            headline="1 of 1", note="", settings={}, mode="quick", seed=3, command="x", seconds=1.0,
            date="2026-01-01", environment=environment(),
        )  # fmt: skip

    monkeypatch.setattr(room, "reproduce", run)
    said = actlas("reproduce", "void", "--seed", "3", "--json").json
    assert said["claim"] == "a claim" and said["verdict"] == "holds"
    assert "a claim" in actlas("reproduce", "void", "--full", "--store").out
    assert asked == [
        ("void", {"quick": True, "seed": 3, "store": False}),
        ("void", {"quick": False, "seed": 0, "store": True}),
    ]
    asked.clear()
    every = actlas("reproduce", "--all", "--json").json["reproductions"]
    assert [r["slug"] for r in every] == [slug for slug, _ in asked] and len(asked) >= 3


def test_models(actlas: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTLAS_CACHE", str(tmp_path))
    found = actlas("models", "--json").json["models"]
    assert {"smollm2", "minilm", "efficientnet-lite0"} <= {m["name"] for m in found}
    assert not any(m["cached"] for m in found)
    assert "0 MB" in actlas("models", "--remove", "minilm").out
    assert "did you mean smollm2" in actlas("models", "--fetch", "smolm2").failed()


def test_card(actlas: Run, tiny: str, tmp_path: Path) -> None:
    target = tmp_path / "card"
    said = actlas("card", tiny, "--out", target, "--sections", "identity", "--json")
    assert said.status == 0, said
    assert {Path(f).name for f in said.json["files"].values()} == {"card.html", "card.md", "card.json"}
    assert all(Path(f).stat().st_size > 100 for f in said.json["files"].values())
    assert said.json["card"]["kind"] == "card"
    assert str(target / "card.html") in actlas("card", tiny, "--out", target, "--sections", "identity").out


def test_card_is_filled_from_a_template(actlas: Run, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "about.yaml"
    assert str(file) in actlas("card", tiny, "--fill-template", file).out
    assert "exists already" in actlas("card", "--fill-template", file).failed()
    said = actlas("card", tiny, "--out", tmp_path / "c", "--sections", "identity", "--fill", file)
    assert said.status == 0, said
    file.write_text("no: [such")
    assert str(file) in actlas("card", tiny, "--out", tmp_path / "d", "--fill", file).failed()
    assert not (tmp_path / "d").exists()


def commands_with_json(tiny: str, book: Path, tmp_path: Path) -> list[list[Any]]:
    return [
        ["sites", tiny, "embed"],
        ["trace", tiny, "the cat", "--html", tmp_path / "a.html"],
        ["generate", tiny, "the", "--max-new-tokens", 2],
        ["measure", tiny, "parameters"],
        ["calibrate", tiny, book, "--site", "blocks.0.resid_post", "--tokens", 50, "-o", tmp_path / "c"],
        ["fit", "pca", tiny, book, "--site", "blocks.0.resid_post", "-o", tmp_path / "p"],
        ["methods"],
        ["papers"],
        ["models"],
    ]


def test_json_is_one_document_even_when_a_library_prints(
    actlas: Run, tiny: str, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import actlas.models as room

    load = room.load

    def noisy(*arguments: Any, **options: Any) -> Any:
        print("a library says hello")
        return load(*arguments, **options)

    monkeypatch.setattr(room, "load", noisy)
    for arguments in commands_with_json(tiny, book, tmp_path):
        said = actlas(*arguments, "--json")
        assert said.status == 0, said
        assert isinstance(json.loads(said.out), dict), arguments


def test_json_holds_no_nan() -> None:
    from actlas.cli.output import plain
    from actlas.core.measurement import Measurement

    value = {
        "a": math.nan,
        "b": [math.inf, 1.5],
        "c": Measurement("m", math.nan, "x", 0),
        "d": Path("p"),
        "e": {2, 1},
    }
    made = plain({**value, "f": torch.tensor([1.0, math.nan])})
    json.dumps(made, allow_nan=False)
    assert made["a"] is None and made["b"] == [None, 1.5] and made["d"] == "p" and made["e"] == [1, 2]
    assert made["c"]["value"] is None and made["f"] == [1.0, None]
