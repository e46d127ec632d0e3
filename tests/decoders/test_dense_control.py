"""The dense control has as many parameters as a token touches in the memory, and stands where the memory stands."""

import families
import pytest
import torch
from safetensors.torch import load_file
from tiny import batch, decoder, memory_model

from memlayer.decoders.attach import memory_layers
from memlayer.decoders.dense_control import DenseBlock, add_dense, touched_per_token
from memlayer.layers.memory import MemoryLayer, MemoryTable


def test_a_token_touches_every_parameter_but_the_rows_it_does_not_read():
    layer = MemoryLayer(width=24, table=MemoryTable(100, 12), num_keys=10, num_heads=3, top_k=4, key_width=8)
    query, norm, half_keys = 24 * 3 * 8, 4 + 4, 3 * 2 * 10 * 4
    gate, out, rows = 24 * 12, 12 * 24, 3 * 4 * 12
    assert touched_per_token(layer) == query + norm + half_keys + gate + out + rows


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize(("width", "num_keys", "heads", "top_k"), [(64, 16, 2, 4), (96, 33, 4, 16), (576, 128, 4, 32)])
def test_the_count_differs_by_less_than_two_percent(mode, width, num_keys, heads, top_k):
    layer = MemoryLayer(width, MemoryTable(num_keys**2, width), num_keys, heads, top_k)
    touched = touched_per_token(layer)
    model = decoder()
    model.config.hidden_size = width  # of the block alone: it is counted, not run
    (block,) = add_dense(model, [1], touched, mode)
    assert abs(sum(p.numel() for p in block.parameters()) - touched) < 0.02 * touched


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_blocks_stand_at_the_layers_of_the_memory_and_add_starts_as_the_base(mode):
    base, model = decoder(), decoder()
    blocks = add_dense(model, [0, 2], 3000, mode)
    with_memory = memory_model(layers=[0, 2], mode=mode)
    there = [name for name, module in model.named_modules() if isinstance(module, DenseBlock)]
    assert there == list(memory_layers(with_memory))
    assert [model.get_submodule(name) for name in there] == blocks
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits) == (mode == "add")


def test_a_checkpoint_in_a_mixture_of_experts_keeps_the_names_that_a_resume_looks_for(tmp_path):
    model = families.decoder("mixtral", tied=False)
    add_dense(model, [0, 2], 500, "replace")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_the_block_gates_one_projection_by_another():
    block = DenseBlock(2, 1)
    with torch.no_grad():
        for linear, weights in ((block.gate, [[1.0, 0.0]]), (block.up, [[0.0, 1.0]]), (block.out, [[1.0], [2.0]])):
            linear.weight.copy_(torch.tensor(weights))
        silu = 3.0 / (1.0 + torch.tensor(-3.0).exp())
        torch.testing.assert_close(block(torch.tensor([[3.0, 5.0]])), torch.stack([5 * silu, 10 * silu])[None])
