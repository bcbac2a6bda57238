"""Upcycling: identities against the dense model, reversibility, saving, training, refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import find
from actlas.core.methods import find_method
from actlas.nn import MoEX, SwitchMoE, balance_loss
from actlas.training.dense_mlp import dense_mlp
from actlas.training.upcycle import EqualExperts, trainable, upcycle
from tests.core.families import BY_NAME

LIKE = ("llama", "phi3", "gemma2", "gpt2", "gpt-neox", "falcon")


def logits(model, family):
    with torch.no_grad():
        return model(**family.inputs(model.module)).logits


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("kind", ["moe-x", "switch"])
def test_copies_without_noise_are_the_dense_model(name, kind):
    family = BY_NAME[name]
    model = family.model()
    before = logits(model, family)
    with pytest.warns(EqualExperts) if kind == "moe-x" else _nothing():
        edit = upcycle(model, kind, noise=0, activation="same", experts=3)
    with model.edit(edit):
        torch.testing.assert_close(logits(model, family), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model, family), before)  # reversible, bit for bit


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_partition_that_runs_every_expert_equally_is_the_dense_model(name):
    family = BY_NAME[name]
    model = family.model()
    before = logits(model, family)
    edit = upcycle(model, "switch", split="partition", noise=0, activation="same", experts=4, top_k=4)
    for part in edit.parts():
        torch.nn.init.zeros_(part.module.router.weight)  # all gates 1/4
    with model.edit(edit):
        torch.testing.assert_close(logits(model, family), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("split", ["copy", "partition"])
def test_neurons_are_dealt_out_whole(split):
    model = BY_NAME["llama"].model()
    dense = dense_mlp(model, 1)
    edit = upcycle(model, split=split, noise=0.1 if split == "copy" else 0, experts=4, blocks=[1])
    new = edit.parts()[0].module if edit.parts() else edit.module
    assert isinstance(new, MoEX) and new.w_up is not None
    if split == "copy":
        assert new.hidden == 48 and torch.equal(new.w_dec[2], dense.w_out)
        added = new.w_enc - dense.w_in
        size = float(dense.w_in.square().mean().sqrt())
        assert float(added.std()) == pytest.approx(0.1 * size, rel=0.1)
        assert not torch.equal(new.w_enc[0], new.w_enc[1])
        return
    assert new.hidden == 12
    rows = torch.cat([new.w_enc.flatten(0, 1), new.w_up.flatten(0, 1), new.atoms / 2], 1)
    whole = torch.cat([dense.w_in, dense.w_up, dense.w_out.T], 1)
    distance = torch.cdist(rows.double(), whole.double())
    matched = distance.argmin(1)
    assert float(distance.min(1).values.max()) < 1e-5 and sorted(matched.tolist()) == list(range(48))
    assert matched.tolist() != list(range(48))


def test_it_saves_loads_and_installs_elsewhere(tmp_path):
    family = BY_NAME["llama"]
    model = family.model()
    edit = upcycle(model, "moe-x", experts=3, blocks=[-1, 0])
    assert [p.path for p in edit.parts()] == ["model.layers.2.mlp", "model.layers.0.mlp"]
    with model.edit(edit):
        expected = logits(model, family)
        out = model.trace(family.inputs(model.module), "blocks.0.mlp.out")["blocks.0.mlp.out"]
        assert out.shape[-1] == 32
        with pytest.raises(InputError, match="mlp.act"):
            model.trace(family.inputs(model.module), "blocks.0.mlp.act")
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(logits(model, family), expected)
    with pytest.raises(InputError, match="made for"):
        Edit.load(tmp_path / "e", BY_NAME["gpt2"].model())
    code = f"from actlas.core.edit import Edit; print(Edit.load({str(tmp_path / 'e')!r}).describe())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == edit.describe()


def test_bfloat16_models_keep_their_dtype(tmp_path):
    family = BY_NAME["llama"]
    model = family.model()
    model.module.to(torch.bfloat16)
    edit = upcycle(model, "moe-x", experts=2, blocks=[1])
    edit.save(tmp_path / "e", model)
    again = Edit.load(tmp_path / "e", model)
    assert again.module.w_enc.dtype == torch.bfloat16
    with model.edit(edit):
        expected = logits(model, family)
    with model.edit(again):
        assert torch.equal(logits(model, family), expected) and expected.dtype == torch.bfloat16


def test_training_reaches_the_new_parameters_only(tmp_path):
    family = BY_NAME["llama"]
    model = family.model()
    edit = upcycle(model, "moe-x", experts=3, noise=0.1, blocks=[1])
    inputs = family.inputs(model.module)
    before = logits(model, family)
    optimiser = torch.optim.Adam(trainable(edit), lr=1e-2)
    losses = []
    with model.edit(edit):
        for _ in range(12):
            loss = model.module(**inputs, labels=inputs["input_ids"]).loss + 0.01 * balance_loss(model.module)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        trained = logits(model, family)
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(logits(model, family), before)
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(logits(model, family), trained)


def test_equal_copies_stay_equal_and_noise_parts_them():
    family = BY_NAME["llama"]
    inputs = family.inputs(family.model().module)
    apart = {}
    for noise in (0.0, 0.1):
        model = family.model()
        with pytest.warns(EqualExperts) if noise == 0 else _nothing():
            edit = upcycle(model, "moe-x", experts=3, noise=noise, blocks=[1])
        new = edit.module
        start = (new.w_enc[0] - new.w_enc[1]).detach().clone()
        with model.edit(edit):
            model.module(**inputs, labels=inputs["input_ids"]).loss.backward()
        chosen = new.routed.experts.unique().tolist()
        grads = [new.w_dec.grad[j] for j in chosen]
        apart[noise] = max(float((g - grads[0]).abs().max()) for g in grads)
        assert (float(start.abs().max()) > 0) is (noise > 0)
    assert apart[0.0] < 1e-6 < apart[0.1]


def test_the_same_seed_gives_the_same_experts():
    model = BY_NAME["llama"].model()
    a, b, c = (upcycle(model, "switch", experts=3, blocks=[1], seed=s).module.state_dict() for s in (4, 4, 5))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["w_enc"], c["w_enc"]) and not torch.equal(a["router.weight"], c["router.weight"])
    state = torch.get_rng_state()
    upcycle(model, "switch", experts=3, blocks=[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("llama", {"kind": "moex"}, InputError, "did you mean moe-x"),
        ("llama", {"split": "half"}, InputError, "must be 'copy' or 'partition'"),
        ("llama", {"noise": -1}, InputError, "noise is -1"),
        ("llama", {"split": "partition", "experts": 5}, InputError, "48 neurons cannot be dealt out to 5"),
        ("llama", {"top_k": 9}, InputError, "top_k is 9"),
        ("llama", {"blocks": [7]}, ModelError, "blocks 0 to 2"),
        ("llama", {"blocks": []}, InputError, "no block was given"),
        ("opt", {}, ModelError, "spread over several modules"),
        ("bloom", {}, ModelError, "takes the activation only"),
        ("mixtral", {}, ModelError, "no dense MLP"),
        ("clip", {"activation": "same"}, InputError, "no activation 'quick_gelu'"),
    ],
)
def test_refusals(name, options, error, message):
    with pytest.raises(error, match=message):
        upcycle(BY_NAME[name].model(), **options)


def test_it_is_a_method():
    info = find_method("upcycle")
    assert info.room == "training" and info.returns == "Edit" and info.data == "none"
    edit = info.fit(BY_NAME["gpt2"].model(), kind="switch", experts=2)
    assert all(isinstance(p.module, SwitchMoE) for p in edit.parts())
    model = BY_NAME["gpt2"].model()
    edit.bake(model)
    assert isinstance(find(model.module, edit.parts()[0].path), SwitchMoE)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()
