"""Neurofeedback: dialogues, axes, report and control against oracles and brute force, bad input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from actlas.core.direction import Direction
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.methods import find_method
from actlas.core.model import Model
from actlas.core.probe_data import Examples
from actlas.measure import find_measure, measure
from actlas.measure.feedback_axes import Axis, as_axis, standard_axes, text_accuracy, text_features
from actlas.measure.feedback_chat import Chat, Dialogue
from actlas.measure.feedback_control import cohens_d, control
from actlas.measure.neurofeedback import auc_above, neurofeedback
from actlas.measure.samples import missing
from tests.measure.small_models import llama

SITE = "blocks.0.resid_post"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PAIRS = [
    (f"the {thing} was great", f"the {thing} was awful")
    for thing in ["film", "soup", "room", "book", "song", "trip"]
]
PAIRS += [
    (f"I found the {thing} lovely", f"I found the {thing} ugly") for thing in ["film", "soup", "room", "book"]
]


@pytest.fixture(scope="module")
def model() -> Model:
    made = llama(context=1024)
    tokenizer = deepcopy(made.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return Model(made.module, tokenizer, name="small chat")


@pytest.fixture(scope="module")
def chat(model: Model) -> Chat:
    return Chat(model)


def test_a_dialogue_knows_its_sentences_and_labels(model: Model, chat: Chat) -> None:
    said = ["the film was great", "I", "the soup was awful"]  # "I" also occurs in the system text
    made = chat.render(said, [1, 0, 1])
    decode = model.tokenizer.decode
    assert [decode(list(made.ids[a:b])).strip() for a, b in made.sentences] == said
    assert [decode([made.ids[i]]) for i in made.labels] == ["1", "0", "1"]
    assert [made.ids[i] for i in made.labels] == [chat.labels[1], chat.labels[0], chat.labels[1]]
    asked = chat.render(said[:2], [1, 0], imitate=0, last="s")  # "s" also occurs in "assistant"
    assert decode(list(asked.ids[slice(*asked.sentences[-1])])).strip() == "s"
    assert len(asked.sentences) == 3 and len(asked.labels) == 2
    opened = chat.render(said[:2], [1, 0], imitate=1)
    assert decode(list(opened.ids)).rstrip().endswith("assistant") and len(opened.sentences) == 2
    assert "[Score: {1}]" in decode(list(opened.ids)).rpartition("user")[2]


def test_labels_and_activations_are_read_where_they_are(model: Model, chat: Chat) -> None:
    made = [chat.render(["the film was great", "the soup"], [1, 0]), chat.render(["the room was ugly"], [1])]
    gaps = chat.label_logits(made, batch=2)  # padded together
    zero, one = chat.labels
    rows = chat.read(made, SITE, batch=2)
    for dialogue, gap, row in zip(made, gaps, rows, strict=True):
        ids = torch.tensor([dialogue.ids])
        logits = model.logits(ids)[0].double()
        wanted = [float(logits[i - 1, one] - logits[i - 1, zero]) for i in dialogue.labels]
        np.testing.assert_allclose(gap.numpy(), wanted, rtol=1e-4, atol=1e-5)
        a, b = dialogue.sentences[-1]
        whole = model.trace(ids, [SITE])[SITE][0].double()
        torch.testing.assert_close(row, whole[a:b].mean(0), rtol=1e-4, atol=1e-5)
    texts = ["the soup was ugly", "the room", "the book was great and lovely"]
    alone = chat.alone(texts, SITE, batch=2)
    torch.testing.assert_close(alone[1], chat.read([chat.render([texts[1]], system=None)], SITE)[0])


class Oracle(Chat):
    """A chat model that knows the label, always says the same digit, or is always wrong."""

    kind = "right"

    def label_logits(self, dialogues: Sequence[Dialogue], batch: int = 4) -> list[Tensor]:
        out = []
        for d in dialogues:
            told = torch.tensor([1.0 if d.ids[i] == self.labels[1] else -1.0 for i in d.labels]).double()
            out.append({"right": told, "wrong": -told, "one": torch.ones_like(told)}[self.kind])
        return out


@pytest.mark.parametrize(
    ("kind", "accuracy", "area"), [("right", 1.0, 1.0), ("wrong", 0.0, 0.0), ("one", 0.5, 0.5)]
)
def test_the_report_scores_oracles(
    model: Model, monkeypatch: pytest.MonkeyPatch, kind: str, accuracy: float, area: float
) -> None:
    monkeypatch.setattr("actlas.measure.neurofeedback.Chat", Oracle)
    monkeypatch.setattr(Oracle, "kind", kind)
    found = neurofeedback(model, PAIRS, site=SITE, axes=("means", "shuffled"), examples=(0, 4), repetitions=8)
    by = {(m.name, m.group["axis"], m.group["examples"]): m for m in found}
    late = by["report accuracy", "means", "late"]
    if kind == "one":  # flipped labels in every second repetition: no digit is right more often
        assert 0.2 < late.value < 0.8
    else:
        assert late.value == accuracy and by["report accuracy", "means", "4"].value == accuracy
        assert by["report AUC above the shuffled axis", "means", "late"].value == 0
    assert by["report AUC", "means", "late"].value == area
    wanted = math.log1p(math.exp(1 if kind == "wrong" else -1))
    if kind != "one":
        assert by["report cross-entropy", "means", "4"].value == pytest.approx(wanted)
    assert by["text-only accuracy", "means", "0"].value == 0.5
    assert late.n == 8 and late.low is not None and late.group["task"] == "report"


def test_flips_cancel_a_preference_for_a_digit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actlas.measure.neurofeedback.Chat", Oracle)
    monkeypatch.setattr(Oracle, "kind", "one")
    many = neurofeedback(model, PAIRS, site=SITE, axes="means", examples=0, repetitions=400)
    late = next(m for m in many if m.name == "report accuracy" and m.group["examples"] == "late")
    assert abs(late.value - 0.5) < 0.1


class Obedient(Chat):
    """Its activation follows the digit that was asked for (`digit`) or what the digit means (`meaning`)."""

    follows = "meaning"

    def read(self, dialogues: Sequence[Dialogue], site: str, batch: int = 4) -> Tensor:
        rows = torch.randn(len(dialogues), 32, generator=torch.Generator().manual_seed(1)).double()
        for i in range(len(dialogues)):
            flip, high = i // 2 % 2, 1 - i % 2  # the order in which control asks
            rows[i, 0] += 3.0 * (high if self.follows == "meaning" else high ^ flip)
        return rows


@pytest.mark.parametrize("follows", ["meaning", "digit"])
def test_control_follows_meaning_and_not_the_digit(model: Model, follows: str) -> None:
    chat = Obedient(model)
    chat.follows = follows
    axis = Axis("first", Direction(site=SITE, vector=torch.eye(32)[0]))
    texts = [p for pair in PAIRS for p in pair]
    labels = np.arange(len(texts)) % 2
    drawn = [(0, 1, 2, 3, 4 + i % 10) for i in range(40)]
    found = {m.name: m for m in control(chat, texts, labels, axis, drawn, task="implicit")}
    effect = found["implicit control"]
    assert effect.group == {"task": "implicit", "axis": "first", "examples": "4"}
    assert effect.low is not None and effect.high is not None
    if follows == "meaning":
        assert effect.low > 2 and effect.value == pytest.approx(3, abs=0.6)
    else:
        assert effect.low < 0 < effect.high and abs(effect.value) < 0.4


def test_explicit_control_reads_what_was_said_twice(model: Model) -> None:
    found = neurofeedback(
        model,
        PAIRS,
        site=SITE,
        axes=("means", "pc1"),
        tasks=("explicit", "implicit"),
        examples=2,
        repetitions=2,
        tokens=4,
    )
    names = {m.name for m in found}
    assert {"explicit control", "explicit control, sentence alone", "implicit control precision"} <= names
    assert {"explicit control above components"} <= names
    assert all(m.group["axis"] in ("means", "pc1") for m in found)


def test_cohens_d_is_brute_force() -> None:
    generator = np.random.default_rng(0)
    high, low = generator.normal(1, 2, (5, 2, 3)), generator.normal(0, 1, (5, 2, 3))
    high[2, 1] = np.nan
    counts = np.array([[1.0, 1, 1, 1, 1], [0, 2, 1, 2, 0]])
    found = cohens_d(counts, high, low)
    for row, c in zip(found, counts.astype(int), strict=True):
        for k in range(3):
            a, b = (np.repeat(x[..., k], c, axis=0).ravel() for x in (high, low))
            a = a[~np.isnan(a)]
            wanted = (a.mean() - b.mean()) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
            assert row[k] == pytest.approx(wanted)
    assert np.isnan(cohens_d(np.ones((1, 5)), np.ones((5, 2, 1)), np.ones((5, 2, 1)))).all()


def test_axes_are_lenses_of_any_kind() -> None:
    generator = np.random.default_rng(0)
    y = np.repeat([0.0, 1.0], 20)
    x = generator.normal(size=(40, 8))
    x[:, 2] += 5 * y
    examples = Examples(x, y, np.arange(40))
    means, logistic, first, blank, drawn = standard_axes(
        examples, SITE, ["means", "logistic", "pc1", "shuffled", "random"], seed=1
    )
    rows = torch.tensor(x)
    for axis in (means, logistic):
        assert ((axis.read(rows) > 0) == (y > 0)).mean() > 0.95
    assert abs(np.corrcoef(first.read(rows), x[:, 2])[0, 1]) > 0.95 and first.feature == 0
    assert abs(np.corrcoef(blank.read(rows), y)[0, 1]) < 0.6
    again = standard_axes(examples, SITE, ["random"], seed=1)[0]
    np.testing.assert_array_equal(again.read(rows), drawn.read(rows))
    assert as_axis(means) is means and as_axis(first.lens).feature == 0
    assert as_axis(means.lens, "m") == Axis("m", means.lens, None)
    with pytest.raises(InputError, match="an axis is a Lens"):
        as_axis("means")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no axis 'pcx'"):
        standard_axes(examples, SITE, ["pcx"])
    with pytest.raises(InputError, match="pc40 needs more than 40"):
        standard_axes(examples, SITE, ["pc40"])


def test_a_reader_of_the_text_sees_what_is_in_the_text() -> None:
    texts = ["a great day", "a great film", "an awful day", "an awful film", "a great soup", "an awful soup"]
    labels = np.array([1, 1, 0, 0, 1, 0])
    features = text_features(texts, None)
    assert (
        text_accuracy(features, labels, [0, 1, 2, 3], 4)
        == text_accuracy(features, labels, [0, 1, 2, 3], 5)
        == 1
    )
    assert text_accuracy(features, 1 - labels, [0, 1, 2, 3], 4) == 1
    assert text_accuracy(features, labels, [], 4) == text_accuracy(features, labels, [0, 1], 4) == 0.5


def test_it_runs_as_a_measure_and_as_a_method(model: Model) -> None:
    info = find_measure("neurofeedback")
    assert info.needs == ("causal-lm",) and find_method("neurofeedback").returns == "Measurement"
    found = measure(model, ["neurofeedback"], {"pairs": PAIRS}, examples=(0, 2), repetitions=2, site=SITE)
    assert {"report AUC", "text-only accuracy"} <= {m.name for m in found}
    many = neurofeedback(model, PAIRS, examples=(0, 4), repetitions=8, site=SITE)
    areas = [m for m in many if m.name == "report AUC"]
    assert len(areas) == 2 and auc_above(areas[0], areas[0], "x").value == 0
    none = missing("report AUC", "AUC", "alike")
    assert auc_above(none, areas[0], "x").note == auc_above(areas[0], none, "x").note == "alike"
    with pytest.raises(InputError, match="two measurements 'report AUC'"):
        auc_above(found[0], areas[0], "x")


def test_bad_input_is_refused_in_one_line(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama()
    with pytest.raises(ModelError, match="is no chat model"):
        neurofeedback(plain, PAIRS)
    for options, message in (
        ({"examples": (0, 3)}, "even numbers"),
        ({"tasks": "guess"}, "tasks is 'guess'"),
        ({"repetitions": 1}, "at least 2"),
        ({"axes": ()}, "no axis"),
        ({"axes": "meens"}, "there is no axis 'meens'"),
        ({"examples": (0, 40)}, "40 examples need 21 sentences"),
        ({"site": "blocks.9.resid_post"}, "blocks.9"),
    ):
        with pytest.raises(InputError, match=message):
            neurofeedback(model, PAIRS, **options)  # type: ignore[arg-type]
    lens = Direction(site="blocks.1.resid_post", vector=torch.ones(32))
    with pytest.raises(InputError, match="give axes of one site"):
        neurofeedback(model, PAIRS, site=SITE, axes=[lens])
    with pytest.raises(InputError, match="at least 8 different sentences"):
        neurofeedback(model, PAIRS[:2])
    with pytest.raises(InputError, match="labels of the sentences must be 0 and 1"):
        neurofeedback(model, [(f"text {i}", 3.0) for i in range(10)])
    monkeypatch.setattr(
        "actlas.measure.feedback_chat.output_logits", lambda *a, **k: torch.full((1, 400, 1500), math.nan)
    )
    with pytest.raises(NonFiniteError, match="NaN or infinity at a label"):
        Chat(model).label_logits([Chat(model).render(["the film"], [1])])
