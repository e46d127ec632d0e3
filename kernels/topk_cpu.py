"""The k best of many short columns on CPUs, by a sorting network of torch.maximum and torch.minimum.

torch.topk looks at one row at a time, number by number. A network makes the same comparisons for every
column, so that one call compares 16 columns at once: a column of 256 takes 1 us instead of 4. A number
must then carry its position: scores are rounded to levels, as many as the position leaves of 31 bits, from
a number that k scores reach to the largest. Columns in which that rounding may have decided are named, for the
caller to sort exactly; they are one in some hundreds, unless scores tie.

Shapes: C scores of a column, X columns, K kept, P parts of scores, G groups, M members of the groups chosen.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

MANTISSA_BITS = 23  # of a float32, without the leading one
MARGIN = 16  # levels from either end to what counts, so that rounding does not make it one with what is beyond
GROUP = 4  # scores of which at first only the best counts, where there are many
MANY_SCORES = 16  # scores for each one kept


def column_topk(num_scores: int, num_columns: int, k: int) -> "ColumnTopK | GroupTopK":
    """What finds the k best of so many scores with least work; see ColumnTopK."""
    grouped = num_scores >= MANY_SCORES * k and num_scores % GROUP == 0
    return (GroupTopK if grouped else ColumnTopK)(num_scores, num_columns, k)


def places(position_KX: Tensor) -> Tensor:
    """Where in memory int32 positions of contiguous columns are; X may be several dimensions."""
    columns_X = torch.arange(position_KX[0].numel(), dtype=torch.int32).view(position_KX.shape[1:])
    return columns_X.add(position_KX, alpha=columns_X.numel())


def pick(values_CX: Tensor, place: Tensor) -> Tensor:
    """The values in these places; gather would take twice as long."""
    return values_CX.flatten().index_select(0, place.flatten()).view(place.shape)


class ColumnTopK:
    """Finds the k best of each column; keeps its memory and its list of calls from one use to the next.

    Args:
        num_scores: of a column.
        num_columns: looked at at once.
        k: scores to find, at most num_scores.
    """

    def __init__(self, num_scores: int, num_columns: int, k: int) -> None:
        self.k = k
        self.position_bits = (num_scores - 1).bit_length()
        level_bits = min(MANTISSA_BITS, 31 - self.position_bits)
        # The sum of a level and the first of these has the level in its last bits.
        self.lowest, self.highest = 2.0**MANTISSA_BITS, 2.0**MANTISSA_BITS + 2**level_bits - 1
        lowest = torch.tensor(self.lowest, dtype=torch.float32).view(torch.int32).item()
        self.positions_C1 = _wrapped(torch.arange(num_scores) - (lowest << self.position_bits)).unsqueeze(1)
        top = max(2, _power_of_two(k))
        rows = max(top, _power_of_two(num_scores))
        memory_3CX = torch.empty(3, rows, num_columns, dtype=torch.int32)
        # Below every score; were it found, its position would be 0.
        memory_3CX[0, num_scores:] = -(2**31)
        self.packed_CX = memory_3CX[0, :num_scores]
        self.best_KX, self.steps, spare_CX = sorting_network(*memory_3CX, top)
        self.spare_CX = spare_CX[:num_scores]

    def __call__(self, scores_CX: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (K, X) int32 of the best of float32 scores, descending; whether they are unsure (X,).

        Scores are contiguous. X may be several dimensions, in all three alike.
        """
        shape = scores_CX.shape[1:]
        if len(scores_CX) == 1:  # the pairs where one slot is read: nothing to decide
            return torch.zeros_like(scores_CX, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
        flat_X = self._pack(scores_CX.flatten(1))
        for step in self.steps:
            step()
        best_KX = self.best_KX[: self.k]
        position_KX = best_KX & ((1 << self.position_bits) - 1)
        # Equal levels may stand in the wrong order, or one of them outside, so the one after the last counts too,
        # if there is one.
        next_X = self._next(best_KX[-1]) if self.k < len(self.packed_CX) else best_KX[-1] ^ (2**31 - 1)
        difference_X = best_KX[-1] ^ next_X
        if self.k > 1:
            difference_X = torch.minimum(difference_X, (best_KX[1:] ^ best_KX[:-1]).amin(0))
        unsure_X = (difference_X < 1 << self.position_bits) | flat_X
        return position_KX.view(self.k, *shape), unsure_X.view(shape)

    def _pack(self, scores_CX: Tensor) -> Tensor:
        """Levels and positions into packed; True for columns without levels (X,). Every operation keeps order."""
        low_X, high_X = self._range(scores_CX)
        range_X = high_X - low_X
        scale_X = (self.highest - self.lowest - 2 * MARGIN) / range_X
        # One of them is infinite or no number where scores are all equal, or not all finite.
        flat_X = (range_X + scale_X) * 0 != 0
        offset_X = self.lowest + MARGIN - low_X * scale_X
        # No addcmul: it may round once in vector code and twice at the end of a row, which would not keep order.
        level_CX = torch.mul(scores_CX, scale_X, out=self.packed_CX.view(torch.float32))
        level_CX.add_(offset_X).clamp_(self.lowest, self.highest)
        torch.add(self.positions_C1, self.packed_CX, alpha=1 << self.position_bits, out=self.packed_CX)
        return flat_X

    def _range(self, scores_CX: Tensor) -> tuple[Tensor, Tensor]:
        """A number that at least k scores reach, the smallest maximum of k parts of them, and the largest score."""
        parts = min(max(2, self.k), len(scores_CX))  # of one part the smallest would be the largest
        whole = len(scores_CX) // parts * parts
        best_PX = scores_CX[:whole].unflatten(0, (-1, parts)).amax(0)
        low_X, high_X = best_PX.amin(0), best_PX.amax(0)
        if whole < len(scores_CX):
            high_X = torch.maximum(high_X, scores_CX[whole:].amax(0))
        return low_X, high_X

    def _next(self, last_X: Tensor) -> Tensor:
        """The largest packed number below last, which is not the smallest."""
        # Less last, those below are negative: with the sign bit turned they are above all others.
        turn_X = -(2**31) - last_X
        return torch.add(self.packed_CX, turn_X, out=self.spare_CX).amax(0) - turn_X


class GroupTopK:
    """The same by way of the groups of neighbours with the k best maxima, which hold the k best."""

    def __init__(self, num_scores: int, num_columns: int, k: int) -> None:
        self.find_groups = ColumnTopK(num_scores // GROUP, num_columns, k)
        self.find_members = ColumnTopK(k * GROUP, num_columns, k)

    def __call__(self, scores_CX: Tensor) -> tuple[Tensor, Tensor]:
        group_KX, unsure_X = self.find_groups(scores_CX.unflatten(0, (-1, GROUP)).amax(1))
        index_MX = torch.stack([group_KX * GROUP + place for place in range(GROUP)], 1).flatten(0, 1)
        member_KX, also_unsure_X = self.find_members(pick(scores_CX, places(index_MX)))
        return pick(index_MX, places(member_KX)), unsure_X | also_unsure_X


def sorting_network(
    values_CX: Tensor, some_CX: Tensor, more_CX: Tensor, top: int
) -> tuple[Tensor, list[Callable[[], object]], Tensor]:
    """Calls that find the top largest of each column, descending.

    A bitonic sort: runs are put in order, the first descending, the next ascending and so on, until they have
    length top; then of each two the larger at each place are kept, and put in order again.

    Args:
        values_CX: what each run of the calls sorts; C and top are powers of two, C >= top. Not changed.
        some_CX: memory to sort in.
        more_CX: likewise.
        top: how many are wanted.

    Returns:
        What is found, (top, X), the calls, and that memory of the two which it is not in.
    """
    memory = some_CX, more_CX
    steps: list[Callable[[], object]] = []
    turn, length = 0, 1
    while length < top or len(values_CX) > top:
        if length == top:
            first, second = values_CX.view(-1, 2, top, values_CX.shape[1]).unbind(1)
            values_CX, turn = memory[turn][: len(values_CX) // 2], 1 - turn
            steps.append(partial(torch.maximum, first, second, out=values_CX.view(first.shape)))
        length = min(2 * length, top)
        span = length // 2
        while span:
            places_CX = memory[turn][: len(values_CX)]
            steps += _exchange(values_CX, places_CX, span, length)
            values_CX, turn, span = places_CX, 1 - turn, span // 2
    return values_CX, steps, memory[turn]


def _exchange(values_CX: Tensor, places_CX: Tensor, span: int, length: int) -> list[Callable[[], object]]:
    """Calls that order places span apart; runs of length are descending and ascending in turn."""
    num_values, num_columns = values_CX.shape
    runs = min(2, num_values // length)
    shape = (num_values // (runs * length), runs, length // (2 * span), span * num_columns)

    def every_other(memory_CX: Tensor, first: int, shift: int) -> Tensor:
        """Each second block of span rows from the first on; in ascending runs, those shift rows further."""
        strides = (runs * length, length + shift, 2 * span)
        start = memory_CX.storage_offset() + first * num_columns
        return memory_CX.as_strided(shape, (*(rows * num_columns for rows in strides), 1), start)

    first, second = every_other(values_CX, 0, 0), every_other(values_CX, span, 0)
    # The larger goes to the first of both places in descending runs, to the second in ascending ones.
    larger, smaller = every_other(places_CX, 0, span), every_other(places_CX, span, -span)
    return [partial(torch.maximum, first, second, out=larger), partial(torch.minimum, first, second, out=smaller)]


def _wrapped(numbers: Tensor) -> Tensor:
    """int32 that differ from int64 by a multiple of 2**32."""
    return ((numbers + 2**31) % 2**32 - 2**31).int()


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
