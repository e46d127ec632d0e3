"""The dense control: a gated feed-forward block where the memory would be, of as many FLOPs a token.

A memory that serves a model may do so only because arithmetic and parameters were added. Against that stands a gated
block in the same layers, wired the same way and trained on the same batches. It has as many weights as the memory layer
does multiply-adds a token (layers/costs.py), and so, but for the norm's few numbers, as many parameters as one token
touches there; not all of the table's: a dense block as large as a table would cost a thousand times the arithmetic. Its
weights are drawn as those of a memory layer's projections are, by torch's rule for linear layers.

Shapes: D model width.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class DenseBlock(nn.Module):
    """A gated feed-forward block, ``out( up(x) * silu(gate(x)) )`` (SwiGLU, arXiv:2002.05202).

    Args:
        width: model width D.
        inner_width: width between the projections; the block has ``3 * width * inner_width`` parameters, and a token
            takes twice as many FLOPs.
    """

    def __init__(self, width: int, inner_width: int):
        super().__init__()
        self.gate = nn.Linear(width, inner_width, bias=False)
        self.up = nn.Linear(width, inner_width, bias=False)
        self.out = nn.Linear(inner_width, width, bias=False)

    def silence(self, start: str) -> None:
        """Make the output zero whatever comes in; a block has one way for it, whichever ``start`` a memory has."""
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to output of the same shape, computed in the block's own dtype."""
        dtype = self.gate.weight.dtype
        inner = hidden.to(dtype)
        out = self.out(self.up(inner) * F.silu(self.gate(inner)))
        return out if hidden.dtype == dtype else out.to(hidden.dtype)


def inner_width(width: int, num_weights: int) -> int:
    """The inner width of a block of as nearly ``num_weights`` weights as a whole width allows."""
    return max(1, round(num_weights / (3 * width)))
