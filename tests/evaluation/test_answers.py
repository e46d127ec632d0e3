"""Answers that people write in several ways are one answer, and different answers stay different."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.evaluation import squad
from memlayer.evaluation.answers import exact_match, normalise, token_f1

words = st.text(alphabet="bcdefgéß ", min_size=1).filter(str.strip)
# Whatever the rule treats apart, close together.
thorny = st.text(alphabet="aA 15-\u2212.,'\u2019:/^+#$%\u20ac\u00bd\u00b2ß北泰\u0e34i\u0307éI\u200b(", max_size=12)

DECOMPOSED = unicodedata.normalize("NFD", "São Paulo")
EQUAL = [
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("1 000", "1000"),
    ("1,234,567.50", "1234567.5"),
    ("1.0", "1"),
    ("29.00", "29"),
    ("\u22125", "-5"),
    ("\u20135", "-5"),
    ("-\u20ac5", "-5"),
    (".5", "0.5"),
    ("$100", "100"),
    ("€100", "100"),
    ("100 %", "100"),
    ("Jean-Paul", "Jean Paul"),
    ("Jean\u2010Paul", "Jean-Paul"),
    ("New York.", "New York"),
    ("U.S.A.", "USA"),
    ("the Hague", "Hague"),
    ("\uff11\uff19\uff14\uff15", "1945"),
    ("١٩٤٥", "1945"),
    ("ﬁlm", "film"),
    ("Ⅳ", "IV"),
    ("Straße", "Strasse"),
    ("STRASSE", "Straße"),
    ("İstanbul", "istanbul"),
    ("São Paulo", DECOMPOSED),
    ("Ulm\u200b", "Ulm"),
    ("\u200fJena", "Jena"),
    ("Shop\u00a0Bea", "Shop Bea"),
    ("O\u2019Brien", "O'Brien"),
    ("O'Brien", "OBrien"),
    ("مُحَمَّد", "محمد"),
    ("½", "1/2"),
    ("7½", "7 1/2"),
    ("10⁶", "10^6"),
    ("CO₂", "CO2"),
    ("北京 市", "北京市"),
    ("!!!", "!!!"),
    ("The The", "the the"),
]
DIFFERENT = [
    ("O-", "O"),
    ("Rh-", "Rh"),
    ("O-", "O+"),
    ("3.14", "314"),
    ("1.0", "10"),
    ("-5", "5"),
    ("7½", "71/2"),
    ("10⁶", "106"),
    ("$100", "€100"),
    ("$100", "100 %"),
    ("C++", "C"),
    ("C#", "C"),
    ("C++", "C#"),
    ("F#", "F"),
    ("A+", "a"),
    ("Hepatitis A", "Hepatitis"),
    ("Vitamin A", "vitamin"),
    ("Plan A", "plan the"),
    ("ISPARTA", "\u0131sparta"),
    ("Sao Paulo", "São Paulo"),
    ("أحمد", "احمد"),
    ("北京市", "北京"),
    ("呼和浩特市新城区", "呼和浩特市"),
    ("5 March 1990", "March 5, 1990"),
    ("1990-03-05", "19900305"),
    ("1990", "1990s"),
    ("12:30", "1230"),
    ("1/2", "12"),
    ("10^6", "106"),
    ("1914\u20131918", "19141918"),
    ("Bonn\nQ: Where", "Bonn"),
    ("It is Bonn", "Bonn"),
    ("Bonn, Germany", "Bonn"),
    ("die Stadt", "Stadt"),
    ("le Havre", "Havre"),
    ("★★★", "★★"),
    ("", "!!!"),
    ("", "The The"),
    ("", "%"),
    ("The The", "The"),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_what_people_write_in_several_ways_is_one_answer(one, other):
    assert exact_match(one, [other])
    assert exact_match(other, [one])
    assert token_f1(one, [other]) == 1.0


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers_stay_different(one, other):
    assert not exact_match(one, [other])
    assert not exact_match(other, [one])


@given(thorny | st.text())
def test_normalising_twice_changes_nothing_more(text):
    assert normalise(normalise(text)) == normalise(text)


@given(thorny, thorny)
def test_neither_score_depends_on_which_is_the_answer(one, other):
    assert exact_match(one, [other]) == exact_match(other, [one])
    assert token_f1(one, [other]) == pytest.approx(token_f1(other, [one]))


@given(thorny, thorny)
def test_an_exact_match_has_an_f1_of_one(one, other):
    assert exact_match(one, [one])
    assert token_f1(one, [other]) == 1.0 or not exact_match(one, [other])


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("New York City", ["New York"], 2 * 2 / (3 + 2)),
        ("York", ["New York", "the York"], 1.0),
        ("York York", ["York"], 2 * 1 / (2 + 1)),
        ("London", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("北京市", ["北京"], 2 * 2 / (3 + 2)),
        ("กรุงเทพ", ["กรุง"], 2 * 3 / (6 + 3)),
        ("1945年", ["1945"], 2 * 1 / (2 + 1)),
    ],
)
def test_token_f1(prediction, answers, expected):
    assert token_f1(prediction, answers) == pytest.approx(expected)


@given(words, st.lists(words, min_size=1), words)
def test_another_alias_never_costs_anything(prediction, answers, alias):
    assert 0.0 <= token_f1(prediction, answers) <= token_f1(prediction, [*answers, alias]) <= 1.0


@pytest.mark.parametrize("score", [exact_match, token_f1])
def test_a_single_string_or_no_answer_is_refused(score):
    with pytest.raises(ValueError, match="not the single string 'Paris'"):
        score("Paris", "Paris")
    with pytest.raises(ValueError, match="answers is empty"):
        score("Paris", [])


# SQuAD's rule, as its script has it.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Hague!", "hague"),
        ("an apple a day", "apple day"),
        ("3.14", "314"),
        ("1 000", "1 000"),
        ("C++", "c"),
        ("Jean-Paul", "jeanpaul"),
        ("“Paris”", "“paris”"),
        ("1914\u20131918", "1914\u20131918"),
        ("O\u2019Brien", "o\u2019brien"),
        ("a-b", "ab"),
        ("«the» théâtre", "« » théâtre"),
        ("STRASSE", "strasse"),
        ("Straße", "straße"),
        ("\uff11\uff19\uff14\uff15", "\uff11\uff19\uff14\uff15"),
        ("The The", ""),
        ("!!!", ""),
    ],
)
def test_squad_normalisation(text, expected):
    assert squad.normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "right", "f1"),
    [
        ("the Hague", ["Hague"], True, 1.0),
        ("York York", ["York"], False, 2 / 3),
        ("York York", ["New York", "York York City"], False, 0.8),
        ("-5", ["5"], True, 1.0),
        ("北京市", ["北京"], False, 0.0),
        ("!!!", ["The"], True, 0.0),  # nothing is left of either, and F1 needs a word in common
    ],
)
def test_squad_scores(prediction, answers, right, f1):
    assert squad.exact_match(prediction, answers) is right
    assert squad.token_f1(prediction, answers) == pytest.approx(f1)
