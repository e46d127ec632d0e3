"""The k best of each of many rows of float32 on CPUs, exactly, by numpy's partition and sort.

torch.topk looks at one number at a time. numpy (2.0 and later) compares 4 or 8 int64 at once, where the processor
can, but returns numbers alone, not where they were. So a number carries its position: the upper half of a key
is the score, the lower half tells equal scores apart.

Shapes: Y rows, C scores of a row, K kept.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MAGNITUDE = 2**31 - 1  # of a float32, as int32: all bits but the sign
LOWER_HALF = 2**32 - 1
NANS = 2**23 - 1  # float32 of each sign that are no numbers; by their bits the negative ones rank below -inf
THREAD_SCORES = 1 << 16  # scores that are worth a thread
REGISTER_KEYS = 256  # sorted by numpy as fast as parted, with AVX-512; with AVX2 a sort takes three times as long


def row_topk(scores_YC: Tensor, k: int, memory_M: Tensor) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, descending, and their positions (int64), both (Y, K).

    Of equal scores, 0 and -0 among them, the first comes first. What is no number counts as more than infinity, so
    that it shows.

    Args:
        scores_YC: contiguous float32; written over.
        k: at most C.
        memory_M: at least Y * C int64 to work in. Fresh memory would take longer than the work.
    """
    shape, size = scores_YC.shape, scores_YC.numel()
    order_YC, keys_YC = scores_YC.view(torch.int32), memory_M[:size].view(shape)
    _change_order(order_YC, memory_M.view(torch.int32)[:size].view(shape))
    ranks_C = torch.arange(shape[1] - 1, -1, -1)  # of equal scores the first has the largest key
    # Less NANS in the upper half, what is below -inf wraps round to the top.
    keys_YC.copy_(order_YC).bitwise_left_shift_(32).add_(ranks_C - (NANS << 32))
    best_YK = torch.from_numpy(_largest(keys_YC.numpy(), k)).flip(1)
    position_YK = (shape[1] - 1) - (best_YK & LOWER_HALF)
    order_YK = best_YK.bitwise_right_shift_(32).int().add_(NANS)
    _change_order(order_YK, torch.empty_like(order_YK))
    return order_YK.view(torch.float32), position_YK


def _change_order(bits: Tensor, signs: Tensor) -> None:
    """In place from the bits of float32 (sign and magnitude) to int32 in the same order (two's complement), or back."""
    torch.bitwise_right_shift(bits, 31, out=signs)
    bits.bitwise_and_(MAGNITUDE).bitwise_xor_(signs).sub_(signs)


def _largest(keys_YC: np.ndarray, k: int) -> np.ndarray:
    """The k largest keys of each row, ascending (Y, K); keys change places."""
    # Half as many threads as torch has, whose own wait for their next call on all cores, spinning.
    threads = min(torch.get_num_threads() // 2, keys_YC.size // THREAD_SCORES)
    if threads < 2:
        return _largest_by_one_thread(keys_YC, k)
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(keys_YC, threads)
        return np.concatenate(list(pool.map(_largest_by_one_thread, parts, [k] * threads)))


def _largest_by_one_thread(keys_YC: np.ndarray, k: int) -> np.ndarray:
    num_scores = keys_YC.shape[1]
    if num_scores <= REGISTER_KEYS and torch.backends.cpu.get_cpu_capability() == "AVX512":
        keys_YC.sort(axis=1)
        return keys_YC[:, num_scores - k :]
    keys_YC.partition(num_scores - k, axis=1)
    best_YK = keys_YC[:, num_scores - k :].copy()
    best_YK.sort(axis=1)
    return best_YK
