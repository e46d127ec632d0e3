"""Each number against loops over thresholds, pairs and bins."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.evaluation.refusal import (
    answer_entropy,
    auroc,
    average_precision,
    calibration_error,
    known_by_entropy,
    refusal_rate,
    says_answer,
)

# Few different numbers, so that many are equal; exact in binary, so that a bin's bound is one.
ANSWERED = st.lists(st.tuples(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.625, 1.0]), st.booleans()), min_size=1)


def unzipped(pairs):
    return [confidence for confidence, _ in pairs], [right for _, right in pairs]


@given(ANSWERED)
def test_average_precision_is_the_area_over_all_thresholds(pairs):
    total = sum(right for _, right in pairs)
    recall, area = 0.0, 0.0
    for threshold in sorted({confidence for confidence, _ in pairs}, reverse=True):
        kept = [right for confidence, right in pairs if confidence >= threshold]
        if total:
            area += (sum(kept) / total - recall) * sum(kept) / len(kept)
            recall = sum(kept) / total
    assert average_precision(*unzipped(pairs)) == pytest.approx(area if total else math.nan, nan_ok=True)


def test_average_precision_of_known_arrays():
    # scikit-learn's average_precision_score of the same numbers; its documentation has the first.
    assert average_precision([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == pytest.approx(0.8333333)
    assert average_precision([0.5] * 4, [True, False, False, False]) == 0.25


@given(ANSWERED)
def test_auroc_counts_pairs(pairs):
    won = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, right in pairs
        for other, also in pairs
        if right and not also
    ]
    assert auroc(*unzipped(pairs)) == pytest.approx(sum(won) / len(won) if won else math.nan, nan_ok=True)


@given(ANSWERED, st.sampled_from([1, 2, 4, 8]))
def test_calibration_error_is_the_gap_of_each_bin_by_its_share(pairs, bins):
    error = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        some = [pair for pair in pairs if low < pair[0] <= high or (number == 0 and pair[0] == 0)]
        if some:
            gap = sum(right for _, right in some) / len(some) - sum(confidence for confidence, _ in some) / len(some)
            error += len(some) / len(pairs) * abs(gap)
    assert calibration_error(*unzipped(pairs), bins) == pytest.approx(error)


@given(st.lists(st.floats(0, 3), max_size=30))
def test_the_surest_half_is_known(entropies):
    known = known_by_entropy(entropies)
    assert sum(known) == len(entropies) // 2
    kept, left = ([each for each, one in zip(entropies, known) if one is kind] for kind in (True, False))
    assert not kept or max(kept) <= min(left)


def test_entropy_is_of_answers_as_they_are_compared():
    assert answer_entropy(["Bonn", "bonn ", "the Bonn"]) == 0
    assert answer_entropy(["Bonn", "Rome"] * 5) == pytest.approx(math.log(2))
    assert answer_entropy(["a1", "b2", "b2", "b2"]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


@pytest.mark.parametrize(
    ("told", "answers", "says"),
    [("It is in Bonn, I think", ["Rome", "bonn"], True), ("Bonnland", ["Bonn"], False), ("", ["Bonn"], False)],
)
def test_an_answer_is_said_word_for_word(told, answers, says):
    assert says_answer(told, answers) is says


def test_what_is_not_sure_enough_is_refused():
    assert refusal_rate([0.1, 0.5, 0.9, 0.2]) == 0.5
    assert refusal_rate([0.1, 0.5, 0.9, 0.2], 0.95) == 1
    assert math.isnan(refusal_rate([]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: answer_entropy([]),
        lambda: known_by_entropy([1.0], 1.5),
        lambda: calibration_error([], []),
        lambda: calibration_error([1.5], [True]),
        lambda: calibration_error([0.5], [True], 0),
        lambda: average_precision([0.5], []),
    ],
)
def test_what_has_no_number_is_refused(call):
    with pytest.raises(ValueError):
        call()
