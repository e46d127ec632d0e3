"""The gradient of a table over several processes, as rows: what was not read is not sent.

Each process has a sparse gradient of the slots that it read. Slots and rows of all are gathered and summed in the order
of ranks, by whatever backend: NCCL reduces no sparse tensors, and a dense one of a million slots would be gigabytes.
Two runs of as many processes give the same bits; another number of processes adds in another order.

Left out: gathering what the rows are sums of (slots, weights and the gradient of what was read), which would give the
bits of one process, and on long batches sends less.
"""

import torch
from torch import Tensor, nn

from memlayer.layers.ranks import Ranks
from memlayer_kernels.rows import sparse_rows


@torch.no_grad()
def average_rows_(parameter: nn.Parameter, ranks: Ranks, processes: int) -> None:
    """Put into ``parameter.grad`` the mean over processes of the gradients of its rows.

    Args:
        parameter: a table's, with a sparse gradient or none.
        ranks: the processes that hold the same numbers, whose gradients are gathered.
        processes: what the sum is divided by.

    Raises:
        ValueError: the gradient is not a sparse one over rows.
    """
    slots_U, rows_UV = _rows_of(parameter)
    if ranks.size > 1:
        lengths = ranks.lengths(len(slots_U), slots_U.device)
        slots_U = ranks.gather(slots_U.int(), lengths).long()  # tables hold fewer than 2**31 slots
        rows_UV = ranks.gather(rows_UV, lengths)
    summed_in = torch.promote_types(rows_UV.dtype, torch.float32)
    summed = torch.sparse_coo_tensor(
        slots_U[None], rows_UV.to(summed_in), parameter.shape, check_invariants=False
    ).coalesce()
    mean_UV = summed.values().div_(processes).to(rows_UV.dtype)
    parameter.grad = torch.sparse_coo_tensor(
        summed.indices(), mean_UV, parameter.shape, is_coalesced=True, check_invariants=False
    )


def _rows_of(parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    if parameter.grad is None:  # this process read nothing; the others wait all the same
        return torch.empty(0, dtype=torch.int64, device=parameter.device), parameter.detach()[:0]
    return sparse_rows(parameter.grad)
