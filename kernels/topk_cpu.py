"""The k best of many short columns on CPUs, by a sorting network of torch.maximum and torch.minimum.

torch.topk looks at one row at a time, number by number. A network makes the same comparisons for every
column, so that one call compares 16 columns at once: a column of 256 takes 1 us instead of 4. A number
must then carry its position: scores are rounded to what of 31 bits the position leaves. Columns in which
that rounding may have decided are named, for the caller to sort exactly; they are one in some hundreds,
unless scores tie.

Shapes: C scores of a column, X columns, K kept, R runs of L places.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LEVEL_BITS = 30  # of an int32, shared by rounded score and position; the sign is that of the padding


class ColumnTopK:
    """Finds the k best of each column; keeps its memory and its list of calls from one use to the next.

    Args:
        num_scores: of a column.
        num_columns: looked at at once.
        k: scores to find, at most num_scores.
    """

    def __init__(self, num_scores: int, num_columns: int, k: int) -> None:
        top = max(2, _power_of_two(k))
        self.k = k
        self.position_bits = (num_scores - 1).bit_length()
        self.last_position = (1 << self.position_bits) - 1
        self.positions_C1 = self.last_position - torch.arange(num_scores, dtype=torch.int32).unsqueeze(1)
        padded_CX = torch.full((max(top, _power_of_two(num_scores)), num_columns), -1, dtype=torch.int32)
        self.packed_CX = padded_CX[:num_scores]
        self.spare_CX = torch.empty(num_scores, num_columns)
        self.best_KX, self.steps = sorting_network(padded_CX, top)

    def __call__(self, scores_CX: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (K, X) int64 of the best scores, descending; whether they are unsure (X,)."""
        self._pack(scores_CX)
        for step in self.steps:
            step()
        best_KX = self.best_KX[: self.k]
        # Equal levels may stand in the wrong order, or one of them outside, so the one after the last counts too.
        if self.k < len(self.packed_CX):
            best_KX = torch.cat([best_KX, self._next(best_KX[-1]).unsqueeze(0)])
        level_KX = best_KX >> self.position_bits
        unsure_X = (level_KX[1:] == level_KX[:-1]).any(0)
        best_KX = best_KX[: self.k]
        return (self.last_position - (best_KX & self.last_position)).long(), unsure_X

    def _next(self, last_X: Tensor) -> Tensor:
        """The largest packed number below last, which is not the smallest."""
        # Less last, those below are negative: with the sign bit turned they are above all others.
        turn_X = -(2**31) - last_X
        return torch.add(self.packed_CX, turn_X, out=self.spare_CX.view(torch.int32)).amax(0) - turn_X

    def _pack(self, scores_CX: Tensor) -> None:
        """Levels and positions into packed. Every operation keeps order: what is larger does not become smaller."""
        # Two reductions: aminmax over the outer dimension is ten times slower than both.
        low_X, high_X = scores_CX.amin(0), scores_CX.amax(0)
        scale_X = 2.0 ** (LEVEL_BITS - self.position_bits) / (high_X - low_X)
        # Where scores are all equal or not all finite, all levels are to be equal: NaN becomes 0 or -2**31,
        # either of which is 0 once shifted.
        scale_X.masked_fill_(~scale_X.isfinite(), 0)
        self.packed_CX.copy_(torch.sub(scores_CX, low_X, out=self.spare_CX).mul_(scale_X))
        # The lower of two positions is the larger number.
        torch.add(self.positions_C1, self.packed_CX, alpha=1 << self.position_bits, out=self.packed_CX)


def sorting_network(values_CX: Tensor, top: int) -> tuple[Tensor, list[Callable[[], object]]]:
    """Calls that find the top largest of each column, and where these then stand, (top, X), descending.

    Runs of sorted places are merged two by two (bitonic: one run is turned round, so that the larger at each
    place are the larger half); once they have length top, only the larger half is kept.

    Args:
        values_CX: what each run of the calls sorts; C and top are powers of two, C >= top. Not changed.
        top: how many are wanted.
    """
    num_columns = values_CX.shape[1]
    into, other = torch.empty_like(values_CX), torch.empty_like(values_CX)
    runs_RLX = values_CX.unsqueeze(1)
    steps: list[Callable[[], object]] = []
    while len(runs_RLX) > 1:
        num_runs, length, _ = runs_RLX.shape
        first, second = runs_RLX.view(num_runs // 2, 2, length, num_columns).unbind(1)
        merged = into[: num_runs * length].view(num_runs // 2, 2, length, num_columns)
        larger, smaller = merged.unbind(1)
        if length < top:
            steps.append(partial(_compare, first, second, larger, smaller, turn=True))
            runs_RLX = merged.flatten(1, 2)
        else:
            steps.append(partial(_compare, first, second, larger, None, turn=True))
            runs_RLX = larger
        into, other = other, into
        span = length // 2
        while span:
            blocks = (runs_RLX.shape[1] // (2 * span), 2, span)
            cleaned_RLX = into[: len(runs_RLX) * runs_RLX.shape[1]].view(runs_RLX.shape)
            first, second = runs_RLX.unflatten(1, blocks).unbind(2)
            larger, smaller = cleaned_RLX.unflatten(1, blocks).unbind(2)
            steps.append(partial(_compare, first, second, larger, smaller))
            runs_RLX = cleaned_RLX
            into, other = other, into
            span //= 2
    return runs_RLX[0], steps


def _compare(first: Tensor, second: Tensor, larger: Tensor, smaller: Tensor | None, turn: bool = False) -> None:
    if turn and second.shape[1] > 1:
        second = second.flip(1)
    torch.maximum(first, second, out=larger)
    if smaller is not None:
        torch.minimum(first, second, out=smaller)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
