"""The k best of each of many rows of float32 on CPUs, exactly, by numpy's partition and sort.

torch.topk looks at one number at a time. numpy (2.0 and later) compares 4 to 16 integers at once, where the processor
can (vector_sorts.py), but returns numbers alone, not where they were. So a number carries its position. In 64 bits
there is room for both, and sorting is exact. In 32 bits the position takes the place of the last bits of the score;
that parts the best few of a long row, and some to spare, from the rest in a quarter of the time, and leaves few to be
sorted.

Shapes: Y rows, C scores of a row, B of them with some to spare, K kept.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .vector_sorts import PARTITION, vector_sorts

SORTS = vector_sorts()  # how rows are parted; found numbers are the same in every way
MAGNITUDE = 2**31 - 1  # of a float32, as int32: all bits but the sign
LOWER_HALF = 2**32 - 1
NANS = 2**23 - 1  # float32 of each sign that are no numbers; by their bits the negative ones rank below -inf
SPARE = 8  # scores kept beyond k: so many have to be equal but for their last bits before a row is sorted in full
SHORT_ROW = 128  # scores that are sorted by 64 bits as fast as they are parted by 32
REGISTER_KEYS = 256  # sorted by numpy as fast as they are parted
THREAD_SCORES = 1 << 16  # scores that are worth a thread


def row_topk(scores_YC: Tensor, k: int, memory_M: Tensor) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, descending, and their positions (int64), both (Y, K).

    Of equal scores, 0 and -0 among them, the first comes first. What is no number counts as more than infinity, so
    that it shows.

    Args:
        scores_YC: contiguous float32.
        k: at most C.
        memory_M: at least Y * C int64 to work in. Fresh memory would take longer than the work.
    """
    num_scores = scores_YC.shape[1]
    if num_scores <= SHORT_ROW or num_scores < 2 * (k + SPARE):
        position_YK = _sorted_positions(scores_YC, torch.arange(num_scores), k, memory_M)
    else:
        position_YK = _parted_positions(scores_YC, k, memory_M)
    return scores_YC.gather(1, position_YK), position_YK


def _parted_positions(scores_YC: Tensor, k: int, memory_M: Tensor) -> Tensor:
    """Positions of the k best, by way of the k + SPARE that are best but for their last bits."""
    num_scores = scores_YC.shape[1]
    last_bits = (1 << (num_scores - 1).bit_length()) - 1
    coarse_YC = memory_M.view(torch.int32)[: scores_YC.numel()].view(scores_YC.shape)
    _order(scores_YC, out=coarse_YC)
    coarse_YC.bitwise_and_(~last_bits).bitwise_or_(torch.arange(num_scores, dtype=torch.int32))
    first = num_scores - k - SPARE
    _part(coarse_YC, first)
    position_YB, bound_Y = (coarse_YC[:, first:] & last_bits).long(), coarse_YC[:, first].clone()
    position_YK = _sorted_positions(scores_YC.gather(1, position_YB), position_YB, k, memory_M)
    # What was left out is not above the bound, so it is less than the k-th where that is more by a bit that counts;
    # -0 and 0 differ in none of those.
    worst_Y = scores_YC.gather(1, position_YK[:, -1:]).flatten()
    worst_Y = _order(worst_Y, out=torch.empty_like(worst_Y, dtype=torch.int32)).bitwise_and_(~last_bits)
    unsure = (bound_Y >= worst_Y).nonzero().flatten()
    if unsure.numel():
        rows = scores_YC.index_select(0, unsure)
        position_YK[unsure] = _sorted_positions(rows, torch.arange(num_scores), k, memory_M)
    return position_YK


def _sorted_positions(scores_YB: Tensor, position_YB: Tensor, k: int, memory_M: Tensor) -> Tensor:
    """Positions of the k best of these scores."""
    order_YB = torch.add(scores_YB, 0.0)  # which makes 0 of -0
    order_YB = _order(order_YB, out=torch.empty_like(order_YB, dtype=torch.int32)).bitwise_not_()  # descending
    keys_YB = memory_M[: order_YB.numel()].view(order_YB.shape)
    keys_YB.copy_(order_YB).bitwise_left_shift_(32).bitwise_or_(position_YB)
    if keys_YB.shape[1] > REGISTER_KEYS:
        _part(keys_YB, k - 1)
        keys_YB = keys_YB[:, :k]
    _each_row(lambda rows: rows.sort(axis=1), keys_YB)
    return keys_YB[:, :k] & LOWER_HALF


def _order(scores: Tensor, out: Tensor) -> Tensor:
    """int32 in the order of scores, -0 before 0, what is no number last."""
    bits = scores.view(torch.int32)
    torch.bitwise_right_shift(bits, 31, out=out)
    # Less NANS, what is below -inf wraps round to the top. -0 and 0 become an even number and the next, which are
    # one number without their last bits.
    return out.bitwise_and_(MAGNITUDE).bitwise_xor_(bits).sub_(NANS)


def _part(keys_YC: Tensor, place: int) -> None:
    """Put what is less than the key that belongs at a place before it, and what is more after it, in each row."""
    if SORTS == PARTITION:
        _each_row(lambda rows: rows.partition(place, axis=1), keys_YC)
    else:
        _each_row(lambda rows: rows.sort(axis=1), keys_YC)


def _each_row(work: Callable[[np.ndarray], None], keys_YC: Tensor) -> None:
    """Work on rows in place.

    With half as many threads as torch has, whose own wait for their next call on all cores, spinning.
    """
    threads = min(torch.get_num_threads() // 2, keys_YC.numel() // THREAD_SCORES)
    if threads < 2:
        work(keys_YC.numpy())
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, np.array_split(keys_YC.numpy(), threads)))
