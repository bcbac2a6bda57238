"""Linear layers that leave out inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import ActlasError
from actlas.core.skip_inputs import SkipInputs
from tests.core.tiny import tiny

SITE = "module:model.layers.1.mlp.up_proj.input"


@pytest.mark.parametrize("rule", ["threshold", "channel", "keep", "frozen"])
def test_a_layer_sees_only_what_is_kept(rule: str, tmp_path: Path) -> None:
    model = tiny()
    d = model.d_model or 0
    x = model.trace("hello there", SITE)[SITE]
    factor = torch.rand(d, generator=torch.Generator().manual_seed(0))
    score = x.abs() * factor
    edit, want = {
        "threshold": lambda: (SkipInputs(SITE, factor, threshold=0.1), score >= 0.1),
        "channel": lambda: (SkipInputs(SITE, factor, threshold=factor * 0.2), score >= factor * 0.2),
        "keep": lambda: (
            SkipInputs(SITE, factor, keep=0.25),
            score >= score.topk(round(0.25 * d)).values[..., -1:],
        ),
        "frozen": lambda: (SkipInputs(SITE, frozen=factor > 0.5), (factor > 0.5).expand_as(x)),
    }[rule]()
    loaded = Edit.load(edit.save(tmp_path / "e", model), model)
    with model.edit(loaded):
        out = model.trace("hello there", ["module:model.layers.1.mlp.up_proj.output", "blocks.1.mlp.gate"])
    up = model.module.model.layers[1].mlp.up_proj
    assert torch.allclose(out["module:model.layers.1.mlp.up_proj.output"], up(x * want), atol=1e-5)
    assert torch.allclose(
        out["blocks.1.mlp.gate"], model.trace("hello there", "blocks.1.mlp.gate")["blocks.1.mlp.gate"]
    )
    assert 0.0 < float(want.float().mean()) < 1.0


def test_skipping_nothing_changes_nothing() -> None:
    model = tiny()
    want = model.logits("hello")
    for edit in (SkipInputs(SITE), SkipInputs(SITE, keep=1.0), SkipInputs(SITE, threshold=1e9) * 0):
        with model.edit(edit):
            assert torch.equal(model.logits("hello"), want)


def test_ties_keep_the_lower_channel_and_exactly_k() -> None:
    kept = SkipInputs(SITE, keep=0.5).mask(torch.ones(3, 8))
    assert kept.sum(-1).tolist() == [4, 4, 4] and bool(kept[:, :4].all())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.0}, "in \\(0, 1\\]"),
        ({"keep": 1.5}, "in \\(0, 1\\]"),
        ({"threshold": -1.0}, "threshold must not be negative"),
        ({"factor": torch.tensor([-1.0])}, "factor must not be negative"),
        ({"frozen": torch.ones(3)}, "bool"),
        ({"activation": "tanh"}, "activation"),
    ],
)
def test_bad_rules_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ActlasError, match=said):
        SkipInputs(SITE, **options)  # type: ignore[arg-type]
    model = tiny()
    with (
        pytest.raises(ActlasError),
        model.edit(SkipInputs("blocks.1.mlp.act", frozen=torch.ones(3, dtype=torch.bool))),
    ):
        pass
