"""Which of numpy's sorts compare several integers at a time on this processor: what the search on CPUs is made of.

On x86 numpy has such loops from AVX2 on, for sort and partition. On ARM (ASIMD) and up to numpy 2.4 it has them for
sort alone, and a sort by several is faster than a partition one by one. Without either, torch.topk is as fast as numpy
or faster. Source: numpy/_core/src/npysort, quicksort.cpp and selection.cpp.
"""

from collections.abc import Mapping

from numpy._core._multiarray_umath import __cpu_features__

PARTITION, SORT, NONE = "partition and sort", "sort", "none"


def vector_sorts(features: Mapping[str, bool] = __cpu_features__) -> str:
    """PARTITION where numpy has both, SORT where it has that alone, else NONE.

    Args:
        features: what the processor can do, by numpy's names, less what NPY_DISABLE_CPU_FEATURES takes away. numpy 2.4
            has levels of x86 for the names of its loops, the versions before it instruction sets.
    """
    levels = ("X86_V3", "X86_V4") if "X86_V3" in features else ("AVX2", "AVX512_SKX")
    if any(features.get(level) for level in levels):
        return PARTITION
    return SORT if features.get("ASIMD") else NONE
