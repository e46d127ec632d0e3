"""A learning rate in units that the lessons tell, so that the same number does about the same in every model.

What a rate of SGD does depends on how long gradients are, which differs from model to model. A unit here is the rate at
which the first step takes the whole loss of the median lesson away, if the loss falls in a straight line. After Polyak,
whose step is the loss above its lowest over the gradient's square, anew each time; here the lowest loss is 0, and the
rate stays what it is.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from memlayer.layers.ranks import num_ranks

LOOKED_AT = 32


class StepsWhole(Protocol):
    """What tells the unit: a sparse memory finetuner."""

    def whole_step(self, batch: Mapping[str, Tensor]) -> float:
        """SGD's rate for a first step that takes the batch's whole loss away, if that falls in a straight line."""


def rate_of_one(finetuner: StepsWhole, lessons: Sequence[Mapping[str, Tensor]]) -> float:
    """The rate that is a unit.

    Args:
        finetuner: a new one; it is left as it was.
        lessons: a batch of each; 32 of them at most are looked at, from the first to the last.

    Raises:
        ValueError: there are no lessons or several processes, or the loss of most lessons falls nowhere.
    """
    if (ranks := num_ranks()) > 1:
        raise ValueError(f"rate_unit 'lessons' in {ranks} processes: run it in one, and set the rate that it tells")
    number = min(LOOKED_AT, len(lessons))
    if not number:
        raise ValueError("rate_unit is 'lessons', and there are no lessons to tell the rate by")
    rates = [finetuner.whole_step(lessons[place * len(lessons) // number]) for place in range(number)]
    if not math.isfinite(rate := statistics.median_low(rates)):
        raise ValueError("rate_unit is 'lessons', and their loss does not change with the rows: set a rate yourself")
    return rate
