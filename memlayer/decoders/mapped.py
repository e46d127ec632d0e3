"""A table larger than memory: mapped from its safetensors file, with what is written laid over it in memory.

The mapping is private: reads come from the file's pages, which the system keeps in memory while there is room and drops
when there is not; the first write to a page gives this process a copy of it. So a learning run needs memory for what
it writes and never changes the file, and none of what reads or writes rows has to know. Pages are 4 KB, a row of 1,024
float32: a row that straddles two costs 8.

Trades time at the first read of a row, 4 KB from the disk each, for memory. Left out: what looks at a whole table or
makes one as large (training all values, another dtype, copies of the model); each is refused in a sentence. While a
model is mapped its file must stay as it is: a process whose file is cut short is ended by the system.
"""

import errno
import json
import mmap
import re
import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memlayer.layers.memory import MemoryTable
from memlayer_kernels.ops import lookup_over_the_bus

WEIGHT_FILES = "model*.safetensors"  # of a checkpoint, one or its shards
TABLE = re.compile(r"(^|\.)memory\.\d+\.weight$")  # where structure.insert_memory puts a table
# Without it the system refuses a mapping that it may write to and that is larger than its memory; Python names it not
# before 3.13. The numbers are those of x86 and Arm.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", {"linux": 0x4000, "darwin": 0x40}.get(sys.platform, 0))
PAGEMAP = Path("/proc/self/pagemap")  # of Linux: 8 bytes a page, of which the highest bits say what it is
PRESENT, SWAPPED, OF_A_FILE = (1 << np.uint64(bit) for bit in (63, 62, 61))
BLOCK_BYTES = 64 << 20
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}


