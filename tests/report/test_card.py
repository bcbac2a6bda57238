"""`card(...)` from end to end on small random models, and what must not go wrong while writing it."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from actlas.core.edits import Add
from actlas.core.errors import FailureError, InputError, ModelError
from actlas.core.model import Model
from actlas.report import Card, SectionResult, card
from actlas.report import registry as registry_module
from actlas.report.budget import FULL, QUICK, Budget, budget_for
from actlas.report.frontmatter import check_metadata, split_metadata
from actlas.report.registry import Context, SectionInfo, known_sections
from tests.measure.small_models import bert, gpt2, llama, vit
from tests.report.writer import write_many

SMALL = Budget(
    task_prompts=20,
    text_tokens=384,
    atlas_tokens=256,
    sparsity_tokens=256,
    sparsity_passes=2,
    quantize_tokens=256,
    cost_tokens=16,
    cost_repeats=2,
    new_tokens=3,
    images=4,
    pairs=6,
)
FILES = ("card.html", "card.json", "card.md")


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


class Cnn(nn.Module):
    """A plain module: no config, no tokenizer, no name."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


@pytest.fixture(scope="module")
def llama_card(tmp_path_factory: pytest.TempPathFactory) -> tuple[Card, Path]:
    out = tmp_path_factory.mktemp("llama") / "card"
    fill = {"intended_use": {"primary_uses": "<b>tests</b> | & more"}, "model_details": {"license": "mit"}}
    return card(llama(), out, budget=SMALL, fill=fill, debug=True), out


def test_language_model_has_every_section_and_all_three_files(llama_card: tuple[Card, Path]) -> None:
    made, out = llama_card
    assert made.problems == []
    wanted = [
        "identity",
        "use",
        "behaviour",
        "text",
        "atlas",
        "features",
        "circuits",
        "controllability",
        "sparsity",
        "quantizability",
        "cost",
        "methods",
    ]
    assert [s.id for s in made.sections] == wanted
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    assert len(made.tiles) >= 6
    for m in made.measurements:
        assert m.n >= 0 and m.unit is not None
        if m.low is not None and m.high is not None:
            assert m.low <= m.high or math.isnan(m.low)


def test_markdown_file_is_valid_for_the_hub_and_a_fixed_point(llama_card: tuple[Card, Path]) -> None:
    made, out = llama_card
    text = (out / "card.md").read_text(encoding="utf-8")
    assert Card.from_markdown(text).render("md") == text == made.render("md")
    data, _ = split_metadata(text)
    assert check_metadata(data) == []
    parsed = ModelCard(text).data
    assert parsed.license == "mit"
    accuracy = {
        r.dataset_name: r.metric_value for r in parsed.eval_results if r.metric_type == "task_accuracy"
    }
    measured = {
        m.group["task"]: m.value for m in made.measurements if m.name == "task-accuracy" and len(m.group) == 1
    }
    assert accuracy == pytest.approx(measured, rel=1e-5)
    assert {"code", "docs", "prose"} <= {r.dataset_name for r in parsed.eval_results}


def test_json_file_holds_everything_and_loads_back(llama_card: tuple[Card, Path]) -> None:
    made, out = llama_card
    record = json.loads((out / "card.json").read_text(encoding="utf-8"))
    back = Card.load(out)
    assert back.render("json") == made.render("json")
    assert back.render("md") == made.render("md")
    assert record["provenance"]["seed"] == 0 and record["provenance"]["versions"]["torch"]
    assert "card(small llama" in record["provenance"]["command"]
    assert all(s["seconds"] is not None for s in record["sections"])
    used = [d for s in record["sections"] for d in s["data"]]
    assert used and all(re.fullmatch("[0-9a-f]{64}", d["sha256"]) for d in used)
    groups = [m["group"] for s in record["sections"] for m in s["measurements"] + s["details"]]
    assert any("layer" in g for g in groups) and any(len(g) == 3 and "task" in g for g in groups)


