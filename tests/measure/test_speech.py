"""Word error rates by hand."""

from __future__ import annotations

import pytest

from actlas.core.errors import InputError
from actlas.data.speech import sentences
from actlas.measure.speech import edit_distance, normalise, word_error_rate


def test_normalisation_and_distance() -> None:
    assert normalise("The well-known Captain's 3 dogs -- gone!") == [
        "the",
        "well",
        "known",
        "captains",
        "three",
        "dogs",
        "gone",
    ]
    assert edit_distance(["a", "b", "c", "d"], ["a", "x", "c"]) == 2
    assert edit_distance([], ["a", "b"]) == 2 and edit_distance(["a"], ["a"]) == 0


def test_rates_count_words_not_clips() -> None:
    found = word_error_rate(["a b", "one two three four"], ["a c", "one two three four"])
    assert found.value == pytest.approx(1 / 6) and found.n == 2
    with pytest.raises(InputError, match="give one for each"):
        word_error_rate(["a"], ["a", "b"])
    with pytest.raises(InputError, match="reference 1 has no words"):
        word_error_rate(["a", "b"], ["a", "..."])


def test_sentences_are_different_and_repeatable() -> None:
    assert len(set(sentences(40))) == 40 and sentences(5, 1) == sentences(5, 1) != sentences(5, 2)
    with pytest.raises(InputError, match="asked for 0"):
        sentences(0)


def test_spoken_sentences_sound() -> None:
    pytest.importorskip("espeakng_loader")
    from actlas.data.speech import speech

    clips = speech(2)
    assert [c.voice for c in clips] == ["en-us", "en-gb-x-rp"]
    assert all(16_000 < len(c.samples) < 200_000 and 0.05 < abs(c.samples).max() <= 1 for c in clips)
