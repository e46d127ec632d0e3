"""The processes of a group, seen from one of them: what tables and their gradients send each other, and how much.

Two exchanges are enough, and every backend of torch.distributed has them: parts of all ranks gathered in order, and
rows sent each to the rank they belong to. There is no reduction here: who sums does so itself, in the order of ranks,
so the bits of a sum depend on how many ranks there are and on nothing else.

Left out: sending while something is computed. Every call waits for the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def num_ranks() -> int:
    """Processes that run together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Ranks:
    """One process's place in a group.

    Args:
        group: of torch.distributed; None is all processes.

    Attributes:
        size: processes in the group.
        rank: of this one among them.
        bytes_sent: what this one has sent to the others so far, padding included; whoever measures may set it to 0.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.bytes_sent = 0

    def lengths(self, length: int, device: torch.device) -> list[int]:
        """What each rank says its length is."""
        said = torch.tensor([length], device=device)
        heard = [torch.empty_like(said) for _ in range(self.size)]
        dist.all_gather(heard, said, group=self._group)
        self.bytes_sent += (self.size - 1) * said.nbytes
        return torch.cat(heard).tolist()

    def gather(self, part: Tensor, lengths: Sequence[int]) -> Tensor:
        """The parts of all ranks, one after the other.

        Args:
            part: this rank's, shape (lengths[rank], ...).
            lengths: of every rank's part, see ``lengths``.
        """
        longest = max(lengths)
        sent = part.contiguous()
        if len(part) < longest:  # backends gather equal parts only
            sent = torch.cat([sent, sent.new_zeros(longest - len(part), *part.shape[1:])])
        heard = sent.new_empty(self.size, *sent.shape)
        dist.all_gather(list(heard.unbind()), sent, group=self._group)
        self.bytes_sent += (self.size - 1) * sent.nbytes
        if min(lengths) == longest:
            return heard.flatten(0, 1)
        return torch.cat([each[:length] for each, length in zip(heard, lengths, strict=True)])

    def exchange(self, rows: Tensor, to: Sequence[int], back: Sequence[int]) -> Tensor:
        """Send rows away and get others.

        Args:
            rows: in the order of the ranks that get them.
            to: how many of them each rank gets.
            back: how many each rank sends here.

        Returns:
            what was sent here, in the order of ranks, shape (sum of back, ...).
        """
        heard = rows.new_empty(sum(back), *rows.shape[1:])
        dist.all_to_all_single(heard, rows.contiguous(), list(back), list(to), group=self._group)
        self.bytes_sent += (len(rows) - to[self.rank]) * rows[:1].nbytes
        return heard

    def copy_from_first(self, tensor: Tensor) -> None:
        """Give every rank what the first one has, in place."""
        first = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        dist.broadcast(tensor, first, group=self._group)
        self.bytes_sent += (self.size - 1) * tensor.nbytes if not self.rank else 0


def grid(shards: int) -> tuple[Ranks, Ranks]:
    """All processes as groups of neighbours, and of those that have one place in such a group.

    Args:
        shards: processes in a group of neighbours.

    Returns:
        this process's neighbours; and its replicas, one of every group.

    Raises:
        ValueError: the processes do not make groups of that size.
    """
    world = num_ranks()
    if world % shards or shards < 1:
        raise ValueError(f"{world} process{'es' * (world > 1)} cannot stand in groups of {shards}")
    rows = torch.arange(world).view(-1, shards)
    rank, mine = dist.get_rank(), []
    for groups in (rows.tolist(), rows.T.tolist()):
        for members in groups:  # every process makes every group, in one order
            made = dist.new_group(members)
            if rank in members:
                mine.append(Ranks(made))
    return mine[0], mine[1]
