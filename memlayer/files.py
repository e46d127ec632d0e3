"""Write a file whole or not at all, and name the file in whatever goes wrong with one.

Libraries say "No space left on device", "header too large" or "file write failed" and not of which file, each with an
error class of its own. ``reading`` and ``writing`` turn these into one sentence with the file's name and what to do.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# How torch.save and torch.load, which raise RuntimeError for anything, speak of files.
TORCH_FILE_WORDS = ("PytorchStream", "inline_container", "Parent directory")
LFS_POINTER = b"version https://git-lfs"


class NotWritten(OSError):
    """A file or a folder could not be written; the sentence says which, why, and what to do."""


def write_file(path: str | Path, content: str | bytes) -> None:
    """Put the content at the path in one step: a crash leaves the old file or the new one, a failure no third.

    Raises:
        NotWritten: it cannot be written.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or the rename may reach the disk before the data
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A context in which libraries write ``path``, a file or a folder.

    Raises:
        NotWritten: they could not.
    """
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_about_a_file(error):
            raise
        raise NotWritten(f"cannot write {getattr(error, 'filename', None) or path}: {reason(error)}") from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """A context in which libraries read the file ``path``.

    Raises:
        ValueError: it is damaged; says what to do.
    """
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError) as error:
        if isinstance(error, RuntimeError) and not _is_about_a_file(error):
            raise
        with open(path, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        cure = "it is a Git LFS pointer: run git lfs pull" if pointer else "fetch or make it again"
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): {cure}") from error


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_about_a_file(error: Exception) -> bool:
    return not isinstance(error, RuntimeError) or any(words in str(error) for words in TORCH_FILE_WORDS)


def reason(error: Exception) -> str:
    """Why a library could not write, and what to do about a full disk."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)
    if full:
        return "no space is left on the device; make room and run the same command again"
    if "inline_container" in str(error):  # torch.save says of any failure where in its code it was
        return "torch could not write all of it, as on a full disk; make room and run the same command again"
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
