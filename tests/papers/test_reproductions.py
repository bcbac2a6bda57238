"""Every reproduction runs, end to end, at a size that takes seconds; what it finds there means nothing."""

import json

import pytest

from actlas.papers import reproduce
from actlas.papers.reproduction import Reproduction
from actlas.papers.reproductions.byte_models import byte_model, byte_tokenizer, train_checkpoints
from actlas.papers.reproductions.planted_cell import draw_digits, predictions
from actlas.papers.reproductions.report_room import completeness
from actlas.papers.reproductions.synthetic_cards import SECTIONS, labelled_cards

TINY = {
    "fast-model-scaling": {"factors": (1, 2), "repeats": 3, "timed": (2,)},
    "hash-encoders": {
        "widths": (4, 8),
        "sweep_width": 8,
        "epochs": (0, 1),
        "samples": (100, 200),
        "seeds": 2,
        "tokens": 0,
    },
    "model-cards": {"seeds": 1, "shuffles": 2, "sweep_seeds": 0, "simulations": 20, "documents": 0},
    "hf-model-reuse": {"series": 50, "longest": 6, "models": (), "cards": ()},
    "sparsing-law": {"cetts": (), "checkpoints": (2, 4), "seeds": 1, "eval_bytes": 512, "search": 2},
}


def small_model(*_, **__):
    return byte_model("silu", 0, width=32, layers=3)


def run(slug, settings, seed=0):
    result = reproduce(slug, settings=settings, seed=seed)
    assert result.verdict in ("holds", "partly", "does not hold here", "not testable here")
    assert result.headline and result.note and result.measured and result.checks
    assert (
        Reproduction.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))).checks
        == result.checks
    )
    assert result.slug in str(result) and result.criterion in result.to_markdown()
    return result


@pytest.mark.parametrize("slug", TINY)
def test_a_tiny_run(slug):
    result = run(slug, TINY[slug])
    if slug == "model-cards":
        assert next(c for c in result.checks if c.name == "identities are exact").passed
    if slug == "hf-model-reuse":
        passed = {c.name: c.passed for c in result.checks}
        assert passed["templates score nothing"] and passed["Spearman's correlation is exact"]
        assert (
            passed["Mann-Kendall's S and variance are exact"]
            and passed["packages carry less than half of a card"] is None
        )
    if slug == "fast-model-scaling":
        passed = {c.name: c.passed for c in result.checks}
        assert passed["activations follow the law exactly before rounding"]
        assert passed["parameters follow the law exactly before rounding"]


def test_tiny_runs_on_a_language_model(monkeypatch):
    import actlas.models

    monkeypatch.setattr(actlas.models, "load", small_model)
    sizes = {"questions": 4, "answer_tokens": 3, "alphas": (0.1, 0.5), "tokens": 256, "items": 0}
    void = run("void", {**sizes, "signals": ("norm", "angle")})
    modes = {m.group["mode"] for m in void.measured if m.name == "void-perplexity"}
    assert modes == {"readout", "skip", "random"}
    rules = run("sparsing-law", {"cetts": (0.2,), "tokens": 512, "search": 2})
    found = {m.group["rule"] for m in rules.measured if m.name == "extra loss over CETT"}
    assert found == {"topk", "fat", "topk-output", "random"}


def test_the_same_seed_gives_the_same_numbers():
    settings = {**TINY["hash-encoders"], "widths": (4,), "samples": (50, 100), "seeds": 1}
    a, b = (run("hash-encoders", settings, seed=5).measured for _ in range(2))
    assert [(m.name, m.value, m.low, m.high) for m in a] == [(m.name, m.value, m.low, m.high) for m in b]


def test_labelled_cards_cover_every_kind_and_section():
    cards = labelled_cards(seed=3)
    assert len(cards) == 30 and len({c.kind for c in cards}) == 6
    assert set().union(*(c.sections for c in cards)) == set(SECTIONS)
    assert all(not c.sections for c in cards if c.kind == "template only")
    assert [c.text for c in labelled_cards(seed=3)] == [c.text for c in cards]


@pytest.mark.parametrize("kind", ["template only", "complete"])
def test_the_audit_never_counts_a_template_and_always_a_complete_card(kind, tmp_path):
    for seed in range(3):
        for card in labelled_cards(seed):
            if card.kind == kind:
                share, present, _ = completeness(card.text, tmp_path)
                assert present == card.sections and share == len(card.sections) / 9


def test_a_planted_cell_is_what_the_classifier_fails_on():
    data = draw_digits(1)
    assert draw_digits(1).thickness.tolist() == data.thickness.tolist()
    cell = (8, "thick")
    wrong = {
        name: [s != str(d) for s, d in zip(said, data.digits, strict=True)]
        for name, said in (("whole", predictions(data, 1)), ("cut", predictions(data, 1, cell=cell)))
    }
    inside = data.inside(cell)
    share = {k: sum(w for w, i in zip(v, inside, strict=True) if i) / inside.sum() for k, v in wrong.items()}
    assert share["cut"] > share["whole"] + 0.2


def test_byte_models_read_bytes_and_learn():
    text = "abcab" * 2000
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 256
    for sample in ("héllo\n", "  two spaces", "日本"):
        ids = tokenizer(sample)["input_ids"]
        assert len(ids) == len(sample.encode()) and tokenizer.decode(ids) == sample
    losses = []
    for step, model in train_checkpoints(
        text, activation="relu", checkpoints=(1, 20), seed=0, width=16, layers=1
    ):
        ids = model.encode("abcab" * 10)["input_ids"]
        losses.append((step, model.module(input_ids=ids, labels=ids).loss.item()))
    assert losses[0][0] == 1 and losses[1][1] < losses[0][1] - 0.5
