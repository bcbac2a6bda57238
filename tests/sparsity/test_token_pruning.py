"""Token pruning: scores by hand, equal to masking by hand, caches, padding, schedules, saving, bad input."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.sparsity.token_pruning import PruneTokens, fit_prune_tokens, keep_best, spread, token_scores
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny

FAMILIES = ["llama", "gpt2", "opt", "gpt-neox", "bloom", "falcon", "qwen3", "phi3"]


def ids_of(rows: int = 2, length: int = 20, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: Model, inputs: dict[str, Tensor], *edits: Edit) -> Tensor:
    with model.edit(*edits):
        out: Tensor = model.module(**inputs, use_cache=False).logits
    return out


def test_scores_are_those_of_the_definition() -> None:
    a = (
        torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
        .masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        .softmax(-1)
    )
    for row in range(2):
        for t in range(7):
            first = sum(float(a[row, h, t, 0]) for h in range(3))
            column = sum(float(a[row, h, i, t]) for h in range(3) for i in range(t, 7)) / (7 - t)
            assert float(token_scores(a, "first_token")[row, t]) == pytest.approx(first, abs=1e-5)
            assert float(token_scores(a, "column_mean")[row, t]) == pytest.approx(column, abs=1e-5)
            assert float(token_scores(a, "reversed")[row, t]) == pytest.approx(-first, abs=1e-5)
    drawn = token_scores(a, "random", 3)
    assert torch.equal(drawn, token_scores(a, "random", 3)) and not torch.equal(
        drawn, token_scores(a, "random", 4)
    )


def test_first_and_last_stay_whatever_their_score() -> None:
    score = torch.tensor([[-9.0, 3.0, 1.0, 2.0, -9.0]])
    real = torch.ones(1, 5, dtype=torch.bool)
    assert keep_best(score, real, torch.tensor([2])).tolist() == [[0, 1, 4]]
    padded = torch.tensor([[False, True, True, True, True], [True] * 5])
    kept = keep_best(torch.cat([score, score]), padded, torch.tensor([1, 2]))
    assert kept.tolist() == [[1, 3, 4], [0, 1, 4]]


@torch.no_grad()
def by_masking(model: Model, inputs: dict[str, Tensor], block: int, share: float, scores: str) -> Tensor:
    """The same without changing shapes: later blocks may not look at dropped tokens, one row at a time."""
    from actlas.core.edits import AttentionEdit

    rows = []
    for row in range(len(inputs["input_ids"])):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        site = f"blocks.{block}.attn.pattern"
        pattern = model.trace(one, [site])[site]
        score = token_scores(pattern, scores)[0]  # type: ignore[arg-type]
        n = len(score)
        score[0] = score[-1] = torch.inf
        gone = score.argsort()[: int(share * n)].tolist()
        edits = [
            AttentionEdit.knockout(f"blocks.{i}.attn.scores", tuple(gone))
            for i in range(block + 1, model.n_blocks or 0)
        ]
        with model.edit(*edits):
            out = model.module(**one, use_cache=False).logits[0]
        out[gone] = torch.nan
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_masking(family: str) -> None:
    model, inputs = BY_NAME[family].model(), ids_of()
    for scores in ("column_mean", "first_token"):
        want = by_masking(model, inputs, 0, 0.3, scores)
        got = logits(model, inputs, PruneTokens({0: 0.3}, scores))  # type: ignore[arg-type]
        kept = ~want.isnan().any(-1)
        assert kept.sum(1).tolist() == [14, 14] and kept[:, 0].all() and kept[:, -1].all()
        assert torch.allclose(got[kept], want[kept], atol=1e-4)
        assert not torch.allclose(got[kept], logits(model, inputs)[kept], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_as_without(family: str) -> None:
    """Prompt, then two more passes: what is cached of each block is what it computed."""
    model, inputs = BY_NAME[family].model(), ids_of()
    edit = PruneTokens({0: 0.2, 1: 0.4}, "column_mean")
    after = torch.randint(3, 60, (2, 3), generator=torch.Generator().manual_seed(5))
    ones = torch.ones(2, 3, dtype=torch.long)
    with model.edit(edit), torch.no_grad():
        out = model.module(**inputs, use_cache=True)
        assert torch.allclose(out.logits, model.module(**inputs, use_cache=False).logits, atol=1e-5)
        cache = out.past_key_values
        last = (model.n_blocks or 0) - 1
        assert [cache.layers[i].keys.shape[2] for i in (0, 1, last)] == [20, 16, 12]
        assert all(layer.get_seq_length() == 20 for layer in cache.layers)
        mask = torch.cat([inputs["attention_mask"], ones], 1)
        many = model.module(
            input_ids=after, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits
        cache = model.module(**inputs, use_cache=True).past_key_values
        steps = []
        for i in range(3):
            step = model.module(
                input_ids=after[:, i : i + 1],
                attention_mask=mask[:, : 21 + i],
                past_key_values=cache,
                use_cache=True,
            )
            steps.append(step.logits)
        assert torch.allclose(many, torch.cat(steps, 1), atol=1e-4)
        assert model.generate(inputs, max_new_tokens=3).sequences.shape[1] == 23


@pytest.mark.parametrize("scores", ["first_token", "column_mean", "random", "reversed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(scores: str, side: str) -> None:
    model = BY_NAME["llama"].model()
    edit = PruneTokens({0: 0.3, 1: 0.5}, scores)  # type: ignore[arg-type]
    alone = ids_of(1, 20)
    zeros = torch.zeros(1, 5, dtype=torch.long)
    parts = (lambda x: [zeros, x]) if side == "left" else (lambda x: [x, zeros])
    longer = ids_of(1, 25, seed=1)
    batch = {k: torch.cat([torch.cat(parts(alone[k]), 1), longer[k]]) for k in alone}
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    got = logits(model, batch, edit)
    own = got[0, 5:] if side == "left" else got[0, :20]
    assert torch.allclose(own, logits(model, alone, edit)[0], atol=1e-5)
    assert torch.allclose(got[1], logits(model, longer, edit)[0], atol=1e-5)


def test_dropped_tokens_give_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dropped token the output is the head's reading of its state when it was dropped."""
    model, inputs = BY_NAME["llama"].model(), ids_of(1)
    edit = PruneTokens({1: 0.5}, "column_mean")
    with torch.no_grad():
        early = model.trace(inputs, ["blocks.1.resid_post"])["blocks.1.resid_post"]
        read = model.module.lm_head(model.module.model.norm(early))
        same = (logits(model, inputs, edit) - read).abs().amax(-1) < 1e-5
    assert int(same.sum()) == 10 and not same[0, 0] and not same[0, -1]


