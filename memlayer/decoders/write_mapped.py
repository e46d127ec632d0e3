"""Write a model whose tables are mapped: its files are copied and what has changed is written into the copies.

Takes no memory beyond a block, and of a sparse file only what it holds: its holes stay holes.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlayer.decoders.looked_at import rows_written
from memlayer.decoders.mapped import BLOCK_BYTES, WEIGHT_FILES, TensorFile, mapped_tables

INDEX = "model.safetensors.index.json"


def write_mapped(model: PreTrainedModel, folder: str | Path) -> None:
    """What ``save_pretrained`` writes of such a model, in the shards that it was loaded from.

    Raises:
        ValueError: a weight has another shape or dtype than it had in its file.
    """
    folder, state, tables = Path(folder), model.state_dict(), mapped_tables(model)
    source = next(iter(tables.values())).file.path.parent
    files = [TensorFile(path) for path in sorted(source.glob(WEIGHT_FILES))]
    for file in files:
        for name in file.entries:
            _, dtype, shape = file.place(name)
            if name not in state or (state[name].dtype, list(state[name].shape)) != (dtype, shape):
                raise ValueError(
                    f"{name} is not {dtype} of shape {shape} as in {file.path}: what goes with a mapped table is "
                    "written as it was loaded"
                )
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if (source / INDEX).is_file():
        (folder / INDEX).write_bytes((source / INDEX).read_bytes())
    for file in files:
        _copy(file.path, folder / file.path.name)
        with (folder / file.path.name).open("r+b", buffering=0) as copy:
            for name in file.entries:
                begins, _, _ = file.place(name)
                if name not in tables:
                    _write(copy, begins, state[name])
                    continue
                for slots_B, rows_BV in rows_written(tables[name]):
                    for slot, row_V in zip(slots_B.tolist(), rows_BV):
                        _write(copy, begins + slot * row_V.nbytes, row_V)


def _write(file, begins: int, tensor: Tensor) -> None:
    file.seek(begins)
    left = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    while len(left):
        left = left[file.write(left) :]


def _copy(source: Path, target: Path) -> None:
    """Copy a file without its holes, where the system tells where they are."""
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        size = os.fstat(read.fileno()).st_size
        written.truncate(size)
        for begins, ends in _parts_with_data(read, size):
            read.seek(begins)
            written.seek(begins)
            while begins < ends:
                block = memoryview(read.read(min(BLOCK_BYTES, ends - begins)))
                begins += len(block)
                while len(block):
                    block = block[written.write(block) :]


def _parts_with_data(file, size: int) -> Iterator[tuple[int, int]]:
    """Where the file has something, from place to place; all of it where the system does not tell."""
    if not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    ends = 0
    while ends < size:
        try:
            begins = os.lseek(file.fileno(), ends, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        ends = os.lseek(file.fileno(), begins, os.SEEK_HOLE)
        yield begins, ends
