"""A knob fitted from a file of pairs on the command line, and what its edit does there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actlas.circuits.knob import SetProjection
from actlas.core.edit import Edit


def test_fit_a_knob_and_generate_with_it(actlas: Callable[..., Any], tiny: str, tmp_path: Path) -> None:
    starts = ("the cat", "a dog", "the mat", "the house", "a cat", "the dog", "on the mat", "to the house")
    rows = [{"positive": f"{s} ran", "negative": f"{s} sat"} for s in starts]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    target = tmp_path / "knob"
    site = ("--site", "blocks.1.resid_post")
    said = actlas("fit", "knob", tiny, data, *site, "--names", '["run", "sit"]', "-o", target, "--json")
    assert said.status == 0, said
    names = {m["name"] for m in said.json["measurements"]}
    assert {"turned", "share of the parts"} <= names
    loaded = Edit.load(target)
    assert isinstance(loaded, SetProjection) and loaded.names == ("run", "sit")
    assert loaded.to == loaded.means[0]
    steered = actlas("generate", tiny, "the cat", "--edit", target, "--json")
    assert steered.status == 0 and steered.json["edits"][0].startswith("SetProjection at blocks.1.resid_post")
    wrong = actlas("fit", "knob", tiny, data, *site, "--method", "pca", "-o", tmp_path / "w")
    assert "'mean_diff' or 'das'" in wrong.failed()
