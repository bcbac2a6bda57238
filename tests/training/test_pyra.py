"""Token merging, pruning and PYRA: identities, brute force, training, saving, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.core.token_merging import match_tokens, merge_matched, tokens_per_block
from actlas.sparsity.token_merge import (
    TokenMerge,
    TokenPrune,
    even_schedule,
    fit_token_merge,
    fit_token_prune,
)
from actlas.training.pyra import Adapters, Reactivation, TunedTokens, fit_pyra, tune_pyra
from tests.core.tiny import tiny


@pytest.fixture(scope="module")
def vit() -> Model:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    module = ViTForImageClassification(config)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.3)
    return Model(module, name="tiny vit")


def pictures(n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def logits(model: Model, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.module(pixel_values=pixels).logits
    return found


def test_merging_nothing_changes_nothing_bit_for_bit(vit: Model) -> None:
    base = logits(vit, pictures())
    for edit in (TokenMerge((0, 0, 0)), TokenPrune((0, 0, 0))):
        with vit.edit(edit):
            assert torch.equal(logits(vit, pictures()), base)
    with vit.edit(TokenMerge((3, 2, 1))):
        assert not torch.allclose(logits(vit, pictures()), base)
    assert torch.equal(logits(vit, pictures()), base)


def test_matching_and_merging_brute_force() -> None:
    generator = torch.Generator().manual_seed(1)
    metric = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (2, 9, 1), generator=generator).double()
    merged, sizes = merge_matched(x, size, match_tokens(metric, 3))
    assert merged.shape == (2, 6, 5) and sizes.sum() == size.sum()
    for row in range(2):
        best = []
        for a in range(2, 9, 2):  # the class token, 0, is protected
            found = [
                float(F.cosine_similarity(metric[row, a], metric[row, b], dim=0)) for b in range(1, 9, 2)
            ]
            best.append((max(found), a, 1 + 2 * found.index(max(found))))
        total = {j: x[row, j] * size[row, j] for j in range(9)}
        weight = {j: float(size[row, j]) for j in range(9)}
        for _, a, b in sorted(best, reverse=True)[:3]:
            total[b] = total[b] + total.pop(a)
            weight[b] += weight.pop(a)
        order = [j for j in range(0, 9, 2) if j in total] + list(range(1, 9, 2))
        want = torch.stack([total[j] / weight[j] for j in order])
        assert torch.allclose(merged[row], want)
        assert sizes[row, :, 0].tolist() == [weight[j] for j in order]


def test_equal_tokens_merge_without_loss(vit: Model) -> None:
    """An image of equal patches without positions: a merged token counts as often as its patches do."""
    embeddings = vit.module.vit.embeddings.position_embeddings
    before = embeddings.detach().clone()
    with torch.no_grad():
        embeddings.zero_()
    try:
        plain = pictures(1)[:, :, :1, :1].expand(1, 1, 8, 8)
        base = logits(vit, plain)
        with vit.edit(TokenMerge((7, 4, 2))):
            assert torch.allclose(logits(vit, plain), base, atol=1e-5)
        with vit.edit(TokenPrune((7, 4, 2))):  # pruning does not count what it dropped
            assert (logits(vit, plain) - base).abs().max() > 1e-4
    finally:
        with torch.no_grad():
            embeddings.copy_(before)


def test_tokens_go_as_the_schedule_says(vit: Model) -> None:
    for edit in (TokenMerge((5, 0, 3)), TokenPrune((5, 0, 3))):
        with vit.edit(edit):
            logits(vit, pictures(2))
            blocks = vit.module.vit.layers
            assert blocks[0].tokens.counts == tokens_per_block(17, (5, 0, 3)) == [12, 12, 9]
    assert even_schedule(vit, 8) == (3, 3, 2)
    assert fit_token_merge(vit, tokens=8).schedule == (3, 3, 2)
    assert isinstance(fit_token_prune(vit, tokens=8), TokenPrune)


def test_pruning_keeps_what_the_class_token_attends_to(vit: Model) -> None:
    pixels = pictures(1, seed=3)
    pattern = vit.trace({"pixel_values": pixels}, "blocks.0.attn.pattern")["blocks.0.attn.pattern"]
    kept = pattern[0, :, 0, 1:].mean(0).topk(10).indices.sort().values + 1
    middle = vit.trace({"pixel_values": pixels}, "blocks.0.resid_mid")["blocks.0.resid_mid"][0]
    block = vit.block(0)
    with torch.no_grad():
        rest = middle[torch.cat([torch.zeros(1, dtype=torch.long), kept])]
        want = block.mlp(block.layernorm_after(rest)) + rest
    with vit.edit(TokenPrune((6, 0, 0))):
        got = vit.trace({"pixel_values": pixels}, "blocks.1.resid_pre")["blocks.1.resid_pre"][0]
    assert torch.allclose(got, want, atol=1e-5)


def test_pyra_begins_as_plain_merging_and_follows_its_equation(vit: Model) -> None:
    outputs = []
    for reactivate in (False, True):
        torch.manual_seed(0)
        with vit.edit(TunedTokens(Adapters(16, 3, (4, 3, 2), 2, reactivate=reactivate).eval())):
            outputs.append(logits(vit, pictures()))
    assert torch.equal(outputs[0], outputs[1])

    torch.manual_seed(1)
    module = Reactivation(3, 4).double()
    with torch.no_grad():
        module.w_d.normal_()
    source, target = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    got = module(source, target).detach()
    module.requires_grad_(False)
    for row in range(2):
        total = source[row] + target[row]
        p = (total - total.mean(-1, keepdim=True)) / (
            total.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        for i in range(3):
            by_token = 2 * torch.sigmoid((p[i] * module.w_d[0]).sum()) - 1
            for c in range(4):
                by_channel = 2 * torch.sigmoid((module.w_r[:, 0] * p[:, c]).sum())
                want = source[row, i, c] * (1 + by_token * by_channel)
                assert float(got[row, i, c]) == pytest.approx(float(want), abs=1e-12)


def test_training_learns_and_leaves_the_model_alone(vit: Model, tmp_path: Path) -> None:
    pixels = pictures(48, seed=2)
    labels = (pixels.mean((1, 2, 3)) > 0).long()
    before = {n: p.clone() for n, p in vit.module.named_parameters()}
    base = logits(vit, pixels)
    edit = tune_pyra(vit, pixels, labels, schedule=(4, 2, 1), rank=2, epochs=25, lr=1e-2, pyra_lr=1e-2)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in vit.module.named_parameters())
    assert torch.equal(logits(vit, pixels), base)
    with vit.edit(edit):
        tuned = logits(vit, pixels)
    assert float((tuned.argmax(-1) == labels).double().mean()) > 0.8
    moved = {i: float(m.w_d.abs().max()) > 0 for i, m in edit.adapters.pyra.items()}
    assert moved == {"0": True, "1": True, "2": False}  # nothing reads the patches behind the last attention
    loaded = Edit.load(edit.save(tmp_path / "pyra"), vit)
    with vit.edit(loaded):
        assert torch.equal(logits(vit, pixels), tuned)
    again = tune_pyra(vit, pixels, labels, schedule=(4, 2, 1), rank=2, epochs=25, lr=1e-2, pyra_lr=1e-2)
    with vit.edit(again):
        assert torch.equal(logits(vit, pixels), tuned)
    merged = TokenMerge((4, 2, 1))
    same = Edit.load(merged.save(tmp_path / "merge", model=vit), vit)
    with vit.edit(merged):
        want = logits(vit, pixels)
    with vit.edit(same):
        assert torch.equal(logits(vit, pixels), want)


def test_bad_input(vit: Model) -> None:
    pixels, labels = pictures(4), torch.tensor([0, 1, 0, 1])
    with pytest.raises(InputError, match="3 blocks"), vit.edit(TokenMerge((1, 1))):
        pass
    with pytest.raises(InputError, match="whole numbers"), vit.edit(TokenMerge((1, -1, 0))):
        pass
    with pytest.raises(InputError, match="at most half"), vit.edit(TokenMerge((9, 0, 0))):
        logits(vit, pixels)
    with pytest.raises(InputError, match="one must stay"), vit.edit(TokenPrune((16, 0, 0))):
        logits(vit, pixels)
    with (
        pytest.raises(InputError, match="another edit"),
        vit.edit(TokenMerge((1, 1, 1)), TokenPrune((1, 1, 1))),
    ):
        pass
    with pytest.raises(ModelError, match="no ViT"), tiny("llama").edit(TokenMerge((1, 1, 1))):
        pass
    with pytest.raises(InputError, match="built for 3"):
        Reactivation(3, 4)(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    with pytest.raises(InputError, match="one class"):
        tune_pyra(vit, pixels, labels[:3], schedule=(1, 1, 1))
    with pytest.raises(InputError, match="rank"):
        tune_pyra(vit, pixels, labels, schedule=(1, 1, 1), rank=0)
    with pytest.raises(InputError, match="text is no image"):
        fit_pyra(vit, [("a text", 1)], schedule=(1, 1, 1))  # type: ignore[list-item]
    with pytest.raises(InputError, match="no strength"):
        TokenMerge((1, 1, 1)) * 0.5
