"""The way to search on CPUs follows from what numpy says of the processor, in every numpy that is allowed."""

import os
import subprocess
import sys

import pytest
import torch

from memlayer_kernels import product_key_cpu, topk_cpu
from memlayer_kernels.vector_sorts import NONE, PARTITION, SORT, vector_sorts


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"AVX2": True, "X86_V3": True, "X86_V4": False, "ASIMD": False}, PARTITION),  # numpy 2.4
        ({"AVX2": True, "X86_V3": True, "X86_V4": True, "ASIMD": False}, PARTITION),
        ({"AVX2": True, "X86_V3": False, "X86_V4": False, "ASIMD": False}, NONE),  # taken away: AVX2 names no loop
        ({"AVX2": True, "AVX512_SKX": False, "ASIMD": False}, PARTITION),  # before
        ({"AVX2": False, "AVX512_SKX": False, "ASIMD": False}, NONE),
        ({"AVX2": False, "X86_V3": False, "X86_V4": False, "NEON": True, "ASIMD": True}, SORT),
        ({"VSX2": True}, NONE),
    ],
)
def test_by_feature(features, expected):
    assert vector_sorts(features) == expected


def test_a_search_takes_torch_where_numpy_has_no_vector_sorts(monkeypatch):
    # Whole numbers: a matrix product of another size may round others otherwise.
    queries, half_keys = torch.randn(40, 4, 2, 8).round(), torch.randn(4, 2, 64, 8).round()
    assert product_key_cpu.FEW_SCORES < 40 * 4 * 2 * 64
    parted = []
    row_topk = product_key_cpu.row_topk
    monkeypatch.setattr(product_key_cpu, "row_topk", lambda *given: parted.append(1) or row_topk(*given))
    found = {}
    for sorts in (PARTITION, SORT, NONE):
        monkeypatch.setattr(topk_cpu, "SORTS", sorts)
        before = len(parted)
        found[sorts] = product_key_cpu.search(queries, half_keys, 8)
        assert (len(parted) > before) == (sorts != NONE)
    for scores, slots in found.values():
        assert torch.equal(scores, found[NONE][0])
        assert torch.equal(slots, found[NONE][1])


@pytest.mark.skipif(vector_sorts() != PARTITION, reason="for x86 with AVX2 or more")
def test_what_is_taken_away_from_numpy_is_not_counted_on():
    program = "from memlayer_kernels import topk_cpu; print(topk_cpu.SORTS)"
    levels = {"NPY_DISABLE_CPU_FEATURES": "X86_V3,X86_V4,AVX512_ICL,AVX512_SPR,AVX2,AVX512_SKX"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | levels, capture_output=True, text=True)
    assert done.stdout.strip() == NONE, done.stderr
