"""The judge of mohd on invented numbers, and what its models are made of."""

from __future__ import annotations

import pytest
import torch

from actlas.core.measurement import Measurement
from actlas.nn import MoHD
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import mohd


def m(name: str, value: float, half: float = 0.001, **group: str) -> Measurement:
    return Measurement(name, value, "", 50, value - half, value + half, group=group)


def found(
    usage: float = 0.2, overlap: float = 0.05, narrow: float = 0.1, alone: float = 0.1, rarest: float = 0.1
) -> Measured:
    site = {"site": "middle"}
    return Measured(
        [
            m("hidden-dim-usage less than rotated", usage, **site),
            m("hidden-dim-overlap of neighbours over strangers", overlap, **site),
            m(mohd.OVER, narrow, arm=mohd.NARROW),
            m(mohd.OVER, alone, arm=mohd.ALONE),
            m(mohd.OVER, -0.1, arm=mohd.WIDE),
            m(mohd.OVER, 0.1, arm=mohd.PLAIN),
            m(mohd.OVER, 0.1, arm=mohd.UNFUSED),
            m("tokens of the rarest routed slice", rarest, arm=mohd.MOHD),
        ]
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"narrow": -0.1}, "partly"),
        ({"alone": -0.1}, "partly"),
        ({"rarest": 0.0}, "partly"),
        ({"usage": -0.1, "overlap": -0.1, "narrow": -0.1, "alone": -0.1}, "does not hold here"),
        ({"usage": 0.0, "overlap": 0.0, "narrow": 0.0, "alone": 0.0}, "not testable here"),
    ],
)
def test_width_must_pay_and_shared_slices_must_not_hurt(given: dict[str, float], verdict: str) -> None:
    assert verdict_of(mohd.judge(found(**given))) == verdict


@pytest.mark.parametrize("arm", mohd.ARMS)
def test_arms_train_and_have_as_many_active_parameters(arm: str) -> None:
    sizes = {"width": 16, "layers": 1}
    model = mohd.build(arm, 0, **sizes)
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = model.module(input_ids=ids, labels=ids).loss + mohd._balance(model.module)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.module.parameters())
    mixtures = [x for x in model.module.modules() if isinstance(x, MoHD)]
    assert len(mixtures) == (0 if arm in (mohd.NARROW, mohd.WIDE) else 2)
    narrow = mohd.active_parameters(mohd.build(mohd.NARROW, 0, **sizes))
    extra = sum(p.numel() for x in mixtures for n, p in x.named_parameters() if not n.startswith("component"))
    norms = 2 * 16 if arm != mohd.NARROW else 0  # two norms, 16 channels wider
    weights = narrow - 2 * 16
    expected = narrow + extra + norms + (weights if arm == mohd.WIDE else 0)
    assert mohd.active_parameters(model) == expected
