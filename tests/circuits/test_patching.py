"""Exact patching equals whole runs with hooks, for every family, mode, place and position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actlas.circuits import PromptPairs, agreement, attribute, head, mlp, patch, screen
from actlas.circuits.nodes import Node, nodes
from actlas.circuits.patching import PatchChangedNothing
from actlas.core.edits import Add, HeadScale
from actlas.core.errors import InputError, SiteError
from actlas.core.model import Model
from tests.circuits.pairs import brute, metric, model_of, pairs_of
from tests.core.families import FAMILIES

_OTHERS = ("bert", "bert-encoder", "roberta", "t5", "t5-gated", "vit", "clip", "whisper")
_QUICK = ("llama", "gemma2", "gpt2", "bloom", "opt-post-norm", "gpt-neox", "mixtral")
CAUSAL = [
    pytest.param(f.name, marks=() if f.name in _QUICK else pytest.mark.slow)
    for f in FAMILIES
    if f.name not in _OTHERS
]
KINDS = ("attn.z[head=1]", "mlp.out", "resid_pre", "resid_post", "attn.out", "mlp.act[channel=3]", "attn.k")


def places(model: Model, positions: tuple[str | int, ...]) -> list[Node]:
    found = []
    for block in range(model.n_blocks or 0):
        for kind in KINDS:
            try:
                model.resolve(f"blocks.{block}.{kind}")
            except SiteError:
                continue  # a mixture of experts has no mlp.act
            found += [Node(f"blocks.{block}.{kind}", p) for p in positions]
    return found


def trace(model: Model, pairs: PromptPairs, side: str, node: Node) -> Tensor:
    name = node.site.split("[")[0]
    return model.trace(dict(getattr(pairs, side)), name)[name]


@pytest.mark.parametrize("family", CAUSAL)
def test_exact_patching_equals_whole_runs_with_hooks(family: str) -> None:
    model = model_of(family)
    pairs = pairs_of(model)
    some = places(model, ("all", -3))
    for mode, base, other in (("denoise", "corrupt", "clean"), ("noise", "clean", "corrupt")):
        found = patch(model, pairs, some, mode=mode)
        everywhere = torch.ones_like(pairs.clean["input_ids"], dtype=torch.bool)
        for node, row in zip(some, found.patched, strict=True):
            expected = brute(model, pairs, node, trace(model, pairs, other, node), base, everywhere)
            torch.testing.assert_close(row, expected, rtol=0, atol=5e-6, msg=f"{mode} {node.label}")
    assert float((found.clean - found.corrupt).abs().max()) > 0.1
    assert float((found.patched - found.clean).abs().max()) > 0.1


@pytest.mark.parametrize("mode", ["mean", "zero", "resample"])
def test_ablations_equal_whole_runs_with_hooks(mode: str) -> None:
    model = model_of("llama", torch.float64)
    pairs = pairs_of(model)
    some = places(model, ("all", "last", "changed"))
    found = patch(model, pairs, some, mode=mode, seed=3)
    mask = pairs.clean["attention_mask"].bool()
    where = mask & (mask.cumsum(1) > 1)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3))
    taken = torch.arange(4)
    taken[order] = order.roll(1)
    assert sorted(taken.tolist()) == [0, 1, 2, 3] and not (taken == torch.arange(4)).any()
    for node, row in zip(some, found.patched, strict=True):
        x = trace(model, pairs, "clean", node)
        written, here = torch.zeros_like(x), where
        if mode == "mean":
            written = x[where].mean(0).expand_as(x)
        elif mode == "resample":
            written, here = x[taken], where & where[taken]
        expected = brute(model, pairs, node, written, "clean", here)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5, msg=f"{node.label}")


def test_parts_that_are_patched_together_and_small_batches() -> None:
    model = model_of()
    pairs = pairs_of(model)
    together = (head(0, 1), mlp(1), head(2, 0, "last"))
    found = patch(model, pairs, [together, mlp(1)], batch_tokens=1)
    assert found.labels == ["L0H1 + MLP 1 + L2H0 at last", "MLP 1"]
    values = {n: trace(model, pairs, "clean", n) for n in together}
    from actlas.core.edits import Replace

    z0 = trace(model, pairs, "corrupt", together[0]).clone()
    z0[:, :, 1] = values[together[0]][:, :, 1]
    edits = [Replace("blocks.0.attn.z", z0), Replace("blocks.1.mlp.out", values[together[1]])]
    last = Replace("blocks.2.attn.z[head=0]", values[together[2]][:, :, 0])
    # Replace counts real tokens; without padding both mean the same columns
    rows = torch.tensor([2, 3])
    bare = pairs.take(rows)
    edits = [Replace(e.site, e.with_value[rows]) for e in edits]
    with model.edit(*edits, Replace(last.site, last.with_value[rows]).at(positions="last")):
        logits = model.logits(dict(bare.corrupt))[:, -1]
    torch.testing.assert_close(found.patched[0, rows], metric(logits.double(), bare), rtol=0, atol=5e-6)
    wide = patch(model, pairs, [together, mlp(1)], batch_tokens=10_000)
    torch.testing.assert_close(found.patched, wide.patched, rtol=0, atol=1e-6)


def test_installed_edits_apply_to_patched_runs() -> None:
    model = model_of()
    pairs = pairs_of(model)
    some = places(model, ("all",))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    edits = Add("blocks.1.resid_post", vector) + HeadScale("blocks.0.attn.z", {2: 3.0})
    plain = patch(model, pairs, some)
    with model.edit(edits):
        found = patch(model, pairs, some)
        for node, row in zip(some, found.patched, strict=True):
            everywhere = torch.ones_like(pairs.clean["input_ids"], dtype=torch.bool)
            expected = brute(model, pairs, node, trace(model, pairs, "clean", node), "corrupt", everywhere)
            torch.testing.assert_close(row, expected, rtol=0, atol=5e-6, msg=node.label)
    assert float((found.patched - plain.patched).abs().max()) > 0.05


def test_other_metrics_and_ones_own() -> None:
    model = model_of()
    pairs = pairs_of(model)
    some = nodes(model, "components")
    clean = pairs.last_logits(model).double().log_softmax(-1)
    own = patch(model, pairs, some, metric=metric)
    torch.testing.assert_close(own.patched, patch(model, pairs, some).patched, rtol=0, atol=1e-6)
    found = patch(model, pairs, some, metric="kl", mode="noise")
    assert float(found.clean.abs().max()) < 1e-6 and float(found.patched.min()) > -1e-6
    corrupt = pairs.last_logits(model, "corrupt").double().log_softmax(-1)
    expected = (clean.exp() * (clean - corrupt)).sum(1)
    torch.testing.assert_close(found.corrupt, expected, rtol=0, atol=1e-5)
    whole = patch(model, pairs, [Node("blocks.0.resid_pre")], metric="log_prob")
    torch.testing.assert_close(whole.patched[0], whole.clean, rtol=0, atol=1e-5)
    assert whole["L0 resid_pre"].value == pytest.approx(1.0, abs=1e-4)


def test_what_cannot_change_anything_is_said() -> None:
    model = model_of()
    pairs = pairs_of(model)
    some = [head(0, 0, -9), head(0, 0), Node("blocks.2.mlp.out", -2)]
    found = patch(model, pairs, some)  # no pair differs in the first column; the last MLP is read at the end
    assert found.inert.tolist() == [True, False, True]
    assert any("2 of 3 patches changed nothing" in note for note in found.notes)
    with pytest.warns(PatchChangedNothing, match="the patch changed nothing"):
        patch(model, pairs, some[:1])


def test_bad_input_is_one_line() -> None:
    model = model_of()
    pairs = pairs_of(model)
    for call, error, said in (
        (lambda: patch(model, pairs, []), InputError, "nothing to patch"),
        (lambda: patch(model, pairs, "haeds"), InputError, "did you mean heads"),
        (lambda: patch(model, pairs, "features"), InputError, "lens"),
        (lambda: patch(model, pairs, mode="denoised"), InputError, "did you mean denoise"),
        (lambda: patch(model, pairs, metric="accuracy"), InputError, "there are logit_difference"),
        (lambda: patch(model, pairs, layers=[7]), InputError, "blocks 0 to 2, not 7"),
        (lambda: patch(model, pairs, positions="subject"), InputError, "it is all, last, changed"),
        (lambda: head(0, 0, 3), InputError, "give a negative number"),
        (lambda: patch(model, pairs, [head(9, 0)]), SiteError, "blocks 0 to 2"),
        (lambda: patch(model, pairs, [head(0, 9)]), SiteError, "head 9 does not exist"),
        (lambda: patch(model, pairs, [Node("blocks.0.attn.pattern")]), SiteError, "token by token"),
        (lambda: patch(model, pairs, [Node("final_norm")]), SiteError, "token by token"),
        (lambda: patch(model, pairs, metric=lambda z, p: z[:, 0] * 0), InputError, "nothing to attribute"),
        (lambda: attribute(model, pairs, mode="mean", steps=5), InputError, "between two prompts"),
        (lambda: attribute(model, pairs, mode="noise", metric="kl"), InputError, "no gradient at the clean run"),
        (lambda: screen(model, pairs, "heads", top=0), InputError, "at least 1"),
        (lambda: agreement(patch(model, pairs, "heads"), patch(model, pairs, "mlps")), InputError, "different parts"),
    ):  # fmt: skip
        with pytest.raises(error, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
