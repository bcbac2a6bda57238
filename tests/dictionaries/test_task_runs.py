"""Prompts that run again with other activations: held against full passes with the edit installed."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as tf

from actlas.core.edits import Replace
from actlas.core.errors import InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.model import Model
from actlas.data import Task, task
from actlas.dictionaries.attribution import AttributionSAE, attribution_rows, attribution_terms
from actlas.dictionaries.objective import Batch, TrainSettings, TrainState
from actlas.dictionaries.sources import RowsSource
from actlas.dictionaries.task_runs import TaskRuns
from actlas.dictionaries.training import train
from tests.core.families import BY_NAME
from tests.data.tokenizers_made_here import tokenizer

SITE = "blocks.1.resid_post"


@cache
def reader() -> Model:
    """A small random model whose tokenizer has the names of the task as single tokens."""
    torch.manual_seed(0)
    tok = tokenizer("bytes")
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tok), max_position_embeddings=64,
    )  # fmt: skip
    module = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim >= 2:
                p.mul_(6.0)
    return Model(module, tok, name="reader")


@cache
def ioi(n: int = 12) -> Task:
    return task("ioi", reader().tokenizer, n=n, words=6)


def brute_force(items: Task, edits: dict[str, torch.Tensor]) -> tuple[list[float], list[int]]:
    """One prompt at a time through the whole model, the activations written by an installed edit."""
    model, differences, tokens = reader(), [], []
    for i, item in enumerate(items):
        encoded = model.encode(item.prompt)
        length = encoded["input_ids"].shape[1]
        installed = []
        for site, new in edits.items():
            features = model.resolve(site)[0].features
            assert features is not None
            whole = torch.zeros(1, length, *features)
            whole[0, -1] = new[i].reshape(features)
            installed.append(Replace(site, whole).at(positions=length - 1))
        if installed:
            with model.edit(*installed):
                logits = model.logits(item.prompt)[0, -1].double()
        else:
            logits = model.logits(item.prompt)[0, -1].double()
        differences.append(float(logits[item.answer_id] - logits[list(item.wrong_ids)].mean()))
        tokens.append(int(logits.argmax()))
    return differences, tokens


@pytest.mark.parametrize(
    "sites",
    [
        (SITE,),
        ("blocks.1.attn.z",),
        ("blocks.2.resid_post", SITE),
        ("blocks.2.attn.z", "blocks.1.mlp.out", "blocks.1.attn.z"),
        ("embed",),
    ],
)
def test_a_run_equals_full_passes_one_by_one(sites: tuple[str, ...]) -> None:
    runs = TaskRuns(reader(), ioi(), sites, batch=3)
    assert set(runs.values) == set(sites)
    for site in sites:
        for i, item in enumerate(ioi()):
            alone = reader().trace(item.prompt, site)[site][0, -1].flatten()
            assert torch.allclose(runs.values[site][i], alone, atol=1e-4)
    differences, tokens = brute_force(ioi(), {})
    assert torch.allclose(runs.clean.difference, torch.tensor(differences).double(), atol=1e-3)
    assert runs.clean.token.tolist() == tokens
    g = torch.Generator().manual_seed(1)
    new = {s: v + torch.randn(v.shape, generator=g) * v.std() for s, v in runs.values.items()}
    differences, tokens = brute_force(ioi(), new)
    found = runs.run(new)
    assert torch.allclose(found.difference, torch.tensor(differences).double(), atol=1e-3)
    assert found.token.tolist() == tokens
    assert not torch.allclose(found.difference, runs.clean.difference, atol=1e-2)


def test_writing_what_was_there_changes_nothing() -> None:
    runs = TaskRuns(reader(), ioi(), SITE)
    assert torch.equal(runs.run(dict(runs.values)).difference, runs.clean.difference)


def test_another_position_is_read_and_written_there() -> None:
    runs = TaskRuns(reader(), ioi(), SITE, position=-2)
    alone = reader().trace(ioi()[4].prompt, SITE)[SITE][0, -2]
    assert torch.allclose(runs.values[SITE][4], alone, atol=1e-4)
    moved = runs.run({SITE: -runs.values[SITE]})
    assert not torch.allclose(moved.difference, runs.clean.difference)


def test_models_that_cannot_skip_logits_give_the_same() -> None:
    runs = TaskRuns(reader(), ioi(), SITE)
    assert runs._keeps_last
    runs._keeps_last = False
    assert torch.allclose(runs.run({}).difference, runs.clean.difference, atol=1e-6)


def test_bad_input() -> None:
    model, items = reader(), ioi()
    runs = TaskRuns(model, items, SITE)
    with pytest.raises(InputError, match=r"were read at blocks.1.resid_post, not at 'blocks.2"):
        runs.run({"blocks.2.resid_post": runs.values[SITE]})
    with pytest.raises(ShapeError, match="must be"):
        runs.run({SITE: runs.values[SITE][:3]})
    bad = runs.values[SITE].clone()
    bad[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        runs.run({SITE: bad})
    with pytest.raises(InputError, match="make the task with"):
        TaskRuns(model, task("ioi", n=9), SITE)
    with pytest.raises(InputError, match="no prompts"):
        TaskRuns(model, [], SITE)
    with pytest.raises(InputError, match="position 99 does not exist"):
        TaskRuns(model, items, SITE, position=99)
    with pytest.raises(InputError, match="position is 'middle'"):
        TaskRuns(model, items, SITE, position="middle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="token by token"):
        TaskRuns(model, items, "blocks.1.attn.pattern")
    with pytest.raises(InputError, match="named twice"):
        TaskRuns(model, items, [SITE, SITE])
    with pytest.raises(ModelError, match="causal-lm"):
        TaskRuns(BY_NAME["bert"].model(), items, SITE)


def test_gradients_of_the_logit_difference_equal_finite_differences() -> None:
    items = ioi()[:4]
    x, g = attribution_rows(reader(), items, SITE, batch=2)
    runs = TaskRuns(reader(), items, SITE)
    assert torch.allclose(x, runs.values[SITE], atol=1e-5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2
    up, down = (runs.run({SITE: x + s * step * direction}).difference for s in (1, -1))
    assert torch.allclose((up - down) / (2 * step), (g * direction).sum(1).double(), rtol=0.05, atol=0.02)


def test_attribution_terms_equal_the_formula_and_train() -> None:
    gen = torch.Generator().manual_seed(0)
    z, error, w, g = (torch.randn(*s, generator=gen).double() for s in ((6, 5), (6, 3), (5, 3), (6, 3)))
    for normalise in (False, True):
        norm = sum(float(row.norm()) for row in g) / 6 if normalise else 1.0
        penalty = sum(abs(float(z[i, j] * (g[i] @ w[j]))) for i in range(6) for j in range(5)) / 6 / norm
        left = sum(abs(float(g[i] @ error[i])) for i in range(6)) / 6 / norm
        found = attribution_terms(z, error, w, g, normalise)
        assert float(found[0]) == pytest.approx(penalty) and float(found[1]) == pytest.approx(left)
    x = torch.randn(256, 8, generator=gen)
    plain = AttributionSAE.create("s", 8, 16, attribution=0.0, unexplained=0.0)
    heavy = AttributionSAE.create("s", 8, 16, attribution=50.0)
    g = torch.zeros(256, 8)
    g[:, 0] = 1.0
    settings = TrainSettings(tokens=256 * 60, batch=64, lr=5e-3)
    for sae in (plain, heavy):
        train(sae, RowsSource(x, gradient=g), settings, show=False)
    used = [float(attribution_terms(s.encode(x).dense(), x, s.atoms, g)[0]) for s in (plain, heavy)]
    assert used[1] < 0.3 * used[0]
    state = TrainState(settings, torch.zeros(16, dtype=torch.int64))
    with pytest.raises(InputError, match="gradients of a metric"):
        plain.objective(Batch(x), state)
    with pytest.raises(InputError, match="attribution is -1"):
        AttributionSAE.create("s", 8, 16, attribution=-1.0)
