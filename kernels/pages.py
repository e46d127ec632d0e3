"""Memory for large results on CPUs: on huge pages, and used again once what it held is gone.

The C library gives large memory back to the system when it is freed and asks for it again at the next step,
so each step pays for touching it for the first time: 25 ms for 64 MB by 4 KB pages, 2 ms by huge ones, and at
times 80 ms on a virtual machine whose host has to find memory. Here it is kept, as torch keeps memory on GPUs;
what goes beyond KEPT_BYTES is marked as free to take, so that the system has it back when it is short of memory.

So memory that a monitor shows does not fall when gradients are dropped. That is no leak: it serves the next ones,
and what PASSES requests in a row found unfit is given back. release() gives all of it back at once;
MEMLAYER_KEEP_MEMORY=0 in the environment keeps none, and gradients are then ordinary tensors, which can be resized.

What is kept is the only state of a module in this package. No result depends on it.
"""

import contextlib
import mmap
import os
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE_BYTES = 32 << 20  # the C library keeps smaller memory itself
HUGE_PAGE_BYTES = 2 << 20
KEPT_BYTES = 256 << 20  # kept as it is: marking costs 10 us a huge page, 2 % of a lookup and its backward
PASSES = 4  # so that up to five tables of different sizes stepped in turn have memory each
MAY_BE_KEPT = (
    hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE") and os.environ.get("MEMLAYER_KEEP_MEMORY", "1") != "0"
)


@dataclass(eq=False)
class Spare:
    """Pages that nothing holds, and how many requests in a row they did not fit."""

    pages: mmap.mmap
    passed_over: int = 0


_spares: list[Spare] = []


def empty_rows(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, (num_rows, width)."""
    num_bytes = num_rows * width * dtype.itemsize
    if num_bytes <= LARGE_BYTES or not MAY_BE_KEPT:
        return torch.empty(num_rows, width, dtype=dtype)
    pages = _take_spare(num_bytes) or _new_pages(num_bytes)
    # The tensor holds the view, and the view the pages: they are spare when the last tensor of this memory is gone.
    view = memoryview(pages)
    weakref.finalize(view, _keep, pages).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=num_rows * width).view(num_rows, width)


def release() -> None:
    """Give the memory that nothing holds back to the system."""
    _spares.clear()


def _take_spare(num_bytes: int) -> mmap.mmap | None:
    """Spare pages of this size or up to an eighth more, since the number of slots read varies from step to step."""
    for spare in tuple(_spares):
        if num_bytes <= len(spare.pages) <= num_bytes + num_bytes // 8 + HUGE_PAGE_BYTES:
            if _take(spare):
                return spare.pages
        elif spare.passed_over == PASSES:
            _take(spare)
        else:
            spare.passed_over += 1
    return None


def _take(spare: Spare) -> bool:
    """Whether this thread was the first to take it."""
    with contextlib.suppress(ValueError):
        _spares.remove(spare)
        return True
    return False


def _new_pages(num_bytes: int) -> mmap.mmap:
    # Whole huge pages: a part of one would be made of small ones.
    num_pages = -(-num_bytes // HUGE_PAGE_BYTES)
    pages = mmap.mmap(-1, num_pages * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _keep(pages: mmap.mmap) -> None:
    """Make pages spare, if they are few or the system can take them back."""
    with contextlib.suppress(OSError):
        if len(pages) + sum(len(spare.pages) for spare in tuple(_spares)) > KEPT_BYTES:
            pages.madvise(mmap.MADV_FREE)
        _spares.append(Spare(pages))
