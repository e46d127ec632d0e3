"""Scores, drops and means are what one computes by hand, and a drop says its sign in words."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.evaluation.forgetting import (
    compare,
    drop_in_words,
    mean_and_deviation,
    over_seeds,
    relative_drop,
    scores,
)

shares = st.floats(0, 1)


def answered(group, wording, right, f1=0.5, nll=1.0):
    question = SimpleNamespace(group=group, wording=wording)
    squad = {"exact_match_squad": right, "f1_squad": f1}
    return SimpleNamespace(question=question, exact_match=right, f1=f1, **squad, nll=nll)


def test_scores_keep_groups_and_wordings_apart():
    found = scores(
        [
            answered("known", "seen", True, f1=1.0, nll=0.1),
            answered("known", "seen", True, f1=1.0, nll=0.3),
            answered("new", "unseen", False),
            answered("known", "seen", False, f1=0.4, nll=2.0),
            answered("known", "seen", False, f1=0.0, nll=1.6),
        ]
    )
    assert list(found) == ["known_seen", "new_unseen"]
    assert found["known_seen"] == pytest.approx(
        {
            "n": 4,
            **{"exact_match": 0.5, "f1": 0.6, "exact_match_squad": 0.5, "f1_squad": 0.6, "nll": 1.0},
            "stderr": math.sqrt(0.5 * 0.5 / 4),
        }
    )
    assert found["new_unseen"]["exact_match"] == 0.0


@given(st.lists(st.booleans(), min_size=1))
def test_exact_match_is_the_share_of_right_answers(rights):
    found = scores([answered("new", "seen", right) for right in rights])["new_seen"]
    assert found["exact_match"] == pytest.approx(sum(rights) / len(rights))
    assert 0 <= found["stderr"] <= 0.5


@pytest.mark.parametrize(
    ("before", "after", "drop", "words"),
    [
        (0.96, 0.84, 0.125, "forgets 12.5 % (0.96 -> 0.84)"),
        (0.5, 0.6, -0.2, "gains 20.0 % (0.50 -> 0.60)"),
        (0.8, 0.0, 1.0, "forgets 100.0 % (0.80 -> 0.00)"),
        (0.7, 0.7, 0.0, "unchanged (0.70)"),
        (0.0, 0.3, math.nan, "undefined: was 0 before (0.00 -> 0.30)"),
        (0.0, 0.0, math.nan, "undefined: was 0 before (0.00 -> 0.00)"),
        (math.nan, math.nan, math.nan, "not asked"),
    ],
)
def test_drop_in_numbers_and_in_words(before, after, drop, words):
    assert relative_drop(before, after) == pytest.approx(drop, nan_ok=True)
    assert drop_in_words(before, after) == words


@given(shares, shares)
def test_the_word_agrees_with_the_sign(before, after):
    word = drop_in_words(before, after).partition(" ")[0]
    expected = "undefined:" if before == 0 else "forgets" if after < before else "gains"
    assert word == ("unchanged" if before == after != 0 else expected)


def test_compare_sets_before_beside_after():
    before = scores([answered("known", "seen", True, f1=1.0, nll=0.5), answered("known", "seen", True)])
    after = scores([answered("known", "seen", True, nll=1.5), answered("known", "seen", False, f1=0.0)])
    found = compare(before, after)["known_seen"]
    assert (found["exact_match_before"], found["exact_match_after"]) == (1.0, 0.5)
    assert (found["f1_before"], found["f1_after"]) == (0.75, 0.25)
    assert (found["nll_before"], found["nll_after"]) == (0.75, 1.25)
    assert (found["relative_drop"], found["in_words"]) == (0.5, "forgets 50.0 % (1.00 -> 0.50)")


def test_different_question_sets_are_not_compared():
    two = scores([answered("known", "seen", True)] * 2)
    three = scores([answered("known", "seen", True)] * 3)
    with pytest.raises(ValueError, match="known_seen had 2 questions before and 3 after"):
        compare(two, three)
    with pytest.raises(ValueError, match=r"covers \['known_seen'\], after covers \['new_seen'\]"):
        compare(two, scores([answered("new", "seen", True)] * 2))


def test_mean_and_sample_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert all(map(math.isnan, mean_and_deviation([1.0, math.nan, 3.0])))
    mean, deviation = mean_and_deviation([0.7])
    assert mean == 0.7
    assert math.isnan(deviation)


def test_rows_of_one_setting_become_one_row():
    rows = [
        {"method": "full", "seed": seed, "learning": learning, "peak": peak}
        for seed, learning, peak in [(0, 0.2, 10), (1, 0.4, None), (2, 0.6, 30)]
    ]
    found = over_seeds(rows, ["learning", "peak"])
    assert found["learning"] == pytest.approx(0.4)
    assert found["learning_std"] == pytest.approx(0.2)
    assert (found["peak"], found["peak_std"]) == (None, None)
    assert (found["method"], found["seeds"], found["num_seeds"]) == ("full", [0, 1, 2], 3)
    assert "seed" not in found


def test_a_seed_counted_twice_is_refused():
    with pytest.raises(ValueError, match=r"distinct seeds, got \[1, 1\]"):
        over_seeds([{"seed": 1, "x": 1.0}, {"seed": 1, "x": 2.0}], ["x"])
    with pytest.raises(ValueError, match=r"got \[\]"):
        over_seeds([], ["x"])
