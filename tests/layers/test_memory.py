"""The memory layer against a derivation in plain torch that shares no code with it."""

import pytest
import torch

from memlayer.layers.memory import FeedForwardWithMemory, MemoryLayer, MemoryTable, MemoryTables


def layer(num_keys=8, value_width=12, **settings):
    torch.manual_seed(0)
    table = MemoryTable(num_keys**2, value_width)
    return MemoryLayer(16, table, num_keys, **{"num_heads": 2, "top_k": 3, "key_width": 6, **settings})


def by_hand(memory, hidden_TD):
    """out( read * silu(gate(x)) ) one token, one head and one slot at a time."""
    keys, values_NV = memory.keys, memory.table.weight
    rows = []
    for hidden_D in hidden_TD:
        query = (keys.query.weight @ hidden_D).view(keys.num_heads, 2, keys.half_width)
        centred = query - query.mean(-1, keepdim=True)
        query = centred / (centred.pow(2).mean(-1, keepdim=True) + keys.norm.eps).sqrt()
        query = query * keys.norm.weight + keys.norm.bias
        read_V = torch.zeros(values_NV.shape[1])
        for head in range(keys.num_heads):
            first_n, second_n = (keys.half_keys[head, half] @ query[head, half] for half in (0, 1))
            sums_N = torch.stack([a + b for a in first_n for b in second_n])
            scores_K, slots_K = sums_N.topk(keys.top_k)
            weights_K = scores_K.exp() / scores_K.exp().sum()
            for weight, slot in zip(weights_K, slots_K, strict=True):
                read_V = read_V + weight * values_NV[slot]
        gate_V = memory.gate.weight @ hidden_D
        rows.append(memory.out.weight @ (read_V * gate_V * torch.sigmoid(gate_V)))
    return torch.stack(rows)


def gradients(memory, output, wanted):
    memory.zero_grad()
    memory.table.zero_grad()
    (output * wanted).sum().backward()
    named = [*memory.named_parameters(), ("values", memory.table.weight)]
    return {name: p.grad.to_dense().clone() for name, p in named}


def test_layer_equals_the_derivation_by_hand():
    memory, hidden_TD = layer(), torch.randn(9, 16)
    torch.testing.assert_close(memory(hidden_TD), by_hand(memory, hidden_TD), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_the_derivation_by_hand():
    memory, hidden_TD, wanted = layer(), torch.randn(9, 16), torch.randn(9, 16)
    ours = gradients(memory, memory(hidden_TD), wanted)
    theirs = gradients(memory, by_hand(memory, hidden_TD), wanted)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].abs().sum() > 0, name
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 0, 16)])
def test_output_has_the_shape_of_the_input(shape):
    assert layer()(torch.randn(shape)).shape == shape


def test_output_has_the_dtype_of_a_bfloat16_model():
    memory = layer().bfloat16()
    memory.table.bfloat16()
    assert memory(torch.randn(5, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_gradient_of_a_sparse_table_holds_only_the_rows_read():
    memory, hidden_TD = layer(), torch.randn(4, 16)
    memory.table.sparse = True
    memory(hidden_TD).sum().backward()
    _, slots_THK = memory.keys(hidden_TD)
    gradient = memory.table.weight.grad
    assert gradient.is_sparse
    assert torch.equal(gradient.coalesce().indices()[0], slots_THK.unique())


def test_the_gradient_of_a_table_is_dense_unless_asked_otherwise():
    memory, hidden_TD = layer(), torch.randn(4, 16)
    memory(hidden_TD).sum().backward()
    _, slots_THK = memory.keys(hidden_TD)
    gradient = memory.table.weight.grad
    assert not gradient.is_sparse
    assert torch.equal(gradient.any(dim=1).nonzero().flatten(), slots_THK.unique())


def test_a_table_stays_the_module_that_layers_read():
    tables = MemoryTables([MemoryTable(64, 12)])
    with pytest.raises(ValueError, match="a Linear cannot stand in for memory table 0: memory layers read the table"):
        tables[0] = torch.nn.Linear(12, 12)
    tables[0] = MemoryTable(64, 12)


def test_a_layer_does_not_register_its_table():
    memory = layer()
    assert all(p is not memory.table.weight for p in memory.parameters())
    assert not any(isinstance(m, MemoryTable) for m in memory.modules())


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the table has 60 slots, num_keys = 8 addresses 64"):
        MemoryLayer(16, MemoryTable(60, 12), num_keys=8, top_k=3)


@pytest.mark.parametrize(("start", "learns_first"), [("values_zero", "values"), ("output_zero", "output")])
def test_memory_beside_a_feed_forward_block_changes_nothing_at_first_and_learns(start, learns_first):
    ffn, hidden = torch.nn.Linear(16, 16), torch.randn(5, 16)
    block = FeedForwardWithMemory(ffn, layer())
    block.memory.silence(start)
    assert torch.equal(block(hidden), ffn(hidden))
    block(hidden).sum().backward()
    learned = {"values": block.memory.table.weight, "output": block.memory.out.weight}
    assert [name for name, weight in learned.items() if weight.grad.any()] == [learns_first]


def test_a_value_written_into_an_empty_table_is_heard_at_its_own_size():
    memory = layer()
    memory.silence("values_zero")
    values_RV = torch.randn(9, memory.table.embedding_dim)
    torch.testing.assert_close(memory.out(values_RV).norm(dim=1), values_RV.norm(dim=1))
