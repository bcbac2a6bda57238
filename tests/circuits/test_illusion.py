"""The illusion test: where it must appear, where it must not, its parts against algebra, its readers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actlas.circuits.illusion import DORMANT, NATURAL, PARTS, Outcome, illusion_test
from actlas.circuits.readers import Readers, readers_of, through_norm
from actlas.core.errors import InputError, ShapeError, SiteError
from actlas.core.layout import find, weight_matrix
from actlas.papers.reproductions.distilled_illusion import MUST, distilled, hidden, output
from tests.core.tiny import tiny


def test_the_distilled_illusion_is_exact_and_found() -> None:
    found = distilled()
    assert found.error < 1e-12
    assert found.illusion.verdict == "illusion"
    for part, effect in (("subspace", 1.0), ("readable", 0.0), ("unreadable", 0.0), ("whole", 1.0)):
        assert found.illusion.effect(part).value == pytest.approx(effect, abs=1e-12)
    assert found.illusion.get(DORMANT).value == pytest.approx(1.0)
    assert found.illusion.get(NATURAL).value == pytest.approx(0.0, abs=1e-12)
    assert "silent otherwise" in found.illusion.get(PARTS).note


def test_where_the_variable_is_there_is_no_illusion() -> None:
    found = distilled()
    assert found.honest.verdict == "faithful"
    assert found.honest.effect("readable").value == pytest.approx(1.0)
    assert found.honest.get(DORMANT).value == pytest.approx(0.0, abs=1e-12)
    assert found.honest.get(NATURAL).value == pytest.approx(1.0)


def test_dormant_neurons_are_found_when_one_functional_reads_everything() -> None:
    """With the output alone as reader, the row space cannot tell h1 from h2; the neurons can."""
    x = torch.linspace(0, 1, 20, dtype=torch.float64)
    readers = Readers(torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64), ("output",))
    base, source = hidden(x), hidden(x + 1)
    found = illusion_test(lambda h: Outcome(output(h)), base, source, MUST, readers, scale=-torch.ones(20))
    assert found.get(PARTS).value == pytest.approx(1.0)
    assert found.verdict == "illusion" and found.get(DORMANT).value == pytest.approx(1.0)


def test_an_mlp_that_nothing_read_reads_cannot_be_patched_through_its_kernel() -> None:
    """A random linear readout: effects of the parts add up to what algebra says, the kernel has none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    base, source = torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(8, generator=generator, dtype=torch.float64)
    readers = Readers(weight, ("W",))
    w = weight.sum(0)
    found = illusion_test(lambda h: Outcome(h @ w), base, source, v, readers, scale=torch.ones(30), seed=1)
    row = torch.linalg.pinv(weight) @ weight @ v
    change = lambda u: -(((source - base) @ u) / (u @ u) * (u @ w)).mean()  # noqa: E731
    assert found.effect("subspace").value == pytest.approx(float(change(v)))
    assert found.effect("readable").value == pytest.approx(float(change(row)))
    assert found.effect("unreadable").value == pytest.approx(0.0, abs=1e-12)
    norms = [found.get("norm of the part", part).value for part in ("readable", "unreadable")]
    assert norms[0] ** 2 + norms[1] ** 2 == pytest.approx(1.0)
    assert norms[0] == pytest.approx(float(row.norm() / v.norm()))


def test_no_effect_and_undecided() -> None:
    x = torch.linspace(0, 1, 20, dtype=torch.float64)
    base, source = hidden(x), hidden(x + 1)
    unread = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    run = lambda h: Outcome(output(h))  # noqa: E731
    readers = Readers(torch.eye(3, dtype=torch.float64)[:2], ("h1", "h2"))
    scale = -torch.ones(20, dtype=torch.float64)
    assert illusion_test(run, base, source, unread, readers, scale=scale).verdict == "no effect"
    first = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    every = Readers(torch.eye(3, dtype=torch.float64), ("all",))
    found = illusion_test(run, base, source, first, every, scale=scale)
    assert found.verdict == "undecided" and "name a few" in found.said


