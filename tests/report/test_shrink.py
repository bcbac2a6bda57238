"""Shrinking: what is tried, what is chosen, and a folder that is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actlas.core.artifact import load_artifact
from actlas.core.edit import Edit, compose
from actlas.core.errors import ArtifactError, FingerprintError, InputError, ModelError, NonFiniteError
from actlas.core.model import Model
from actlas.core.packed_weights import PackedWeights
from actlas.core.quant_edit import QuantEdit
from actlas.core.skip_inputs import SkipInputs
from actlas.kernels.loading import native
from actlas.measure.likelihood import nll
from actlas.models.fast_generate import lean_weights
from actlas.report.shrink import Effort, Goal, Row, Shrunk, is_shrunk, load_record, shrink
from actlas.report.shrink import race as races
from actlas.report.shrink import search as module
from actlas.report.shrink.plot import chart
from actlas.report.shrink.quantised import allocate, most_bits, rounding_rises, stored_bytes
from actlas.report.shrink.rows import choose, on_frontier
from actlas.report.shrink.skipping import Skipping
from actlas.report.shrink.speed import Speed, Step, interleave
from actlas.report.shrink.weights import Layers, grid, packed_mixes
from tests.core.tiny import TEXTS, tiny

EFFORT = Effort(tokens=300, context=32, calibration=200, gradients=100, written=6, repeats=1, step=0.2)
DOCUMENTS = [f"{text} {i}" for i in range(6) for text in TEXTS]
lean = pytest.mark.skipif(native() is None, reason="no native kernels")


def search(model: Model, **options: Any) -> Shrunk:
    return shrink(model, DOCUMENTS, effort=EFFORT, **options)


def row(name: str, rate: float, quality: float, bytes: int = 10, **more: Any) -> Row:
    more = {"fits": True, "runtime": "lean loop", **more}
    return Row(name, "q4", 4.0, 0.0, bytes, quality=quality, rate=rate, **more)


# -- choosing ----------------------------------------------------------------------------------


def test_the_frontier_is_what_nothing_beats() -> None:
    rows = [row("a", 10, 1.0), row("b", 20, 1.01), row("c", 15, 1.02), row("d", 20, 1.005), row("e", 5, 1.0)]
    rows += [Row("unknown", "q4", 4.0, 0.0, 1, "lean loop", quality=0.5)]
    assert on_frontier(rows) == {"a", "d"}


def test_what_is_chosen() -> None:
    rows = [
        row("slow", 10, 1.0),
        row("big", 100, 1.002, 20),
        row("small", 98, 1.003, 10),
        row("no", 200, 1.1, fits=False),
    ]
    assert choose(rows, Goal()) == "small"  # within 3% of the fastest, and smaller
    assert choose(rows[:2], Goal()) == "big"
    assert choose([row("dense", 98, 1.0), row("skips", 100, 1.004)], Goal()) == "dense"
    assert choose(rows, Goal(None, bits=4.0)) == "slow"
    near = [row("best", 10, 1.0), row("near", 50, 1.0009), row("off", 90, 1.002)]
    assert choose(near, Goal(None, bits=4.0)) == "near"
    plain = [row("a", 10, 1.0, 30, runtime="transformers"), row("b", 9, 1.0, 8, runtime="transformers")]
    assert choose(plain, Goal()) == "b"  # there packed weights are float weights
    assert choose([], Goal()) is None


def test_the_budget_holds_for_the_upper_end_or_the_estimate() -> None:
    assert Goal(0.01).good(1.005, 1.0099) and not Goal(0.01).good(1.005, 1.02)
    assert Goal(0.01, "estimate").good(1.005, 1.02) and not Goal(0.01, "estimate").good(1.011, 1.02)
    assert Goal(None).good(9.0, 10.0) and not Goal(0.01).good(None, None)


def test_ratios_are_taken_within_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0, 9, 9, 18, *(t for a, b in ((8, 2), (4, 2), (6, 1)) for t in (0, a, 0, b))])
    monkeypatch.setattr("actlas.report.shrink.speed.time.perf_counter", lambda: float(next(now)))
    step = Step(lambda ids: 2)
    found = interleave({"original": step, "other": step}, [[1]], 3)
    assert found["other"] == Speed(rate=1.0, ratio=4.0, low=2.0, high=6.0)
    assert found["original"].ratio == 1.0 and found["original"].rate == pytest.approx(1 / 3)


# -- searching ---------------------------------------------------------------------------------


@lean
def test_a_search_ends_with_an_edit_that_keeps_the_quality(tmp_path: Path) -> None:
    model = tiny()
    before = {n: p.clone() for n, p in model.module.state_dict().items()}
    found = search(model, keep=0.05)
    assert (
        all(torch.equal(p, before[n]) for n, p in model.module.state_dict().items()) and not model.installed
    )
    names = [r.name for r in found.rows]
    assert names[:4] == ["original", "f32", "q8", "q4"]
    assert all(r.rate and r.speed and r.quality for r in found.rows)
    assert sum(r.chosen for r in found.rows) == 1 and found.chosen.fits and found.chosen.high <= 1.05  # type: ignore[operator]
    assert found.lean and found.chosen.frontier | (found.chosen.rate >= 0.9 * max(r.rate for r in found.rows))  # type: ignore[operator, type-var]
    # the quality of a row is that of its edit on the held-out half
    base = nll(model, DOCUMENTS[1::2], tokens=300, context=32)
    with model.edit(found.edit):
        other = nll(model, DOCUMENTS[1::2], tokens=300, context=32)
    ratio = math.exp(other.nll.sum() / other.tokens.sum() - base.nll.sum() / base.tokens.sum())
    assert ratio == pytest.approx(found.chosen.quality, rel=1e-6)
    assert found.base == pytest.approx(math.exp(base.nll.sum() / base.tokens.sum()))

    folder = found.save(tmp_path / "shrunk")
    assert is_shrunk(folder)
    assert {p.name for p in folder.iterdir()} >= {
        "shrink.json",
        "manifest.json",
        "frontier.html",
        "frontier.png",
    }
    record = load_record(folder)
    assert [Row.from_json(r) for r in record["rows"]] == list(found.rows)
    assert record["environment"]["kernels"] and record["settings"]["tokens"] == 300
    edit = Edit.load(folder, model)
    assert lean_weights(model, [edit]).weights == found.chosen.weights
    assert [m.name for m in edit.measurements] == ["shrink-quality", "shrink-speed"]
    assert edit.measurements[0].value == found.chosen.quality
    with pytest.raises(FingerprintError):
        Edit.load(folder, tiny("qwen3"))
    search(model, formats=["f32"], skip=False).save(folder)  # a later search replaces it
    assert load_record(folder)["chosen"] == "f32"


@lean
def test_levels_of_skipped_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    found = search(model, keep=0.5, formats=["q4"], everything=True)
    levels = {r.name: r for r in found.rows if r.skipped}
    assert levels and all(r.weights == "q4" and 0 < r.touched < 1 for r in levels.values())  # type: ignore[operator]
    high = max(r.skipped for r in levels.values())
    assert high == pytest.approx(0.6)  # everything fits, so the bisection ends at the top
    strict = search(model, keep=0.0, formats=["q4"], rule="estimate", everything=True)
    assert min(r.skipped for r in strict.rows if r.skipped) == pytest.approx(0.2)
    monkeypatch.setattr(module, "_loses_nothing", lambda mix, model: True)

    def race(self: Any, mixes: Any, **options: Any) -> dict[str, Speed]:
        slow = {m.name: Speed(5.0 if "skipped" in m.name else 50.0, 1.0, 1.0, 1.0) for m in mixes}
        return {"original": Speed(1.0, 1.0, 1.0, 1.0), **slow}

    monkeypatch.setattr(module.Search, "run", race)
    none = search(model, keep=0.5, formats=["q4"])
    assert not [r for r in none.rows if r.skipped]
    assert any("skipping inputs of q4 cannot win" in note for note in none.notes)


def test_one_calibration_gives_every_level() -> None:
    model = tiny()
    skipping = Skipping(model, DOCUMENTS, tokens=200, gradient_tokens=100)
    shares = []
    for level in (0.2, 0.5):
        edit = skipping.edit(level)
        assert all(isinstance(p, SkipInputs) for p in edit.parts())
        shares.append(sum(float(p.threshold > 0) for p in edit.parts()))  # type: ignore[attr-defined]
    assert not any("down_proj" in p.site for p in edit.parts())  # type: ignore[attr-defined]  # 48 inputs
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        skipping.edit(1.0)


@pytest.mark.parametrize("family", ["gpt2", "bert-encoder"])
def test_what_the_lean_loop_cannot_run_is_measured_all_the_same(family: str) -> None:
    model = tiny(family)
    found = search(model, keep=0.5)
    assert [r.name for r in found.rows] == ["original", "q8", "q4"]
    assert found.chosen.name == "q4" and not found.lean
    assert all(r.runtime == ("transformers" if family == "gpt2" else "forward pass") for r in found.rows)
    assert any("cannot run" in note for note in found.notes)
    assert found.quality == ("perplexity" if family == "gpt2" else "embeddings")


def test_without_kernels_and_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    if native() is not None:
        monkeypatch.setattr(module, "kernel_level", lambda: "baseline")
        found = search(model, formats=["f32"], skip=False)
        assert any("neither AVX2" in note for note in found.notes)
    monkeypatch.setattr("actlas.models.decoder.native", lambda: None)
    found = search(model, keep=0.5, formats=["q4"])
    assert [r.runtime for r in found.rows] == ["transformers", "transformers"]
    assert any("native kernels are not installed" in note for note in found.notes)


def test_races_are_cut_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mixes = packed_mixes(Layers(tiny())) * 3
    monkeypatch.setattr(races, "MEMORY", 2 * max(m.bytes for m in mixes[1:]))
    cut = list(races._batches(mixes))
    assert [m for batch in cut for m in batch] == mixes and len(cut) > 1
    own = [sum(m.bytes for m in batch if m.weights != "f32") for batch in cut]
    assert native() is None or max(own) <= races.MEMORY


def test_a_grid_that_weights_lie_on_is_said() -> None:
    model = tiny()
    layers = Layers(model)
    assert grid(layers) is None
    for mix in packed_mixes(layers, ["q4"]):
        with model.edit(*mix.edits):
            held = {p.path: p.weight(model).clone() for p in layers.blocks}
    for path, weight in held.items():
        model.module.get_submodule(path).weight.data = weight  # type: ignore[union-attr]
    for layer in layers.blocks:  # 48 inputs make no group of 32, so those stay off the grid
        if layer.columns % 32:
            model.module.get_submodule(layer.path).weight.data.zero_()  # type: ignore[union-attr, operator]
    names = [layer for layer in layers.blocks if layer.columns % 32 == 0]
    layers.blocks = names
    assert grid(layers) == (4, 32)


# -- sizes -------------------------------------------------------------------------------------


@lean
def test_bits_by_layer_and_the_best_method() -> None:
    model = tiny()
    found = search(model, keep=None, bits=3.0, methods=["rtn", "gptq"], skip=False)
    small = [r for r in found.rows if r.fits]
    assert {r.weights for r in small} == {"rtn", "gptq"}
    assert all(r.bits <= 3.0 for r in small) and found.chosen in small
    best = min(r.quality for r in small)  # type: ignore[type-var]
    assert found.chosen.quality <= best * 1.001  # type: ignore[operator]
    assert any(isinstance(p, QuantEdit) for p in found.edit.parts())
    assert not found.original.fits


def test_a_limit_in_bytes() -> None:
    layers = Layers(tiny())
    whole = stored_bytes(layers, 8)
    assert most_bits(layers, None, round(whole) + 1) == pytest.approx(8)
    bits = most_bits(layers, None, round(stored_bytes(layers, 3.5)))
    assert bits == pytest.approx(3.5, abs=0.05)
    assert most_bits(layers, 3.0, round(stored_bytes(layers, 3.5))) == pytest.approx(3.0)
    with pytest.raises(InputError, match="the least is 2"):
        most_bits(layers, None, 100)


def test_rises_are_what_the_loss_minds() -> None:
    model = tiny()
    layers = Layers(model).blocks[:6]
    rises = rounding_rises(model, DOCUMENTS, layers, tokens=200, seed=0)
    for of in rises.values():
        assert of[2] > of[3] > of[4] > of[8] > 0
    dead = layers[0]
    nothing = model.module.get_submodule("model.layers.0.self_attn.o_proj")
    nothing.weight.data.zero_()  # type: ignore[union-attr, operator]
    again = rounding_rises(model, DOCUMENTS, layers, tokens=200, seed=0)
    assert set(again[dead.path].values()) == {0.0}  # q_proj reaches nothing


def test_bits_go_where_they_save_most() -> None:
    rises = {"a": {2: 9.0, 3: 1.0, 4: 0.5}, "b": {2: 2.0, 3: 1.9, 4: 0.1}, "c": {2: 0.2, 3: 0.1, 4: 0.0}}
    same = dict.fromkeys(rises, 10)
    assert allocate(rises, same, 2.0) == {"a": 2, "b": 2, "c": 2}
    assert allocate(rises, same, 2.34) == {"a": 3, "b": 2, "c": 2}
    assert allocate(rises, same, 3.0) == {"a": 3, "b": 4, "c": 2}  # two bits for b at once
    assert allocate(rises, same, 4.0) == {"a": 4, "b": 4, "c": 4}
    assert allocate(rises, {"a": 1000, "b": 10, "c": 10}, 2.02) == {"a": 2, "b": 4, "c": 2}  # a is too large


# -- bad input ---------------------------------------------------------------------------------


def test_bad_input() -> None:
    model = tiny()
    for options, said in (
        ({"keep": -0.1}, "keep is the rise"),
        ({"rule": "mean"}, "'upper' or 'estimate'"),
        ({"bits": 0.5}, "bits is 0.5"),
        ({"most_bytes": 0}, "above 0"),
        ({"formats": ["q5"]}, "no weight format 'q5'"),
        ({"keep": None, "bits": 3.0, "methods": ["gptqq"]}, "did you mean gptq"),
    ):
        with pytest.raises(InputError, match=said):
            search(model, **options)
    with pytest.raises(InputError, match="2 documents"):
        shrink(model, ["one text", "another text"], effort=EFFORT)
    with pytest.raises(ModelError, match="kind image-classifier"):
        shrink(tiny_vit(), DOCUMENTS, effort=EFFORT)
    model.module.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(NonFiniteError):
        search(model)


def tiny_vit() -> Model:
    from tests.core.families import BY_NAME

    return BY_NAME["vit"].model()


def test_a_quantised_model_is_refused() -> None:
    from actlas.core.quant_linear import QuantLinear

    model = tiny()
    path = "model.layers.0.mlp.gate_proj"
    with (
        model.edit(QuantEdit({path: QuantLinear.of(model.module.get_submodule(path), "int4-g32")})),
        pytest.raises(ModelError, match="quantised already"),
    ):
        Layers(model)


def result(model: Model) -> Shrunk:
    rows = (
        Row("original", "f32", 32, 0, 9, "transformers", 1.0, 1.0, 1.0, 1.0, 10.0, 1.0, fits=True),
        row("q4", 90.0, 1.004, 2, low=1.001, high=1.006, speed=9.0, chosen=True, frontier=True),
    )
    edit = compose([PackedWeights(Layers(model).formats("q4"))]).bind(model.fingerprint)
    return Shrunk("tiny", Goal(), rows, edit, True, "perplexity", 9.0, (), {}, {})


def test_a_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = result(tiny())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("do not lose me")
    with pytest.raises(InputError, match="not a shrunk model"):
        found.save(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        found.save(tmp_path / "file")

    def full(path: Path, content: object) -> Path:
        if path.name == "shrink.json":
            raise KeyboardInterrupt
        return write(path, content)  # type: ignore[arg-type]

    from actlas.core import artifact

    write: Callable[[Path, Any], Path] = artifact.atomic_write
    monkeypatch.setattr(artifact, "atomic_write", full)
    with pytest.raises(KeyboardInterrupt):
        found.save(tmp_path / "cut")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_a_record_that_is_no_record(tmp_path: Path) -> None:
    found = result(tiny()).save(tmp_path / "s")
    record = json.loads((found / "shrink.json").read_text())
    for change, said in (({"kind": "edit"}, "lacks the fields"), ({"format": 99}, "upgrade")):
        (found / "shrink.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(ArtifactError, match=said):
            load_record(found)
    (found / "shrink.json").write_text("{")
    with pytest.raises(ArtifactError, match="not readable"):
        load_record(found)
    assert load_artifact(found, "edit")


def test_the_plot_shows_what_was_measured() -> None:
    found = result(tiny())
    spec = chart(found.rows, found.goal).to_dict()
    text = json.dumps(spec)
    assert "rise of the perplexity" in text and "q4" in text
    assert chart(found.rows[:1], found.goal) is None
