"""Layer voids against brute force, one token at a time, and under generation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.model import Model
from actlas.measure.likelihood import nll
from actlas.measure.void_edits import PassThrough, VoidRule, lac, random_skip, static_layer_skip
from actlas.measure.void_quality import count_usage, void_perplexity
from actlas.measure.voids import layer_usage, profile_distance, void_trace
from tests.measure.letter_models import TEXTS, gpt2, llama, trained


def deep() -> Model:
    return llama(num_hidden_layers=6)


def judged(norms: list[float], alpha: float) -> list[bool]:
    """The rule, written as on paper: norms of h_0 ... h_L."""
    d = [b - a for a, b in itertools.pairwise(norms)]
    out = []
    for layer, step in enumerate(d):
        before = d[:layer]
        out.append(step >= (alpha * (max(before) - min(before)) if before else 0.0))
    return out


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.8, 1.0])
def test_trace_is_brute_force(alpha: float) -> None:
    model = deep()
    trace = void_trace(model, TEXTS, alpha=alpha, tokens=None)
    row = 0
    for text in TEXTS:
        states = model.module(**model.encode(text), output_hidden_states=True)
        last = model.trace(text, "blocks.5.resid_post")["blocks.5.resid_post"]
        hidden = [*states.hidden_states[:-1], last]  # transformers gives the last one after the norm
        for position in range(last.shape[1]):
            norms = [float(h[0, position].detach().norm()) for h in hidden]
            assert np.allclose(trace.increments[row], np.diff(norms), atol=1e-4)
            assert trace.active[row].tolist() == judged(norms, alpha)
            row += 1
    assert row == len(trace.active) and not trace.massive.any() and not trace.response.any()
    usage = trace.usage()
    assert usage[0].value == pytest.approx(trace.active.mean())
    assert [m.value for m in usage[1:]] == pytest.approx(trace.profile().tolist())
    assert usage[0].n == len(TEXTS) and usage[0].low < usage[0].value < usage[0].high


def test_rule_signals_and_warnings() -> None:
    rule = VoidRule(0.5, "distance")
    assert rule.active(torch.tensor([[3.0, 1.0, 0.5, 1.5]])).tolist() == [[True, True, False, True]]
    with pytest.warns(UserWarning, match="alpha"):
        VoidRule(-0.1)
    with pytest.raises(InputError, match="signal"):
        VoidRule(0.5, "size")  # type: ignore[arg-type]
    before, after = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    from actlas.measure.void_edits import increment

    assert increment(before, after, "norm") == 0
    assert float(increment(before, after, "distance")) == pytest.approx(math.sqrt(2))
    assert float(increment(before, after, "angle")) == pytest.approx(1)
    assert increment(before.bfloat16(), after.bfloat16(), "norm").dtype == torch.float32


def skipped_forward(model: Model, text: str, alpha: float) -> torch.Tensor:
    """True skipping, block by block with plain PyTorch; returns the logits."""
    module = model.module
    ids = model.encode(text)["input_ids"]
    h = module.model.embed_tokens(ids)
    n = ids.shape[1]
    cos_sin = module.model.rotary_emb(h, torch.arange(n)[None])
    mask = torch.full((n, n), -torch.inf, dtype=h.dtype).triu(1)[None, None]
    seen = None
    for block in module.model.layers:
        out = block(h, attention_mask=mask, position_embeddings=cos_sin)
        d = out.norm(dim=-1) - h.norm(dim=-1)
        if seen is None:
            active, seen = d >= 0, (d, d)
        else:
            active = d >= alpha * (seen[1] - seen[0])
            seen = torch.minimum(seen[0], d), torch.maximum(seen[1], d)
        h = torch.where(active[..., None], out, h)
    return module.lm_head(module.model.norm(h))


def test_true_skip_is_block_by_block() -> None:
    model = deep()
    with torch.no_grad():
        expected = skipped_forward(model, TEXTS[0], 0.8)
    with model.edit(lac(0.8, "skip")):
        assert torch.allclose(model.logits(TEXTS[0]), expected, atol=1e-9)
    assert not torch.allclose(model.logits(TEXTS[0]), expected, atol=1e-3)


def test_readout_is_the_state_after_the_last_active_layer() -> None:
    model = deep()
    trace = void_trace(model, TEXTS[:1], alpha=0.8, tokens=None)
    states = model.trace(TEXTS[0], "blocks.*.resid_p*")
    chain = [states["blocks.0.resid_pre"], *(states[f"blocks.{i}.resid_post"] for i in range(6))]
    expected = torch.stack([chain[last][0, t] for t, last in enumerate(trace.last_active)])
    with model.edit(lac(0.8, "readout")):
        found = model.trace(TEXTS[0], "blocks.*.resid_post")
    assert torch.equal(found["blocks.5.resid_post"][0], expected)
    assert torch.equal(found["blocks.3.resid_post"], states["blocks.3.resid_post"])
    assert (trace.last_active < 6).any()


@pytest.mark.parametrize("edit", [lac(0.8, "skip"), lac(1.0, "readout"), random_skip(3.4, seed=3)])
def test_same_tokens_with_and_without_cache_padded_and_alone(edit: Edit) -> None:
    model = deep()
    with model.edit(edit):
        alone = [model.generate(t, max_new_tokens=8).tokens[0].tolist() for t in TEXTS[:3]]
        without = [model.generate(t, max_new_tokens=8, use_cache=False).tokens[0].tolist() for t in TEXTS[:3]]
        padded = [t.tolist() for t in model.generate(TEXTS[:3], max_new_tokens=8).tokens]
    assert alone == without == padded
    plain = [model.generate(t, max_new_tokens=8).tokens[0].tolist() for t in TEXTS[:3]]
    assert alone != plain


def test_phase_limits_the_edit() -> None:
    model = deep()
    plain = model.logits(TEXTS[0])
    with model.edit(lac(0.8, "skip", phase="generated")), pytest.warns(UserWarning, match="changed nothing"):
        assert torch.equal(model.logits(TEXTS[0]), plain)


def test_edits_save_and_load(tmp_path: object) -> None:
    model = deep()
    whole = lac(0.4, "skip", signal="angle") + random_skip(2.5, seed=1)
    for i, edit in enumerate((whole, static_layer_skip(model, [0.9, 0.1, 0.5, 0.2, 0.8, 0.7], 2))):
        path = edit.save(tmp_path / str(i), model=model)  # type: ignore[operator]
        with model.edit(edit):
            one = model.logits(TEXTS[0])
        with model.edit(Edit.load(path, model)):
            assert torch.equal(model.logits(TEXTS[0]), one)


def test_random_skip_keeps_so_many() -> None:
    model = deep()
    for keep in (0, 2, 3.5, 6):
        with model.edit(random_skip(keep, seed=5)), count_usage(model) as usage:
            model.forward(TEXTS)
        assert usage.tokens == sum(len(t) for t in TEXTS)
        assert usage.active / usage.tokens == pytest.approx(keep, abs=0 if keep == int(keep) else 0.15)
    counts = np.zeros(6)
    with model.edit(random_skip(3)):
        states = model.trace(TEXTS, "blocks.*.resid_p*")
    for i in range(6):
        moved = (states[f"blocks.{i}.resid_post"] != states[f"blocks.{i}.resid_pre"]).any(-1)
        counts[i] = moved[states.mask].double().mean()
    assert (np.abs(counts - 0.5) < 0.15).all()  # no layer is favoured


def test_usage_counts_agree_with_the_trace() -> None:
    model = deep()
    trace = void_trace(model, TEXTS, alpha=0.8, tokens=None)
    with count_usage(model, VoidRule(0.8)) as usage:
        model.forward(TEXTS)
    assert usage.active / usage.tokens / 6 == pytest.approx(trace.active.mean())
    assert usage.last / usage.tokens == pytest.approx(trace.last_active.mean())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_static_skip_takes_blocks_out() -> None:
    model = deep()
    edit = static_layer_skip(model, [0.9, 0.1, 0.5, 0.2, 0.8, 0.7], 2)
    with model.edit(edit):
        assert isinstance(model.block(1), PassThrough) and isinstance(model.block(3), PassThrough)
        cached = model.generate(TEXTS[0], max_new_tokens=6).tokens[0].tolist()
        assert cached == model.generate(TEXTS[0], max_new_tokens=6, use_cache=False).tokens[0].tolist()
        changed = model.logits(TEXTS[0])
    assert not isinstance(model.block(1), PassThrough)
    assert not torch.allclose(changed, model.logits(TEXTS[0]))
    with pytest.raises(InputError, match="can be taken out"):
        static_layer_skip(model, [0.5] * 6, 6)
    with pytest.raises(InputError, match="entries"):
        static_layer_skip(model, [0.5] * 5, 1)
    other = gpt2()
    with other.edit(static_layer_skip(other, [0.5, 0.1], 1)):
        other.logits(TEXTS[0])


def test_perplexities_have_controls() -> None:
    model = trained()
    rows = void_perplexity(model, TEXTS, alphas=(0.8,), tokens=220)
    by = {m.group["mode"]: m for m in rows}
    assert list(by) == ["readout", "skip", "random"]
    assert by["random"].details["usage"] == pytest.approx(by["skip"].details["usage"], abs=0.1)
    base = nll(model, TEXTS, tokens=220)
    with model.edit(lac(0.8, "skip")):
        skip = nll(model, TEXTS, tokens=220)
    expected = math.exp(skip.nll.sum() / skip.tokens.sum() - base.nll.sum() / base.tokens.sum())
    assert by["skip"].value == pytest.approx(expected)
    later = void_perplexity(model, TEXTS, alphas=(0.8,), modes=("skip",), tokens=220, skip_first=3)[0]
    assert "first 3 tokens left alone" in later.note and later.value != by["skip"].value
    with pytest.raises(InputError, match="unknown mode"):
        void_perplexity(model, TEXTS, modes=("best",))


def test_prompt_and_response_phases() -> None:
    model = deep()
    trace = void_trace(model, TEXTS, alpha=0.5, max_new_tokens=5)
    assert trace.response.sum() == 5 * len(TEXTS)
    assert (~trace.response).sum() == sum(len(t) for t in TEXTS)
    prompt = void_trace(model, TEXTS, alpha=0.5, tokens=None)
    assert trace.profile("prompt") == pytest.approx(prompt.profile())
    distance = profile_distance(trace)
    assert distance.value == pytest.approx(np.abs(trace.profile("prompt") - trace.profile("response")).mean())
    assert distance.baseline is not None and distance.low <= distance.high
    with pytest.raises(InputError, match="response"):
        profile_distance(prompt)


def test_massive_tokens_are_kept_apart() -> None:
    model = deep()
    with torch.no_grad():
        model.module.model.embed_tokens.weight[5, 3] = 1e5  # the letter f
    trace = void_trace(model, TEXTS, tokens=None)
    letters_f = sum(t.count("f") for t in TEXTS)
    assert trace.massive.sum() == letters_f
    measured = layer_usage(model, TEXTS, tokens=None)
    assert measured[0].value == pytest.approx(trace.active[~trace.massive].mean())
    assert measured[-1].group["tokens"] == "massive" and "massive tokens apart" in measured[0].note
