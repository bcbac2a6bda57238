"""Supervised dictionaries: planted attributes are found, and what the prompts leave open is said."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.errors import InputError, NonFiniteError, ShapeError
from actlas.core.lens import Lens
from actlas.core.methods import find_method
from actlas.data import task
from actlas.dictionaries.supervised import SupervisedDictionary, fit_supervised
from actlas.dictionaries.task_runs import TaskRuns
from tests.core.families import BY_NAME
from tests.data.tokenizers_made_here import tokenizer

SITE = "blocks.1.resid_post"


def planted(
    seed: int = 0, n: int = 400, noise: float = 0.0
) -> tuple[Tensor, list[dict[str, str]], dict[str, Tensor]]:
    """Rows b + u[name] + u[place] + noise, with the vectors that made them."""
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(12, generator=g)
    vectors = {"name": torch.randn(5, 12, generator=g), "place": torch.randn(3, 12, generator=g)}
    chosen = {k: torch.randint(0, len(v), (n,), generator=g) for k, v in vectors.items()}
    x = bias + sum(v[chosen[k]] for k, v in vectors.items()) + noise * torch.randn(n, 12, generator=g)
    items = [{k: f"{k}{int(c[i])}" for k, c in chosen.items()} for i in range(n)]
    return x, items, vectors


def test_mse_codes_find_the_differences_that_were_planted() -> None:
    x, items, vectors = planted()
    found = fit_supervised(None, (x, items), SITE, method="mse")
    for attribute, true in vectors.items():
        for a, b in itertools.combinations(range(len(true)), 2):
            u = [found.direction(found.feature(attribute, f"{attribute}{v}")) for v in (a, b)]
            assert torch.allclose(u[0] - u[1], true[a] - true[b], atol=1e-4)
    assert torch.allclose(found.decode(found.encode_values(items)), x, atol=1e-4)
    assert found.note == "" and found.count == 400
    explained, control, gap = found.measurements
    assert explained.value > 0.999 and control.value < 0.1 and gap.low is not None and gap.low > 0.8


def test_both_codebooks_equal_their_formulas() -> None:
    x, items, _ = planted(1, n=60, noise=0.5)
    wide = x.double()
    mean = fit_supervised(None, (x, items), SITE)
    for attribute, value in (("name", "name2"), ("place", "place0")):
        rows = [i for i, item in enumerate(items) if item[attribute] == value]
        expected = wide[rows].mean(0) - wide.mean(0)
        assert torch.allclose(mean.direction(mean.feature(attribute, value)).double(), expected, atol=1e-6)
    mse = fit_supervised(None, (x, items), SITE, method="mse")
    design = np.zeros((60, 8))
    for i, item in enumerate(items):
        design[i, int(item["name"][-1])] = design[i, 5 + int(item["place"][-1])] = 1
    u, *_ = np.linalg.lstsq(design, (wide - wide.mean(0)).numpy(), rcond=None)
    assert np.allclose(mse.vectors.numpy(), u, atol=1e-5)


def test_coupled_has_one_vector_for_each_combination() -> None:
    x, items, _ = planted()
    more = [{**item, "order": "AB" if i % 2 else "BA"} for i, item in enumerate(items)]
    found = fit_supervised(None, (x, more), SITE, parametrisation="coupled")
    assert found.attributes == ("name+order", "place+order")
    assert len(found.values[0]) == 10 and len(found.values[1]) == 6
    assert found.name(found.feature("name+order", "name3+BA")) == "name+order=name3+BA"
    written = fit_supervised(None, (x, more), SITE, parametrisation="name+order, place")
    assert written.attributes == ("name+order", "place")
    assert fit_supervised(None, (x, more), SITE, attributes=("place",)).attributes == ("place",)


def test_encode_guesses_the_attributes_of_an_activation() -> None:
    x, items, _ = planted(noise=0.05)
    found = fit_supervised(None, (x, items), SITE, method="mse")
    assert torch.equal(found.encode(x).indices, found.encode_values(items).indices)
    assert torch.allclose(found.reconstruct(x), x, atol=0.5)


def test_exchange_moves_a_prompt_to_its_counterfactual() -> None:
    x, items, _ = planted()
    found = fit_supervised(None, (x, items), SITE, method="mse")
    after = [{**item, "name": "name1"} for item in items]
    target = found.decode(found.encode_values(after))
    assert torch.allclose(found.exchange(x, items, after), target, atol=1e-4)
    same = torch.tensor([item["name"] == "name1" for item in items])
    assert torch.equal(found.exchange(x, items, after)[same], x[same])
    for how in ("project", "project-to-mean"):
        moved = found.exchange(x, items, after, how=how)  # type: ignore[arg-type]
        for i in (0, 1, 2):
            if same[i]:
                continue
            u = found.direction(found.feature("name", items[i]["name"])).double()
            new = found.direction(found.feature("name", "name1")).double()
            row = x[i].double() - (found.bias.double() if how == "project-to-mean" else 0)
            expected = x[i].double() - (row @ u) / (u @ u) * u + new
            assert torch.allclose(moved[i].double(), expected, atol=1e-4)


def test_what_the_prompts_leave_open_is_said() -> None:
    x, items, _ = planted()
    constant = [{**item, "where": "here"} for item in items]
    found = fit_supervised(None, (x, constant), SITE, method="mse")
    assert "where has one value only" in found.note and "minimum-norm" in found.note
    assert found.note in found.measurements[0].note
    together = [{**item, "twin": item["name"]} for item in items]
    found = fit_supervised(None, (x, together), SITE, method="mse")
    assert "4 directions of their vectors are open" in found.note
    design_free = found.decode(found.encode_values(together))
    assert torch.allclose(design_free, x, atol=1e-4)


def test_unseen_values_are_listed() -> None:
    x, items, _ = planted()
    found = fit_supervised(None, (x, items), SITE)
    with pytest.raises(InputError, match="not seen name=name9, place=nowhere"):
        found.encode_values([items[0], {"name": "name9", "place": "nowhere"}])
    with pytest.raises(InputError, match="never 'name7'.*did you mean"):
        found.swap("name", "name1", "name7")
    with pytest.raises(InputError, match="no attribute 'nam'"):
        found.feature("nam", "name1")


def test_save_load_and_use_as_a_dictionary(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=g)
    items = [{"a": "xyz"[i % 3], "b": "pq"[i // 3 % 2]} for i in range(40)]
    found = fit_supervised(None, (x, items), SITE)
    back = Lens.load(found.save(tmp_path / "s", model), model)
    assert isinstance(back, SupervisedDictionary) and back.values == found.values
    assert torch.equal(back.reconstruct(x), found.reconstruct(x))
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model.logits(ids)
    with model.edit(back.swap("b", "p", "q") * 0.0):
        assert torch.equal(model.logits(ids), before)
    with model.edit(back.swap("b", "p", "q")):
        assert not torch.equal(model.logits(ids), before)
    codes = back.encode(x)
    p, q = back.feature("b", "p"), back.feature("b", "q")
    assert bool((codes.of(p) + codes.of(q) == 1).all())
    with model.edit(back.edit({p: 0.0, q: 1.0})):
        assert model.logits(ids).shape == before.shape


def test_it_is_fitted_to_a_task_from_the_registry() -> None:
    from actlas.core.model import Model

    tok = tokenizer("bytes")
    base = BY_NAME["llama"]
    torch.manual_seed(0)
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tok), max_position_embeddings=64,
    )  # fmt: skip
    model = Model(tf.LlamaForCausalLM(config).eval(), tok, name=base.name)
    items = task("ioi", tok, n=60, words=4)
    found = find_method("supervised-dictionary").fit(model, items, SITE)
    assert found.attributes == ("IO", "S", "Pos") and found.features == 4 + 4 + 2
    assert found.fingerprint == model.fingerprint
    runs = TaskRuns(model, list(items), SITE)
    pos = [i for i, item in enumerate(items) if item.attributes["Pos"] == "ABBA"]
    expected = runs.values[SITE][pos].mean(0) - runs.values[SITE].mean(0)
    assert torch.allclose(found.direction(found.feature("Pos", "ABBA")), expected, atol=1e-5)


def test_bad_input() -> None:
    x, items, _ = planted(n=20)
    with pytest.raises(InputError, match="at least 8 prompts, not 4"):
        fit_supervised(None, (x[:4], items[:4]), SITE)
    with pytest.raises(ShapeError, match="20"):
        fit_supervised(None, (x, items[:9]), SITE)
    with pytest.raises(InputError, match="method is 'median'"):
        fit_supervised(None, (x, items), SITE, method="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no attribute 'plac'"):
        fit_supervised(None, (x, items), SITE, parametrisation="name+plac")
    with pytest.raises(InputError, match="prompt 3 has no attribute 'place'"):
        fit_supervised(None, (x, [*items[:3], {"name": "name0"}, *items[4:]]), SITE)
    with pytest.raises(InputError, match="no attributes"):
        fit_supervised(None, (x, [{}] * 20), SITE)
    with pytest.raises(InputError, match="coupling needs two"):
        fit_supervised(None, (x, items), SITE, parametrisation="coupled", attributes=("name",))
    x[3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        fit_supervised(None, (x, items), SITE)
    with pytest.raises(InputError, match="needs a model"):
        fit_supervised(None, task("ioi", n=9), SITE)
