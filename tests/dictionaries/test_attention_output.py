"""Direct feature attribution: exact for every way of splitting, against loops in float64, padded and grouped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.errors import InputError, SiteError
from actlas.core.model import Model
from actlas.dictionaries.attention_output import (
    dfa,
    dfa_sites,
    reading_direction,
)
from actlas.dictionaries.head_weights import head_weights, latents_by_head, participation_ratio
from actlas.dictionaries.topk import TopKSAE
from tests.core.families import BY_NAME

CAUSAL = [
    "llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gpt2", "gpt-neox", "opt", "opt-post-norm", "bloom",
    "falcon-new", "mixtral",
]  # fmt: skip


def made(site: str, d: int, width: int = 24, heads: int | None = None, seed: int = 0) -> TopKSAE:
    """An autoencoder with every parameter random, so that each term of the split counts."""
    g = torch.Generator().manual_seed(seed)
    sae = TopKSAE.create(site, d, width, seed=seed, k=4)
    return replace(
        sae,
        W_enc=torch.randn(width, d, generator=g),
        b_enc=torch.randn(width, generator=g),
        b_dec=torch.randn(d, generator=g),
        scale=0.7,
        heads=heads,
    )


def attention_lens(model: Model, block: int = 1) -> TopKSAE:
    heads, size = model.n_heads, model.head_dim
    assert heads and size
    return made(f"blocks.{block}.attn.z", heads * size, heads=heads)


def inputs(left: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if left:
        mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", CAUSAL)
def test_every_split_sums_to_the_preactivation(name: str) -> None:
    model = BY_NAME[name].model()
    lens = attention_lens(model)
    assert model.d_model is not None
    upstream = made("blocks.1.resid_pre", model.d_model, seed=3)
    trace = model.trace(inputs(), dfa_sites(lens, "feature"))
    z = lens.flat(trace[lens.site])[1, 6].double()
    for latent in (0, 17):
        wanted = float(
            (z * lens.scale - lens.b_dec.double()) @ lens.W_enc[latent].double() + lens.b_enc[latent].double()
        )
        for by in ("source", "head", "head-source", "feature"):
            found = dfa(
                lens,
                trace,
                latent,
                6,
                by,
                row=1,
                upstream=upstream if by == "feature" else None,  # type: ignore[arg-type]
            )
            assert found.preactivation == pytest.approx(wanted, rel=1e-9)
            size = found.contributions.abs().sum() + sum(abs(v) for v in found.rest.values())
            assert abs(found.total - wanted) < 3e-5 * float(size), (name, by, found.total, wanted)


def test_sources_and_heads_equal_loops() -> None:
    model = BY_NAME["llama"].model()  # four query heads share two value heads
    assert (model.n_heads, model.n_kv_heads) == (4, 2)
    lens = attention_lens(model)
    trace = model.trace(inputs(), dfa_sites(lens))
    pattern, v = trace["blocks.1.attn.pattern"][0].double(), trace["blocks.1.attn.v"][0].double()
    w = (lens.W_enc[5].double() * lens.scale).reshape(4, 8)
    both = torch.tensor(
        [[float(pattern[h, 7, s] * (v[s, h // 2] @ w[h])) for s in range(9)] for h in range(4)],
        dtype=torch.float64,
    )
    grid = dfa(lens, trace, 5, 7, "head-source")
    torch.testing.assert_close(grid.contributions.reshape(4, 9), both)
    assert grid.heads.tolist()[:10] == [0] * 9 + [1] and grid.sources.tolist()[:10] == [*range(9), 0]
    torch.testing.assert_close(dfa(lens, trace, 5, 7, "source").contributions, both.sum(0))
    torch.testing.assert_close(
        dfa(lens, trace, 5, 7, "head").contributions, both.sum(1), rtol=1e-4, atol=1e-6
    )
    best = dfa(lens, trace, 5, 7).top(1)[0]
    assert best["source"] == int(both.sum(0).abs().argmax())
    assert float(dfa(lens, trace, 5, 3).contributions[4:].abs().sum()) == 0.0  # nothing from later tokens


def test_features_equal_an_ablation_through_the_frozen_norm_and_pattern() -> None:
    model = BY_NAME["gemma2"].model()  # a gain of 1 + weight, grouped queries, soft-capping
    lens = attention_lens(model)
    upstream = made("blocks.0.resid_post", 32, seed=3)
    trace = model.trace(inputs(), [*dfa_sites(lens, "feature"), "blocks.1.attn_norm"])
    found = dfa(lens, trace, 2, 8, "feature", upstream=upstream)
    block = model.block(1)
    x, normed = trace["blocks.1.resid_pre"][0].double(), trace["blocks.1.attn_norm"][0].double()
    held = normed / x  # the frozen norm: gain / rms, channel by channel
    weight = block.self_attn.v_proj.weight.detach().double()
    w = (lens.W_enc[2].double() * lens.scale).reshape(4, 8)
    pattern = trace["blocks.1.attn.pattern"][0].double()
    codes = upstream.encode(x.float())
    for part in range(0, len(found.contributions), 5):
        s, j = int(found.sources[part]), int(found.features[part])
        written = float(codes.of(j)[s]) * upstream.atoms[j].double() * held[s]
        value = (weight @ written).reshape(2, 8)
        wanted = sum(float(pattern[h, 8, s] * (value[h // 2] @ w[h])) for h in range(4))
        assert float(found.contributions[part]) == pytest.approx(wanted, rel=2e-4, abs=1e-7)
    assert len(found.features) == int(codes.active.sum())


def test_left_padding_counts_real_tokens() -> None:
    model = BY_NAME["llama"].model()
    lens = attention_lens(model)
    padded = model.encode(inputs(left=True), padding_side="left")
    trace = model.trace(padded, dfa_sites(lens))
    alone = model.trace(inputs()["input_ids"][:1, 3:], dfa_sites(lens))
    for dest in (0, 4, -1):
        a, b = dfa(lens, trace, 3, dest), dfa(lens, alone, 3, dest)
        assert len(a.contributions) == 6 and a.dest == b.dest == dest % 6
        torch.testing.assert_close(a.contributions, b.contributions, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="row 0 has 6 tokens"):
        dfa(lens, trace, 3, 6)


def test_head_weights_with_and_without_the_output_projection() -> None:
    model = BY_NAME["gpt2"].model()
    lens = attention_lens(model)
    weights = head_weights(lens)
    norms = torch.stack([lens.W_dec[:, 8 * h : 8 * h + 8].norm(dim=1) for h in range(4)], 1)
    torch.testing.assert_close(weights, norms / norms.sum(1, keepdim=True))
    project = model.block(1).attn.c_proj.weight.detach()  # Conv1D: [in, out]
    written = torch.stack(
        [(lens.W_dec[:, 8 * h : 8 * h + 8] @ project[8 * h : 8 * h + 8]).norm(dim=1) for h in range(4)], 1
    )
    torch.testing.assert_close(head_weights(lens, through=model), written / written.sum(1, keepdim=True))
    assert participation_ratio(torch.tensor([[1.0, 0, 0, 0], [0.25] * 4])).tolist() == [1.0, 4.0]


def test_ten_latents_a_head_and_their_roles() -> None:
    lens = attention_lens(BY_NAME["llama"].model())
    weights = head_weights(lens)
    found = latents_by_head(lens, 10)
    assert [f.head for f in found] == [0, 1, 2, 3]
    for f in found:
        assert f.latents == tuple(weights[:, f.head].argsort(descending=True)[:10].tolist())
        assert f.monosemantic_candidate is None
    one = set(found[2].latents)
    labels = {i: "names" if i in one else f"role {i}" for i in range(24)}
    assert [f.monosemantic_candidate for f in latents_by_head(lens, 10, labels=labels)] == [
        set(f.latents) <= one for f in found
    ]
    assert set(latents_by_head(lens, 3, among=[1, 2, 3])[0].latents) == {1, 2, 3}
    with pytest.raises(InputError, match="has no label"):
        latents_by_head(lens, labels={0: "names"})


def test_bad_input(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    lens = attention_lens(model)
    trace = model.trace(inputs(), dfa_sites(lens))
    residual = made("blocks.1.resid_pre", 32)
    with pytest.raises(InputError, match="needs upstream"):
        dfa(lens, trace, 0, 0, "feature")
    with pytest.raises(InputError, match="must read"):
        dfa(
            lens,
            model.trace(inputs(), dfa_sites(lens, "feature")),
            0,
            0,
            "feature",
            upstream=replace(residual, site="blocks.1.resid_post"),
        )
    with pytest.raises(SiteError, match="has not read"):
        dfa(lens, trace, 0, 0, "feature", upstream=residual)
    with pytest.raises(InputError, match="must be 'source'"):
        dfa(lens, trace, 0, 0, "position")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no feature 99"):
        dfa(lens, trace, 99, 0)
    with pytest.raises(SiteError, match="joined heads"):
        dfa_sites(residual)
    with pytest.raises(InputError, match="heads"):
        head_weights(residual)
    with pytest.raises(InputError, match="row is 2"):
        dfa(lens, trace, 0, 0, row=2)


def test_reading_direction_is_the_encoders_own() -> None:
    lens = attention_lens(BY_NAME["llama"].model())
    x = torch.randn(3, 32)
    w, c = reading_direction(lens, 4)
    torch.testing.assert_close(
        (x.double() @ w + c).float(), lens.pre(x * lens.scale)[:, 4], rtol=1e-4, atol=1e-5
    )
    uncentred = replace(lens, centred=False)
    w, c = reading_direction(uncentred, 4)
    torch.testing.assert_close(
        (x.double() @ w + c).float(), uncentred.pre(x * lens.scale)[:, 4], rtol=1e-4, atol=1e-5
    )
    assert isinstance(lens.encode(x), Codes)
