"""Every question is in one cell of the matrix; a probe repeated without training moves nothing but what is drawn."""

from dataclasses import astuple

import pytest
from commands import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from memlayer.data.facts import facts_of
from memlayer.data.qa import known_questions
from memlayer.decoders import files
from memlayer.evaluation.slick import CATEGORIES, how_well_known
from memlayer.evaluation.transitions import Moves, moves, transition_matrix

__all__ = ["checkpoint"]  # a fixture

PAIRS = st.lists(st.tuples(st.sampled_from(CATEGORIES), st.sampled_from(CATEGORIES)))


@given(PAIRS)
def test_every_question_is_in_one_cell(pairs):
    matrix = transition_matrix([one for one, _ in pairs], [other for _, other in pairs])
    expected = [[0] * 4 for _ in CATEGORIES]
    better = worse = 0
    for one, other in pairs:
        expected[CATEGORIES.index(one)][CATEGORIES.index(other)] += 1
        better += CATEGORIES.index(other) < CATEGORIES.index(one)
        worse += CATEGORIES.index(other) > CATEGORIES.index(one)
    assert matrix == expected
    assert moves(matrix) == Moves(better, len(pairs) - better - worse, worse)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(["Unknown"], [], "1 categories before and 0 after"), (["Unknown"], ["Known"], "'Known' is no category")],
)
def test_what_is_no_pair_of_categories_is_refused(before, after, words):
    with pytest.raises(ValueError, match=words):
        transition_matrix(before, after)


def test_the_null_of_a_probe_is_what_its_draws_move(checkpoint):
    model, tokenizer = files.load(checkpoint)
    facts = facts_of(num_known=24, num_new=0)
    questions = known_questions(facts.known, facts.wordings)
    likeliest = [how_well_known(model, tokenizer, [questions], samples=0) for _ in range(2)]
    assert moves(transition_matrix(*likeliest)) == Moves(0, len(questions), 0)
    drawn = [how_well_known(model, tokenizer, [questions], samples=4, temperature=2.0, seed=seed) for seed in (0, 1)]
    null = transition_matrix(*drawn)
    assert sum(astuple(moves(null))) == len(questions)
    assert null[0] == [drawn[0].count("HighlyKnown"), 0, 0, 0], "the likeliest answers are no draws"
    assert all(row[:2] == [0, 0] for row in null[2:]), "what is drawn tells WeaklyKnown from Unknown alone"