def test_bad_tests() -> None:
    base = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    readers = Readers(torch.eye(3, dtype=torch.float64), ("all",))
    run = lambda h: Outcome(h.sum(1))  # noqa: E731
    with pytest.raises(InputError, match="same activations"):
        illusion_test(run, base, base, base[0], readers)
    with pytest.raises(ShapeError, match="2 channels"):
        illusion_test(run, base, base + 1, torch.ones(2), readers)
    with pytest.raises(InputError, match="at least 2"):
        illusion_test(run, base[:1], base[:1] + 1, base[0], readers)
    with pytest.raises(InputError, match="0 on average"):
        illusion_test(lambda h: Outcome(0 * h.sum(1)), base, base + 1, base[0], readers)
    with pytest.raises(InputError, match="no 'interest'"):
        distilled().honest.get("interest")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "phi3"])
def test_readers_of_each_site(family: str) -> None:
    model = tiny(family)
    block = model.block(1)
    down = weight_matrix(find(block, model.tower.down_proj)).double()
    torch.testing.assert_close(readers_of(model, "blocks.1.mlp.act").matrix, down)
    out = weight_matrix(find(block, model.tower.out_proj)).double()
    torch.testing.assert_close(readers_of(model, "blocks.1.attn.z").matrix, out)
    head = readers_of(model, "blocks.1.attn.z[head=2]").matrix
    torch.testing.assert_close(head, out[:, 2 * model.head_dim : 3 * model.head_dim])
    assert readers_of(model, "blocks.1.attn.z[head=2]").hidden == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "phi3"])
def test_what_a_query_does_not_read_does_not_move_it(family: str) -> None:
    """Moving the residual stream in the readers' null space changes the query only by the norm's scale."""
    model = tiny(family)
    name = "blocks.2.attn.q[head=1]"
    readers = readers_of(model, "blocks.1.resid_post", [name])
    assert readers.hidden > 0
    block = model.block(2)
    norm = find(model.module, model.resolve("blocks.2.attn_norm")[0].module)
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    step = torch.randn(32, generator=torch.Generator().manual_seed(1))
    seen, unseen = (part.float() for part in readers.split(step))
    weight = weight_matrix(find(model.module, model.resolve("blocks.2.attn.q")[0].module))
    site = model.resolve(name)[0]

    def query(at: torch.Tensor) -> torch.Tensor:
        y = norm(at[None, None]) @ weight.T
        return site.read(y).flatten()

    with torch.no_grad():
        bias = query(torch.zeros(32)) * 0 if not hasattr(norm, "bias") or norm.bias is None else None
        if bias is None:  # the norm's bias gives a constant: compare differences from it
            bias = site.read((norm.bias @ weight.T)[None, None]).flatten()
        before, hidden_, seen_ = (query(at) - bias for at in (x, x + unseen, x + seen))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(before, hidden_, dim=0) == pytest.approx(1.0, abs=1e-4)
    assert cosine(before, seen_, dim=0) < 0.999
    assert block is model.block(2)


def test_readers_come_after_the_site() -> None:
    model = tiny()
    every = readers_of(model, "blocks.1.resid_post")
    assert every.names == ("blocks.2.attn.q", "blocks.2.attn.k", "blocks.2.attn.v", "blocks.2.mlp")
    assert readers_of(model, "blocks.1.resid_mid").names[0] == "blocks.1.mlp"
    assert readers_of(tiny("gpt-neox"), "blocks.1.attn.out").names[0] == "blocks.2.attn.q"  # parallel
    with pytest.raises(InputError, match="comes before"):
        readers_of(model, "blocks.1.resid_post", ["blocks.1.attn.q"])
    with pytest.raises(InputError, match="name no readers"):
        readers_of(model, "blocks.1.mlp.act", ["blocks.2.mlp"])
    with pytest.raises(InputError, match="not known as a linear map"):
        readers_of(model, "blocks.1.mlp.gate")
    with pytest.raises(SiteError, match="names 3 sites"):
        readers_of(model, "blocks.*.mlp.act")
    with pytest.raises(InputError, match="only the output head"):
        readers_of(model, "blocks.2.resid_post")


def test_through_norms() -> None:
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer, rms = nn.LayerNorm(8), nn.RMSNorm(8)
    for norm in (layer, rms):
        nn.init.normal_(norm.weight)
    nn.init.normal_(layer.bias)
    g = rms.weight.detach().double()
    torch.testing.assert_close(through_norm(rows, rms), rows * g, rtol=1e-5, atol=1e-5)
    scaled = rows * layer.weight.detach().double()
    wanted = scaled - scaled.mean(1, keepdim=True)
    torch.testing.assert_close(through_norm(rows, layer), wanted, rtol=1e-5, atol=1e-5)
