"""The judges of the trained-sparsity reproductions on invented numbers, and the clips that they use."""

from __future__ import annotations

import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import deft, ftwt, plm
from actlas.papers.reproductions.moving_digits import clips, unrelated
from actlas.papers.reproductions.prosparse import _identities


def number(name, value, low=None, high=None, **group):
    return Measurement(name, value, "", 3, low, high, group=group)


def deft_numbers(drop, rise):
    return Measured(
        [
            number("density drop", drop, model="relu", arm="DEFT"),
            number("density drop", drop, model="relu", arm="DEFT, weight 10"),
            number("density drop", 0.0, model="silu", arm="DEFT"),
            number("loss over PEFT", rise, rise - 0.005, rise + 0.005, arm="DEFT"),
            number("loss over PEFT", rise, rise - 0.005, rise + 0.005, arm="DEFT, weight 10"),
            number("loss of PEFT over the model as it was", -1, -1.1, -0.9),
        ]
    )


def test_the_judge_of_deft_wants_both_density_and_quality():
    assert verdict_of(deft.judge(deft_numbers(0.3, 0.01))) == "holds"
    assert verdict_of(deft.judge(deft_numbers(0.3, 0.2))) == "partly"
    assert verdict_of(deft.judge(deft_numbers(0.01, 0.2))) == "does not hold here"


def ftwt_numbers(over_fixed, seeds=3):
    return Measured(
        [
            number("seeds", seeds),
            number("multiplications saved", 0.5, mass="0.8", rule="predict"),
            number("accuracy over dense", -0.005, mass="0.8", rule="predict"),
            number("accuracy over random", 0.5, 0.4, 0.6, mass="0.8"),
            number("accuracy over fixed", over_fixed, over_fixed - 0.01, over_fixed + 0.01, mass="0.8"),
            number("predictors agree with labels", 0.9, mass="0.8"),
            number("filters differ between images", 2.0, mass="0.8"),
        ]
    )


def test_the_judge_of_ftwt_wants_more_than_fixed_filters_and_three_seeds():
    assert verdict_of(ftwt.judge(ftwt_numbers(0.05))) == "holds"
    assert verdict_of(ftwt.judge(ftwt_numbers(0.0))) == "partly"
    assert verdict_of(ftwt.judge(ftwt_numbers(0.05, seeds=1))) == "partly"


def test_models_of_plm_have_equal_parameters():
    sizes = {
        sum(p.numel() for p in plm.build(m, 24, 1, 0).module.parameters())
        for m in ("swiglu", "relu", "relu2")
    }
    assert len(sizes) == 1
    assert plm.absorbed_difference(0).value < 1e-5


def test_identities_of_prosparse_hold():
    assert _identities(100, 1e-3).value == 0


def test_clips_move_as_fast_as_asked_and_unrelated_frames_do_not_last():
    still, labels = clips(6, 0, held_out=True, speed=0)
    moving, _ = clips(6, 0, held_out=True, speed=1)
    assert still.shape == (6, 8, 1, 24, 24) and len(labels) == 6
    assert torch.equal(still[:, 0], still[:, 7]) and not torch.equal(moving[:, 0], moving[:, 1])
    mixed = unrelated(still, 0)
    assert torch.equal(mixed[:, 2].flatten(1).sum(1).sort()[0], still[:, 2].flatten(1).sum(1).sort()[0])
    assert float((mixed[:, 1] != mixed[:, 0]).float().mean()) > 0.3
