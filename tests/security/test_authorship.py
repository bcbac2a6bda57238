"""Attribution: what is stripped, honest splits, calibration, unseen authors, saving, bad input."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from actlas.core.errors import ArtifactError, InputError
from actlas.core.lens import Lens
from actlas.core.methods import find_method
from actlas.security.authorship import Authorship, fit_authorship, prepare
from actlas.security.authorship_features import Extractor
from actlas.security.authorship_quality import calibration_error, softmax, temperature_of
from actlas.security.code_text import without
from tests.measure.small_models import bert

STYLES = {
    "loops": "total = 0\nfor x in {a}:\n    total += x\nreturn total  # sum",
    "calls": "return sum(map(int, list({a})), {b})  # short",
    "lambda": "f = lambda x: x + {b}\nreturn f({a}) or None # {b}",
}


def code(n: int = 12, seed: int = 0, noise: int = 0) -> list[tuple[str, str, str]]:
    """Texts of three authors, one of each a prompt, all of one length."""
    draw = random.Random(seed)
    out = []
    for prompt in range(n):
        names = {"a": draw.choice("pqrstuvw") * 3, "b": str(draw.randint(10, 99))}
        for author, style in STYLES.items():
            body = style.format(**names)
            if noise and draw.random() < noise / 10:
                body = draw.choice(list(STYLES.values())).format(**names)
            out.append((f"{body:<60}#{prompt:03}"[-64:], author, f"prompt {prompt}"))
    return out


def by_name(made: Lens) -> dict[tuple[str, str], float]:
    return {(m.name, m.group.get("author", "")): m.value for m in made.measurements}


def test_comments_and_docstrings_go_and_strings_stay() -> None:
    whole = '''def f(a, b="# no"):
    """Document
    this."""
    x = "say # this"  # not this

    y = f("""keep
    me""",
        "and me")
    # nor this
    "nor me"
    return 'it\\'s # fine' + x
'''
    bare = without(whole, ("comments", "docstrings"))
    assert "Document" not in bare and "not this" not in bare and "nor" not in bare
    for kept in ('"# no"', '"say # this"', '"""keep\n    me"""', '"and me"', "'it\\'s # fine'"):
        assert kept in bare, kept
    assert "# not this" in without(whole, ("docstrings",)) and '"""Document' in without(whole, ("comments",))
    assert without(whole, ()) == whole
    compile(bare, "bare", "exec")
    cut = 'def f():\n    """never closed\n    x = 1'
    assert (
        without(cut, ("docstrings",)) == "def f():"
        and without('x = "open # no', ("comments",)) == 'x = "open # no'
    )
    c = 'int f() { // one\n  /* two\n  */ char *s = "// three"; /* four'
    assert without(c, ("comments",), "c") == 'int f() {\n   char *s = "// three";'
    with pytest.raises(InputError, match="cannot take 'names'"):
        without(whole, ("names",))
    with pytest.raises(InputError, match="out of 'cobol'"):
        without(whole, ("comments",), "cobol")


def test_it_names_authors_and_saves_as_data(tmp_path: Path) -> None:
    items = code(24, noise=3)
    made = fit_authorship(None, items, folds=3, characters=0)
    values = by_name(made)
    assert values["authorship accuracy", ""] > 0.7 > values["authorship accuracy, shuffled authors", ""]
    assert values["authorship accuracy, length only", ""] < 0.5
    table = np.array(made.measurements[0].details["confusion (rows: true)"])
    assert table.sum() == 72 and table.trace() == pytest.approx(made.measurements[0].value * 72)
    texts = [t for t, _, _ in items]
    p = made.probabilities(texts)
    torch.testing.assert_close(p.sum(1), torch.ones(72))
    named = made.name(texts)
    assert named.count(None) <= 20 and {n for n in named if n} == set(STYLES)
    right = [n == a for n, (_, a, _) in zip(named, items, strict=True) if n]
    assert np.mean(right) > 0.7
    again = Authorship.load(made.save(tmp_path / "who", bert()))
    assert torch.equal(again.probabilities(texts), p) and again.name(texts) == named
    assert sorted(f.name for f in (tmp_path / "who").iterdir()) == ["manifest.json", "tensors.safetensors"]


