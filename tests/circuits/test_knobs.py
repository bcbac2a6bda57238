"""The knob, the head knob and the search over depth, on small random models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actlas.circuits.depth_search import decode_layers, depth_search
from actlas.circuits.head_knob import halves, head_effect, strongest, sweep_heads, tune_head
from actlas.circuits.head_runs import HeadRuns, random_heads
from actlas.circuits.knob import SetProjection, contrast_swaps, fit_dial, knob
from actlas.core.contrast import Contrast
from actlas.core.edit import Edit
from actlas.core.edits import HeadScale
from actlas.core.errors import InputError
from tests.circuits.pairs import metric, model_of, pairs_of
from tests.core.tiny import tiny

SITE = "blocks.1.resid_post"
STARTS = (
    "The bridge",
    "Nobody",
    "It was raining",
    "We will see",
    "Why not",
    "A second",
    "He said",
    "The river",
)
PAIRS = [(f"{start}, yes Q", f"{start}, not k") for start in STARTS]


def test_a_knob_sets_the_projection_of_the_newest_token() -> None:
    model = tiny()
    dial = knob(model, PAIRS, site=SITE, check=False)
    high, low = dial.means
    assert high > low and dial.to == high and dial.names == ("context", "prior")
    for to, value in (("context", high), ("prior", low), (1.5, 1.5)):
        made = dial.set(to)
        with model.edit(made):
            trace = model.trace(model.encode(list(STARTS[:3]), padding_side="left"), SITE)
        clean = model.trace(model.encode(list(STARTS[:3]), padding_side="left"), SITE)
        torch.testing.assert_close(
            made.score(trace.last(SITE)), torch.full((3,), value), atol=1e-4, rtol=1e-4
        )
        moved = trace.last(SITE) - clean.last(SITE)
        across = moved - made.score(moved).unsqueeze(1) * made.unit
        assert across.abs().max() < 1e-4  # nothing else changes
        assert torch.equal(trace[SITE][:, :-1], clean[SITE][:, :-1])


def test_the_mean_difference_and_its_sign() -> None:
    model = tiny()
    swap = contrast_swaps(model, Contrast.of(PAIRS), SITE)
    half = len(swap) // 2
    dial = fit_dial(swap)
    by_hand = (swap.base[:half] - swap.base[half:]).mean(0)
    torch.testing.assert_close(dial.unit, by_hand / by_hand.norm())
    other = fit_dial(contrast_swaps(model, Contrast.of(PAIRS).flipped(), SITE))
    torch.testing.assert_close(other.unit, -dial.unit)  # the positive side is always the larger
    learned = fit_dial(swap, "das", steps=3)
    assert learned.means[0] > learned.means[1]


def test_generation_follows_the_knob_row_by_row() -> None:
    model = tiny()
    dial = knob(model, PAIRS, site=SITE, check=False, controls=0)
    prompts = [PAIRS[0][1], PAIRS[1][1], PAIRS[2][1]]
    settings = [dial.set("context"), None, dial.set(-30.0)]
    together = model.generate(prompts, max_new_tokens=5, edits_by_row=settings)
    for prompt, edit, text in zip(prompts, settings, together.tokens, strict=True):
        if edit is None:
            alone = model.generate([prompt], max_new_tokens=5)
        else:
            with model.edit(edit):
                alone = model.generate([prompt], max_new_tokens=5)
        assert list(alone.tokens[0]) == list(text)


def test_a_knob_is_saved_with_its_sides_and_its_measurements(tmp_path) -> None:
    model = tiny()
    dial = knob(model, PAIRS, site=SITE, names=("loud", "quiet"), set="quiet", controls=2)
    loaded = Edit.load(dial.save(tmp_path / "knob"), model)
    assert isinstance(loaded, SetProjection) and loaded.names == ("loud", "quiet")
    assert loaded.to == dial.means[1] and loaded.set("loud").to == dial.means[0]
    by = {m.group["by"] for m in loaded.measurements if m.name == "turned"}
    assert by == {"set", "swap along the knob", "swap of everything", "random directions"}
    assert any(m.name == "share of the parts" for m in loaded.measurements)
    assert "quiet" in loaded.describe()


def test_bad_knobs() -> None:
    model = tiny()
    dial = SetProjection(SITE, torch.ones(32))
    with pytest.raises(InputError, match="did you mean context"):
        dial.set("contxt")
    with pytest.raises(InputError, match="finite"):
        dial.set(float("nan"))
    with pytest.raises(InputError, match="32 channels"), model.edit(SetProjection(SITE, torch.ones(3))):
        pass
    with pytest.raises(InputError, match="zero"), model.edit(SetProjection(SITE, torch.zeros(32))):
        pass
    with pytest.raises(InputError, match="'mean_diff' or 'das'"):
        knob(model, PAIRS, site=SITE, method="pca")
    with pytest.raises(InputError, match="two sides"):
        knob(model, PAIRS, site=SITE, names=("a", "a"))
    same = [(f"{a} yes Q", f"{b} yes Q") for a, b in zip(STARTS, STARTS[::-1], strict=True)]
    with pytest.raises(InputError, match="does what both sides ask"):
        contrast_swaps(_deaf(model), Contrast.of(same), SITE)


def _deaf(model):
    with torch.no_grad():
        model.module.lm_head.weight[5] = 0
        model.module.lm_head.weight[6:] *= 1e-6
        model.module.lm_head.weight[:5] *= 1e-6
        model.module.model.norm.weight.zero_()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scaled_heads_equal_installed_edits(family: str) -> None:
    model = model_of(family)
    pairs = pairs_of(model)
    runs = HeadRuns(model, pairs)
    torch.testing.assert_close(runs.scaled({}).difference.float(), pairs.difference, atol=1e-4, rtol=0)
    for factors in ({(1, 2): 3.0}, {(1, 2): 0.0, (1, 3): -1.0}, {(0, 1): 2.0, (2, 0): 0.0}):
        edits = [
            HeadScale(f"blocks.{b}.attn.z", factors={h: a}).at(positions=[-1])
            for (b, h), a in factors.items()
        ]
        with model.edit(*edits):
            wanted = metric(pairs.last_logits(model), pairs)
        torch.testing.assert_close(runs.scaled(factors).difference.float(), wanted, atol=1e-4, rtol=0)
        said = runs.scaled(factors)
        assert torch.equal(said.answer | said.wrong | said.other, torch.ones(len(pairs), dtype=torch.bool))
    with pytest.raises(InputError, match="no head 3.0"):
        runs.scaled({(3, 0): 1.0})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attribution_adds_up_to_the_logit_difference(family: str) -> None:
    """Heads, MLPs, embedding and biases together are the logit difference, through the frozen norm."""
    model = model_of(family, torch.float64)
    pairs = pairs_of(model)
    found = HeadRuns(model, pairs).attribution()
    names = [f"blocks.{b}.attn.out" for b in range(3)]
    trace = model.trace(dict(pairs.clean), [*names, "blocks.2.resid_post"])
    x = trace.last("blocks.2.resid_post").double()
    norm = model.final_norm_module
    rows = model.unembed_module.weight[pairs.answer_ids] - model.unembed_module.weight[pairs.wrong_ids]

    def through(part: torch.Tensor) -> torch.Tensor:
        spread = x - x.mean(1, keepdim=True) if family == "gpt2" else x
        centred = part - part.mean(1, keepdim=True) if family == "gpt2" else part
        return (centred * norm.weight / spread.square().mean(1, keepdim=True).sqrt() * rows).sum(1)

    for b, name in enumerate(names):
        out = trace.last(name)
        bias = getattr(model.block(b).attn.c_proj, "bias", None) if family == "gpt2" else None
        out = out - bias if bias is not None else out
        torch.testing.assert_close(found[:, b].sum(1), through(out).detach(), atol=1e-4, rtol=1e-4)


def test_tuning_a_head() -> None:
    model = model_of()
    pairs = pairs_of(model)
    groups = ["a", "b", "a", "b"]
    found = tune_head(model, pairs, alphas=(0.0, 3.0), candidates=4, groups=groups, controls=3, seed=0)
    sweep = found.measurements[0].details["sweep"]
    assert len(sweep) == 8 and {r["alpha"] for r in sweep} == {0.0, 3.0}
    best = max(r["answer"] for r in sweep)
    chosen = found.measurements[0].group["scaled"]
    assert any(f"{r['head']} x {r['alpha']:g}" == chosen and r["answer"] == best for r in sweep)
    edits = {m.group["edit"] for m in found.measurements if m.name == "rate"}
    assert edits == {"none", "tuned", "opposite change", "random heads"}
    for edit in ("none", "tuned", "opposite change"):
        rates = [m.value for m in found.measurements if m.group.get("edit") == edit]
        assert sum(rates) == pytest.approx(1.0)
    assert found.scope.positions == "last"


def test_the_best_head_is_the_best_by_brute_force() -> None:
    model = model_of()
    runs = HeadRuns(model, pairs_of(model))
    heads = [(b, h) for b in range(3) for h in range(4)]
    (best, alpha), rows = sweep_heads(runs, heads, (0.0, 5.0), "wrong")
    assert runs.scaled({best: alpha}).rate("wrong") == max(r["wrong"] for r in rows)
    mean = runs.attribution().mean(0)
    first = strongest(runs, 2)
    assert [float(mean[h]) for h in first] == pytest.approx([float(mean.max()), float(mean.min())])
    drawn = random_heads(runs, 50, first=1, without=[(1, 0)], seed=0)
    assert len(drawn) == 7 and (1, 0) not in drawn and min(b for b, _ in drawn) == 1
    effect = head_effect(runs, {(1, 0): 0.0, (2, 1): 4.0}, controls=2)
    assert np.isfinite([m.value for m in effect]).all()


def test_halves_keep_groups_together() -> None:
    groups = ["a", "a", "b", "c", "c", "d"]
    dev, test = halves(6, groups, seed=3)
    assert sorted(dev + test) == list(range(6))
    assert not {groups[i] for i in dev} & {groups[i] for i in test}
    with pytest.raises(InputError, match="same group"):
        halves(3, ["a"] * 3, 0)
    with pytest.raises(InputError, match="3 group labels"):
        halves(3, ["a"], 0)
    with pytest.raises(InputError, match="finite factor"):
        tune_head(model_of(), None, alphas=())


def _chooses_in_block_1():
    """A model in which only block 1's attention output carries what the last token says."""
    model = model_of()
    with torch.no_grad():
        for i, block in enumerate(model.module.model.layers):
            if i != 1:
                block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.mul_(0.0)
    return model


