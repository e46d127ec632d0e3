"""The ways that the GPU kernels may go, and which of them they go: what counting instructions cannot decide.

Every way of an operation gives the same numbers, and is tested to. benchmarks/kernel_variants.py times them all on
the card that is there and prints the lines of CHOSEN that would be faster; this table is changed by hand, so that a
commit says which kernels a version runs. Nothing is tuned while a program runs: bits would follow the clock.

A launcher takes a way as an argument; without one it goes the chosen way.
"""

from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Collect(NamedTuple):
    """Sizes of half_bounds.py, all powers of two: a tile of tokens, groups of half-keys, columns multiplied at a time.

    Resident, queries stay on the chip, and COLUMNS is the widest half-key for which they do.
    """

    TOKENS: int
    GROUPS: int
    COLUMNS: int
    RESIDENT: bool
    WARPS: int
    STAGES: int


class Pairs(NamedTuple):
    """Candidate pairs that a program of pair_topk_kernel sorts with one warp, and its warps."""

    CANDIDATES: int
    WARPS: int


class Search(NamedTuple):
    """How the k best of each half are found, by sorting everything if not by bounds, and how those of the pairs."""

    collect: Collect | None
    pairs: Pairs


class Gather(NamedTuple):
    """Columns of a program of gather_kernel, its warps, and groups of rows under way."""

    COLUMNS: int
    WARPS: int
    STAGES: int


ONE_WARP, FOUR_WARPS = Pairs(256, 1), Pairs(1024, 4)

SEARCHES = MappingProxyType(
    {
        "sort": Search(None, ONE_WARP),
        "sort, pairs by four warps": Search(None, FOUR_WARPS),
        "collect": Search(Collect(64, 128, 64, False, 8, 2), ONE_WARP),
        "collect 128 x 128": Search(Collect(128, 128, 32, False, 8, 3), ONE_WARP),
        "collect, 64 groups": Search(Collect(128, 64, 64, False, 8, 2), ONE_WARP),
        "collect, 16 tokens": Search(Collect(16, 128, 64, False, 4, 3), ONE_WARP),
        "resident": Search(Collect(128, 128, 256, True, 8, 2), ONE_WARP),
        "resident 64 x 128": Search(Collect(64, 128, 256, True, 4, 2), ONE_WARP),
        "resident 128 x 64": Search(Collect(128, 64, 256, True, 8, 2), ONE_WARP),
        "resident 64 x 64": Search(Collect(64, 64, 256, True, 4, 2), ONE_WARP),
    }
)
GATHERS = MappingProxyType(
    {
        "wide": Gather(1024, 4, 3),
        "wide, 2 stages": Gather(1024, 4, 2),
        "half, 2 warps": Gather(512, 2, 4),
        "narrow": Gather(256, 1, 4),
        "narrow, 3 stages": Gather(256, 1, 3),
    }
)
# None stands for every GPU that is not named by its compute capability.
CHOSEN = MappingProxyType(
    {
        ("search", None): "collect",
        ("search", (9, 0)): "resident",
        ("gather", None): "wide",
        ("gather few tokens", None): "narrow",
    }
)
FEW_PROGRAMS = 132  # a gather of fewer programs leaves multiprocessors of an H100 idle


def chosen(operation: str, tensor: Tensor) -> str:
    """The name of the way that an operation goes on the device of a tensor."""
    machine = None
    if tensor.is_cuda and torch.version.hip is None:
        machine = torch.cuda.get_device_capability(tensor.device)
    return CHOSEN.get((operation, machine), CHOSEN[operation, None])
