"""Answers are compared as SQuAD compares them, with the two differences that the module states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.evaluation.answers import exact_match, normalise, token_f1

words = st.text(alphabet="bcdefgéß ", min_size=1).filter(str.strip)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "paris"),
        ("  New \t York\n", "new york"),
        ("The Hague", "hague"),
        ("an apple a day", "apple day"),
        ("Athens", "athens"),
        ("U.S.A.", "usa"),
        ("Jean-Luc", "jeanluc"),
        ("1914\u20131918", "19141918"),
        ("\u201cParis\u201d", "paris"),
        ("L\u2019Oréal", "loréal"),
        ("«Le Monde»", "le monde"),
        ("e\u0301", "é"),
        ("The The", "the the"),
        ("!!!", "!!!"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("paris.", ["Paris"], True),
        ("the United States", ["USA", "United States"], True),
        ("Paris, France", ["Paris"], False),
        ("", ["Paris"], False),
        ("", ["The The", "!!!"], False),
        ("The The", ["The The"], True),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) is expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("New York City", ["New York"], 2 * 2 / (3 + 2)),
        ("York", ["New York", "the York"], 1.0),
        ("York York", ["York"], 2 * 1 / (2 + 1)),
        ("London", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
    ],
)
def test_token_f1(prediction, answers, expected):
    assert token_f1(prediction, answers) == pytest.approx(expected)


@given(words, st.lists(words, min_size=1))
def test_f1_is_a_share_and_one_for_an_exact_match(prediction, answers):
    assert 0.0 <= token_f1(prediction, answers) <= 1.0
    assert token_f1(prediction, [*answers, prediction]) == 1.0
    assert exact_match(prediction, [*answers, prediction])


@given(words, words)
def test_f1_does_not_depend_on_which_is_the_answer(one, other):
    assert token_f1(one, [other]) == pytest.approx(token_f1(other, [one]))


@given(words, st.lists(words, min_size=1), words)
def test_another_alias_never_costs_anything(prediction, answers, alias):
    assert token_f1(prediction, [*answers, alias]) >= token_f1(prediction, answers)


@pytest.mark.parametrize("score", [exact_match, token_f1])
def test_a_single_string_or_no_answer_is_refused(score):
    with pytest.raises(ValueError, match="not the single string 'Paris'"):
        score("Paris", "Paris")
    with pytest.raises(ValueError, match="answers is empty"):
        score("Paris", [])
