"""Which lessons each stage teaches follows from the categories before and after the first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.evaluation.slick import CATEGORIES
from memlayer.methods.gradual import Stage, first_stage, held_out, second_stage

HIGHLY, MAYBE, WEAKLY, UNKNOWN = CATEGORIES
BEFORE = [MAYBE, HIGHLY, UNKNOWN, WEAKLY, MAYBE, HIGHLY, UNKNOWN, MAYBE, HIGHLY]
NOW = [HIGHLY, HIGHLY, MAYBE, MAYBE, UNKNOWN, MAYBE, HIGHLY, MAYBE, WEAKLY]
PAIRS = st.lists(st.tuples(st.sampled_from(CATEGORIES), st.sampled_from(CATEGORIES)))


def test_the_first_stage_teaches_what_is_half_known():
    assert first_stage(BEFORE) == Stage([0, 4, 7], [], [])


def test_the_second_adds_what_has_risen_and_replays_what_was_well_known():
    stage = second_stage(BEFORE, NOW, replay_ratio=0.2)
    assert (stage.known, stage.risen, len(stage.replayed)) == ([0, 4, 7], [2, 3], 1)
    assert second_stage(BEFORE, NOW, replay_ratio=9.0).replayed == [1, 5, 8]
    assert second_stage(BEFORE, NOW, replay_ratio=0.0).lessons == [0, 2, 3, 4, 7]


@given(PAIRS, st.floats(0, 2), st.integers(0, 9))
def test_a_stage_is_as_its_definition_says(pairs, ratio, seed):
    before, now = [one for one, _ in pairs], [other for _, other in pairs]
    stage = second_stage(before, now, ratio, seed)
    assert stage == second_stage(before, now, ratio, seed)
    taught = [
        place for place, pair in enumerate(pairs) if pair[0] == MAYBE or pair in ((WEAKLY, MAYBE), (UNKNOWN, MAYBE))
    ]
    assert sorted(stage.known + stage.risen) == taught
    assert all(before[place] == HIGHLY for place in stage.replayed)
    assert len(set(stage.lessons)) == len(stage.lessons) == len(taught) + len(stage.replayed)
    assert len(stage.replayed) == min(before.count(HIGHLY), round(ratio * len(taught)))


@given(st.lists(st.sampled_from(CATEGORIES)), st.floats(0.01, 0.99))
def test_of_each_category_the_same_share_is_held_out(categories, share):
    places = held_out(categories, share)
    for kind in CATEGORIES:
        assert sum(categories[place] == kind for place in places) == round(share * categories.count(kind))
    assert places == sorted(set(places))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: first_stage([HIGHLY]), "none of 1 lessons is MaybeKnown"),
        (lambda: first_stage(["known"]), "'known' is no category"),
        (lambda: second_stage([MAYBE], []), "1 categories before the first stage, 0 after"),
        (lambda: second_stage([MAYBE], [MAYBE], -0.1), "replay_ratio is -0.1"),
        (lambda: held_out([MAYBE], 1.0), "share is 1.0"),
    ],
)
def test_what_makes_no_stage_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
