"""The suite of quantised variants: what is paired, what is counted, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from actlas.core.errors import InputError
from actlas.measure.quantization_suite import BASE, Suite, proxy_agreement, quantization_suite, recovery
from actlas.measure.text_overlap import longest_common, rouge_1, rouge_l, shared_start
from actlas.quantize.rtn import fit_rtn
from tests.core.tiny import TEXTS, tiny


def test_overlap_of_texts_by_hand() -> None:
    assert rouge_1("The cat sat.", "the CAT ran") == pytest.approx(2 * 2 / 6)
    assert rouge_l("a b c d", "b a c d") == pytest.approx(2 * 3 / 8)
    assert longest_common("abcbdab", "bdcaba") == 4
    assert rouge_1("", "") == rouge_l("...", "") == 1.0 and rouge_1("a", "") == 0.0
    assert shared_start([1, 2, 9, 4], [1, 2, 3, 4]) == 0.5 and shared_start([], []) == 1.0


def test_variants_are_measured_on_the_same_items() -> None:
    model = tiny()
    edits = {f"{b} bits": fit_rtn(model, bits=b, group_size=16, evaluate=0) for b in (8, 4, 3, 2)}
    texts = [t[:40] for t in TEXTS] * 3
    suite = quantization_suite(
        model, edits, corpus=texts, tasks=(), tokens=100, context=32, prompts=2, new_tokens=4
    )
    divergence = [suite.get("kl-to-base", variant=name).value for name in edits]
    assert divergence == sorted(divergence) and divergence[0] < 1e-3
    sizes = [suite.get("stored-bytes", variant=name).value for name in edits]
    assert sizes == sorted(sizes, reverse=True)
    assert suite.get("same-text", variant="8 bits").value >= suite.get("same-text", variant="2 bits").value
    with pytest.raises(InputError, match="has no 'speed'"):
        suite.get("speed")


def test_recovery_and_proxies_of_made_up_answers() -> None:
    rng = np.random.default_rng(0)
    skill = {BASE: 0.9, "a": 0.8, "b": 0.6, "c": 0.3, "d": 0.1}
    draw = rng.random(400)
    correct = {"task": {name: draw < p for name, p in skill.items()}}
    found = recovery(correct, "b")
    want = 100 * (draw < 0.6).mean() / (draw < 0.9).mean()
    assert (
        found.value == pytest.approx(want) and found.low is not None and found.low < want < (found.high or 0)
    )
    assert recovery(correct, BASE).value == 100

    class Loss:
        def __init__(self, nll: float) -> None:
            self.nll, self.tokens = np.array([nll]), np.array([1.0])

    from actlas.core.measurement import Measurement

    kls = [Measurement("kl-to-base", 1 - p, "nats", 1, group={"variant": n}) for n, p in skill.items()]
    losses = {name: Loss(3 - p) for name, p in skill.items()}
    suite = Suite(kls, tuple(skill), correct, losses)  # type: ignore[arg-type]
    for m in proxy_agreement(suite):
        assert m.value == pytest.approx(-1.0) and m.low is not None and m.low < -0.8


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        quantization_suite(tiny(), {})
    model = tiny()
    with pytest.raises(InputError, match="call the variant something else"):
        quantization_suite(model, {BASE: fit_rtn(model, bits=4, group_size=16, evaluate=0)})
