"""The audit is silent on plain models of every family and finds every vector that is put in, exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from actlas.core.edits import Add, AttentionEdit, Scale
from actlas.core.errors import FingerprintError, InputError
from actlas.core.hooks import attach
from actlas.core.model import Model
from actlas.security import StateFingerprint, audit, differences, fingerprint, injected, inventory
from actlas.security.injection import WAYS
from actlas.security.reexecution import reexecute, stripped
from tests.core.families import FAMILIES, Family
from tests.core.tiny import TEXTS, tiny

SHORT = [text[:40] for text in TEXTS]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


@pytest.fixture
def vector() -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_plain_model_is_clean_and_stays_as_it_was(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    before = fingerprint(model)
    report = audit(model, before, texts=inputs)
    assert report.clean, [str(f) for f in report.findings]
    assert fingerprint(model) == before
    assert next(m for m in report.measurements if m.name == "parts changed").value == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("way", WAYS)
def test_every_injection_is_found(family: str, way: str, vector: torch.Tensor) -> None:
    model = tiny(family)
    known = fingerprint(model)
    plain = model.logits(SHORT[0])
    with injected(model, 1, vector, way):
        report = audit(model, known, texts=SHORT)
        assert not report.clean
        assert differences(known, fingerprint(model))
        if way in ("late hook", "bias"):  # the texts have no trigger; weights are not run twice
            assert report.changes == ()
        else:
            (change,) = report.changes
            assert change.site == "blocks.1.resid_post"
            assert change.is_vector and change.share == 1.0
            assert torch.allclose(change.vector, vector, atol=1e-4)
            with model.edit(change.undo()):
                assert torch.allclose(model.logits(SHORT[0]), plain, atol=1e-3)
    assert audit(model, known, texts=SHORT).clean
    assert torch.equal(model.logits(SHORT[0]), plain)


def test_a_trigger_is_found_by_a_text_that_contains_it(vector: torch.Tensor) -> None:
    model = tiny("llama")
    token = model.tokenizer.encode("q", add_special_tokens=False)[0]
    with model.edit(Add("blocks.0.resid_post", vector).at(tokens=[token])):
        assert reexecute(model, ["no such letter"]) == []
        (change,) = reexecute(model, ["a quick test"])
    assert change.is_vector and change.share == pytest.approx(1 / 12)
    with pytest.raises(InputError, match="not one vector at every token"):
        change.undo()


def test_other_changes_are_not_called_vectors(model: Model) -> None:
    with model.edit(Scale("blocks.1.resid_post", 1.5)):
        (change,) = reexecute(model, SHORT)
    assert not change.is_vector
    assert change.aligned == pytest.approx(1.0)
    assert "rescaled" in change.finding().said
    with model.edit(AttentionEdit("blocks.1.attn.scores", temperature=3.0)):
        (change,) = reexecute(model, SHORT)
    assert change.site == "blocks.1.resid_post" and not change.is_vector and change.aligned < 0.9


def test_a_vector_at_the_embeddings_is_found_there(model: Model, vector: torch.Tensor) -> None:
    table = model.module.get_input_embeddings()  # type: ignore[operator]
    handle = table.register_forward_hook(lambda m, args, output: output + vector)
    try:
        (change,) = reexecute(model, SHORT)
    finally:
        handle.remove()
    assert change.site == "embed" and change.is_vector
    assert torch.allclose(change.vector, vector, atol=1e-5)


def test_allowed_edits_do_not_alarm_and_others_still_do(model: Model, vector: torch.Tensor) -> None:
    wanted, other = Add("blocks.0.resid_post", vector), Add("blocks.1.resid_post", -vector)
    with model.edit(wanted):
        assert audit(model, texts=SHORT, allowed=[wanted]).clean
        assert not audit(model, texts=SHORT).clean
        with model.edit(other):
            report = audit(model, texts=SHORT, allowed=[wanted])
            assert [c.site for c in report.changes] == ["blocks.1.resid_post"]
            assert model.installed == (wanted, other)


def test_a_hook_does_not_hide_behind_an_installed_edit(model: Model, vector: torch.Tensor) -> None:
    site = model.resolve("blocks.0.resid_post")[0]
    with model.edit(Add("blocks.2.resid_post", vector)):
        handle = attach(model.module, site, lambda x: x + vector)  # Actlas's own hook code
        try:
            kinds = [f.kind for f in inventory(model)]
        finally:
            handle.remove()
        assert kinds == ["edit", "hook"]
        assert [f.kind for f in inventory(model)] == ["edit"]


class _Plus(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w + 1.0


def _parametrised(model: Model) -> Iterator[None]:
    parametrize.register_parametrization(model.block(0).mlp.down_proj, "weight", _Plus())  # type: ignore[arg-type, union-attr]
    yield


def _replaced(model: Model) -> Iterator[None]:
    model.block(0).mlp.act_fn = nn.Tanh()  # type: ignore[union-attr]
    yield


def _buffered(model: Model) -> Iterator[None]:
    model.block(0).register_buffer("stolen", torch.zeros(32))
    yield


def _patched(model: Model) -> Iterator[None]:
    cls = type(model.block(0).mlp)
    original = cls.forward
    cls.forward = lambda self, x: original(self, x) + 1.0  # type: ignore[method-assign]
    try:
        yield
    finally:
        cls.forward = original  # type: ignore[method-assign]


def _global_hook(model: Model) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, output: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_parametrised, "parametrisation"),
        (_replaced, "module"),
        (_buffered, "tensor"),
        (_patched, "patched class"),
        (_global_hook, "global hook"),
    ],
)
def test_the_inventory_names_what_is_foreign(change, kind: str) -> None:
    model = tiny("llama")
    changing = change(model)
    next(changing)
    try:
        assert kind in {f.kind for f in inventory(model)}
    finally:
        next(changing, None)


def test_stripping_restores_hooks_and_methods(model: Model) -> None:
    seen: list[int] = []
    block = model.block(0)
    handle = block.register_forward_hook(lambda m, args, output: seen.append(1))
    with stripped(model):
        model.logits("abc")
    assert not seen
    model.logits("abc")
    assert seen == [1]
    handle.remove()
    model.logits("abc")
    assert seen == [1]


def test_a_model_without_a_layout_is_only_listed() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    report = audit(model, texts=torch.zeros(1, 4))
    assert report.clean and "no layout" in report.notes[0]
    handle = model.module[0].register_forward_hook(lambda m, a, o: o + 1)  # type: ignore[index]
    assert [f.kind for f in audit(model, texts=torch.zeros(1, 4)).findings] == ["hook"]
    handle.remove()


def test_fingerprints(tmp_path, model: Model, vector: torch.Tensor) -> None:
    known = fingerprint(model)
    again = StateFingerprint.load(known.save(tmp_path / "known"))
    assert again == known and again.digest == known.digest
    known.check(model)
    weight = model.block(2).mlp.up_proj.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight[0, 0] += 1e-4  # type: ignore[index]
    with pytest.raises(FingerprintError, match=r"layers\.2\.mlp\.up_proj\.weight has other values"):
        known.check(model)
    with torch.no_grad():
        weight[0, 0] -= 1e-4  # type: ignore[index]
    edit = Add("blocks.0.resid_post", vector)
    with model.edit(edit):
        inside = fingerprint(model)
        assert differences(known, inside) == [f"edit installed: {edit.describe()}"]
        assert differences(inside, known) == [f"edit gone: {edit.describe()}"]
    with model.edit(Add("blocks.0.resid_post", vector + 1e-3)):
        assert differences(inside, fingerprint(model))  # the same words, another vector


def test_unknown_ways(model: Model, vector: torch.Tensor) -> None:
    with pytest.raises(InputError, match="no way 'magic'"), injected(model, 0, vector, "magic"):
        pass