def test_the_encoder_is_any_model_and_the_lens_reads_its_states(tmp_path: Path) -> None:
    model = bert()
    items = code(8)
    made = fit_authorship(model, items, features="encoder", folds=2, position="first", characters=0)
    assert made.site == "blocks.1.resid_post" and made.kind == "encoder" and made.channels == 32
    texts = [t for t, _, _ in items]
    p = made.probabilities(texts, model)
    state = model.trace(texts[0], [made.site])[made.site][0, 0]
    torch.testing.assert_close(made.encode(state).exp(), p[0], rtol=1e-3, atol=1e-4)
    raw = (made.encode(state) * made.temperature).softmax(-1)
    assert float(made.score(state)) == pytest.approx(float(raw.max()) - made.threshold, abs=1e-4)
    assert (made.name(texts[:1], model)[0] is None) == (float(made.score(state)) < 0)
    again = Authorship.load(made.save(tmp_path / "who"), model)
    torch.testing.assert_close(again.probabilities(texts, model), p)
    with pytest.raises(InputError, match="give it as model="):
        made.probabilities(texts)


def test_equal_texts_and_prompts_stay_on_one_side() -> None:
    items = [(f"def f{i}(): return {i}", f"author {i % 2}", str(i // 2)) for i in range(24)]
    copies = [(t, f"author {(i + 1) % 2}", f"other {i}") for i, (t, _, _) in enumerate(items[:6])]
    made = fit_authorship(None, [*items, *items[:3], *copies], folds=3, characters=0)
    about = made.measurements[0].details
    assert about["texts dropped as repeated"] == 3
    assert about["groups"] == 12  # a copy under another prompt joins its original's group
    assert about["texts"] == [*range(24), *range(27, 33)]


def test_a_prompt_on_both_sides_flatters() -> None:
    # each author has a word of its own for each prompt and nothing else: grouped folds cannot know it
    items = [
        (f"word{p}x{a} again{k}", f"author {a}", f"{p}") for p in range(8) for a in range(2) for k in range(3)
    ]
    items = [(t.replace("again", "zz" * (1 + i % 3)), a, g) for i, (t, a, g) in enumerate(items)]
    digits = [(t.translate(str.maketrans("0123456789", "abcdefghij")), a, g) for t, a, g in items]
    values = by_name(fit_authorship(None, digits, folds=3, characters=0))
    assert values["authorship accuracy, random split", ""] > values["authorship accuracy", ""] + 0.3
    assert values["random split above grouped split", ""] > 0.3


def test_the_shuffled_control_shuffles_also_where_every_text_is_a_group() -> None:
    items = [(f"{t} {i}", a) for i, (t, a, _) in enumerate(code(12))]
    values = by_name(fit_authorship(None, items, folds=3, characters=0))
    assert values["authorship accuracy", ""] > 0.9
    assert values["authorship accuracy, shuffled authors", ""] < 0.7


def test_length_alone_is_caught() -> None:
    draw = random.Random(0)
    items = [
        (" ".join(draw.choice("abcdefgh") * 2 for _ in range(14 + 20 * a)), f"author {a}", str(p))
        for p in range(20)
        for a in range(2)
    ]
    free = by_name(fit_authorship(None, items, folds=4, characters=0))
    assert free["authorship accuracy, length only", ""] == 1
    cut = fit_authorship(None, items, folds=4)
    assert cut.characters <= 41 and cut.measurements[0].value < 0.8
    assert by_name(cut)["authorship accuracy, length only", ""] <= 0.6


def test_an_unseen_author_is_not_named_with_confidence() -> None:
    made = fit_authorship(None, code(20), folds=4, characters=0)
    named = [v for (n, _), v in by_name(made).items() if n == "unseen author named"]
    areas = [v for (n, _), v in by_name(made).items() if n == "unseen author told by confidence"]
    assert len(named) == len(areas) == 3 and np.mean(named) < 0.8 and np.mean(areas) > 0.7
    two = fit_authorship(None, [i for i in code(8) if i[1] != "lambda"], folds=2, characters=0)
    missing = [m for m in two.measurements if m.name == "unseen author named"]
    assert len(missing) == 1 and missing[0].value != missing[0].value and "three or more" in missing[0].note


def test_temperature_and_calibration_error_are_brute_force() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(0, 2, (4000, 3))
    y = np.array([generator.choice(3, p=p) for p in softmax(true)])
    assert temperature_of(3 * true, y) == pytest.approx(3, rel=0.08)
    p = softmax(true)
    right, confident = p.argmax(1) == y, p.max(1)
    wanted = 0.0
    for b in range(10):
        inside = (confident >= b / 10) & (confident < (b + 1) / 10 + (b == 9))
        if inside.any():
            wanted += inside.mean() * abs(right[inside].mean() - confident[inside].mean())
    assert calibration_error(p, y, np.ones((1, 4000)))[0] == pytest.approx(wanted)
    assert wanted < 0.03 < calibration_error(softmax(3 * true), y, np.ones((1, 4000)))[0]


def test_tfidf_agrees_with_scikit_learn_and_is_fitted_in_the_fold() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    from actlas.security.authorship_features import TOKENS

    texts = [t for t, _, _ in code(6)]
    extractor = Extractor(texts, None, 50)
    fitted = extractor.fit(np.arange(10))
    other = TfidfVectorizer(lowercase=False, token_pattern=TOKENS, max_features=50)
    np.testing.assert_allclose(fitted.x, other.fit_transform(texts[:10]).toarray())
    np.testing.assert_allclose(extractor.of(fitted, np.arange(10, 18)), other.transform(texts[10:]).toarray())
    assert "lambda" not in Extractor(["a b", "lambda"], None, 9).fit(np.array([0])).features.vocabulary


def test_stripping_happens_first_and_svm_is_a_classifier() -> None:
    items = code(8)
    made = fit_authorship(None, items, strip="comments", classifier="svm", folds=2, characters=40)
    assert made.strip == ("comments",) and "#" not in made.vocabulary
    assert prepare(["x = 1  # y"], ("comments",), "python", 3) == ["x ="]
    assert by_name(made)["authorship accuracy", ""] > 0.9


def test_it_is_registered() -> None:
    info = find_method("authorship")
    assert info.returns == "Lens" and info.data == "labelled"
    made = info.fit(bert(), [(f"{t}{i}", float(i % 2)) for i, (t, _, _) in enumerate(code(4))], folds=2)
    assert made.authors == ("0", "1") and made.fingerprint is not None
    records = [{"text": t, "author": a, "group": g} for t, a, g in code(4)]
    assert fit_authorship(None, records, folds=2).authors == ("calls", "lambda", "loops")


def test_bad_input_is_refused_in_one_line() -> None:
    items = code(6)
    for data, options, message in (
        (items[::3], {}, "1 author is nothing"),
        (items, {"folds": 7}, "groups; 7 folds need at least 7"),
        (items, {"features": "bag"}, "features is 'bag'"),
        (items, {"classifier": "tree"}, "classifier 'tree'"),
        (items, {"features": "encoder"}, "needs a model"),
        (items, {"strip": "names"}, "cannot take 'names'"),
        (items, {"groups": [1]}, "18 texts but 1 groups"),
        (items, {"characters": -1}, "characters is -1"),
        (items, {"accepted": 1.0}, "accepted is 1"),
        ([*items, (" ", "loops", "p")], {}, "nothing is left of text 18"),
        ([*items, 3], {}, "item 18 is int"),
    ):
        with pytest.raises(InputError, match=message):
            fit_authorship(None, data, **options)
    made = fit_authorship(None, items, folds=2)
    with pytest.raises(InputError, match="has no directions"):
        made.edit(0)
    with pytest.raises(ArtifactError, match="do not fit"):
        Authorship(
            authors=("a",),
            kind="tfidf",
            weight=made.weight,
            bias=made.bias,
            centre=made.centre,
            scale=made.scale,
        )
    with pytest.raises(InputError, match="position is 'middle'"):
        fit_authorship(bert(), items, features="encoder", position="middle", folds=2)
