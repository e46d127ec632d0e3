"""Kernels run on the device that their tensors are on, whichever is current, and are told how to round."""

import contextlib

import pytest
import torch
from compile_kernels import KERNELS, launch_every_kernel
from kernel_costs import Shape
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from memlayer_kernels.variants import GATHERS, ONE_WARP, SEARCHES, Collect, Search

SHAPE = Shape("", tokens=300, half_keys=32, width=16, key_width=8, dtype="float32", heads=1, top_k=2, ops=())
BOUNDS = Search(Collect(TOKENS=128, GROUPS=16, COLUMNS=16, RESIDENT=False, WARPS=4, STAGES=2), ONE_WARP)
WAYS = (SEARCHES["sort"], BOUNDS), (GATHERS["wide"],)


@pytest.fixture
def launches(monkeypatch):
    """Of every launch: the kernel, the tensors whose device was made current for it, and its options."""
    entered, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    def noting(run):
        def note(self, *arguments, **options):
            seen.append((self.fn.__name__, list(entered), arguments, options))
            return run(self, *arguments, **options)

        return note

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for function in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(function, "run", noting(function.run))
    return seen


def test_every_kernel_is_launched_with_the_device_of_its_tensors_current(launches, device):
    with device:
        launch_every_kernel(SHAPE, torch.bfloat16, *WAYS)
    assert {name for name, *_ in launches} == KERNELS
    for name, entered, arguments, _ in launches:
        assert len(entered) == 1, name
        assert entered[0] is arguments[0]


def test_every_kernel_is_told_to_fuse_products_and_sums(launches):
    """Triton 3.10 no longer does so unless told, which changes bits and speed."""
    launch_every_kernel(SHAPE, torch.bfloat16, *WAYS)
    assert all(options["enable_fp_fusion"] is True for *_, options in launches)
