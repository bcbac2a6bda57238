"""Teaching a copy: it learns, the original stays, the cache gives the same copy, bad input."""

from __future__ import annotations

import pytest
import torch

from actlas.core.errors import InputError, ModelError
from actlas.training.skill_tuning import skill_accuracy, tune_skill
from tests.core.tiny import tiny

ITEMS = [("The box holds ", "k"), ("A letter says ", "q"), ("Nobody has ", "zz"), ("We will see ", "P")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACTLAS_CACHE", str(tmp_path / "cache"))


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}


@pytest.mark.parametrize(("train", "lr"), [("all-but-embedding", 5e-3), ("lora", 5e-2)])
def test_a_copy_learns_and_the_model_stays(train, lr) -> None:
    model = tiny()
    before = weights(model)
    tuned = tune_skill(model, ITEMS, steps=40, batch=4, lr=lr, train=train, rank=8)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert skill_accuracy(model, ITEMS) < 1.0 and skill_accuracy(tuned, ITEMS) == 1.0
    changed = {n for n, p in tuned.module.named_parameters() if not torch.equal(p, before[n])}
    assert "model.embed_tokens.weight" not in changed and changed
    if train == "lora":
        assert all("self_attn" in n for n in changed)
        delta = dict(tuned.module.named_parameters())[sorted(changed)[0]] - before[sorted(changed)[0]]
        values = torch.linalg.svdvals(delta)
        assert values[8:].sum() < 0.05 * values[:8].sum()  # rank 8 up to rounding to bfloat16
    assert not tuned.module.training


def test_the_cache_gives_the_same_copy_without_training(monkeypatch, tmp_path) -> None:
    model = tiny()
    first = tune_skill(model, ITEMS, steps=3, batch=2)
    (folder,) = (tmp_path / "cache" / "tuned").glob("[!.]*")
    import actlas.training.skill_tuning as module

    def no_training(*_):
        raise AssertionError("it trained again")

    monkeypatch.setattr(module, "_learn", no_training)
    second = tune_skill(model, ITEMS, steps=3, batch=2)
    assert all(torch.equal(p, weights(second)[n]) for n, p in weights(first).items())
    with pytest.raises(AssertionError, match="again"):
        tune_skill(model, ITEMS, steps=4, batch=2)
    with torch.no_grad():
        model.module.model.norm.weight.add_(1.0)  # other weights of the same shapes are another model
    with pytest.raises(AssertionError, match="again"):
        tune_skill(model, ITEMS, steps=3, batch=2)
    monkeypatch.undo()
    monkeypatch.setenv("ACTLAS_CACHE", str(tmp_path / "cache"))
    with torch.no_grad():
        model.module.model.norm.weight.sub_(1.0)
    (folder / "change.safetensors").write_bytes(b"broken")  # damaged: it is made again
    again = tune_skill(tiny(), ITEMS, steps=3, batch=2)
    assert all(torch.equal(p, weights(again)[n]) for n, p in weights(first).items())


def test_without_the_cache_it_is_the_same(tmp_path) -> None:
    kept = tune_skill(tiny(), ITEMS, steps=2, batch=2)
    free = tune_skill(tiny(), ITEMS, steps=2, batch=2, cache=False)
    assert all(torch.equal(p, weights(free)[n]) for n, p in weights(kept).items())


def test_bad_skills() -> None:
    model = tiny()
    with pytest.raises(InputError, match="nothing to learn"):
        tune_skill(model, [])
    with pytest.raises(InputError, match="adds no tokens"):
        tune_skill(model, [("The end", "")])
    with pytest.raises(InputError, match="steps is 0"):
        tune_skill(model, ITEMS, steps=0)
    with pytest.raises(InputError, match="lora"):
        tune_skill(model, ITEMS, train="everything")
    with pytest.raises(ModelError, match="causal-lm"):
        tune_skill(tiny("bert"), ITEMS)
