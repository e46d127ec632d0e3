"""Routed blocks beside a feed-forward block: gated blocks, of which the path of a sequence says which ones answer.

The bank of hierarchical memories (Pouransari et al., arXiv:2510.02375): a block for each cluster of each level, wide
where the clusters are coarse and many texts share one. A block is a parameter of its own, so one that no sequence of a
batch goes through has no gradient, and no optimizer moves it.

Shapes: B sequences, L tokens, D width, P levels of a path, S inner width of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RoutedBlocks(nn.Module):
    """``sum over levels of down( silu(gate(x)) * up(x) )``, with the block of the node that the path names.

    All downs start at zero: nothing is added until something is learned.

    Args:
        width: model width D.
        branching: k; level l has k ** l blocks.
        sizes: inner width S of the blocks of each level, coarsest first; 0 leaves a level without blocks.

    Raises:
        ValueError: no level has blocks, or a size is below 0.
    """

    def __init__(self, width: int, branching: int, sizes: Sequence[int]):
        super().__init__()
        if min(sizes, default=0) < 0 or not any(sizes):
            raise ValueError(f"sizes are {list(sizes)}: none may be below 0, and one must be above")
        self.branching, self.sizes = branching, tuple(sizes)
        self.levels = nn.ModuleList(
            nn.ParameterList(_block(width, size) for _ in range(branching**level if size else 0))
            for level, size in enumerate(sizes, start=1)
        )

    @property
    def num_fetched(self) -> int:
        """Numbers that one sequence uses."""
        return sum(len(level) and level[0].numel() for level in self.levels)

    def forward(self, hidden_BLD: Tensor, path_BP: Tensor) -> Tensor:
        """What the blocks of each sequence's path add up to, shape (B, L, D), in the blocks' own dtype.

        Raises:
            ValueError: there is not one path a sequence.
        """
        if len(path_BP) != len(hidden_BLD):
            raise ValueError(f"{len(path_BP)} paths for a batch of {len(hidden_BLD)} sequences")
        dtype = next(self.parameters()).dtype
        inner_BLD = hidden_BLD.to(dtype)
        added_BLD = torch.zeros_like(inner_BLD)
        for level, node_B in zip(self.levels, path_BP.T):
            for node in node_B.unique().tolist() if len(level) else ():
                here = (node_B == node).nonzero()[:, 0].to(hidden_BLD.device)
                gate_SD, up_SD, down_SD = level[node]
                inner_bLS = F.silu(F.linear(inner_BLD[here], gate_SD)) * F.linear(inner_BLD[here], up_SD)
                added_BLD = added_BLD.index_add(0, here, inner_bLS @ down_SD)
        return added_BLD


def _block(width: int, size: int) -> nn.Parameter:
    """Gate, up and down of one block, shape (3, S, D)."""
    block = torch.zeros(3, size, width)
    block[:2].uniform_(-(width**-0.5), width**-0.5)
    return nn.Parameter(block)
