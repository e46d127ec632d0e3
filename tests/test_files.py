"""Files are written whole or not at all, and what goes wrong with one names it."""

import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memlayer.files import NotWritten, reading, write_file, writing


@contextmanager
def no_file_larger_than(number):
    """A full disk, as a process sees one that may write no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one_and_no_other(tmp_path):
    path = tmp_path / "results.json"
    write_file(path, "łódź")
    with no_file_larger_than(1000), pytest.raises(NotWritten, match=r"cannot write .*results\.json: File too large"):
        write_file(path, bytes(2000))
    assert path.read_text(encoding="utf-8") == "łódź"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_libraries_that_cannot_write_are_told_in_one_sentence(tmp_path, save):
    path, tensors = tmp_path / "weights", {"a": torch.zeros(10_000)}
    with no_file_larger_than(1000), pytest.raises(NotWritten, match=f"^cannot write {path}: [^\n]+$"), writing(path):
        save(tensors, path)


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "run git lfs pull"),
        (b"\x08", "fetch or make it again"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, content, cure):
    path = tmp_path / "counts.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=cure) as refused, reading(path), safe_open(path, framework="pt"):
        pass
    assert str(refused.value).startswith(f"{path} is damaged")


def test_errors_that_are_not_about_files_pass_unchanged(tmp_path):
    for context in (reading, writing):
        with pytest.raises(RuntimeError, match=r"^shapes differ$"), context(tmp_path / "x"):
            raise RuntimeError("shapes differ")