def test_depth_search_finds_the_layer_that_chooses() -> None:
    model = _chooses_in_block_1()
    ids = torch.randint(3, 60, (6, 8), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 2:5] = torch.randint(3, 60, (6, 3), generator=torch.Generator().manual_seed(1))  # not the last
    from actlas.circuits.batch import PromptPairs

    with torch.no_grad():
        model.module.lm_head.weight.mul_(40.0)  # sure of what it says
    said = [model.logits(x)[:, -1].argmax(1) for x in (ids, other)]
    kept = said[0] != said[1]
    assert int(kept.sum()) >= 2
    pairs = PromptPairs.from_ids(model, ids[kept], other[kept], said[0][kept], said[1][kept])
    found = depth_search(model, pairs)
    assert (found.first, found.last, found.layers) == (1, 2, (1,))
    assert found.evaluations < 2**3
    by = {(m.group["patch"], m.group["answer"]): m.value for m in found.measurements}
    assert by["range", "other"] > by["no patch", "other"] + 0.3
    with pytest.raises(InputError, match="does not travel"):
        depth_search(model, pairs, component="mlp.out")
    with pytest.raises(InputError, match="threshold"):
        depth_search(model, pairs, threshold=1.0)


def test_decoding_layers() -> None:
    model = tiny()
    records = [
        {"clean": f"{s} a", "corrupt": f"{s} b", "answer": "c", "wrong": "d"} for s in ("The end", "We see")
    ]
    from actlas.circuits.batch import PromptPairs

    pairs = PromptPairs.from_task(model, records, force=True)
    last = model.logits(dict(pairs.clean))[:, -1].argmax(1) == pairs.answer_ids
    found = decode_layers(model, pairs)
    final = [m for m in found if m.group["layer"] == "2" and m.group["answer"] == "own"]
    assert final[0].value == pytest.approx(float(last.float().mean()))
    assert len(decode_layers(model, pairs, decode="identity")) == 6
    with pytest.raises(InputError, match="decode"):
        decode_layers(model, pairs, decode="magic")
