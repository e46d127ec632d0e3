"""Flips, McNemar's test and bootstrap intervals against counting by hand and against scipy's figures."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.evaluation.statistics import Flips, bootstrap_interval, flips


def test_flips_count_pairs():
    found = flips([True, True, False, False, True], [True, False, True, False, True])
    assert found == Flips(kept=2, lost=1, gained=1, neither=1)
    assert found.share_kept == 2 / 3


def test_answers_of_another_number_of_questions_are_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        flips([True], [True, False])


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    # scipy.stats.binomtest(lost, lost + gained).pvalue
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (10, 2, 0.03857421875), (3, 3, 1.0), (0, 9, 0.00390625)],
)
def test_mcnemar_is_the_exact_binomial_test(lost, gained, expected):
    assert Flips(7, lost, gained, 2).p_value == pytest.approx(expected, abs=1e-15)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_knows_no_direction_and_is_a_probability(lost, gained):
    one, other = Flips(0, lost, gained, 0).p_value, Flips(0, gained, lost, 0).p_value
    assert one == other
    assert 0 < one <= 1


def test_nothing_known_has_no_share():
    assert math.isnan(flips([False], [True]).share_kept)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_an_interval_lies_within_the_values_and_repeats(values):
    low, high = bootstrap_interval(values, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap_interval(values, resamples=50) == (low, high)


def test_an_interval_is_that_of_the_normal_law_where_there_are_many_values():
    values = [float(index % 2) for index in range(400)]  # standard error of the mean 0.025
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0)])
def test_an_interval_of_nothing_is_refused(values, level):
    with pytest.raises(ValueError, match="at least one is needed"):
        bootstrap_interval(values, level)
