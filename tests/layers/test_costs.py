"""What a memory layer costs a token is what torch counts of its products, and what its dense control costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from memlayer.layers.costs import flops_per_token, multiply_adds, touched_per_token
from memlayer.layers.memory import MemoryLayer, MemoryTable

D, H, N, K, Q, V = 24, 3, 10, 4, 8, 12


def layer():
    return MemoryLayer(width=D, table=MemoryTable(N * N, V), num_keys=N, num_heads=H, top_k=K, key_width=Q)


def test_the_parts_are_those_of_the_formula():
    parts = {"query": D * H * Q, "half_keys": H * N * Q, "reads": H * K * V, "gate": D * V, "out": V * D}
    assert multiply_adds(layer()) == parts
    assert flops_per_token(layer()) == 2 * sum(parts.values())


def test_torch_counts_the_same_in_a_forward_pass():
    tokens, memory = 5, layer()
    counted = {
        torch.ops.memlayer.search: lambda queries, half_keys, k, *_, out_shape: (
            2 * queries[0] * half_keys[0] * half_keys[1] * half_keys[2] * half_keys[3]
        ),
        torch.ops.memlayer.lookup: lambda values, slots, *_, out_shape: 2 * slots[0] * slots[1] * values[1],
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        memory(torch.randn(tokens, D))
    assert {str(name) for name in counter.get_flop_counts()["Global"]} >= {
        "memlayer.search",
        "memlayer.lookup",
        "aten.mm",
    }
    assert counter.get_total_flops() == tokens * flops_per_token(memory)


def test_a_token_touches_every_parameter_but_the_rows_it_does_not_read():
    query, norm, half_keys = D * H * Q, Q // 2 + Q // 2, H * 2 * N * Q // 2
    gate, out, rows = D * V, V * D, H * K * V
    assert touched_per_token(layer()) == query + norm + half_keys + gate + out + rows
