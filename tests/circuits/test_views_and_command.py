"""Heat maps, attention views, knobs, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from actlas.circuits import PromptPairs, attention_view, attribute, head, heat_map, knob_curve, patch
from actlas.circuits.nodes import Node, nodes
from actlas.circuits.views import column_names, grid_of, save_png
from actlas.cli.main import main
from actlas.core.edits import HeadScale
from actlas.core.errors import InputError, SiteError
from actlas.core.model import Model
from tests.circuits.pairs import metric, model_of, pairs_of
from tests.cli.conftest import Said, make_model


def test_effects_lie_in_a_table_of_layers_and_columns() -> None:
    model = model_of()
    pairs = pairs_of(model)
    found = attribute(model, pairs, "components")
    grid = grid_of(found)
    assert grid is not None and grid.layers == (0, 1, 2) and grid.columns == ("0", "1", "2", "3", "MLP")
    assert found.parts[grid.cells[1, 2]] == head(1, 2)
    assert found.parts[grid.cells[2, 4]] == Node("blocks.2.mlp.out")
    where = attribute(model, pairs, "positions")
    table = grid_of(where)
    assert table is not None and table.columns == tuple(str(-i) for i in range(7, 0, -1))
    assert column_names(where, pairs)["-1"] == "-1"
    assert grid_of(attribute(model, pairs, "neurons")) is None
    for effects in (found, where, attribute(model, pairs, "neurons")):
        cells = heat_map(effects, pairs).to_dict()
        assert cells["title"]["text"].startswith("Denoise patching of tiny-llama")


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    model = model_of()
    found = attribute(model, pairs_of(model), "heads")
    path = save_png(found, tmp_path / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_attention_views_are_the_pattern_of_the_last_token() -> None:
    model = model_of()
    pairs = pairs_of(model)
    view = attention_view(model, pairs, [(1, 2)])[0]
    pattern = model.trace(dict(pairs.clean), "blocks.1.attn.pattern")["blocks.1.attn.pattern"]
    torch.testing.assert_close(view.weights, pattern[:, 2, -1].float())
    rows = torch.arange(4)
    mean = float(pattern[rows, 2, -1, pairs.changed].mean())
    assert view.by_position["changed"][0] == pytest.approx(mean, abs=1e-6)
    assert view.by_position["changed"][1] <= mean <= view.by_position["changed"][2]
    with pytest.raises(SiteError):
        attention_view(model, pairs, [(1, 9)])
    with pytest.raises(InputError, match="no head"):
        attention_view(model, pairs, [])


def test_the_knob_is_the_edit_that_scales_a_head() -> None:
    model = model_of()
    pairs = pairs_of(model)
    points = knob_curve(model, pairs, 1, 2, factors=(0.0, 1.0, 3.0))
    for point in points:
        edits = [HeadScale("blocks.1.attn.z", {2: point.factor})] if point.factor != 1 else []
        with model.edit(*edits):
            expected = float(metric(model.logits(dict(pairs.clean))[:, -1], pairs).mean())
        assert point.value == pytest.approx(expected, abs=1e-5)
        assert point.low <= point.value <= point.high
    assert points[1].value == pytest.approx(float(pairs.difference.mean()), abs=1e-5)
    with pytest.raises(InputError, match="no factor"):
        knob_curve(model, pairs, 1, 2, factors=())


def test_nodes_are_listed_and_named() -> None:
    model = model_of()
    assert len(nodes(model, "components")) == 3 * (4 + 1)
    assert [n.label for n in nodes(model, "heads", layers=[-1])] == ["L2H0", "L2H1", "L2H2", "L2H3"]
    assert [n.label for n in nodes(model, "mlps", layers=[0], positions=["last", -2])] == [
        "MLP 0 at last",
        "MLP 0 at -2",
    ]
    assert nodes(model, "blocks.*.attn.v[head=1]")[2] == Node("blocks.2.attn.v[head=1]")
    assert Node("blocks.3.mlp.act[channel=17]").label == "L3N17"


def test_features_of_a_dictionary() -> None:
    """A feature's patch adds the change of its code along its atom and leaves the rest alone."""
    from actlas.dictionaries.topk import TopKSAE

    model = model_of()
    pairs = pairs_of(model)
    sae = TopKSAE.create("blocks.1.resid_post", 32, 64, seed=0, k=4)
    found = patch(model, pairs, "features", lens=sae)
    assert len(found) == 64 and int((~found.inert).sum()) > 8
    j = int(found.values.abs().argmax())
    name = "blocks.1.resid_post"
    x, y = (model.trace(dict(side), name)[name] for side in (pairs.corrupt, pairs.clean))
    change = (sae.encode(y).of(j) - sae.encode(x).of(j)).unsqueeze(-1) * sae.atoms[j]
    where = (torch.arange(pairs.width) >= pairs.changed[:, None]) & pairs.clean["attention_mask"].bool()
    from actlas.core.hooks import attach

    handle = attach(model.module, model.resolve(name)[0], lambda x: x + change * where.unsqueeze(-1))
    logits = model.logits(dict(pairs.corrupt))[:, -1]
    handle.remove()
    torch.testing.assert_close(found.patched[j], metric(logits.double(), pairs), rtol=0, atol=5e-6)
    estimated = attribute(model, pairs, "features", lens=sae)
    assert float(torch.corrcoef(torch.stack([found.values, estimated.values]))[0, 1]) > 0.5


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny", 32))


