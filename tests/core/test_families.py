"""What must hold for every architecture family: the identities that make a site what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actlas.core.edits import Add, Replace, Scale
from actlas.core.layout import BLOCK_KINDS, apply_linear, find, join
from actlas.core.model import Model
from tests.core.families import BY_NAME, FAMILIES, Family

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=[f.name for f in FAMILIES])
def family(request: pytest.FixtureRequest) -> Family:
    return BY_NAME[request.param]


def run(model: Model, inputs: dict[str, Tensor], **options: object) -> object:
    with torch.no_grad():
        return model.module(**inputs, **options)


def outputs(out: object) -> list[Tensor]:
    """Return every tensor of a model output, in a fixed order."""
    found = []
    for name in ("logits", "last_hidden_state", "logits_per_image", "text_embeds", "image_embeds"):
        value = getattr(out, name, None)
        if isinstance(value, Tensor):
            found.append(value)
    assert found
    return found


def same(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


def present(model: Model) -> list[str]:
    return [s.name for s in model.sites() if s.absent is None]


def test_every_canonical_site_exists_or_says_why_not(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    assert model.layout is not None
    for tower in model.layout.towers:
        kinds = {s.kind for s in model.sites() if s.tower == tower.name and s.block == 0}
        assert kinds == set(BLOCK_KINDS)
    for site in model.sites():
        if site.absent is not None:
            assert len(site.absent) > 10, site.name
    trace = model.trace(inputs, present(model), stop=False)
    for site in model.sites():
        if (
            site.absent is None
            and site.features is not None
            and "pattern" not in site.kind
            and "scores" not in site.kind
        ):
            assert tuple(trace[site.name].shape[-len(site.features) :]) == site.features, site.name


def test_resid_post_equals_hidden_states(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    trace = model.trace(
        inputs, [n for n in present(model) if "resid_p" in n or "embed" in n or "final_norm" in n]
    )
    out = run(model, inputs, output_hidden_states=True)
    assert model.layout is not None
    for tower in model.layout.towers:
        hidden = _tower_output(out, tower.name, "hidden_states")
        if hidden is None:
            continue
        for i in range(tower.n_blocks):
            pre = trace[join(tower.name, f"blocks.{i}.resid_pre")]
            torch.testing.assert_close(pre, hidden[i], rtol=0, atol=0)
            if i + 1 < tower.n_blocks:
                post = trace[join(tower.name, f"blocks.{i}.resid_post")]
                torch.testing.assert_close(post, hidden[i + 1], rtol=0, atol=0)
        last = trace[join(tower.name, f"blocks.{tower.n_blocks - 1}.resid_post")]
        final = join(tower.name, "final_norm")
        ends = [last] + ([trace[final]] if final in trace else [])
        assert any(torch.equal(e, hidden[-1]) for e in ends)
        torch.testing.assert_close(trace[join(tower.name, "embed")], hidden[0], rtol=0, atol=0)


def _tower_output(out: object, tower: str, what: str) -> tuple[Tensor, ...] | None:
    if tower in ("encoder", "decoder"):
        return getattr(out, f"{tower}_{what}")
    if tower in ("text", "vision"):
        return getattr(getattr(out, f"{tower}_model_output"), what)
    return getattr(out, what)


def test_pattern_equals_output_attentions(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    names = [n for n in present(model) if n.endswith("attn.pattern")]
    trace = model.trace(inputs, names)
    reference = family.model("eager")
    out = run(reference, inputs, output_attentions=True)
    assert model.layout is not None
    seen = 0
    for tower in model.layout.towers:
        attentions = _tower_output(out, tower.name, "attentions")
        if attentions is None or not len(attentions):
            continue
        for i in range(tower.n_blocks):
            got = trace[join(tower.name, f"blocks.{i}.attn.pattern")]
            torch.testing.assert_close(got, attentions[i], **CLOSE)
            seen += 1
    cross = getattr(out, "cross_attentions", None)
    if cross:
        for i, expected in enumerate(cross):
            torch.testing.assert_close(trace[f"decoder.blocks.{i}.cross_attn.pattern"], expected, **CLOSE)
    assert seen or family.name == "clip"


def test_eager_and_fused_attention_give_the_same_pattern(family: Family) -> None:
    model, eager = family.model(), family.model("eager")
    inputs = family.inputs(model.module)
    names = [n for n in present(model) if n.endswith(("attn.pattern", "attn.scores"))]
    a, b = model.trace(inputs, names), eager.trace(inputs, names)
    for name in names:
        if name.endswith("pattern"):
            torch.testing.assert_close(a[name], b[name], **CLOSE)
        else:
            torch.testing.assert_close(a[name].softmax(-1), b[name].softmax(-1), **CLOSE)


def test_projections_and_residual_identity(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    trace = model.trace(inputs, [n for n in present(model) if "blocks" in n], stop=False)
    assert model.layout is not None
    for tower in model.layout.towers:
        for i in range(tower.n_blocks):
            block = model.block(i, tower.name)

            def at(kind: str, i: int = i, tower: object = tower) -> Tensor | None:
                name = join(tower.name, f"blocks.{i}.{kind}")  # type: ignore[attr-defined]
                return trace[name] if name in trace else None  # noqa: SIM401

            def project(path: str, norm: str, x: Tensor, block: torch.nn.Module = block) -> Tensor:
                linear = find(block, path)
                assert linear is not None
                with torch.no_grad():
                    y = apply_linear(linear, x)
                    after = find(block, norm) if norm else None
                    return after(y) if after is not None else y

            z, out = at("attn.z"), at("attn.out")
            assert z is not None and out is not None
            torch.testing.assert_close(
                project(tower.out_proj, tower.attn_out_norm, z.flatten(-2)), out, **CLOSE
            )
            act, mlp_out = at("mlp.act"), at("mlp.out")
            assert mlp_out is not None
            if act is not None:
                torch.testing.assert_close(
                    project(tower.down_proj, tower.mlp_out_norm, act), mlp_out, **CLOSE
                )
            pre, mid, post = at("resid_pre"), at("resid_mid"), at("resid_post")
            assert pre is not None and post is not None
            cross = at("cross_attn.out")
            if mid is not None:
                expected = pre + out + (cross if cross is not None else 0)
                torch.testing.assert_close(mid, expected, **CLOSE)
                if not tower.post_norm:
                    torch.testing.assert_close(post, mid + mlp_out, **CLOSE)
            else:
                assert tower.parallel
                torch.testing.assert_close(post, pre + out + mlp_out, **CLOSE)


def test_reading_changes_no_output_bit(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    before = run(model, inputs)
    trace = model.trace(inputs, present(model), stop=False)
    assert same(before, trace.output)
    assert same(before, run(model, inputs))
    assert not _hooks(model)


def _hooks(model: Model) -> int:
    count = 0
    for module in model.module.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks)
        count += "_actlas_functions" in module.__dict__ or "forward" in module.__dict__
    return count


def test_strength_zero_changes_no_output_bit(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    before = run(model, inputs)
    for name in present(model):
        with model.edit(Scale(name, 3.0) * 0):
            assert same(before, run(model, inputs)), name


def test_writing_what_was_read_changes_no_output_bit(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    before = run(model, inputs)
    trace = model.trace(inputs, present(model), stop=False)
    names = [n for n in present(model) if n != "logits" or trace[n].ndim == 3]
    edits = [Replace(name, trace[name]) for name in names]
    with pytest.warns(UserWarning, match="changed nothing"), model.edit(*edits):
        assert same(before, run(model, inputs))


def test_writing_a_site_has_an_effect_and_is_undone(family: Family) -> None:
    model = family.model()
    inputs = family.inputs(model.module)
    before = run(model, inputs)
    for name in present(model):
        if name.startswith("encoder.final") or "blocks.1" in name:
            continue
        with model.edit(Scale(name, 1.5)):
            after = run(model, inputs)
        last_row_only = name.startswith(("vision.", "text."))
        if not last_row_only:
            assert not same(before, after), name
        assert same(before, run(model, inputs)), name
    assert not _hooks(model)


def test_written_value_is_what_the_next_site_reads(family: Family) -> None:
    """Adding at resid_mid moves resid_post by the same amount wherever the stream is a plain sum."""
    model = family.model()
    inputs = family.inputs(model.module)
    assert model.layout is not None
    for tower in model.layout.towers:
        site = next(s for s in model.sites() if s.name == join(tower.name, "blocks.0.resid_mid"))
        if site.absent or tower.post_norm:
            continue
        names = [join(tower.name, f"blocks.0.{k}") for k in ("resid_mid", "mlp.out", "resid_post")]
        vector = torch.linspace(-1, 1, tower.d_model)
        base = model.trace(inputs, names)
        with model.edit(Add(names[0], vector)):
            edited = model.trace(inputs, names)
        torch.testing.assert_close(edited[names[0]], base[names[0]] + vector, **CLOSE)
        torch.testing.assert_close(edited[names[2]], edited[names[0]] + edited[names[1]], **CLOSE)
