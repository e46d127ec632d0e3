"""Large results get memory that is used again when, and only when, nothing holds it any more."""

import gc
import mmap
import threading
from pathlib import Path

import pytest
import torch

from memlayer_kernels import ops, pages

pytestmark = pytest.mark.skipif(not pages.MAY_BE_KEPT, reason="this system cannot take marked pages back")
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(pages, "_spare_pages", [])
    monkeypatch.setattr(pages, "LARGE_BYTES", 0)


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


@pytest.mark.parametrize(("megabytes", "taken"), [(64, 64), (60, 64), (40, 40), (66, 66)])
def test_memory_up_to_an_eighth_larger_serves_and_any_other_is_given_back(megabytes, taken):
    rows_of(64)
    assert [len(spare) for spare in pages._spare_pages] == [64 * MEGABYTE]
    rows = rows_of(megabytes)
    assert pages._spare_pages == []
    del rows
    assert [len(spare) for spare in pages._spare_pages] == [taken * MEGABYTE]


def test_no_more_is_kept_than_was_in_use_at_one_time():
    for _ in range(5):
        held = [rows_of(megabytes) for megabytes in (4, 4, 8)]
        del held
        assert sorted(map(len, pages._spare_pages)) == [4 * MEGABYTE, 4 * MEGABYTE, 8 * MEGABYTE]


def test_what_goes_beyond_the_bound_is_marked_as_free_to_take(monkeypatch):
    monkeypatch.setattr(pages, "KEPT_BYTES", 6 * MEGABYTE)
    held = [rows_of(4).fill_(1), rows_of(4).fill_(1)]
    before = lazily_free()
    del held
    assert len(pages._spare_pages) == 2
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
    assert pages._spare_pages == []


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
    assert len(pages._spare_pages) <= 6 * 2  # a thread holds its last rows until it has the next
