"""Schedules, density penalties, ReLUfication, ProSparse, DEFT: values, gradients, the Trainer, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, SiteError
from actlas.core.methods import find_method
from actlas.core.sparse_activations import FATReLU, ReLU2
from actlas.measure.cett import mlp_sites
from actlas.measure.sparse_edits import count_active
from actlas.training.adapters import LoRA, bottleneck_adapters, frozen, trainable
from actlas.training.deft import deft
from actlas.training.density import ActivationPenalty, density_loss
from actlas.training.language_loop import tune_weights
from actlas.training.prosparse import prosparse, stages
from actlas.training.relufication import activation_paths, fit_threshold_shift, relufy
from actlas.training.schedules import WSDC, Constant, SineStages
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny


def test_sine_stages_are_the_published_formula():
    s = SineStages.published("7B")
    assert [s(t) for t in (0, 4_999, 5_000, 6_000)] == [0, 0, 5e-3, 5e-3]
    for end, peak in zip(s.ends, s.peaks, strict=True):
        assert s(end) == pytest.approx(peak, abs=1e-15)
    for t in range(6_001, 10_000, 333):
        eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * (t - 6_000) / 4_000) + 1)
        assert s(t) == pytest.approx(5e-3 + eta * 4.5e-2, rel=1e-12)
    values = [s(t) for t in range(0, 20_000, 50)]
    assert values == sorted(values) and s(10**9) == 2e-1
    assert all(s(t) == pytest.approx(5e-2) for t in range(10_000, 12_001, 500))  # a plateau
    small = s.scaled(steps=330, peak=1.0)
    assert small.ends[-1] == 330 and small.peaks[-1] == 1.0 and small.start == 100


def test_wsdc_warms_up_stays_decays_and_stays():
    for shape in ("cosine", "exponential", "linear"):
        w = WSDC(10, 20, 30, 0.1, shape)
        assert w(0) == pytest.approx(0.1) and w(9) == 1.0 and w(29) == 1.0 and w(30) == pytest.approx(1.0)
        falling = [w(t) for t in range(30, 61)]
        assert falling == sorted(falling, reverse=True) and w(60) == w(10_000) == 0.1
    assert WSDC(10, 20, 30, 0.1)(45) == pytest.approx(0.55)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: SineStages((1.0,), (3, 4)),
        lambda: SineStages((2.0, 1.0), (3, 4)),
        lambda: SineStages((1.0, 2.0), (4, 4)),
        lambda: SineStages((-1.0,), (4,)),
        lambda: SineStages((math.nan,), (4,)),
        lambda: SineStages.published("70B"),
        lambda: WSDC(-1, 1, 1),
        lambda: WSDC(1, 1, 1, 0.0),
        lambda: WSDC(1, 1, 1, 0.1, "step"),
        lambda: Constant(math.inf),
        lambda: FATReLU(-0.1),
        lambda: FATReLU(math.nan),
        lambda: density_loss(torch.ones(2, 2), kind="l2"),
        lambda: density_loss(torch.ones(2, 2), eps=0),
        lambda: density_loss(torch.ones(0, 2)),
        lambda: stages(10, 1e-3),
        lambda: stages(100, -1.0),
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(InputError) as error:
        bad()
    assert "\n" not in str(error.value)


def test_sparse_activations():
    x = torch.linspace(-2, 2, 401).requires_grad_(True)
    assert torch.equal(FATReLU(0.0)(x), torch.relu(x))
    y = FATReLU(0.5)(x)
    assert torch.equal(y, torch.where(x >= 0.5, x, torch.zeros(())))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, (x >= 0.5).float())
    (gradient,) = torch.autograd.grad(ReLU2()(x).sum(), x)
    torch.testing.assert_close(gradient, 2 * torch.relu(x.detach()))


def test_density_losses_against_their_definitions():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    assert density_loss(x, kind="l1").item() == pytest.approx(float(x.abs().sum(-1).mean()), rel=1e-5)
    assert density_loss(x, kind="l1", reduce="mean").item() == pytest.approx(float(x.abs().mean()), rel=1e-5)
    soft = float((x**2 / (x**2 + 0.3)).mean())
    assert density_loss(x, eps=0.3).item() == pytest.approx(soft, rel=1e-5)
    one = torch.zeros(4, 8)
    one[:, 2] = 3
    assert density_loss(one, kind="hoyer").item() == pytest.approx(1 / 8)
    assert density_loss(torch.ones(4, 8), kind="hoyer").item() == pytest.approx(1.0)
    assert density_loss(one).item() == pytest.approx(1 / 8, rel=1e-6)  # counts non-zeros


def test_a_penalty_sees_what_the_mlps_do_and_no_padding():
    model = tiny()
    short, long = model.encode(TEXTS[1]), model.encode([TEXTS[1], TEXTS[0]], padding_side="right")
    penalty = ActivationPenalty(model, kind="l1", weight=0.5)
    with penalty:
        model.module(**short)
        alone = penalty.value()
        rows = {"input_ids": long["input_ids"][:1], "attention_mask": long["attention_mask"][:1]}
        model.module(**rows)
        padded = penalty.value()
    assert alone.item() == pytest.approx(padded.item(), rel=1e-5)
    trace = model.trace(TEXTS[1], sites="blocks.*.mlp.act")
    want = 0.5 * sum(float(trace[s.name].abs().sum(-1).mean()) for s in mlp_sites(model))
    assert alone.item() == pytest.approx(want, rel=1e-5)
    alone.backward()
    assert model.module.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_penalty_is_forgotten_once_it_is_read_and_leaves_nothing_behind():
    model = tiny()
    penalty = ActivationPenalty(model)
    with penalty:
        with pytest.raises(InputError, match="no activations were seen"):
            penalty.value()
        with torch.no_grad():
            model.module(**model.encode(TEXTS[0]))
        with pytest.raises(InputError, match="no activations were seen"):
            penalty.value()
        model.module(**model.encode(TEXTS[0]))
        penalty.value()
        with pytest.raises(InputError, match="watching already"):
            penalty.__enter__()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    with pytest.raises(SiteError):
        ActivationPenalty(model, sites="blocks.9.mlp.act")


def test_gradient_accumulation_in_the_trainer_gives_the_step_of_the_loop(tmp_path):
    """Two micro-batches of the Trainer, with the callback, are the mean of two in a plain loop."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    ours, theirs = tiny(), tiny()
    penalty = ActivationPenalty(ours, kind="l1", weight=0.1)
    optimiser = torch.optim.SGD(ours.module.parameters(), lr=0.1)
    ours.module.train()
    with penalty:
        for row in ids:
            loss = ours.module(input_ids=row[None], labels=row[None]).loss + penalty.value()
            (loss / 2).backward()
    optimiser.step()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    watch = ActivationPenalty(theirs, kind="l1", weight=lambda step: 0.1 if step == 0 else 99.0)
    rows = [{"input_ids": r, "labels": r} for r in ids]
    trainer = Trainer(theirs.module, arguments, train_dataset=rows, callbacks=[watch.callback()])
    trainer.train()
    assert watch.step == 1 and "zero_rate" in trainer.state.log_history[0]
    for (name, a), b in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert not theirs.module._forward_hooks


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "gemma2"])
def test_relufy_swaps_every_mlp_and_comes_off(family):
    known = BY_NAME[family]
    model = known.model()
    inputs = known.inputs(model.module)
    with torch.no_grad():
        before = model(**inputs).logits
        with model.edit(relufy(model)), count_active(model, mlp_sites(model)) as active:
            model(**inputs)
        assert active.ratio < 0.8 and all(r < 0.9 for r in active.per_site.values())
        assert torch.equal(model(**inputs).logits, before)
    assert len(activation_paths(model)) == model.n_blocks


