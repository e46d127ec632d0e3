"""BM25 is its formula, and the share of the best text says how much of a query is there at all."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.data.bm25 import BM25, words

TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "d", "Ada", "Łódź"]), max_size=6).map(" ".join), min_size=1, max_size=6
)
QUERY = st.lists(st.sampled_from(["a", "b", "c", "ADA", "łódź", "x"]), max_size=6).map(" ".join)


def by_the_formula(texts, query, k1, b):
    """One text and one word of the query at a time."""
    told = [text.casefold().split() for text in texts]
    mean = sum(map(len, told)) / len(told) or 1.0
    scores = []
    for text in told:
        score = 0.0
        for word in query.casefold().split():
            holding = sum(word in other for other in told)
            idf = math.log(1 + (len(told) - holding + 0.5) / (holding + 0.5))
            times = text.count(word)
            if times:
                score += idf * times * (k1 + 1) / (times + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@given(TEXTS, QUERY, st.floats(0, 3), st.floats(0, 1))
def test_the_scores_are_those_of_the_formula(texts, query, k1, b):
    found = BM25(texts, k1, b).scores(query)
    assert found == pytest.approx(by_the_formula(texts, query, k1, b))


@given(TEXTS, QUERY)
def test_the_best_text_has_the_highest_score_and_its_share_is_one_of_the_most_there_can_be(texts, query):
    index = BM25(texts)
    place, share = index.best(query)
    scores = by_the_formula(texts, query, 1.2, 0.75)
    assert scores[place] == pytest.approx(max(scores))
    assert 0 <= share <= 1
    assert (share == 0) == (max(scores) == 0)


def test_words_are_letters_and_digits_without_case():
    assert words("Where's Łódź, at No. 7?") == ["where", "s", "łódź", "at", "no", "7"]


def test_a_word_that_no_text_holds_lowers_the_share_and_no_score():
    index = BM25(["Ada works in Bonn", "Bo works in Rome"])
    (place, with_ada), (_, with_cy) = index.best("where does Ada live"), index.best("where does Cy live")
    assert (place, with_cy) == (0, 0.0)
    assert with_ada > 0
    assert index.scores("Ada") == index.scores("Ada unheard")
    assert index.best("Ada unheard")[1] == pytest.approx(index.best("Ada")[1] / 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([],), "there is no text to search"),
        ((["a"], -1.0), "k1 is -1.0"),
        ((["a"], math.nan), "k1 is nan"),
        ((["a"], 1.0, 1.5), "b is 1.5"),
    ],
)
def test_an_index_that_cannot_be_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        BM25(*arguments)
