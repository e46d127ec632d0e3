"""Triton runs under its interpreter where there is no GPU, and every torch.empty is filled with NaN first."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Triton decides when it is imported, so this stands before any import of it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# For compile_kernels.py, which has the shapes of the benchmarks.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]


@pytest.fixture
def device():
    """Where Triton kernels are tested: a GPU if there is one, else the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """An output that is not written in full shows as NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _dot_of_bfloat16(monkeypatch):
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    if torch.cuda.is_available():
        return
    import numpy as np
    import triton
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(tensor):
        if tensor.dtype.scalar != triton.language.bfloat16:
            return tensor
        return TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
