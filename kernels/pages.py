"""Memory for large results on CPUs: on huge pages, and used again once what it held is gone.

The C library gives large memory back to the system when it is freed and asks for it again at the next step,
so each step pays for touching it for the first time: 25 ms for 64 MB by 4 KB pages, 2 ms by huge ones, and at
times 80 ms on a virtual machine whose host has to find memory. Here it is kept, as torch keeps memory on GPUs;
what goes beyond KEPT_BYTES is marked as free to take, so that the system has it back when it is short of memory.

What is kept is the only state of a module in this package. No result depends on it, it is never more than was
in use at one time, and a request that none of it fits gives all of it back.
"""

import contextlib
import mmap
import weakref

import torch
from torch import Tensor

LARGE_BYTES = 32 << 20  # the C library keeps smaller memory itself
HUGE_PAGE_BYTES = 2 << 20
KEPT_BYTES = 256 << 20  # kept as it is: marking costs 10 us a huge page, 2 % of a lookup and its backward
MAY_BE_KEPT = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")

_spare_pages: list[mmap.mmap] = []


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


def _take_spare(num_bytes: int) -> mmap.mmap | None:
    """Spare pages of this size or up to an eighth more, since the number of slots read varies from step to step."""
    for pages in tuple(_spare_pages):
        if num_bytes <= len(pages) <= num_bytes + num_bytes // 8 + HUGE_PAGE_BYTES:
            with contextlib.suppress(ValueError):  # another thread was faster
                _spare_pages.remove(pages)
                return pages
    _spare_pages.clear()
    return None


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
        if len(pages) + sum(map(len, _spare_pages)) > KEPT_BYTES:
            pages.madvise(mmap.MADV_FREE)
        _spare_pages.append(pages)