@pytest.fixture
def actlas(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {
            "clean": "the cat sat on the mat",
            "corrupt": "the dog sat on the mat",
            "answer": " and",
            "wrong": " the",
        },
        {
            "clean": "the dog ran to the house",
            "corrupt": "the cat ran to the house",
            "answer": " the",
            "wrong": " and",
        },
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_shows_writes_and_answers_in_json(
    actlas: Callable[..., Said],
    tiny: str,
    file: Path,
    tmp_path: Path,
) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.png"
    asked = ("patch", tiny, "--task", file, "--force", "--over", "components", "--metric", "kl")
    said = actlas(*asked, "--html", page, "--png", picture, "--json")
    assert said.status == 0, said.err
    record = said.json
    assert len(record["effects"]) == 3 * 5 and record["mode"] == "denoise" and record["prompts"] == 2
    assert record["effects"][0]["component"] == "L0H0" and record["agreement"]["n"] == 2
    text = page.read_text()
    assert "@@" not in text and "http" not in text.split("<script")[0] and "kl" in text
    data = text.split('type="application/json">')[1].split("</script>")[0]
    assert len(json.loads(data)["grid"]["cells"]) == 15
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = actlas(*asked, "--how", "attribution", "--positions", "last")
    assert "15 parts, denoise, attribution" in shown.out and "MLP" in shown.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--over", "hedas"), "did you mean heads"),
        (("--how", "fast"), "exact, attribution or ig"),
        (("--mode", "noisy"), "did you mean noise"),
        (("--layers", "3-x"), "write e.g. 0-5,7"),
        (("--layers", "9"), "blocks 0 to 2, not 9"),
        (("--positions", "2"), "negative number"),
        (("--positions", "verb"), "it is all, last, changed"),
        (("--over", "features"), "--lens"),
        (("--over", "blocks.0.attn.nothing"), "no site"),
        (("--html", "."), "is a folder"),
    ],
)
def test_bad_options_end_with_one_line(
    actlas: Callable[..., Said],
    tiny: str,
    file: Path,
    options: tuple[str, ...],
    said: str,
) -> None:
    assert said in actlas("patch", tiny, "--task", file, "--force", "--metric", "kl", *options).failed()


def test_the_method_chooses_on_one_half_and_measures_on_the_other() -> None:
    from actlas.circuits.fit import fit_patching
    from tests.core.tiny import tiny as reader

    model = reader()
    words = ["the cat sat", "the dog sat", "the man ran", "his cat ran", "her dog ran", "one fox ate"]
    letters = "abcdefghij"
    records = [
        {"clean": w, "corrupt": w[:4] + w[4:7].upper() + w[7:], "answer": a, "wrong": b}
        for w in words
        for a, b in pairwise(letters)
    ]
    found = fit_patching(model, _right(model, records)[:12], over="mlps", mode="noise", prompts=12, top=2)
    assert [m.name for m in found] == ["patching-effect"] * 2 and all(m.n == 6 for m in found)
    assert all(m.low is not None and m.high is not None and m.low <= m.value <= m.high for m in found)
    assert "other half" in found[0].note and found[0].group["mode"] == "noise"


def _right(model: Model, records: list[dict[str, str]]) -> list[dict[str, str]]:
    """Keep the records that the random model happens to get right, and right by more than when corrupted."""
    pairs = PromptPairs.from_task(model, records, n=len(records), force=True)
    kept = (pairs.difference > 0) & (pairs.difference > pairs.corrupt_difference)
    return [r for r, k in zip(records, kept.tolist(), strict=True) if k]
