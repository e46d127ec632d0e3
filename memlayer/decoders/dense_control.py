"""The control of a retrofit: dense blocks where the memory would be, with as many parameters as a token touches there.

A memory that heals a model may do so only because parameters were added. Against that stands a gated feed-forward
block in the same layers, wired the same way and trained on the same batches. It is equal in the parameters
that one token uses, not in all of the table's: a dense block as large as a table would cost a thousand
times the arithmetic.

Shapes: H heads, K slots read, V value width, D model width.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlayer.decoders.structure import decoder_layers
from memlayer.layers.memory import FeedForwardWithMemory, MemoryLayer


class DenseBlock(nn.Module):
    """A gated feed-forward block, ``out( up(x) * silu(gate(x)) )`` (SwiGLU, arXiv:2002.05202).

    Args:
        width: model width D.
        inner_width: width between the projections; the block has ``3 * width * inner_width`` parameters.
    """

    def __init__(self, width: int, inner_width: int):
        super().__init__()
        self.gate = nn.Linear(width, inner_width, bias=False)
        self.up = nn.Linear(width, inner_width, bias=False)
        self.out = nn.Linear(inner_width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to output of the same shape, computed in the block's own dtype."""
        dtype = self.gate.weight.dtype
        inner = hidden.to(dtype)
        out = self.out(self.up(inner) * F.silu(self.gate(inner)))
        return out if hidden.dtype == dtype else out.to(hidden.dtype)


def touched_per_token(memory: MemoryLayer) -> int:
    """Parameters of a memory layer that one token uses: all outside the table, and H * K of its rows of width V.

    All half-keys count, since each query is compared with every one of them.
    """
    dense = sum(p.numel() for p in memory.parameters())
    return dense + memory.keys.num_heads * memory.keys.top_k * memory.table.embedding_dim


def add_dense(
    model: nn.Module, layers: Sequence[int], num_parameters: int, mode: str, dtype: torch.dtype = torch.float32
) -> list[DenseBlock]:
    """Put a dense block into each of the layers, in place.

    Args:
        model: a decoder without memory.
        num_parameters: of each block; met as nearly as a whole inner width allows.
        mode: "replace" the feed-forward block, or "add" beside it with an output that starts at zero.
        dtype: of the blocks; a memory's is float32 unless its config says otherwise.

    Returns:
        the blocks, in the order of ``layers``.
    """
    decoder, ffn_name = decoder_layers(model)
    width = model.config.hidden_size
    blocks = []
    for index in layers:
        ffn = getattr(decoder[index], ffn_name)
        dense = DenseBlock(width, max(1, round(num_parameters / (3 * width))))
        dense.to(next(ffn.parameters()).device, dtype)
        if mode == "add":  # wired as a memory is
            nn.init.zeros_(dense.out.weight)
        setattr(decoder[index], ffn_name, dense if mode == "replace" else FeedForwardWithMemory(ffn, dense))
        blocks.append(dense)
    # Checkpoints keep the model's own names, which are what the Trainer looks for when it resumes: transformers would
    # rename a gate as if it were that of a mixture of experts.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    return blocks
