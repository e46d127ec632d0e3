"""Kernels run on the device that their tensors are on, whichever is current, and are told how to round."""

import contextlib
from dataclasses import replace

import pytest
import torch
from compile_kernels import KERNELS, launch_lookup, launch_search, launch_steps
from kernel_costs import Shape
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from memlayer_kernels.variants import GATHERS, ONE_WARP, SEARCHES, Collect, Search

SHAPE = Shape("", tokens=300, half_keys=32, width=16, key_width=8, dtype="float32", heads=1, top_k=2, ops=())
BOUNDS = Search(Collect(TOKENS=16, GROUPS=16, COLUMNS=16, RESIDENT=False, WARPS=4, STAGES=2), ONE_WARP)


@pytest.fixture(scope="module")
def launches():
    """Of a launch of every kernel: its name, the tensors whose device was made current for it, and its options."""
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

    with pytest.MonkeyPatch.context() as patched, torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        patched.setattr(torch.cuda, "device_of", device_of)
        for function in (InterpretedFunction, JITFunction):
            patched.setattr(function, "run", noting(function.run))
        launch_lookup(SHAPE, torch.bfloat16, [GATHERS["wide"]])
        launch_steps(SHAPE, torch.bfloat16)
        launch_search(replace(SHAPE, tokens=5), torch.bfloat16, [SEARCHES["sort"], BOUNDS])
    return seen


def test_every_kernel_is_launched_with_the_device_of_its_tensors_current(launches):
    assert {name for name, *_ in launches} == KERNELS
    for name, entered, arguments, _ in launches:
        assert len(entered) == 1, name
        assert entered[0] is arguments[0]


def test_every_kernel_is_told_to_fuse_products_and_sums(launches):
    """Triton 3.10 no longer does so unless told, which changes bits and speed."""
    assert all(options["enable_fp_fusion"] is True for *_, options in launches)