def test_threshold_shift_takes_the_largest_that_perplexity_allows():
    model = tiny()
    with model.edit(relufy(model)):
        edit = fit_threshold_shift(model, TEXTS, max_ppl_ratio=1.0001, tokens=300, context=32)
        found = {m.name: m for m in edit.measurements if m.name != "zero rate"}
        rates = [m.value for m in edit.measurements if m.name == "zero rate"]
        assert rates[1] >= rates[0] and found["perplexity-ratio"].value <= 1.0001 + 1e-9
        loose = fit_threshold_shift(model, TEXTS, max_ppl_ratio=2.0, tokens=300, context=32)
    assert loose.measurements[0].value == 1.0 and edit.measurements[0].value <= 1.0
    with pytest.raises(ModelError, match="needs a ReLU model"):
        fit_threshold_shift(model, TEXTS)
    with pytest.raises(InputError, match="max_ppl_ratio"):
        fit_threshold_shift(model, TEXTS, max_ppl_ratio=0.9)
    with pytest.raises(InputError, match="rise"):
        fit_threshold_shift(model, TEXTS, thresholds=(0.2, 0.1))
    with pytest.raises(InputError, match="relu2"):
        relufy(model, "relu2", threshold=0.1)


def test_prosparse_makes_zeros_and_can_be_saved(tmp_path):
    model = tiny()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    edit = prosparse(model, TEXTS * 6, steps=40, weight=0.05, context=24, batch=4, tokens=400, lr=3e-3)
    zeros = [m.value for m in edit.measurements if m.name == "zero rate"]
    assert zeros[0] < 0.01 and zeros[1] > 0.55
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.module.named_parameters())
    edit.save(tmp_path / "sparse", model)
    loaded = Edit.load(tmp_path / "sparse", model)
    with torch.no_grad(), model.edit(edit):
        want = model.logits(TEXTS[0])
    with torch.no_grad(), model.edit(loaded):
        assert torch.equal(model.logits(TEXTS[0]), want)


