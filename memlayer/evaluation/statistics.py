"""What two measurements of the same things say: which answers turned, and how sure a mean is.

Before and after are asked the same questions, so they are compared pair by pair: a mean that stays may hide as many
answers lost as gained. Pure numbers: nothing here knows a model.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Flips:
    """Right and wrong answers before and after, in pairs.

    Attributes:
        kept: right before and after.
        lost: right before, wrong after.
        gained: wrong before, right after.
        neither: wrong before and after.
    """

    kept: int
    lost: int
    gained: int
    neither: int

    @property
    def share_kept(self) -> float:
        """Of the answers that were right before, the share that still is; nan if none was."""
        before = self.kept + self.lost
        return self.kept / before if before else math.nan

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: how often chance alone would turn answers so unevenly."""
        turned = self.lost + self.gained
        tail = sum(math.comb(turned, n) for n in range(min(self.lost, self.gained) + 1))
        return min(1.0, 2 * tail / 2**turned)


def flips(before: Sequence[bool], after: Sequence[bool]) -> Flips:
    """Count pairs of answers.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    pairs = list(zip(map(bool, before), map(bool, after), strict=True))
    return Flips(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean: what it would have been with other things measured, of the same kind.

    Args:
        values: one for each thing measured; for a difference, one for each pair.

    Raises:
        ValueError: there is no value, or ``level`` does not lie between 0 and 1.
    """
    if not values or not 0 < level < 1:
        raise ValueError(f"{len(values)} values at level {level}: at least one is needed, and a level between 0 and 1")
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    beyond = (1 - level) / 2
    return means[math.floor(beyond * (resamples - 1))], means[math.ceil((1 - beyond) * (resamples - 1))]
