"""The MoE-X and RecSAE reproductions: they run at a tiny size, and their judges and truths are right."""

from __future__ import annotations

import numpy as np
import torch

from actlas.core.measurement import Measurement
from actlas.papers.reproduction import Measured, verdict_of
from actlas.papers.reproductions import moe_x, moe_x_models, recsae, recsae_model


def test_properties_of_bytes_are_what_a_person_would_say():
    text = 'Call me "I am" 42 é, ok.\n\nNo'
    raw = text.encode()
    found = moe_x_models.byte_properties(raw)
    at = {name: [chr(b) for b in np.frombuffer(raw, dtype=np.uint8)[truth]] for name, truth in found.items()}
    assert "".join(at["capital"]) == "CIN" and "".join(at["digit"]) == "42"
    assert "".join(at["vowel"]) == "aeIaoo" and "".join(at["space"]) == "      \n\n"
    assert "".join(at["first letter of a word"]) == "CmIaoN"
    assert "".join(at["second letter of a word"]) == "aemko"
    assert "".join(at["last letter of a word"]) == "leImko"
    assert "".join(at["inside quotes"]) == '"I am' and set(at["punctuation"]) == set('".,')
    assert not moe_x_models.byte_properties(b'"open\n\nnext')["inside quotes"][-4:].any()


def test_windows_carry_their_truths_and_bytes_become_their_tokens():
    texts = ["Ab cd 12. " * 30, "Zz. " * 50]
    drawn, truths, documents = moe_x_models.windows(texts, 3, 0, size=32)
    assert len(drawn) == 3 and all(len(t) == 96 for t in truths.values()) and len(documents) == 96
    joined = b"".join(drawn)
    assert [65 <= b <= 90 for b in joined] == truths["capital"].tolist()
    tokenizer = moe_x_models.byte_tokenizer()
    for text in ("Ab cd\n", "é\u2014"):
        assert moe_x_models.byte_ids(text.encode()) == tokenizer(text)["input_ids"]


def test_every_variant_runs_the_same_number_of_neurons():
    for variant in moe_x_models.VARIANTS:
        if variant == "MoE-X, upcycled":
            continue
        model = moe_x_models.build(variant, 0, width=16, layers=2)
        found = moe_x_models.mixtures(model)
        if found:
            assert len(found) == 2 and all(m.hidden * m.top_k == 64 for m in found)
        x = moe_x_models.inputs_of(model, [b"hello world." * 2] * 2, 1)
        z = moe_x_models.features_of(model, x, 1)
        assert z.shape == (48, 4 * 64 if found else 64)


def test_moe_x_runs():
    sizes = {"steps": 3, "seeds": 1, "width": 16, "layers": 2, "windows": 24, "eval_bytes": 1024}
    found = moe_x.moe_x(seed=0, variants=moe_x.FEATURES, **sizes)
    m = Measured(found.measured)
    assert m["wide view error"].value < 1e-5 and 0.6 < m.get("router agreement", weights="random").value < 0.9
    assert verdict_of(moe_x.judge(m)) == "not testable here"  # one seed


def test_the_judge_of_moe_x_needs_every_seed():
    names = (
        "coverage over dense, equal number of neurons",
        "coverage over Switch",
        "coverage over never trained",
        "router agreement over a learned router",
    )

    def verdict(gain, seeds=3.0, error=1e-7):
        given = [Measurement(n, 0.2, "", 3, 0.1, 0.3) for n in names]
        given += [
            Measurement("coverage over dense", gain[0], "", 3, *gain[1:]),
            Measurement("seeds", seeds, "", 3),
            Measurement("active neurons over Switch", 0.5, "", 3, 0.4, 0.6),
            Measurement("loss over Switch", 1.01, "", 3, 1.0, 1.02),
            Measurement("router agreement", 0.75, "", 5, 0.72, 0.78, group={"weights": "random"}),
            Measurement("wide view error", error, "", 3),
        ]
        return verdict_of(moe_x.judge(Measured(given)))

    assert verdict((0.1, 0.05, 0.2)) == "holds"
    assert verdict((0.1, 0.05, 0.2), error=1e-3) == "partly"
    assert verdict((0.1, -0.05, 0.2)) == "not testable here"
    assert verdict((-0.1, -0.2, -0.05)) == "does not hold here"
    assert verdict((0.1, 0.05, 0.2), seeds=2.0) == "not testable here"


def test_the_catalogue_is_what_it_says():
    catalogue = recsae_model.draw_catalogue(0, users=400, items=60, categories=6)
    assert torch.equal(
        catalogue.sequences, recsae_model.draw_catalogue(0, users=400, items=60, categories=6).sequences
    )
    assert torch.bincount(catalogue.category).tolist() == [10] * 6
    matched = (catalogue.category[catalogue.sequences] == catalogue.mood).float().mean()
    assert 0.9 < matched < 0.99
    stays = (catalogue.mood[:, 1:] == catalogue.mood[:, :-1]).float().mean()
    assert 0.9 < stays < 0.98
    assert max(len(set(row.tolist())) for row in catalogue.mood) <= 3
    counts = torch.bincount(catalogue.sequences.flatten(), minlength=60)
    within = counts[catalogue.category == 0].sort(descending=True).values
    assert within[0] > 3 * within[-1]


def test_sasrec_is_causal_and_learns():
    catalogue = recsae_model.draw_catalogue(0, users=600, items=60, categories=6)
    model = recsae_model.train_sasrec(catalogue, 0, width=16, epochs=4)
    history = catalogue.history[:50]
    states = recsae_model.states_of(model, history)
    changed = history.clone()
    changed[:, 10:] = 3
    torch.testing.assert_close(recsae_model.states_of(model, changed)[:, :10], states[:, :10])
    scores = model.forward({"items": history})
    torch.testing.assert_close(scores, states[:, -1] @ model.module.items.weight.T)
    everyone = torch.arange(600)
    found = recsae_model.ndcg(model, catalogue, everyone)
    fresh = recsae_model.train_sasrec(catalogue, 0, width=16, epochs=0)
    assert found.mean() > recsae_model.ndcg(fresh, catalogue, everyone).mean() + 0.1
    order = scores.argsort(dim=1, descending=True)
    rank = (order == catalogue.next[:50].unsqueeze(1)).int().argmax(1)
    expected = [1 / np.log2(r + 2) if r < 10 else 0.0 for r in rank.tolist()]
    assert np.allclose(found[:50], expected)


def test_the_most_frequent_category_and_its_ties():
    rows = torch.tensor([[1, 2, 1, 2, 3], [4, 4, 5, 5, 5], [1, 2, 3, 4, 5]])
    assert recsae._most(rows).tolist() == [2, 5, 5]


def test_recsae_runs():
    sizes = {"users": 700, "epochs": 2, "features": 48, "k": 4, "rows": 8000, "seeds": 1}
    found = recsae.recsae(seed=0, **sizes)
    m = Measured(found.measured)
    checks = recsae.judge(m)
    assert len(checks) == 10 and sum(c.central for c in checks) == 4
    assert all("not measured" not in c.said for c in checks)
    for kind in recsae.KINDS:
        assert m.get("live features that are concepts, shuffled categories", catalogue=kind).value < 0.1
