"""What methods forget at equal learning is read off the lines through their strengths."""

import math

import pytest

from memlayer.evaluation.matched import at_level, common_level, matched
from memlayer.evaluation.rows import CONTROL


@pytest.mark.parametrize(
    ("points", "level", "forgetting"),
    [
        ([(0.0, 0.0), (0.4, 0.2), (0.8, 0.6)], 0.4, 0.2),
        ([(0.0, 0.0), (0.4, 0.2), (0.8, 0.6)], 0.2, 0.1),
        ([(0.0, 0.0), (0.4, 0.2), (0.8, 0.6)], 0.6, 0.4),
        ([(0.0, 0.0), (0.8, 0.2), (0.4, 0.9)], 0.6, 0.15),  # too strong, it comes down again: the cheaper side counts
        ([(0.0, 0.0), (0.4, 0.2)], 0.5, math.nan),
        ([], 0.5, math.nan),
    ],
)
def test_forgetting_at_a_level_is_on_the_line_between_two_strengths(points, level, forgetting):
    assert at_level(points, level) == pytest.approx(forgetting, nan_ok=True)


def test_the_common_level_is_what_every_method_reaches_with_every_seed():
    assert common_level({"a": [[0.2, 0.9], [0.3, 0.7]], "b": [[0.8, 0.1], [0.75]]}) == 0.7


def rows(*learned, method="a", seed=0):
    return [{"method": method, "seed": seed, "learning_unseen": each} for each in learned]


def test_methods_are_matched_seed_by_seed():
    some = rows(0.1, method=CONTROL) + rows(0.5, 0.9) + rows(0.3, 0.7, method="b")
    some += [row | {"seed": 1} for row in some]
    forgotten = dict(enumerate([0, 0.1, 0.3, 0.2, 0.6, 0, 0.1, 0.5, 0.2, 0.6]))
    found = matched(some, CONTROL, {"known": forgotten})
    assert found["level"] == 0.7
    assert found["methods"]["a"]["known"] == pytest.approx((0.25, math.sqrt(2) * 0.05))
    assert found["methods"]["b"]["known"] == pytest.approx((0.6, 0.0))


@pytest.mark.parametrize(
    "some",
    [
        rows(0.1, method=CONTROL) + rows(0.5, 0.9) + rows(0.7, method="b"),  # one strength is no line
        rows(0.1, method=CONTROL) + rows(0.5, 0.9) + rows(0.0, 0.1, method="b"),  # b learns nothing
        rows(0.1, method=CONTROL),
    ],
)
def test_where_methods_cannot_be_matched_nothing_is_said(some):
    assert matched(some, CONTROL, {"known": dict.fromkeys(range(len(some)), 0.0)}) is None
