"""What a checkpoint whose tables are mapped holds, found by reading it once: its SHA-256, and whether it is finite.

Reading 32 GB takes minutes and every job asks, so the answer is kept beside the weights, with the size and the time of
the last write of each of their files: a file that was written since is read again. A folder that cannot be written to
is read once a process.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from memlayer.decoders.fingerprint import fingerprint, state_fingerprint
from memlayer.decoders.mapped import WEIGHT_FILES, MappedTable, mapped_tables
from memlayer.files import write_file

KEPT_FILE = ".looked_at.json"


@dataclass(frozen=True)
class LookedAt:
    """What a checkpoint's files hold.

    Attributes:
        state_sha256: ``fingerprint.state_fingerprint`` of the model as it was loaded.
        finite: whether no number of its mapped tables is nan or infinite.
        files: by the file's name its size in bytes, and when it was last written, in nanoseconds.
    """

    state_sha256: str
    finite: bool
    files: dict[str, list[int]]


def checkpoint_fingerprint(model: nn.Module) -> str:
    """``state_fingerprint`` of a model just loaded; where tables are mapped, as it was when they were read."""
    return look_at(model).state_sha256 if mapped_tables(model) else state_fingerprint(model)


def tables_are_finite(model: nn.Module) -> bool:
    """Whether no number of a mapped table is nan or infinite, be it in the file or written since.

    Of a model without such a table the answer is yes.
    """
    tables = mapped_tables(model)
    if tables and not look_at(model).finite:
        return False
    return all(bool(part.isfinite().all()) for table in tables.values() for _, part in rows_written(table))


def rows_written(table: MappedTable) -> Iterator[tuple[Tensor, Tensor]]:
    """Slots (B,) and rows (B, V) of those that may have been written since the table was mapped, in blocks."""
    for slots_B in table.slots_written().split(1 << 14):
        yield slots_B, table.weight.detach()[slots_B]


def look_at(model: nn.Module) -> LookedAt:
    """What is known of the files of a model with mapped tables; they are read where nobody has done so since a write.

    The other weights are taken as the model has them, so the first call has to come before they change.
    """
    tables = mapped_tables(model)
    folder = next(iter(tables.values())).file.path.parent
    files = _files(folder)
    first = next(iter(tables.values()))
    for known in (first.looked_at, _read(folder / KEPT_FILE)):
        if known is not None and known.files == files:
            first.looked_at = known
            return known
    finite = True

    def numbers(name: str, tensor: Tensor) -> Iterator[Tensor]:
        nonlocal finite
        if name not in tables:
            yield tensor
            return
        told = {"desc": f"reading {name} once", "unit": "B", "unit_scale": True, "delay": 2}
        with tqdm(total=tensor.nbytes, **told) as bar:
            for block in tables[name].file.blocks(name):
                finite = finite and _is_finite(block)
                yield block
                bar.update(block.nbytes)

    found = LookedAt(fingerprint(model.state_dict(), numbers), finite, files)
    first.looked_at = found
    with contextlib.suppress(OSError):
        write_file(folder / KEPT_FILE, json.dumps(asdict(found), indent=2) + "\n")
    return found


def _is_finite(block: Tensor) -> bool:
    """Whether all its numbers are; a sum of them, thirty times as quick, tells unless it leaves the dtype's range."""
    return bool(block.sum().isfinite()) or bool(block.isfinite().all())


def _files(folder: Path) -> dict[str, list[int]]:
    told = {path.name: path.stat() for path in sorted(folder.glob(WEIGHT_FILES))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in told.items()}


def _read(path: Path) -> LookedAt | None:
    try:
        return LookedAt(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or not ours
        return None
