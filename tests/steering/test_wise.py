"""WISE: the router decides per row on the prompt and holds; facts are written; the rest is untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.edits import Scale
from actlas.core.errors import InputError, ShapeError
from actlas.core.layout import find, weight_matrix
from actlas.core.model import Model
from actlas.data.edit_requests import EditRequest, as_requests
from actlas.steering.dual_memory import DualMemory, output_matrix, over_tokens
from actlas.steering.edit_rows import Matrix, frozen, write_rows
from actlas.steering.edit_tuning import TuningEditor
from actlas.steering.editing import edit_stream
from actlas.steering.rome import RomeEditor
from actlas.steering.wise import WiseEditor, WiseSettings, fit_wise
from tests.core.tiny import tiny

TEXTS = ["The committee met on Tuesday.", "Nobody agreed!", "It was raining; the river", "We will come back."]
PROMPTS = ["The old bridge", "Nobody in the town ever agreed", "Why", "It was raining on"]
FACTS = [
    EditRequest("The old bridge is", " r", "bridge", ("A bridge is",), (TEXTS[0], TEXTS[2])),
    EditRequest("Nobody agreed on", " t", "", ("No one agreed on",), (TEXTS[3],)),
    EditRequest("A big river has", " f", "river", (), ()),
]
IRRELEVANT = ["She went home early", "Two and two make four", "Open the window, please"]


def memory(model: Model, block: int = 1, memories: int = 1, scale: float = 0.3) -> DualMemory:
    path = output_matrix(model, block)
    matrix = find(model.module, path)
    assert matrix is not None
    shape = weight_matrix(matrix).shape
    deltas = torch.randn(memories, *shape, generator=torch.Generator().manual_seed(5)) * scale
    return DualMemory(f"module:{path}", f"blocks.{block}.mlp.act", deltas, torch.zeros(memories), "silu")


def halfway(model: Model, edit: DualMemory, prompts: list[str]) -> DualMemory:
    """Return the edit with a threshold that half of the prompts exceed."""
    found = edit.routes(model, prompts).amax(1).sort().values
    middle = float(found[len(found) // 2 - 1] + found[len(found) // 2]) / 2
    return replace(edit, thresholds=torch.full_like(edit.thresholds, middle))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_each_row_is_what_a_changed_weight_or_the_plain_model_gives(family: str) -> None:
    model = tiny(family)
    edit = halfway(model, memory(model), PROMPTS)
    above = (edit.routes(model, PROMPTS) > edit.thresholds)[:, 0].tolist()
    assert sorted(above) == [False, False, True, True]
    changed = Matrix.of(model, 1, 0.5).weight_edit(edit.deltas[0], "test")
    for prompt, side in zip(PROMPTS, above, strict=True):
        plain = model.logits(prompt)
        with model.edit(edit):
            routed = model.logits(prompt)
        with model.edit(changed):
            expected = model.logits(prompt)
        if side:
            torch.testing.assert_close(routed, expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(routed, plain, atol=1e-3)
        else:
            assert torch.equal(routed, plain)


def test_a_row_is_judged_alone_whatever_stands_beside_it_and_padding_does_not_count() -> None:
    model = tiny()
    edit = halfway(model, memory(model), PROMPTS)
    alone = torch.cat([edit.routes(model, [p]) for p in PROMPTS])
    torch.testing.assert_close(edit.routes(model, PROMPTS), alone, atol=1e-5, rtol=1e-5)
    for side in ("left", "right"):
        with model.edit(edit):
            rows = model.encode(PROMPTS, padding_side=side)
            together = model.module(**rows, use_cache=False).logits
            for i, prompt in enumerate(PROMPTS):
                real = rows["attention_mask"][i].bool()
                torch.testing.assert_close(together[i][real], model.logits(prompt)[0], atol=1e-4, rtol=1e-4)


def test_the_decision_of_the_prompt_is_held_while_generating() -> None:
    model = tiny()
    edit = halfway(model, memory(model), PROMPTS)
    above = (edit.routes(model, PROMPTS) > edit.thresholds)[:, 0].tolist()
    changed = Matrix.of(model, 1, 0.5).weight_edit(edit.deltas[0], "test")
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    plain = model.generate(PROMPTS, **options).tokens
    with model.edit(changed):
        side = model.generate(PROMPTS, **options).tokens
    with model.edit(edit):
        cached = model.generate(PROMPTS, **options).tokens
        again = model.generate(PROMPTS, use_cache=False, **options).tokens
        beams = model.generate(PROMPTS, num_beams=2, **options).tokens
        each = [model.generate(p, num_beams=2, **options).tokens[0] for p in PROMPTS]
    for i, is_side in enumerate(above):
        assert torch.equal(cached[i], side[i] if is_side else plain[i])
        assert torch.equal(cached[i], again[i]) and torch.equal(beams[i], each[i])


def test_a_pass_that_starts_from_a_cache_is_refused() -> None:
    model = tiny()
    ids = model.encode("It was raining")["input_ids"]
    with model.edit(memory(model)):
        first = model.module(input_ids=ids, use_cache=True)
        with pytest.raises(InputError, match="must see the prompt"):
            model.module(input_ids=ids[:, :1], past_key_values=first.past_key_values)


def test_the_memory_that_reacts_most_answers() -> None:
    model = tiny()
    edit = memory(model, memories=2)
    edit = replace(edit, deltas=torch.stack([edit.deltas[0], 2 * edit.deltas[1]]))
    reactions = edit.routes(model, PROMPTS)
    assert (reactions[:, 1] > reactions[:, 0]).all()
    with model.edit(edit):
        both = model.logits(PROMPTS[0])
    with model.edit(replace(edit, deltas=edit.deltas[1:], thresholds=torch.zeros(1))):
        assert torch.equal(model.logits(PROMPTS[0]), both)
    shut = replace(edit, thresholds=torch.tensor([0.0, 1e6]))
    with model.edit(shut):
        least = model.logits(PROMPTS[0])
    with model.edit(replace(edit, deltas=edit.deltas[:1], thresholds=torch.zeros(1))):
        assert torch.equal(model.logits(PROMPTS[0]), least)


def test_it_saves_loads_scales_and_comes_off(tmp_path) -> None:
    model = tiny()
    edit = memory(model)
    plain = model.logits(TEXTS[0])
    with model.edit(edit):
        full = model.logits(TEXTS[0])
    assert torch.equal(model.logits(TEXTS[0]), plain)
    edit.save(tmp_path / "m", model)
    loaded = Edit.load(tmp_path / "m", model)
    with model.edit(loaded):
        assert torch.equal(model.logits(TEXTS[0]), full)
    with model.edit(edit * 0.0):
        assert torch.equal(model.logits(TEXTS[0]), plain)
    with model.edit(edit * 0.5):
        half = model.logits(TEXTS[0])
    assert not torch.equal(half, full) and not torch.equal(half, plain)
    with model.edit(edit.at(rows=1)):
        rows = model.logits([TEXTS[0], TEXTS[0]])
    torch.testing.assert_close(rows[0], plain[0])
    torch.testing.assert_close(rows[1], full[0])
    with model.edit(Scale("blocks.1.mlp.act", 0.0)), model.edit(edit):
        shut = model.logits(TEXTS[0])
    with model.edit(Scale("blocks.1.mlp.act", 0.0)):
        assert torch.equal(model.logits(TEXTS[0]), shut)  # no input, no reaction, W answers
    with pytest.raises(ShapeError, match=r"is \[32, 48\]"):
        with model.edit(replace(edit, deltas=torch.zeros(1, 3, 3))):
            pass


def test_the_reaction_is_a_mean_over_real_tokens_or_the_maximum_of_long_rows() -> None:
    r = torch.tensor([[1.0, 3.0, 100.0], [2.0, 4.0, 6.0]])
    real = torch.tensor([[True, True, False], [True, True, True]])
    assert over_tokens(r, real).tolist() == [2.0, 4.0]
    assert over_tokens(r, real, long_max=2).tolist() == [2.0, 6.0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_of_a_change_is_the_loss_of_the_changed_model(family: str) -> None:
    model = tiny(family)
    matrix = Matrix.of(model, "blocks.1.mlp.out", 0.5)
    delta = torch.randn(matrix.weight.shape, generator=torch.Generator().manual_seed(2)) * 0.2
    rows = write_rows(matrix, ["The old bridge is", "Yes. The old bridge is"], " red")
    leaf = delta.clone().requires_grad_()
    with frozen(model.module):
        loss = rows.loss(leaf)
        loss.backward()
    loss = loss.detach()
    with model.edit(matrix.weight_edit(delta, "test")):
        again = write_rows(matrix, ["The old bridge is", "Yes. The old bridge is"], " red")
        logits = again.rows.logits(model)
    assert float(loss) == pytest.approx(
        float(rows.rows.losses(logits).sum() / rows.rows.real.sum()), rel=1e-4
    )
    moved = delta.clone()
    moved[3, 5] += 1e-2
    slope = float((rows.loss(moved) - rows.loss(2 * delta - moved)).detach()) / 2e-2
    assert float(leaf.grad[3, 5]) == pytest.approx(slope, abs=2e-3)
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())


SETTINGS = WiseSettings(lr=3.0, steps=60, contexts=1, save_freq=2, act_ratio=0.5)


def sharp() -> Model:
    """Return a small model whose output can be certain: its head is ten times as large."""
    model = tiny()
    with torch.no_grad():
        model.module.lm_head.weight.mul_(10)
    return model


def says(model: Model, request: EditRequest) -> bool:
    """Say whether generating gives the target."""
    wanted = model.tokenizer(request.target)["input_ids"]
    return model.generate(request.prompt, max_new_tokens=len(wanted)).tokens[0].tolist() == wanted


def editor(model: Model, **changes: object) -> WiseEditor:
    return WiseEditor(model, 1, irrelevant=IRRELEVANT, settings=replace(SETTINGS, **changes))


def test_facts_are_written_where_the_mask_allows_and_are_said_afterwards() -> None:
    model = sharp()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    flags = [p.requires_grad for p in model.module.parameters()]
    wise = editor(model, save_freq=3)
    edit, found = edit_stream(model, wise, as_requests(FACTS), at=(1,), name="wise")
    values = {(m.name, m.group["facts"]): m.value for m in found}
    assert values["reliability", "1"] == 1.0 and values["reliability", "3"] >= 1 / 3
    assert ("locality", "1") not in values and 0 <= values["locality", "3"] <= 1
    shard = wise.shards[0]
    assert not shard.delta[shard.mask == 0].any() and shard.delta.any()
    assert float(shard.delta.abs().max()) <= SETTINGS.clamp
    assert shard.mask.mean() == pytest.approx(0.2, abs=0.05)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert [p.requires_grad for p in model.module.parameters()] == flags
    least = float(edit.routes(model, [r.prompt for r in FACTS]).min())
    assert float(edit.thresholds[0]) == pytest.approx(0.5 * least, rel=1e-4)
    with model.edit(edit):
        assert says(model, FACTS[2])


def test_shards_merge_by_ties_or_stay_apart_and_are_retrieved() -> None:
    from actlas.core.ties import ties

    model = sharp()
    merged, apart = editor(model), editor(model, mode="retrieve")
    for request in FACTS:
        merged.add(request)
        apart.add(request)
    assert len(merged.shards) == 2 and not torch.equal(merged.shards[0].mask, merged.shards[1].mask)
    one, two = merged.edit(), apart.edit()
    expected = ties([{"d": s.delta} for s in merged.shards], density=SETTINGS.density)["d"]
    assert torch.equal(one.deltas[0], expected) and len(two.deltas) == 2
    assert torch.equal(two.deltas[0], apart.shards[0].delta)
    with model.edit(replace(two, deltas=two.deltas[1:], thresholds=two.thresholds[1:])):
        assert says(model, FACTS[2])


def test_the_margin_loss_is_the_papers_and_its_gradient_pushes_facts_up_and_others_down() -> None:
    wise = editor(sharp(), margins=(1.0, 4.0, 2.0))
    inside = torch.tensor([5.0, 3.0], requires_grad=True)
    outside = torch.tensor([0.5, 2.5, 1.0], requires_grad=True)
    loss = wise._margin_loss(inside, outside)
    gaps = [max(0.0, 2.0 - (i - o)) for o in (0.5, 2.5, 1.0) for i in (5.0, 3.0)]
    assert float(loss.detach()) == pytest.approx((1.5 / 3) + (1.0 / 2) + sum(gaps) / 6)
    loss.backward()
    assert inside.grad[1] < 0 <= outside.grad[0] < outside.grad[1] and inside.grad[0] == 0
    assert wise._apart(torch.tensor([5.0, 6.0]), torch.tensor([2.9]))
    assert not wise._apart(torch.tensor([5.0, 6.0]), torch.tensor([3.1]))
    assert not wise._apart(torch.tensor([3.9]), torch.tensor([0.1]))
    auto = editor(sharp()).margins
    assert auto[1] == pytest.approx(4 * auto[0]) and auto[2] == pytest.approx(2 * auto[0]) and auto[0] > 0


def test_fitting_gives_an_edit_with_its_measurements(tmp_path) -> None:
    model = sharp()
    records = [{"prompt": r.prompt, "target": r.target, "locality": list(r.locality)} for r in FACTS[:2]]
    edit = fit_wise(model, records, 1, shards=1, irrelevant=IRRELEVANT, lr=3.0, steps=40, contexts=1)
    names = [m.name for m in edit.measurements]
    assert names == ["reliability", "target-nll", "generality", "locality", "locality-kl"]
    edit.save(tmp_path / "m", model)
    assert [m.name for m in Edit.load(tmp_path / "m", model).measurements] == names


def test_rome_makes_a_rank_one_change_that_maps_the_key_to_the_value() -> None:
    model = sharp()
    rome = RomeEditor(model, 1, texts=TEXTS, contexts=0, steps=40, decay=0.0, kl=0.0)
    fact = replace(FACTS[0], subject="")
    rome.add(fact)
    singular = torch.linalg.svdvals(rome.delta.double())
    assert float(singular[1]) < 1e-5 * float(singular[0])
    rows = write_rows(rome.matrix, [fact.prompt], fact.target)
    base = float(rows.loss(torch.zeros_like(rome.delta)).detach())
    assert float(rows.loss(rome.delta).detach()) < 0.7 * base
    column = rome._column(fact.prompt, "", rows)
    key = rows.prompts.a[0, column].double()
    direction = torch.linalg.solve(rome.moment, key)
    expected = torch.outer(rome.delta.double() @ key, direction) / (key @ direction)
    torch.testing.assert_close(rome.delta.double(), expected, atol=1e-5, rtol=1e-3)
    keys = rome.matrix.activations(TEXTS)
    flat = keys.a[:, 1:][keys.real[:, 1:]].double()
    moment = flat.T @ flat / len(flat)
    moment += 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    torch.testing.assert_close(rome.moment, moment)
    assert column == len(model.tokenizer(fact.prompt)["input_ids"]) - 1
    assert (
        rome._column(fact.prompt, "bridge", rows) == len(model.tokenizer("The old bridge")["input_ids"]) - 1
    )


def test_rome_and_tuning_leave_the_model_as_it_was_and_stack_facts() -> None:
    model = sharp()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    tuning = TuningEditor(model, 1, contexts=0, lr=1.0, steps=60)
    rome = RomeEditor(model, 1, texts=TEXTS, contexts=1, steps=15)
    for request in FACTS:
        tuning.add(request)
        rome.add(request)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    with model.edit(tuning.edit()):
        assert says(model, FACTS[2])
    assert rome.edit().norm > 0 and rome.count == 3


def test_bad_input_says_what_would_be_right() -> None:
    model = sharp()
    with pytest.raises(InputError, match="must be a multiple of save_freq, 4"):
        WiseSettings(save_freq=4, merge_freq=6)
    with pytest.raises(InputError, match="alpha < beta"):
        WiseSettings(margins=(2.0, 1.0, 1.0))
    with pytest.raises(InputError, match="rho is 0"):
        WiseSettings(rho=0.0)
    with pytest.raises(InputError, match="no fact has been written"):
        editor(model).edit()
    with pytest.raises(InputError, match="is an irrelevant text"):
        editor(model).add(EditRequest(IRRELEVANT[0], " x"))
    with pytest.raises(InputError, match="wise has no such option"):
        fit_wise(model, FACTS, 1, learning_rate=1.0)
    with pytest.raises(InputError, match="has blocks 0 to 2"):
        WiseEditor(model, 9)
    with pytest.raises(InputError, match="one of its own locality texts"):
        EditRequest("a", " b", locality=("a",))
    with pytest.raises(InputError, match="edited and is a locality text of another"):
        as_requests([EditRequest("a", " b"), EditRequest("c", " d", locality=("a",))])
    with pytest.raises(InputError, match="two requests edit"):
        as_requests([EditRequest("a", " b"), EditRequest("a", " c")])
    with pytest.raises(InputError, match="at names 5 facts"):
        edit_stream(model, editor(model), FACTS, at=(5,))
