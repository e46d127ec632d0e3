"""python benchmarks/bytes_sent.py --processes 2

What a process sends for each of its tokens when a table is split by columns, counted at the exchanges themselves, and
how many bytes rows would take. Shapes are those of a large memory (128 reads a token, values in bfloat16); the table is
small, since its slots do not change what is sent. Counts, not times: over gloo, on one machine.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from report import finish
from torch import distributed as dist
from torch import multiprocessing, nn

from memlayer.decoders.split import average_table_gradients, split_tables
from memlayer.layers.memory import MemoryTable
from memlayer.layers.ranks import Ranks

BACKWARD, FORWARD, ROWS = "backward_bytes_per_token", "forward_bytes_per_token", "gradient_bytes_per_token"


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        multiprocessing.spawn(one_process, (meeting, options), nprocs=options.processes)


def one_process(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """One of the processes; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=options.processes)
    figures = {**vars(options), **by_columns(options), ROWS: by_rows(options)}
    if not rank:
        print(f"split by columns: {figures[FORWARD]:,.0f} bytes a token forward, {figures[BACKWARD]:,.0f} backward")
        print(f"whole tables: the rows of the gradient take {figures[ROWS]:,.0f} bytes a token, once a step")
        finish("bytes_sent", figures)
    dist.destroy_process_group()


def by_columns(options: argparse.Namespace) -> dict[str, float]:
    """Bytes per token of one lookup in a table that all processes share."""
    model, slots_TK, weights_TK = _problem(options)
    split_tables(model, dist.get_world_size())
    ranks = model["memory"].columns.ranks
    read_TV = model["memory"](slots_TK, weights_TK)
    forward = ranks.bytes_sent
    read_TV.sum().backward()
    return {FORWARD: forward / options.tokens, BACKWARD: (ranks.bytes_sent - forward) / options.tokens}


def by_rows(options: argparse.Namespace) -> float:
    """Bytes per token of the gradient of a whole table, whose slots are read with equal odds here: the most rows."""
    model, slots_TK, weights_TK = _problem(options)
    model["memory"](slots_TK, weights_TK).sum().backward()
    ranks = Ranks()
    average_table_gradients(model, ranks)
    return ranks.bytes_sent / options.tokens


def _problem(options: argparse.Namespace) -> tuple[nn.ModuleDict, torch.Tensor, torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    table = MemoryTable(options.slots, options.width).bfloat16()
    table.sparse = True
    shape = options.tokens, options.reads
    slots_TK = torch.randint(0, options.slots, shape)
    return nn.ModuleDict({"memory": table}), slots_TK, torch.rand(shape).bfloat16().requires_grad_()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--processes", type=int, default=2, help="that share the table, on this machine")
    parser.add_argument("--width", type=int, default=1024, help="of a value; a multiple of the processes")
    parser.add_argument("--reads", type=int, default=128, help="slots that a token reads: heads times top-k")
    parser.add_argument("--tokens", type=int, default=64, help="of each process")
    parser.add_argument("--slots", type=int, default=4096, help="of the table")
    options = parser.parse_args()
    for name, value in vars(options).items():
        if value < 1:
            parser.error(f"--{name} is {value}, must be at least 1")
    if options.width % options.processes:
        parser.error(f"--width is {options.width}, which {options.processes} processes cannot share evenly")
    return options


if __name__ == "__main__":
    main()
