"""Token ablation: the direction is what erasing the right tokens changes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actlas.core.answer_function import token_ids
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.steering.directions import fit_direction, fit_directions
from actlas.steering.token_ablation import token_ablation
from tests.core.tiny import tiny

SITE = "blocks.1.resid_post"
PAIRS = [(f"The committee met {w}e", f"The committee met {w}i") for w in ("on", "at", "in", "by", "up")]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("gpt-neox")


def ascending(model: Model, ids: Tensor, start: int) -> Tensor:
    """An attribution that finds the last token of the prompt best and its first worst."""
    return torch.arange(len(ids))


def last(model: Model, ids: Tensor, erase: int | None = None) -> Tensor:
    ids = ids.clone()
    if erase is not None:
        ids[erase] = model.tokenizer.pad_token_id
    return model.trace({"input_ids": ids.unsqueeze(0)}, SITE)[SITE][0, -1].double()


def test_the_direction_is_the_mean_change_of_the_chosen_tokens(model: Model) -> None:
    options = {"k": 1, "attribution": ascending, "reduce": "mean"}
    found = token_ablation(model, PAIRS, SITE, **options)[SITE]  # type: ignore[arg-type]
    top, bottom = [], []
    for pair in PAIRS:
        for side, text in enumerate(pair):
            ids = token_ids(model, text)
            end, start = len(ids) - 2, 0
            best, worst = (
                (end, start) if side == 0 else (start, end)
            )  # the dispreferred answer counts negative
            top.append(last(model, ids) - last(model, ids, best))
            bottom.append(last(model, ids) - last(model, ids, worst))
    wanted = torch.stack(top).mean(0) - torch.stack(bottom).mean(0)
    assert torch.allclose(found.vector.double(), wanted, atol=1e-4)
    positive = token_ablation(model, PAIRS, SITE, mode="positive", **options)[SITE]  # type: ignore[arg-type]
    assert torch.allclose(positive.vector.double(), torch.stack(top).mean(0), atol=1e-4)


def test_a_component_has_the_means_length_and_sign(model: Model) -> None:
    options = {"k": 1, "attribution": ascending, "mode": "positive"}
    mean = token_ablation(model, PAIRS, SITE, reduce="mean", **options)[SITE]  # type: ignore[arg-type]
    first = token_ablation(model, PAIRS, SITE, reduce="pca", **options)[SITE]  # type: ignore[arg-type]
    assert first.norm == pytest.approx(mean.norm, rel=1e-4)
    assert first.cosine(mean) > 0


def test_one_attribution_serves_all_sites_and_fit_direction(model: Model) -> None:
    both = fit_directions(model, PAIRS, "blocks.1-2.resid_post", method="token_ablation", k=2, steps=4)
    one = fit_direction(model, PAIRS, SITE, method="token_ablation", k=2, steps=4)
    assert set(both) == {SITE, "blocks.2.resid_post"}
    assert torch.equal(both[SITE].vector, one.vector)
    assert one.method == "token_ablation" and one.n == len(PAIRS) and one.data
    with model.edit(one.steer(0.1, keep_norm=True)):
        model.logits(PAIRS[0][0])


@pytest.mark.parametrize("replace", ["pad", "mask", "mean"])
def test_every_replacement_gives_a_direction_of_its_own(model: Model, replace: str) -> None:
    found = token_ablation(model, PAIRS, SITE, k=1, attribution=ascending, replace=replace)[SITE]  # type: ignore[arg-type]
    other = token_ablation(model, PAIRS, SITE, k=2, attribution=ascending, replace=replace)[SITE]  # type: ignore[arg-type]
    assert found.norm > 0 and not torch.allclose(found.vector, other.vector)


def test_random_tokens_follow_the_seed(model: Model) -> None:
    a, b, c = (
        token_ablation(model, PAIRS, SITE, attribution="random", seed=s)[SITE].vector for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_bad_input(model: Model) -> None:
    with pytest.raises(InputError, match="k is 99"):
        token_ablation(model, PAIRS, SITE, k=99, attribution="random")
    with pytest.raises(InputError, match="replace is 'noise'"):
        token_ablation(model, PAIRS, SITE, replace="noise")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="attribution is 'luck'"):
        token_ablation(model, PAIRS, SITE, attribution="luck")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shared beginning"):
        token_ablation(model, [("abc", "xyz")], SITE)
    with pytest.raises(InputError, match="needs pairs"):
        fit_direction(model, [("a text", 1.0), ("another", 0.0)], SITE, method="token_ablation")
    model.tokenizer.pad_token, model.tokenizer.eos_token = None, None
    try:
        with pytest.raises(InputError, match="neither a padding"):
            token_ablation(model, PAIRS, SITE, attribution="random")
    finally:
        model.tokenizer.pad_token, model.tokenizer.eos_token = "<pad>", "</s>"


def test_it_can_be_fitted_as_a_steering_edit(model: Model) -> None:
    from actlas.steering.fit import fit_steer

    pairs = [
        (f"The {w} met one", f"The {w} met two") for w in ("on", "at", "in", "by", "up", "to", "of", "as")
    ]
    edit = fit_steer(model, pairs, "blocks.0-1.resid_post", method="token_ablation", k=1, steps=2, controls=1)
    first = edit.measurements[0]
    assert first.details["method"] == "token_ablation"
    assert any(m.group.get("control") == "shuffled pairs" for m in edit.measurements)
