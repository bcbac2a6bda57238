"""Induction by prefix length: planted sequences, a head that needs three tokens, text, bad input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.edit import ActivationEdit, Here
from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.measure.prefix_induction import (
    overwritten_prefix,
    planted_sequences,
    prefix_induction,
    prefix_induction_measures,
)
from tests.core.families import BY_NAME
from tests.core.test_trace import WORDS, model, text  # noqa: F401


@dataclass(frozen=True, eq=False, repr=False)
class Induct(ActivationEdit):
    """Make one head attend to what followed an earlier copy of the last `needs` tokens, else to the first."""

    head: int = 0
    needs: int = 3

    def value(self, x: Tensor, here: Here) -> Tensor:
        new = x.clone()
        tokens = here.run.tokens
        assert tokens is not None
        for row in range(x.shape[0]):
            ids = tokens[row].tolist()
            for q in range(x.shape[2]):
                last = ids[q - self.needs + 1 : q + 1]
                found = [s for s in range(self.needs, q) if last and ids[s - self.needs : s] == last]
                new[row, self.head, q] = 0
                new[row, self.head, q, found[-1] if found else 0] = 1
        return new


def test_planted_sequences() -> None:
    small = BY_NAME["llama"].model()
    generator = torch.Generator().manual_seed(0)
    seen = []
    for length in (1, 4, 9):
        ids, after, decoy = planted_sequences(small, length, 40, 31, generator)
        for row, a, d in zip(ids.tolist(), after.tolist(), decoy.tolist(), strict=True):
            assert row[a - length : a] == row[-length:]
            spans = [set(range(s - length, s + 1)) for s in (a, d)] + [set(range(31 - length, 31))]
            assert len(set.union(*spans)) == 3 * length + 2 and 0 not in set.union(*spans)
            assert len(set(row)) == 31 - length  # no other token occurs twice
        seen.append(float((after < decoy).double().mean()))
    assert all(0.2 < s < 0.8 for s in seen)  # the control is drawn like the planted span


@pytest.mark.parametrize("needs", [1, 3])
def test_a_planted_head_has_its_curve(needs: int) -> None:
    small = BY_NAME["llama"].model()
    with small.edit(Induct("blocks.1.attn.pattern", head=2, needs=needs)):
        curves = prefix_induction(small, (1, 2, 3, 4), sequences=6, tokens=20)
        [best, *_] = prefix_induction_measures(small, sequences=4, tokens=31)
    assert curves.curve(1, 2).tolist() == [float(p >= needs) for p in (1, 2, 3, 4)]
    assert curves.heads(0.9) == [(1, 2)]
    assert curves.ratio(1, 4)[1, 2] == float(needs == 1)
    assert np.abs(curves.excess[:, 0]).max() < 0.5
    assert best.group == {"layer": "1", "head": "2"} and best.value == 1.0
    assert best.details["curve"] == [float(p >= needs) for p in range(1, 10)]


def test_scores_are_the_patterns() -> None:
    small = BY_NAME["gpt2"].model()
    curves = prefix_induction(small, (2,), sequences=3, tokens=12, seed=5)
    ids, after, decoy = planted_sequences(small, 2, 3, 12, torch.Generator().manual_seed(5))
    for block in range(3):
        pattern = small.trace(ids, f"blocks.{block}.attn.pattern")[f"blocks.{block}.attn.pattern"]
        for i in range(3):
            np.testing.assert_allclose(curves.score[0, block, :, i], pattern[i, :, -1, after[i]], rtol=1e-5)
            np.testing.assert_allclose(curves.control[0, block, :, i], pattern[i, :, -1, decoy[i]], rtol=1e-5)


def test_overwriting_a_prefix_on_text(model: Model) -> None:  # noqa: F811
    repeated = " ".join([text(12), text(12)])
    for needs, kept in ((2, 0.0), (1, 1.0)):
        with model.edit(Induct("blocks.0.attn.pattern", head=1, needs=needs)):
            found = overwritten_prefix(model, [repeated] * 3, 0, 1, tokens=24)
        by = {m.group["overwritten"]: m.value for m in found}
        assert by == {"prefix": kept, "elsewhere": 1.0, "prefix minus elsewhere": kept - 1.0}
    [nothing] = overwritten_prefix(model, [" ".join(WORDS[:20])], 0, 1, tokens=20)
    assert np.isnan(nothing.value) and "no pair" in nothing.note


def test_bad_input() -> None:
    small = BY_NAME["llama"].model()
    with pytest.raises(InputError, match="needs at least 31"):
        prefix_induction(small, sequences=1, tokens=30)
    with pytest.raises(InputError, match="at least 1"):
        prefix_induction(small, (), sequences=1)
    with pytest.raises(InputError, match="a context of 64"):
        prefix_induction(small, sequences=1, tokens=65)
    with pytest.raises(ModelError, match="no causal attention"):
        prefix_induction(BY_NAME["bert"].model(), sequences=1, tokens=40)
    curves = prefix_induction(small, (1, 2), sequences=1, tokens=12)
    with pytest.raises(InputError, match="length 4 was not measured"):
        curves.ratio()
    with pytest.raises(InputError, match="no head 3.0"):
        curves.curve(3, 0)