class TensorFile:
    """A safetensors file whose tensors are read or mapped one by one; safetensors' own maps all of it, with reserve.

    Args:
        path: the file.

    Raises:
        ValueError: it is damaged, cut short, or holds a dtype that is not known here.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self.data_begins = 8 + size
            try:
                entries = json.loads(file.read(size))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: its header is no JSON") from error
        entries.pop("__metadata__", None)
        self.entries: dict[str, dict] = entries
        ends = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if missing := self.data_begins + ends - path.stat().st_size:
            raise ValueError(
                f"{path} is damaged: {abs(missing):,} bytes are {'missing' if missing > 0 else 'too many'}"
            )
        if unknown := sorted({entry["dtype"] for entry in entries.values()} - DTYPES.keys()):
            raise ValueError(f"{path} holds tensors of dtype {unknown[0]}, known are {', '.join(DTYPES)}")

    def place(self, name: str) -> tuple[int, torch.dtype, list[int]]:
        """Where in the file a tensor begins, its dtype and its shape."""
        entry = self.entries[name]
        return self.data_begins + entry["data_offsets"][0], DTYPES[entry["dtype"]], entry["shape"]

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own."""
        begins, dtype, shape = self.place(name)
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            with self.path.open("rb") as file:
                file.seek(begins)
                file.readinto(tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def map(self, name: str) -> Tensor:
        """The tensor over a private mapping of the file; what is written into it stays in this process.

        Raises:
            ValueError: the system refuses a mapping of that size.
        """
        begins, dtype, shape = self.place(name)
        length = begins + prod(shape) * dtype.itemsize
        with self.path.open("rb") as file:
            try:
                pages = mmap.mmap(
                    file.fileno(),
                    length,
                    flags=mmap.MAP_PRIVATE | NO_RESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                raise ValueError(
                    f"{self.path} cannot be mapped, {length:,} bytes: the system promises no more memory than it has "
                    "(vm.overcommit_memory=2); 0 or 1 would do"
                ) from error
        if hasattr(mmap, "MADV_RANDOM"):
            pages.madvise(mmap.MADV_RANDOM)  # or each row read brings its neighbours from the disk
        return torch.frombuffer(pages, dtype=dtype, count=prod(shape), offset=begins).view(shape)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor's numbers as the file has them, flat, a block at a time in the same memory."""
        begins, dtype, shape = self.place(name)
        left = prod(shape)
        block = torch.empty(min(left, BLOCK_BYTES // dtype.itemsize), dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(begins)
            while left:
                part = block[:left]
                _fill(file, memoryview(part.view(torch.uint8).numpy()))
                yield part
                left -= len(part)


def _fill(file, view: memoryview) -> None:
    while len(view):
        read = file.readinto(view)
        if not read:
            raise ValueError(f"{file.name} was cut short while it was read")
        view = view[read:]


class MappedTable(MemoryTable):
    """A table whose values lie in a file; made of a ``MemoryTable`` by ``lay_over``.

    Its values stay on the host in their dtype, wherever the rest of the model goes. When that goes to a GPU and the
    host has the memory, they are copied into pinned memory, of which the GPU fetches the rows that it reads by itself;
    else, and while a finetuner writes into the table, the CPU reads them. No GPU has run this yet.

    Attributes:
        file: where the values come from, and ``name``, what they are called there.
        looked_at: what is known of the whole file, see ``memlayer.decoders.looked_at``.
    """

    file: TensorFile
    name: str
    looked_at: object = None

    def _apply(self, fn, recurse=True):
        asked = fn(self.weight.detach()[:0].clone())
        if asked.dtype != self.weight.dtype:
            raise ValueError(
                f"table {self.name!r} is mapped from {self.file.path} in {self.weight.dtype}: it cannot be made "
                f"{asked.dtype}"
            )
        if asked.is_cuda and not self.weight.is_pinned() and (available_bytes() or 0) > 1.1 * self.weight.nbytes:
            self._pin()
        return self

    def _pin(self) -> None:
        """Copy the values into pinned memory; torch's own would be of a power of two, of up to twice the size."""
        pinned = torch.empty_like(self.weight, requires_grad=False)
        for here, there in zip(self.weight.detach().split(1 << 16), pinned.split(1 << 16)):
            there.copy_(here)
        if error := int(torch.cuda.cudart().cudaHostRegister(pinned.data_ptr(), pinned.nbytes, 0)):
            raise ValueError(f"table {self.name!r}, {pinned.nbytes:,} bytes, cannot be pinned: CUDA error {error}")
        self.weight.data = pinned

    def forward(self, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sums of values, shape (T, V), on the device of the slots where that can fetch rows, else the CPU."""
        if slots_TK.is_cuda and self.rows is None and self.weight.is_pinned():
            return lookup_over_the_bus(self.weight, slots_TK, weights_TK)
        return super().forward(slots_TK, weights_TK)

    def __deepcopy__(self, memo):
        raise ValueError(f"table {self.name!r} is mapped from {self.file.path}: a copy would be all of it in memory")

    def slots_written(self) -> Tensor:
        """The slots that lie on pages of this process's own, ascending: those written, and what shares their pages.

        All slots where the system does not tell.
        """
        weight, num_slots = self.weight.detach(), self.num_embeddings
        if not PAGEMAP.exists():
            return torch.arange(num_slots)
        first, row_bytes = weight.data_ptr(), weight[0].nbytes
        page_bytes = mmap.PAGESIZE
        first_page, last_page = first // page_bytes, (first + weight.nbytes - 1) // page_bytes
        found = [torch.empty(0, dtype=torch.int64)]
        with PAGEMAP.open("rb", buffering=0) as file:
            for page in range(first_page, last_page + 1, BLOCK_BYTES // 8):
                file.seek(page * 8)
                number = min(BLOCK_BYTES // 8, last_page + 1 - page)
                of_pages = np.frombuffer(_read(file, number * 8), np.uint64)
                own = ((of_pages & (PRESENT | SWAPPED)) != 0) & ((of_pages & OF_A_FILE) == 0)
                for each in (np.flatnonzero(own) + page).tolist():
                    begins, ends = each * page_bytes - first, (each + 1) * page_bytes - first
                    found.append(torch.arange(max(0, begins // row_bytes), min(num_slots, -(-ends // row_bytes))))
        return torch.cat(found).unique()


def _read(file, number: int) -> bytes:
    parts = bytearray()
    while len(parts) < number:
        parts += file.read(number - len(parts))
    return bytes(parts)


def mapped_tables(model: nn.Module) -> dict[str, MappedTable]:
    """The tables of a model that are mapped, by their parameter's name in its file."""
    return {table.name: table for table in model.modules() if isinstance(table, MappedTable)}


def refuse_mapped(model: nn.Module, what: str) -> None:
    """Refuse what cannot be done to a table that is mapped.

    Raises:
        ValueError: a table is.
    """
    for name, table in mapped_tables(model).items():
        raise ValueError(f"{what}: table {name!r} is mapped from {table.file.path}, as it is larger than memory")


def read_or_map(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, TensorFile]]:
    """All tensors of a checkpoint, its tables mapped, and of each table the file that it is in."""
    tensors, tables = {}, {}
    for path in files:
        file = TensorFile(path)
        for name in file.entries:
            is_table = TABLE.search(name) is not None
            tensors[name] = file.map(name) if is_table else file.read(name)
            if is_table:
                tables[name] = file
    return tensors, tables


def lay_over(model: nn.Module, tensors: Mapping[str, Tensor], tables: Mapping[str, TensorFile]) -> None:
    """Make the tables of a model that was loaded from these tensors mapped ones, in place."""
    for name, file in tables.items():
        table = model.get_submodule(name.removesuffix(".weight"))
        assert table.weight.data_ptr() == tensors[name].data_ptr(), f"{name} was copied on loading"
        table.__class__ = MappedTable
        table.weight.requires_grad_(False)  # a gradient of it would be as large
        table.file, table.name = file, name
    # Or DistributedDataParallel would copy rank 0's table over the pages of the others, which read the same file.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(tables))


def is_larger_than_memory(files: list[Path]) -> bool:
    """Whether a checkpoint would take more than nine tenths of the memory that is free, or can be made so."""
    free = available_bytes()
    return free is not None and sum(path.stat().st_size for path in files) > 0.9 * free


def available_bytes() -> int | None:
    """Memory that a process may take without anything being swapped; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (told := limit.read_text(encoding="utf-8").strip()).isdigit():
        free = min(free, int(told))
    return free
