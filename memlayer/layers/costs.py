"""What a memory layer costs a token: the one count that dense controls are sized by and throughput is told by.

A multiplication and the addition behind it are one multiply-add, two floating point operations (FLOPs). Counted are the
products of the forward pass: of a token with the matrices, of its queries with every half-key, of weights with the
values read. Left out is what is no such product, here and in dense blocks: norms, the softmax, the gate's curve, and
picking the best of k * k pair sums, which is comparisons.

Each parameter that a token touches takes part in one multiply-add, but for the norm's. So a dense block of equal FLOPs
and one of equal parameters touched are the same block, to within the norm's few numbers: a dense weight costs two FLOPs
as well. Going backward they differ: a half-key that was not found has no gradient, so memory costs less than three
times its forward pass, and a dense control has the advantage.

Shapes: D model width, H heads, n half-keys, K slots read, Q key width, V value width.
"""

from memlayer.layers.memory import MemoryLayer


def multiply_adds(memory: MemoryLayer) -> dict[str, int]:
    """Multiply-adds of one token in a memory layer's forward pass, by part.

    Returns:
        ``query`` D * H * Q; ``half_keys`` H * n * Q, as each half of a query meets every half-key of its kind;
        ``reads`` H * K * V; ``gate`` D * V; ``out`` V * D.
    """
    keys = memory.keys
    return {
        "query": keys.query.weight.numel(),
        "half_keys": keys.half_keys.numel(),
        "reads": keys.num_heads * keys.top_k * memory.table.embedding_dim,
        "gate": memory.gate.weight.numel(),
        "out": memory.out.weight.numel(),
    }


def flops_per_token(memory: MemoryLayer) -> int:
    """FLOPs of one token in a memory layer's forward pass."""
    return 2 * sum(multiply_adds(memory).values())


def touched_per_token(memory: MemoryLayer) -> int:
    """Parameters of a memory layer that one token uses: all outside the table, and H * K of its rows of width V.

    All half-keys count, since each query is compared with every one of them.
    """
    return sum(multiply_adds(memory).values()) + sum(p.numel() for p in memory.keys.norm.parameters())