def test_html_file_is_one_safe_page(llama_card: tuple[Card, Path]) -> None:
    _, out = llama_card
    html = (out / "card.html").read_text(encoding="utf-8")
    assert len(html) < 2_500_000
    assert "<b>tests</b>" not in html and "&lt;b&gt;tests&lt;/b&gt;" in html
    assert html.count("vegaEmbed=") <= 1 and html.count("<script") == 3
    assert "default-src 'none'" in html
    shell = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|https?://)[^"']""", shell)
    assert not re.search(r"""<(?:link|img|iframe|object|embed)\b""", shell)
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', html, re.DOTALL).group(1))
    places = re.findall(r'data-chart="(\d+)"', html)
    assert [int(p) for p in places] == list(range(len(charts["specs"]))) and len(places) >= 10
    assert all(spec.get("data") or spec["layer"] for spec in charts["specs"])
    for figure in re.findall(r"<figure.*?</figure>", shell, re.DOTALL):
        assert 'role="img" aria-label="' in figure and "<table" in figure and "<noscript><svg" in figure
    ids = re.findall(r'<section id="([\w-]+)"', html)
    assert re.findall(r'<li><a href="#([\w-]+)"', html) == ids


def test_same_seed_gives_the_same_numbers(llama_card: tuple[Card, Path]) -> None:
    made, _ = llama_card
    again = card(llama(), None, budget=SMALL, sections=["behaviour", "text", "atlas"], debug=True)
    for section in again.sections:
        assert section.to_json()["measurements"] == made.section(section.id).to_json()["measurements"]
    other = card(llama(), None, budget=SMALL, sections=["behaviour"], seed=1, debug=True)
    assert (
        other.section("behaviour").to_json()["measurements"]
        != made.section("behaviour").to_json()["measurements"]
    )


def test_the_card_audits_well_and_says_what_is_missing(llama_card: tuple[Card, Path], tmp_path: Path) -> None:
    from actlas.report import audit
    from actlas.report.fill import FIELDS

    _, out = llama_card
    found = {tuple(m.group.values()): m for m in audit(out / "card.md")}
    bare = next(m for m in audit(out / "card.md") if m.name == "documentation completeness")
    for section in ("model details", "factors", "metrics", "evaluation data", "quantitative analyses"):
        assert found[(section,)].value == 1, section
    for section in ("training data", "ethical considerations", "caveats and recommendations"):
        assert found[(section,)].value == 0, section
    filled = {s: {f: f"an answer about {f}" for f in fields} for s, (_, fields) in FIELDS.items()}
    filled["model_details"] |= {"license": "mit", "language": "en", "base_model": "a/b", "tags": "x"}
    filled["training_data"] |= {"datasets": "a/b", "sha256": "0" * 64}
    full = card(
        llama(), None, budget=SMALL, fill=filled, sections=["identity", "use", "behaviour", "methods"]
    )
    from actlas.report.auditing import completeness

    assert completeness(full.render("md")) >= 0.9 > bare.value


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (bert, {"embeddings", "atlas", "features", "quantizability", "cost"}),
        (vit, {"images", "modules", "quantizability", "cost"}),
        (
            gpt2,
            {
                "behaviour",
                "text",
                "atlas",
                "features",
                "circuits",
                "controllability",
                "sparsity",
                "quantizability",
                "cost",
            },
        ),
    ],
)
def test_other_kinds_get_the_sections_that_make_sense(make: Any, wanted: set[str], tmp_path: Path) -> None:
    made = card(make(), tmp_path / "card", budget=SMALL, debug=True)
    ids = {s.id for s in made.sections}
    assert ids == wanted | {"identity", "use", "methods"}
    assert made.problems == []
    notes = " ".join(made.section("methods").result.notes)
    left = [s.title for s in known_sections().values() if s.id not in ids]
    assert all(f"Left out: {title}" in notes for title in left)