def test_the_penalty_is_what_makes_the_zeros():
    """The same steps without a penalty leave fewer zeros."""
    model = tiny()
    options = {"steps": 40, "context": 24, "batch": 4, "tokens": 400, "lr": 3e-3}
    made = [prosparse(model, TEXTS * 6, schedule=Constant(w), **options) for w in (0.0, 0.2)]
    plain, penalised = (next(m.value for m in e.measurements if m.group.get("when") == "after") for e in made)
    assert penalised > plain + 0.03


@pytest.mark.parametrize("adapter", ["lora", "bottleneck"])
def test_deft_trains_adapters_only(adapter, tmp_path):
    model = tiny()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    edit = deft(model, TEXTS * 4, steps=20, adapter=adapter, context=24, batch=4, tokens=300, lr=3e-3)
    ratio = next(m for m in edit.measurements if m.name == "perplexity-ratio")
    assert ratio.value < 1.0 and "soft_l0" in ratio.note
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.module.named_parameters())
    edit.save(tmp_path / "e", model)
    loaded = Edit.load(tmp_path / "e", model)
    with torch.no_grad():
        with model.edit(edit):
            want = model.logits(TEXTS[0])
        with model.edit(loaded):
            assert torch.equal(model.logits(TEXTS[0]), want)


def test_adapters_begin_as_nothing_and_lora_folds():
    model = tiny()
    with torch.no_grad():
        plain = model.logits(TEXTS[0])
        adapters = bottleneck_adapters(model, reduction=4)
        with model.edit(frozen(adapters)):
            assert torch.equal(model.logits(TEXTS[0]), plain)
    assert len(trainable(adapters)) == 4 * model.n_blocks and all(
        t.requires_grad for t in trainable(adapters)
    )
    lora = LoRA(model, 4)
    for _, b in lora.pairs.values():
        b.data.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with lora.installed():
            live = model.logits(TEXTS[0])
        with model.edit(lora.edit()):
            torch.testing.assert_close(model.logits(TEXTS[0]), live, atol=1e-4, rtol=1e-4)
    assert (live - plain).abs().max() > 1e-2
    for bad in (
        lambda: LoRA(model, 0),
        lambda: LoRA(model, inside=("nothing",)),
        lambda: bottleneck_adapters(model, reduction=99),
    ):
        with pytest.raises(InputError):
            bad()


def test_bad_calls_of_the_methods():
    model = tiny()
    for call in (
        lambda: prosparse(model, TEXTS[:1]),
        lambda: prosparse(model, TEXTS, held_out=0),
        lambda: deft(model, TEXTS, adapter="prefix"),
        lambda: tune_weights(model, TEXTS, inside="nothing", steps=1, lr=1e-3),
        lambda: tune_weights(model, ["short"], steps=1, lr=1e-3, context=99),
        lambda: tune_weights(model, TEXTS, steps=0, lr=1e-3, context=8),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError):
        deft(BY_NAME["bert"].model(), TEXTS)


def test_the_registry_knows_them():
    for name in ("prosparse", "deft", "fatrelu"):
        info = find_method(name)
        assert info.room == "training" and info.returns == "Edit" and info.example
