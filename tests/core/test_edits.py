"""What edits do: each kind against its formula, composition, scope, gates, saving, safety."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.edits import (
    Add,
    AttentionEdit,
    Clamp,
    HeadScale,
    MeanAblate,
    ProjectOut,
    Replace,
    Resample,
    Scale,
    SwapModule,
    Zero,
)
from actlas.core.errors import (
    ArtifactError,
    FingerprintError,
    InputError,
    NonFiniteError,
    ShapeError,
    SiteError,
)
from actlas.core.installation import EditHadNoEffect
from actlas.core.model import Model
from actlas.core.swap import LowRankLinear
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

SITE = "blocks.1.resid_post"
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [8, 9, 7, 9, 3, 2]])


@pytest.fixture
def model() -> Model:
    return BY_NAME["llama"].model()


def read(model: Model, site: str = SITE, ids: Tensor = IDS) -> Tensor:
    return model.trace(ids, site)[site]


def edited(model: Model, edit: Edit, site: str = SITE, ids: Tensor = IDS) -> Tensor:
    with model.edit(edit):
        return read(model, site, ids)


def hooks(model: Model) -> int:
    count = 0
    for m in model.module.modules():
        count += len(m._forward_hooks) + len(m._forward_pre_hooks)
        count += sum(k in m.__dict__ for k in ("forward", "generate", "_actlas_functions"))
    return count


VECTOR = torch.linspace(-1, 1, 32)
POOL = torch.arange(5.0)[:, None] + VECTOR


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (Add(SITE, VECTOR) * 2, lambda x: x + 2 * VECTOR),
        (-Add(SITE, VECTOR), lambda x: x - VECTOR),
        (Scale(SITE, 3.0), lambda x: 3 * x),
        (Scale(SITE, 3.0) * 0.5, lambda x: 2 * x),
        (Zero(SITE), lambda x: 0 * x),
        (Zero(SITE) * 0.25, lambda x: 0.75 * x),
        (MeanAblate(SITE, VECTOR), lambda x: VECTOR.expand_as(x)),
        (Replace(SITE, VECTOR), lambda x: VECTOR.expand_as(x)),
        (ProjectOut(SITE, VECTOR), lambda x: x - (x @ VECTOR)[..., None] * VECTOR / VECTOR.dot(VECTOR)),
        (Clamp(SITE, -0.1, 0.2), lambda x: x.clamp(-0.1, 0.2)),
        (Add(SITE, VECTOR) + Scale(SITE, 2.0), lambda x: 2 * (x + VECTOR)),
        (Scale(SITE, 2.0) + Add(SITE, VECTOR), lambda x: 2 * x + VECTOR),
        ((Add(SITE, VECTOR) + Add(SITE, VECTOR)) * 3, lambda x: x + 6 * VECTOR),
        (Zero(SITE + "[channel=4]"), lambda x: x * (torch.arange(32) != 4)),
    ],
)
def test_each_kind_computes_its_formula(model: Model, edit: Edit, expected) -> None:
    before = read(model)
    torch.testing.assert_close(edited(model, edit), expected(before), rtol=1e-5, atol=1e-5)
    assert torch.equal(read(model), before)


def test_clamp_along_a_direction(model: Model) -> None:
    unit = VECTOR / VECTOR.norm()
    x = edited(model, Clamp(SITE, low=-0.1, high=0.1, direction=VECTOR))
    before = read(model)
    torch.testing.assert_close(x @ unit, (before @ unit).clamp(-0.1, 0.1), rtol=1e-4, atol=1e-5)
    out = ProjectOut(SITE, VECTOR).basis()
    torch.testing.assert_close(x - (x @ out) @ out.T, before - (before @ out) @ out.T, rtol=1e-4, atol=1e-4)


def test_project_out_of_dependent_directions_removes_their_span_once(model: Model) -> None:
    rows = torch.stack([VECTOR, 2 * VECTOR, VECTOR**2])
    x = edited(model, ProjectOut(SITE, rows))
    assert float((x @ rows.T).abs().max()) < 1e-3
    assert ProjectOut(SITE, rows).basis().shape == (32, 2)


def test_resample_takes_pool_rows_and_depends_on_seed_and_position(model: Model) -> None:
    x = edited(model, Resample(SITE, POOL, seed=1))
    chosen = (x - VECTOR)[..., 0].round()
    torch.testing.assert_close(x, chosen[..., None] + VECTOR.expand_as(x))
    assert set(chosen.flatten().tolist()) <= set(range(5))
    assert len(set(chosen.flatten().tolist())) > 1
    assert not torch.equal(x, edited(model, Resample(SITE, POOL, seed=2)))


def test_activation_patching_from_another_trace(model: Model) -> None:
    other = model.trace(IDS.flip(1), ["blocks.0.attn.z", "logits"], stop=False)
    with model.edit(Replace.from_trace(other, "blocks.0.attn.z")):
        patched = model.trace(IDS, ["blocks.0.attn.z"])
    assert torch.equal(patched["blocks.0.attn.z"], other["blocks.0.attn.z"])


def test_head_scale_and_selector_agree(model: Model) -> None:
    site = "blocks.1.attn.z"
    a = edited(model, HeadScale(site, {2: 0.0}), site)
    b = edited(model, Zero(site + "[head=2]"), site)
    assert torch.equal(a, b)
    assert float(a[:, :, 2].abs().max()) == 0 and float(a[:, :, 1].abs().max()) > 0


def test_two_edits_on_one_site_and_nested_blocks_apply_in_order(model: Model) -> None:
    before = read(model)
    with model.edit(Add(SITE, VECTOR)), model.edit(Scale(SITE, 2.0)):
        torch.testing.assert_close(read(model), 2 * (before + VECTOR))
    with model.edit(Add(SITE, VECTOR), Scale(SITE, 2.0)):
        torch.testing.assert_close(read(model), 2 * (before + VECTOR))
        assert len(model.installed) == 2
    assert model.installed == ()


def test_without_edits_takes_them_out_and_puts_them_back(model: Model) -> None:
    before = read(model)
    with model.edit(Add(SITE, VECTOR)), model.edit(Scale(SITE, 2.0)):
        with model.without_edits():
            assert torch.equal(read(model), before)
        torch.testing.assert_close(read(model), 2 * (before + VECTOR))
    assert torch.equal(read(model), before)


def test_attention_knockout_temperature_and_bias(model: Model) -> None:
    site = "blocks.1.attn.pattern"
    scores = "blocks.1.attn.scores"
    before = read(model, site)
    knocked = edited(model, AttentionEdit.knockout(scores, (0,)), site)
    assert float(knocked[:, :, 1:, 0].max()) == 0
    rest = before[:, :, 1:, 1:] / before[:, :, 1:, 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(knocked[:, :, 1:, 1:], rest, rtol=1e-4, atol=1e-5)
    one_head = edited(model, AttentionEdit.knockout(scores, (0,), heads=(1,)), site)
    assert torch.equal(one_head[:, 0], before[:, 0])
    assert float(one_head[:, 1, 1:, 0].max()) == 0
    flat = edited(model, AttentionEdit(scores, temperature=1e6), site)
    torch.testing.assert_close(flat[0, 0, 3, :4], torch.full((4,), 0.25), rtol=1e-3, atol=1e-3)
    late = edited(model, AttentionEdit.knockout(scores, (0,)).at(positions=[-1]), site)
    assert torch.equal(late[:, :, :-1], before[:, :, :-1])
    assert float(late[:, :, -1, 0].max()) == 0


def test_attention_rows_observer(model: Model) -> None:
    site = "blocks.1.attn.pattern"
    whole = read(model, site)
    last = model.trace(IDS, site, attention_rows=2)[site]
    torch.testing.assert_close(last, whole[:, :, -2:])


def test_scope(model: Model) -> None:
    before = read(model)

    def where(edit: Edit) -> list[tuple[int, int]]:
        changed = (edited(model, edit) != before).any(-1)
        return [tuple(i) for i in changed.nonzero().tolist()]  # type: ignore[misc]

    add = Add("blocks.1.mlp.out", VECTOR)
    assert where(add.at(positions=[0, -1])) == [(0, 0), (0, 5), (1, 0), (1, 5)]
    assert where(add.at(positions=range(1, 3), rows=1)) == [(1, 1), (1, 2)]
    assert where(add.at(tokens=9)) == [(0, 3), (1, 1), (1, 3)]
    assert where(add.at(tokens=[9], positions=[3])) == [(0, 3), (1, 3)]
    assert where(add.at(rows=[0])) == [(0, p) for p in range(6)]
    assert where(add.at(phase="prompt")) == [(r, p) for r in range(2) for p in range(6)]
    with pytest.warns(EditHadNoEffect):
        assert where(add.at(phase="generated")) == []


def test_positions_count_real_tokens_under_padding(model: Model) -> None:
    for side in ("left", "right"):
        mask = torch.ones_like(IDS)
        ids = IDS.clone()
        where = slice(0, 2) if side == "left" else slice(4, 6)
        mask[1, where], ids[1, where] = 0, 0
        inputs = model.encode({"input_ids": ids, "attention_mask": mask}, padding_side=side)
        before = model.trace(inputs, SITE)[SITE]
        with model.edit(Add("blocks.1.mlp.out", VECTOR).at(positions=[0, -1])):
            after = model.trace(inputs, SITE)[SITE]
        changed = [tuple(i) for i in (after != before).any(-1).nonzero().tolist()]
        real = (2, 5) if side == "left" else (0, 3)
        assert changed == [(0, 0), (0, 5), (1, real[0]), (1, real[1])], side


@dataclass
class Threshold:
    """A minimal lens: the first channel of an activation."""

    site: str

    def score(self, x: Tensor) -> Tensor:
        return x[..., 0]


def test_gate_per_token(model: Model) -> None:
    gate = Threshold("blocks.0.resid_post")
    before = model.trace(IDS, ["blocks.0.resid_post", SITE])
    opened = before["blocks.0.resid_post"][..., 0] > 0.0
    assert 0 < int(opened.sum()) < opened.numel()
    edit = Add("blocks.1.mlp.out", VECTOR).when(gate)
    changed = (edited(model, edit) != before[SITE]).any(-1)
    assert torch.equal(changed, opened)
    closed = Add("blocks.1.mlp.out", VECTOR).when(gate, above=False)
    assert torch.equal((edited(model, closed) != before[SITE]).any(-1), ~opened)


def test_gate_per_sequence_and_soft(model: Model) -> None:
    gate = Threshold("blocks.0.resid_post")
    before = model.trace(IDS, ["blocks.0.resid_post", SITE])
    score = before["blocks.0.resid_post"][..., 0]
    edge = float(score[:, -1].mean())
    edit = Add("blocks.1.mlp.out", VECTOR).when(gate, threshold=edge, per="sequence", reduce="last")
    changed = (edited(model, edit) != before[SITE]).any(-1)
    assert torch.equal(changed, (score[:, -1:] > edge).expand_as(changed))
    soft = edited(model, Add(SITE, VECTOR).when(Threshold(SITE), soft=True))
    weight = torch.sigmoid(before[SITE][..., :1])
    torch.testing.assert_close(soft, before[SITE] + weight * VECTOR, rtol=1e-4, atol=1e-5)


def test_gate_must_read_before_the_edit(model: Model) -> None:
    with pytest.raises(InputError, match="comes after"):
        with model.edit(Add("blocks.0.resid_post", VECTOR).when(Threshold("blocks.1.resid_post"))):
            pass
    assert hooks(model) == 0


def test_swap_module_is_undone_and_saved(model: Model, tmp_path) -> None:
    linear = model.module.model.layers[1].mlp.down_proj
    before = model.logits(IDS)
    low = LowRankLinear.of(linear, rank=3)
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    torch.testing.assert_close(
        low.up.weight @ low.down.weight, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4, atol=1e-5
    )
    edit = SwapModule("model.layers.1.mlp.down_proj", low)
    with model.edit(edit + Add(SITE, VECTOR)):
        after = model.logits(IDS)
    assert model.module.model.layers[1].mlp.down_proj is linear
    assert torch.equal(model.logits(IDS), before)
    edit.save(tmp_path / "e", model)
    with model.edit(Edit.load(tmp_path / "e", model), Add(SITE, VECTOR)):
        assert torch.equal(model.logits(IDS), after)
    with pytest.raises(InputError, match="strength"):
        edit * 2
    full = LowRankLinear.of(linear, rank=32)
    x = torch.randn(3, 48)
    torch.testing.assert_close(full(x), linear(x), rtol=1e-4, atol=1e-4)


SAVED = [
    Add(SITE, VECTOR) * 4,
    Scale("blocks.*.mlp.act", 0.5).at(positions=[1, -1], phase="prompt"),
    Zero("blocks.0.attn.z[head=2]").at(rows=[0], tokens=[9]),
    MeanAblate(SITE, VECTOR).at(positions="last"),
    Resample(SITE, POOL, seed=3),
    Replace(SITE, VECTOR),
    ProjectOut(SITE, POOL[:2]) * 0.5,
    Clamp(SITE, -0.1, 0.2, VECTOR),
    HeadScale("blocks.1.attn.z", {0: 0.5, 3: 2.0}),
    AttentionEdit("blocks.1.attn.scores", keys=(0, -1), bias=-2.0, temperature=1.5, heads=(1,)),
    Add(SITE, VECTOR) + Scale(SITE, 2.0).at(positions=0),
]


@pytest.mark.parametrize("edit", SAVED, ids=lambda e: e.describe()[:30])
def test_a_saved_and_loaded_edit_is_the_same(model: Model, edit: Edit, tmp_path) -> None:
    edit.save(tmp_path / "e", model)
    again = Edit.load(tmp_path / "e", model)
    assert again.describe() == edit.describe()
    with model.edit(edit):
        a = model.logits(IDS)
    with model.edit(again):
        b = model.logits(IDS)
    assert torch.equal(a, b)
    assert not torch.equal(a, model.logits(IDS))


def test_loading_for_another_model_is_refused(model: Model, tmp_path) -> None:
    Add(SITE, VECTOR).save(tmp_path / "e", model)
    other = BY_NAME["gpt2"].model()
    with pytest.raises(FingerprintError, match="architecture"):
        Edit.load(tmp_path / "e", other)
    loaded = Edit.load(tmp_path / "e")
    with pytest.raises(FingerprintError, match="another model"), other.edit(loaded):
        pass
    with pytest.raises(FingerprintError), other.edit(loaded * 2 + loaded.at(positions=0)):
        pass
    with other.edit(Edit.load(tmp_path / "e", other, force=True)):
        assert other.installed
    assert hooks(other) == 0


def test_artifacts_that_are_not_whole_are_refused(model: Model, tmp_path) -> None:
    path = Add(SITE, VECTOR).save(tmp_path / "e", model)
    tensors = path / "tensors.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-7])
    with pytest.raises(ArtifactError, match="checksum"):
        Edit.load(path)
    tensors.write_bytes(data)
    manifest = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(manifest.replace("tensors.safetensors", "../tensors.safetensors"))
    with pytest.raises(ArtifactError, match="outside its folder"):
        Edit.load(path)
    (path / "manifest.json").write_text(manifest[:40])
    with pytest.raises(ArtifactError, match="JSON"):
        Edit.load(path)
    (path / "manifest.json").write_text(manifest.replace('"Add"', '"os.system"'))
    with pytest.raises(ArtifactError, match="unknown type"):
        Edit.load(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        Edit.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="model=model"):
        Add(SITE, VECTOR).save(tmp_path / "f")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    with pytest.raises(InputError, match="not an Actlas artifact"):
        Add(SITE, VECTOR).save(tmp_path / "mine", model)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all my work"


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (Add(SITE, torch.ones(31)), ShapeError, "d_model=32"),
        (Add(SITE, torch.ones(32, dtype=torch.long)), ShapeError, "floating point"),
        (Add(SITE, torch.full((32,), torch.nan)), NonFiniteError, "NaN"),
        (Add("blocks.7.resid_post", VECTOR), SiteError, "blocks 0 to 2"),
        (Add("blocks.1.resid_pots", VECTOR), SiteError, "did you mean"),
        (HeadScale("blocks.1.attn.z", {9: 0.0}), InputError, "4 heads"),
        (HeadScale(SITE, {1: 0.0}), InputError, "needs a site with heads"),
        (AttentionEdit(SITE), InputError, "attn.scores"),
        (Clamp(SITE), InputError, "needs a limit"),
        (Clamp(SITE, 2.0, 1.0), InputError, "above"),
        (Add(SITE, VECTOR).at(tokens="hello"), InputError, "tokenizer"),
        (SwapModule("model.nothing", nn.Identity()), InputError, "no submodule"),
        (Replace(SITE, torch.ones(3, 6, 31)), ShapeError, "31"),
    ],
)
def test_unfit_edits_are_refused_before_anything_changes(model: Model, edit: Edit, error, says: str) -> None:
    before = model.logits(IDS)
    good = Add("blocks.0.resid_post", VECTOR)
    with pytest.raises(error, match=says), model.edit(good, edit):
        pass
    assert hooks(model) == 0
    assert torch.equal(model.logits(IDS), before)


def test_an_exception_leaves_no_hook_behind(model: Model) -> None:
    before = model.logits(IDS)
    with pytest.raises(ShapeError), model.edit(Replace(SITE, torch.ones(5, 6, 32))):
        model.logits(IDS)
    with (
        pytest.raises(RuntimeError, match="mine"),
        model.edit(Scale(SITE, 2.0) + SwapModule("lm_head", nn.Identity())),
    ):
        raise RuntimeError("mine")
    with pytest.raises(IndexError):
        model.trace(torch.tensor([[999]]), "blocks.*.attn.pattern")
    assert hooks(model) == 0
    assert torch.equal(model.logits(IDS), before)


def test_an_edit_without_effect_says_so_once(model: Model) -> None:
    installed = model.edit(Add(SITE, VECTOR).at(positions=[50]))
    with installed:
        with pytest.warns(EditHadNoEffect, match="scope matched no token"):
            model.logits(IDS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.logits(IDS)
    with pytest.warns(EditHadNoEffect, match="never ran"), model.edit(Add(SITE, VECTOR)):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.edit(Add(SITE, VECTOR).at(phase="generated")):
            model.generate(IDS, max_new_tokens=2)
        with model.edit(Add(SITE, VECTOR) * 0):
            model.logits(IDS)


def test_edits_work_with_autograd_and_bf16(model: Model) -> None:
    vector = VECTOR.clone().requires_grad_()
    with model.edit(Add(SITE, vector)):
        model.module(IDS).logits.sum().backward()
    assert vector.grad is not None and float(vector.grad.abs().sum()) > 0
    model.module.to(torch.bfloat16)
    for edit in SAVED:
        with model.edit(edit):
            assert model.logits(IDS).dtype == torch.bfloat16
    trace = model.trace(IDS, ["blocks.1.attn.pattern", SITE], stop=False)
    assert torch.equal(trace.logits, model.logits(IDS))


def test_edits_of_plain_modules() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.rnn(x)
            out: Tensor = self.head(states)
            return out

    torch.manual_seed(0)
    model = Model(Tagger())
    x = torch.randn(2, 5, 4)
    before = model.forward(x)
    with model.edit(Add("module:rnn", torch.ones(6))):
        after = model.forward(x)
    torch.testing.assert_close(after, before + model.module.head.weight.sum(1))
    with model.edit(Zero("module:head.input")):
        torch.testing.assert_close(model.forward(x), model.module.head.bias.expand(2, 5, 3))
    assert torch.equal(model.forward(x), before)
    with pytest.raises(SiteError, match="no layout"):
        model.trace(x, "blocks.0.resid_post")
    with pytest.raises(SiteError, match="did you mean"):
        model.trace(x, "module:rnnn")


def test_scopes_that_contradict_are_refused() -> None:
    model = tiny()
    edit = Add("blocks.1.resid_post", torch.ones(model.d_model or 0))
    with pytest.raises(InputError, match="count back from the end of the prompt"):
        edit.at(phase="generated", positions=-1)
    with pytest.raises(InputError, match="count back from the end of the prompt"):
        edit.at(positions=[-2, -1]).at(phase="generated")
    site = "blocks.1.mlp.out"
    with pytest.raises(InputError, match=r"both set blocks\.1\.mlp\.out for the same tokens"):
        with model.edit(Zero(site), MeanAblate(site, torch.ones(model.d_model or 0))):
            pass
    assert model.installed == ()
    with (
        model.edit(Zero(site).at(positions=0), MeanAblate(site, torch.ones(model.d_model or 0))),
        model.edit(Zero(site)),
    ):
        model.logits("one two")
