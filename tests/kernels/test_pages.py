"""Large results get memory that is used again when, and only when, nothing holds it any more."""

import gc
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from memlayer_kernels import cpu, ops, pages

pytestmark = pytest.mark.skipif(not pages.MAY_BE_KEPT, reason="this system cannot take marked pages back")
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(pages, "_spares", [])
    monkeypatch.setattr(pages, "LARGE_BYTES", 0)


def spare_megabytes() -> list[int]:
    return sorted(len(spare.pages) // MEGABYTE for spare in pages._spares)


def rows_of(megabytes: int) -> torch.Tensor:
    return pages.empty_rows(megabytes * 1024, 256, torch.float32)


def test_memory_is_used_again_once_the_last_view_of_it_is_gone():
    rows = rows_of(4)
    rows.fill_(1.5)
    address, view = rows.data_ptr(), rows[10:20].t()
    del rows
    other = rows_of(4)
    other.fill_(2.5)
    assert other.data_ptr() != address
    assert (view == 1.5).all()
    del view
    assert rows_of(4).data_ptr() == address


def test_a_gradient_that_is_dropped_gives_its_memory_to_the_next_one():
    values = torch.randn(4096, 256, requires_grad=True)
    slots, weights = torch.randint(4096, (40, 6)), torch.rand(40, 6)
    gradients = [torch.autograd.grad(ops.memory_lookup(values, slots, weights).sum(), values)[0] for _ in range(2)]
    addresses = {gradient.data_ptr() for gradient in gradients}
    assert len(addresses) == 2
    expected = gradients[0].clone()
    del gradients
    for _ in range(3):
        (gradient,) = torch.autograd.grad(ops.memory_lookup(values, slots, weights).sum(), values)
        assert gradient.data_ptr() in addresses
        assert torch.equal(gradient, expected)
        gradient.fill_(torch.nan)  # whatever it holds when it is dropped
        del gradient


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_large_gradient_is_written_in_full_whatever_its_memory_held(poison, sparse_grad, monkeypatch):
    """More than 32 MB, which MKL writes in place: no other memory is filled with NaN before such tests."""
    monkeypatch.undo()
    assert torch.backends.mkl.is_available()
    values = torch.randn(36000, 256, requires_grad=True)
    slots, weights = torch.randint(36000, (4000, 10)), torch.rand(4000, 10)
    slots[:3600] = torch.arange(36000).view(3600, 10)  # a sparse gradient is as large

    def gradient():
        reads = ops.memory_lookup(values, slots, weights, sparse_grad=sparse_grad)
        (grad,) = torch.autograd.grad(reads.sum(), values)
        return grad._values() if sparse_grad else grad

    first = gradient()
    assert first.nbytes > max(pages.LARGE_BYTES, cpu.IN_PLACE_BYTES)
    expected, address = first.clone(), first.data_ptr()
    first.fill_(poison)
    del first
    second = gradient()
    assert second.data_ptr() == address
    assert torch.equal(second, expected)


@pytest.mark.parametrize(("megabytes", "served"), [(64, True), (60, True), (40, False), (66, False)])
def test_memory_up_to_an_eighth_larger_serves(megabytes, served):
    rows_of(64)
    assert spare_megabytes() == [64]
    rows = rows_of(megabytes)
    assert spare_megabytes() == ([] if served else [64])
    del rows
    assert spare_megabytes() == ([64] if served else sorted([64, megabytes]))


def test_tables_of_different_sizes_that_are_stepped_in_turn_keep_their_memory():
    sizes = (4, 8, 16, 32, 64)
    addresses = [rows_of(megabytes).data_ptr() for megabytes in sizes]
    for _ in range(3):
        assert [rows_of(megabytes).data_ptr() for megabytes in sizes] == addresses


def test_what_no_request_fits_any_more_is_given_back():
    rows_of(64)
    for _ in range(pages.PASSES):
        rows_of(2)
        pages._spares[:] = [spare for spare in pages._spares if len(spare.pages) > 2 * MEGABYTE]
        assert spare_megabytes() == [64]
    rows = rows_of(2)
    assert spare_megabytes() == []
    del rows


def test_release_gives_back_what_nothing_holds():
    rows = rows_of(4).fill_(1)
    rows_of(8)
    pages.release()
    assert spare_megabytes() == []
    assert (rows == 1).all()


def test_the_environment_can_ask_for_ordinary_memory():
    """Which can be resized; memory that is kept cannot."""
    program = "from memlayer_kernels import pages; import torch\n"
    program += "pages.empty_rows(36000, 256, torch.float32).resize_(40000, 256); print(pages.MAY_BE_KEPT)"
    for setting, printed in (("0", "False"), ("1", "not resizable")):
        environment = os.environ | {"MEMLAYER_KEEP_MEMORY": setting}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert printed in done.stdout + done.stderr


def test_steps_that_are_alike_keep_what_one_of_them_uses():
    for _ in range(5):
        held = [rows_of(megabytes) for megabytes in (4, 4, 8)]
        del held
        assert spare_megabytes() == [4, 4, 8]


def test_what_goes_beyond_the_bound_is_marked_as_free_to_take(monkeypatch):
    monkeypatch.setattr(pages, "KEPT_BYTES", 6 * MEGABYTE)
    held = [rows_of(4).fill_(1), rows_of(4).fill_(1)]
    before = lazily_free()
    del held
    assert spare_megabytes() == [4, 4]
    assert lazily_free() - before == 4 * MEGABYTE


def lazily_free() -> int:
    """Bytes of this process that the system may take."""
    gc.collect()
    told = Path("/proc/self/smaps_rollup")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree:")]
    return found[0] if found else pytest.skip("the system does not tell")


class Refusing(mmap.mmap):
    """Memory of a system that has no huge pages and takes nothing back."""

    def madvise(self, *arguments):
        raise OSError("Invalid argument")


def test_a_system_that_takes_no_advice_gets_ordinary_memory_that_is_not_kept(monkeypatch):
    monkeypatch.setattr(pages.mmap, "mmap", Refusing)
    monkeypatch.setattr(pages, "KEPT_BYTES", 0)
    rows = rows_of(4).fill_(1)
    assert rows.sum() == MEGABYTE
    del rows
    assert spare_megabytes() == []


def test_threads_never_share_memory():
    wrong = []

    def work(number: int) -> None:
        for turn in range(200):
            rows = rows_of(2).fill_(number)
            if turn % 3:
                rows = rows[1:]
            if not (rows == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(pages._spares) <= 6 * 2  # a thread holds its last rows until it has the next