def test_short_prompts_nothing_to_drop_and_composition() -> None:
    from actlas.core.quant_activations import QuantizeActivations

    model = BY_NAME["llama"].model()
    for inputs in (ids_of(1, 2), ids_of(1, 3)):
        got = logits(model, inputs, PruneTokens({0: 0.9}))
        assert torch.allclose(got[:, -1], got[:, -1]) and got.shape[1] == inputs["input_ids"].shape[1]
    assert torch.equal(logits(model, ids_of(), PruneTokens({0: 0.0})), logits(model, ids_of()))
    rounded = QuantizeActivations("blocks.*.mlp.act", "int4-token-sym")
    both = logits(model, ids_of(), rounded + PruneTokens({0: 0.3}))
    assert not torch.allclose(both, logits(model, ids_of(), rounded), atol=1e-4)


def test_spread() -> None:
    steps = spread(0.3, 4, 6)
    assert list(steps) == [4, 5, 6] and steps[6] == pytest.approx(0.3)
    left = [1 - r for r in steps.values()]
    assert left[1] / left[0] == pytest.approx(left[0]) == pytest.approx(left[2] / left[1])
    assert left[0] == pytest.approx((1 - 0.3) ** (1 / 3))


def test_saving_and_fitting(tmp_path: Path) -> None:
    model = tiny()
    edit = fit_prune_tokens(model, ratio=0.4, scores="random", first=0, blocks=2, seed=3)
    assert isinstance(edit, PruneTokens) and list(edit.schedule) == [0, 1]
    loaded = Edit.load(edit.save(tmp_path / "e", model), model)
    inputs = model.encode(TEXTS[0])
    assert torch.equal(logits(model, inputs, edit), logits(model, inputs, loaded))
    assert loaded.describe() == edit.describe()
    default = fit_prune_tokens(model)
    assert isinstance(default, PruneTokens) and max(default.schedule) <= 1


def test_bad_input() -> None:
    model = tiny()
    for schedule, said in (
        ({}, "empty"),
        ({0: 1.0}, r"\[0, 1\)"),
        ({0: -0.1}, r"\[0, 1\)"),
        ({0: 0.3, 1: 0.2}, "may not fall"),
    ):
        with pytest.raises(InputError, match=said):
            PruneTokens(schedule)
    with pytest.raises(InputError, match="scores is 'norm'"):
        PruneTokens({0: 0.1}, "norm")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has blocks 0 to 2"), model.edit(PruneTokens({2: 0.1})):
        pass
    with (
        pytest.raises(InputError, match="another edit already"),
        model.edit(PruneTokens({0: 0.1}), PruneTokens({1: 0.1})),
    ):
        pass
    with (
        pytest.raises(ModelError, match="no causal language model"),
        tiny("bert").edit(PruneTokens({0: 0.1})),
    ):
        pass
    with pytest.raises(InputError, match="share lies in"):
        spread(1.0, 0, 1)
    with pytest.raises(InputError, match="ends at block 5"):
        fit_prune_tokens(model, first=5)
    with pytest.raises(ModelError):
        fit_prune_tokens(tiny("bert"))
    sliding = BY_NAME["gemma2"].model()
    with (
        pytest.raises(ModelError, match="SlidingWindow"),
        sliding.edit(PruneTokens({0: 0.2})),
        torch.no_grad(),
    ):
        sliding.module(**ids_of(), use_cache=True)