@pytest.mark.parametrize("example", [None, torch.rand(3, 1, 20, 20)], ids=["guessed", "given"])
def test_plain_module_gets_identity_statistics_and_cost(example: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    module = Cnn().train()
    made = card(module, None, budget=SMALL, example=example, debug=True)
    assert made.problems == []
    assert [s.id for s in made.sections] == ["identity", "use", "modules", "cost", "methods"]
    modules = made.section("modules").result
    zeros = {m.group["module"]: m for m in modules.details if m.name == "module-zeros"}
    assert set(zeros) == {"features.0", "features.1", "features.2", "features.3", "head"}
    assert zeros["features.2"].value > 0.2 and zeros["features.0"].value == 0
    assert zeros["head"].n == (1 if example is None else 3)
    assert ("guessed" in " ".join(modules.notes)) == (example is None)
    assert hooks(module) == 0


def test_local_folders_are_named_without_the_path_to_them(tmp_path: Path) -> None:
    made = card(
        Model(Cnn(), name="m", source=str(tmp_path / "my-model")), None, budget=SMALL, sections=["identity"]
    )
    text = made.render("md")
    assert "local: my-model" in text and str(tmp_path) not in text


def test_statistics_of_modules_equal_brute_force() -> None:
    torch.manual_seed(1)
    module, x = Cnn().eval(), torch.rand(4, 1, 12, 12)
    made = card(module, None, budget=SMALL, example=x, sections=["modules"], debug=True)
    y = module.features[0](x).detach().double().flatten(1)
    c = y - y.mean(1, keepdim=True)
    truth = {
        "module-rms": y.square().mean(1).sqrt().mean(),
        "module-kurtosis": ((c**4).mean(1) / (c**2).mean(1) ** 2 - 3).mean(),
    }
    for m in made.measurements:
        if m.group["module"] == "features.0" and m.name in truth:
            assert m.value == pytest.approx(float(truth[m.name]), rel=1e-9)


def test_a_module_that_nobody_can_feed_is_told_so() -> None:
    class Odd(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    made = card(Odd(), None, budget=SMALL)
    assert any("pass example=" in p for p in made.problems)
    assert made.section("identity").result.reason == ""


def replaced(monkeypatch: pytest.MonkeyPatch, id: str, function: Any) -> None:
    info = known_sections()[id]
    monkeypatch.setitem(
        registry_module._registry,
        id,
        SectionInfo(id, info.title, info.order, info.needs, info.cost, function),
    )


def test_a_section_that_fails_says_why_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(context: Context) -> SectionResult:
        raise ModelError("no <such> thing")

    def breaks(context: Context) -> SectionResult:
        raise ZeroDivisionError("division by zero")

    replaced(monkeypatch, "text", fails)
    replaced(monkeypatch, "cost", breaks)
    chosen = ["identity", "text", "cost", "methods"]
    made = card(llama(), tmp_path / "card", budget=SMALL, sections=chosen)
    assert made.problems == [
        "Results by kind of text: no <such> thing",
        "Cost: unexpected ZeroDivisionError: division by zero (see it with debug)",
    ]
    assert (
        "<strong>Not measured:</strong> no &lt;such&gt; thing"
        in (tmp_path / "card" / "card.html").read_text()
    )
    assert "*Not measured.* no &lt;such&gt; thing" in (tmp_path / "card" / "card.md").read_text()
    with pytest.raises(ZeroDivisionError):
        card(llama(), None, budget=SMALL, sections=["cost"], debug=True)


def test_ctrl_c_leaves_no_files_no_hooks_and_no_edits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = llama()

    def interrupted(context: Context) -> SectionResult:
        assert context.model.installed
        raise KeyboardInterrupt

    replaced(monkeypatch, "cost", interrupted)
    edit = Add("blocks.0.resid_post", torch.ones(32))
    before = hooks(model.module)
    with pytest.raises(KeyboardInterrupt):
        card(model, tmp_path / "card", budget=SMALL, sections=["atlas", "cost"], edits=[edit])
    assert list(tmp_path.iterdir()) == []
    assert model.installed == () and hooks(model.module) == before


def test_ctrl_c_in_the_middle_of_a_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = llama()
    calls = 0

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt

    handle = model.module.model.layers[1].register_forward_hook(stop)
    before = hooks(model.module)
    with pytest.raises(KeyboardInterrupt):
        card(model, tmp_path / "card", budget=SMALL)
    assert list(tmp_path.iterdir()) == [] and hooks(model.module) == before
    handle.remove()


def test_full_disk_is_one_line_and_keeps_the_old_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "card"
    Card("old").save(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FailureError, match="disk is full") as error:
        Card("new").save(out)
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["card"]
    with pytest.raises(FailureError):
        Card("new").save(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["card"]


def test_nobody_elses_files_are_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("x")
    for out, said in ((folder, "notes.txt"), (tmp_path / "file", "is a file")):
        with pytest.raises(InputError, match=said):
            card("a model that is never loaded", out)
    assert (folder / "notes.txt").read_text() == "keep me"
    out = Card("a").save(tmp_path / "card")
    (out / "my.txt").write_text("keep me too")
    with pytest.raises(InputError, match=r"my\.txt"):
        Card("b").save(out)
    assert Card.load(out).name == "a"


def test_two_processes_writing_one_card_never_mix_it(tmp_path: Path) -> None:
    out = tmp_path / "card"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(str(out), n)) for n in ("first", "second")]
    for w in writers:
        w.start()
    seen = 0
    while any(w.is_alive() for w in writers):
        try:
            handle = os.open(out, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            names = [_name_in(handle, f) for f in FILES]
            assert len(set(names)) == 1, names
            seen += 1
        except FileNotFoundError:
            pass  # this folder was replaced while it was read
        finally:
            os.close(handle)
    for w in writers:
        w.join()
        assert w.exitcode == 0
    assert seen and sorted(p.name for p in out.iterdir()) == sorted(FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["card"]


def _name_in(folder: int, file: str) -> str:
    """The card's name in one of its files, read through a handle of the folder."""
    with os.fdopen(os.open(file, os.O_RDONLY, dir_fd=folder), encoding="utf-8") as f:
        return re.search(r"(?:first|second)\d+", f.read()).group()


def test_edits_are_described_before_and_after_by_group_and_taken_off(tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(0)
    edit = Add("blocks.0.resid_post", 3 * torch.randn(32))
    plain = card(model, None, budget=SMALL, sections=["identity", "behaviour", "text"], debug=True)
    made = card(
        model,
        tmp_path / "card",
        budget=SMALL,
        sections=["identity", "behaviour", "text"],
        edits=[edit],
        debug=True,
    )
    assert model.installed == ()
    assert made.under == [edit.describe()]
    behaviour = made.section("behaviour").result.measurements
    after = {tuple(m.group.items()): m for m in behaviour if m.name == "task-accuracy"}
    moved = [m for m in behaviour if m.name == "change of task-accuracy"]
    assert {tuple(m.group.items()) for m in moved} == set(after)
    before = {
        tuple(m.group.items()): m.value
        for m in plain.section("behaviour").result.measurements
        if m.name == "task-accuracy"
    }
    for m in moved:
        key = tuple(m.group.items())
        assert m.value == pytest.approx(after[key].value - before[key])
        assert m.under == (edit.describe(),) == after[key].under
    assert any(
        m.name == "change of loss-per-byte" and m.value > 0 for m in made.section("text").result.measurements
    )
    assert "Measured with edits" in (tmp_path / "card" / "card.html").read_text()
    difference = plain.diff(made)
    assert any(c.verdict == "worse" for c in difference.changes if c.section == "text")
    assert plain.diff(plain).changed() == []
    assert "task-accuracy" in str(difference) and json.dumps(difference.to_json())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sections": ["sparsty"]}, "did you mean sparsity"),
        ({"seed": -1}, "seed must be"),
        ({"fill": "/nowhere/f.yaml"}, "does not exist"),
        ({"fill": {"caveat": {}}}, "did you mean caveats"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    options: dict, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        card("a model that is never loaded", tmp_path / "card", **options)
    assert list(tmp_path.iterdir()) == []


def test_training_data_by_hash_is_not_measured_on(llama_card: tuple[Card, Path]) -> None:
    made, _ = llama_card
    known = made.section("text").result.data[0].sha256
    fill = {"training_data": {"sha256": ["0" * 64, known]}}
    again = card(llama(), None, budget=SMALL, fill=fill, sections=["text", "cost"])
    assert "training data" in again.section("text").result.reason
    assert again.section("cost").result.reason == ""
    forced = card(llama(), None, budget=SMALL, fill=fill, sections=["text"], force=True)
    assert any("training data" in note for note in forced.section("text").result.notes)


def test_budgets_shrink_with_size_to_a_floor_and_full_is_more() -> None:
    assert budget_for(10**6) == budget_for(135_000_000) == QUICK
    large, giant = budget_for(10**9), budget_for(10**11)
    assert giant.text_tokens <= large.text_tokens < QUICK.text_tokens and giant.text_tokens >= 256
    assert budget_for(10**6, quick=False) == FULL and FULL.text_tokens >= 8 * QUICK.text_tokens
    with pytest.raises(InputError):
        budget_for(10, scale=0)


def test_damaged_and_foreign_card_files_are_refused(tmp_path: Path) -> None:
    from actlas.core.errors import ArtifactError

    path = tmp_path / "card.json"
    for text, said in (
        ("{", "not valid JSON"),
        ('{"kind": "edit"}', "not a card"),
        ('{"kind": "card", "format": 99}', "upgrade"),
        ('{"kind": "card", "format": 1}', "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=said):
            Card.load(path)
    with pytest.raises(ArtifactError, match="not a card"):
        Card.load(tmp_path / "nothing")
