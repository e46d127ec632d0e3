"""How every Triton kernel of this package is launched, and the sizes that several of them share.

Triton launches on the device that is current, which need not be the one that the tensors are on: a model spread over
several GPUs has tables on each. Results follow from whether products and sums are fused, which triton decides
differently from version to version unless it is told.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 1024  # per program: 32 accumulators per thread at 4 rows and 4 warps
ROWS = 4  # rows of a table that are loaded together


def launch(kernel, grid: tuple[int, ...], first: Tensor, *arguments, **options) -> None:
    """Run a kernel on the device of its first argument; others may be in pinned memory of the host."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **options, enable_fp_fusion=True)


def column_tile(width: int) -> int:
    """Columns per program: a power of two, of which a mask hides what is past the width."""
    return min(max(16, triton.next_power_of_2(width)), MAX_COLUMNS)


def row_stages(dtype: torch.dtype) -> int:
    """Groups of rows meant to be under way at a time, 32 KB at most; more than one of float64 spill registers."""
    return 1 if dtype.itemsize == 8 else 3


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that sums over this one are taken in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
