"""Attribution patching is the linear estimate: exact where the model is linear, right in the limit elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from actlas.circuits import agreement, attribute, head, mlp, patch, screen
from actlas.circuits.effects import Effects, check_difference
from actlas.circuits.nodes import Node, nodes
from actlas.core.errors import InputError
from tests.circuits.pairs import metric, model_of, pairs_of


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_estimates_are_the_gradient_times_the_change(family: str) -> None:
    model = model_of(family, torch.float64)
    pairs = pairs_of(model)
    some = [head(1, 2), mlp(0), Node("blocks.1.resid_pre", -2), Node("blocks.2.mlp.act[channel=5]")]
    late = [head(2, 1, "last"), Node("blocks.1.mlp.out", "last")]  # the prefix ends behind the changed tokens
    some += late
    found = attribute(model, pairs, some)
    alone = attribute(model, pairs, late)
    torch.testing.assert_close(alone.patched, found.patched[-2:], rtol=0, atol=1e-6)
    torch.testing.assert_close(alone.clean, found.clean, rtol=0, atol=1e-6)
    with torch.no_grad():  # a card runs its sections so
        torch.testing.assert_close(attribute(model, pairs, some).patched, found.patched)
    steps = [attribute(model, pairs, x, steps=2).patched[-2:] for x in (some, late)]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-6)
    names = list(dict.fromkeys(n.site.split("[")[0] for n in some))
    clean = model.trace(dict(pairs.clean), names)
    corrupt = model.trace(dict(pairs.corrupt), names, grad=True, stop=False)
    base = metric(corrupt.logits[:, -1], pairs)
    grads = corrupt.gradients(base.sum())
    for node, row in zip(some, found.patched, strict=True):
        name = node.site.split("[")[0]
        product = ((clean[name] - corrupt[name]) * grads[name]).detach()
        if node.position == -2:
            product = product[:, -2:-1]
        elif node.position == "last":
            product = product[:, -1:]
        if node.kind == "attn.z":
            product = product[:, :, node.index]
        elif node.index is not None:
            product = product[:, :, node.index : node.index + 1]
        expected = base.detach() + product.flatten(1).sum(1)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6, msg=node.label)


def test_small_patches_are_estimated_exactly() -> None:
    """Where the two prompts' activations are near one another, the estimate is the effect."""
    model = model_of("llama", torch.float64)
    pairs = pairs_of(model)
    weight = model.module.model.embed_tokens.weight
    with torch.no_grad():  # all token embeddings nearly the same
        weight.copy_(weight[5] + 1e-4 * (weight - weight[5]))
    pairs = pairs.measured(model)
    some = nodes(model, "components")
    exact, estimate = patch(model, pairs, some), attribute(model, pairs, some)
    change = exact.patched - exact.corrupt
    torch.testing.assert_close(
        estimate.patched - estimate.corrupt, change, rtol=0, atol=float(change.abs().max()) * 0.02
    )
    agreed = agreement(exact, estimate)
    assert agreed.value > 0.99 and agreed.details["shared_top"] >= 9


def test_integrated_gradients_of_the_embedding_sum_to_the_difference() -> None:
    """Completeness: with many steps the effect of the whole embedding is exactly 1."""
    model = model_of("llama", torch.float64)
    pairs = pairs_of(model)
    whole = [Node("blocks.0.resid_pre"), mlp(0), mlp(1)]
    many = attribute(model, pairs, whole, steps=64)
    torch.testing.assert_close(many.patched[0], many.clean, rtol=0, atol=1e-3)
    few = attribute(model, pairs, whole, steps=0)
    assert float((few.patched[0] - few.clean).abs().max()) > 0.05  # the plain gradient is not complete


def test_estimates_by_mode_and_screening() -> None:
    model = model_of()
    pairs = pairs_of(model)
    for mode in ("denoise", "noise", "mean", "zero", "resample"):
        found = attribute(model, pairs, "components", mode=mode)
        exact = patch(model, pairs, "components", mode=mode)
        assert agreement(exact, found).value > 0.5, mode
    exact, estimated = screen(model, pairs, "neurons", top=6, mode="noise")
    assert exact.parts == estimated.parts and len(exact) == 6
    everything = attribute(model, pairs, "neurons", mode="noise")
    assert len(everything) == 3 * 48
    assert (
        float(estimated.values.abs().min())
        >= float(everything.values.abs().sort(descending=True).values[5]) - 1e-12
    )
    together = attribute(model, pairs, [(head(0, 0), mlp(1)), head(0, 0), mlp(1)])
    values = together.patched - together.corrupt
    torch.testing.assert_close(values[0], values[1] + values[2], rtol=0, atol=1e-6)


def effects_of(
    patched: list[list[float]], clean: list[float], corrupt: list[float], mode: str = "denoise"
) -> Effects:
    rows = [torch.tensor(x, dtype=torch.float64) for x in (patched, clean, corrupt)]
    parts = tuple(head(i, 0) for i in range(len(patched)))
    inert = torch.zeros(len(parts), dtype=torch.bool)
    return Effects(parts, *rows, mode, "logit_difference", "logits", "exact", "toy", "toy", inert)


def test_effects_are_ratios_of_means_with_their_sign() -> None:
    found = effects_of([[1.0, 3.0], [0.0, 0.0], [2.0, 6.0]], [2.0, 6.0], [0.0, 0.0])
    assert found.values.tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert [e.label for e in found.top(2)] == ["L2H0", "L0H0"]
    noised = effects_of([[1.0, 3.0], [0.0, 0.0]], [2.0, 6.0], [0.0, 0.0], mode="noise")
    assert noised.values.tolist() == pytest.approx([0.5, 1.0])
    assert found["L0H0"].value == found[0].value == found[head(0, 0)].value
    with pytest.raises(InputError, match="was not patched"):
        found["L9H9"]


def test_intervals_cover_and_shrink() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    wide = effects_of([(0.3 + 0.2 * noise[:20]).tolist()], [1.0] * 20, [0.0] * 20)[0]
    narrow = effects_of([(0.3 + 0.2 * noise).tolist()], [1.0] * 200, [0.0] * 200)[0]
    assert wide.low < 0.3 < wide.high
    assert 0.02 < narrow.high - narrow.low < (wide.high - wide.low) / 2
    assert narrow.high - narrow.low == pytest.approx(4 * 0.2 / math.sqrt(200), rel=0.3)


def test_held_out_effects_are_not_those_that_were_chosen() -> None:
    """Of many parts without any effect, the largest on one half of the prompts is nothing on the other."""
    noise = torch.randn(400, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = effects_of(noise.tolist(), [1.0] * 40, [0.0] * 40)
    assert abs(found.top(1)[0].value) > 0.35
    assert sum(abs(e.value) for e in found.held_out(5)) / 5 < 0.3


def test_agreement_of_known_ranks() -> None:
    rising = [[float(i)] * 4 for i in range(6)]
    a = effects_of(rising, [9.0] * 4, [0.0] * 4)
    b = effects_of(rising[::-1], [9.0] * 4, [0.0] * 4)
    assert agreement(a, a).value == pytest.approx(1.0)
    assert agreement(a, b).value == pytest.approx(-1.0)


def test_metrics_that_say_nothing_are_refused() -> None:
    same = torch.ones(3, dtype=torch.float64)
    with pytest.raises(InputError, match="nothing to attribute"):
        check_difference(same, same, "m")
    with pytest.raises(InputError, match="cancels on average"):
        check_difference(torch.tensor([1.0, -1.0]).double(), torch.tensor([-1.0, 1.0]).double(), "m")
