"""What memory is compared with is built, saved and loaded as memory is, and differs in what it is for alone."""

from copy import deepcopy

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memlayer.decoders import files
from memlayer.decoders.attach import add_memory, memory_layers, memory_parameters, record_reads, remove_memory
from memlayer.decoders.controls import CONTROLS, as_control, make
from memlayer.decoders.dense_control import DenseBlock
from memlayer.decoders.packed import distance_from_alone, hears_others
from memlayer.decoders.shuffled_address import scattered
from memlayer.layers.config import MemoryConfig
from memlayer.layers.costs import flops_per_token
from memlayer.layers.memory import MemoryLayer, MemoryTable

MEMORY = MemoryConfig(layers=[0, 2], num_keys=8, num_heads=2, top_k=3)


def control(name, **changes):
    config = as_control(MemoryConfig(**{**vars(MEMORY), **changes}), name)
    return add_memory(tiny.decoder(), config).eval()


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_saved_and_loaded_to_the_bit(tmp_path, name):
    model, ids = control(name), tiny.batch()["input_ids"]
    files.save(model, tiny.tokenizer(tmp_path), tmp_path)
    files.check_saved(model, tmp_path)
    loaded = files.load_model(tmp_path)
    assert loaded.config.memory == model.config.memory
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.slow
def test_controls_that_write_their_code_beside_them_load_without_memlayer(tmp_path):
    ids, totals = tiny.batch()["input_ids"], []
    for name in CONTROLS:
        model = control(name)
        model.save_pretrained(tmp_path / name, export_code=True)
        totals.append(float(logits(model, ids).double().sum()))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "for name in sys.argv[2:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(f'{sys.argv[1]}/{name}', trust_remote_code=True)\n"
        "    print(float(model(ids).logits.double().sum()))\n"
        "assert not any(m == 'memlayer' or m.startswith('memlayer.') for m in sys.modules)\n"
    )
    printed = tiny.run_python(code, tmp_path, *CONTROLS).split()
    assert list(map(float, printed)) == pytest.approx(totals, abs=1e-3)  # of some thousand logits in float32


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("start", ["values_zero", "output_zero"])
def test_beside_a_block_a_control_starts_as_the_base_and_comes_off_again(name, start):
    base, ids = tiny.decoder(), tiny.batch()["input_ids"]
    model = control(name, mode="add", start=start)
    assert torch.equal(logits(model, ids), logits(base, ids))
    remove_memory(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model, ids), logits(base, ids))


@pytest.mark.parametrize("name", CONTROLS)
def test_everything_that_a_control_brings_is_trained(name):
    model = control(name)
    model(**tiny.inputs(tiny.batch())).loss.backward()
    moved = {each for each, p in memory_parameters(model).items() if p.grad is not None and p.grad.to_dense().any()}
    # Where there is one score its softmax is 1: nothing tells the query what to look for.
    still = {each for each in memory_parameters(model) if ".keys." in each} if name == "one_slot" else set()
    assert moved == memory_parameters(model).keys() - still
    assert moved


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize(("width", "num_keys", "heads", "top_k"), [(64, 16, 2, 4), (96, 33, 4, 16), (576, 128, 4, 32)])
def test_a_dense_block_takes_the_flops_of_the_memory_within_two_percent(mode, width, num_keys, heads, top_k):
    config = MemoryConfig([1], num_keys, heads, top_k, mode=mode)
    wanted = flops_per_token(MemoryLayer(width, MemoryTable(num_keys**2, width), num_keys, heads, top_k))
    (block,) = make(width, as_control(config, "dense")).layers
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(torch.randn(1, width))
    assert abs(counter.get_total_flops() - wanted) < 0.02 * wanted
    assert counter.get_total_flops() == 2 * sum(p.numel() for p in block.parameters())


def test_dense_blocks_stand_where_memory_would_and_bring_no_table():
    model = control("dense")
    there = [name for name, module in model.named_modules() if isinstance(module, DenseBlock)]
    assert there == list(memory_layers(tiny.memory_model(layers=[0, 2])))
    assert not any(isinstance(module, MemoryTable) for module in model.modules())


def test_a_checkpoint_of_the_dense_control_keeps_the_names_that_a_resume_looks_for(tmp_path):
    model = add_memory(families.decoder("mixtral", tied=False), as_control(MEMORY, "dense"))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_the_block_gates_one_projection_by_another():
    block = DenseBlock(2, 1)
    with torch.no_grad():
        for linear, weights in ((block.gate, [[1.0, 0.0]]), (block.up, [[0.0, 1.0]]), (block.out, [[1.0], [2.0]])):
            linear.weight.copy_(torch.tensor(weights))
        silu = 3.0 / (1.0 + torch.tensor(-3.0).exp())
        torch.testing.assert_close(block(torch.tensor([[3.0, 5.0]])), torch.stack([5 * silu, 10 * silu])[None])


def test_one_slot_is_read_by_every_head_of_every_token_in_full():
    model = control("one_slot")
    (layer, *_), hidden_TD = memory_layers(model).values(), torch.randn(5, tiny.WIDTH)
    with torch.no_grad():
        read_V = layer.table.weight[0] * layer.keys.num_heads
        expected = layer.out(read_V * nn.functional.silu(layer.gate(hidden_TD)))
        torch.testing.assert_close(layer(hidden_TD), expected)


def read_of(model, ids, **inputs):
    with record_reads(model) as reads:
        logits(model, ids, **inputs)
    return reads.slots(torch.ones_like(ids))[tiny.TABLE]


def test_a_shuffled_address_knows_the_position_and_nothing_of_the_token():
    model = control("shuffled", layers=[1])
    one_BL, other_BL = torch.randint(4, tiny.VOCAB, (2, 3, 9))
    slots_TK = read_of(model, one_BL).view(3, 9, -1)
    assert torch.equal(slots_TK, read_of(model, other_BL).view(3, 9, -1))
    assert torch.equal(slots_TK[0], slots_TK[1])
    assert len({tuple(row) for row in slots_TK[0].tolist()}) == 9
    real = add_memory(tiny.decoder(), MemoryConfig(**{**vars(MEMORY), "layers": [1]})).eval()
    assert not torch.equal(read_of(real, one_BL), read_of(real, other_BL))


def test_a_shuffled_layer_keeps_the_scores_and_the_weights_of_the_memory():
    model, real = control("shuffled", layers=[1]), tiny.memory_model()
    assert model.state_dict().keys() == real.state_dict().keys()
    for name, tensor in real.state_dict().items():  # of one seed both draw the same numbers
        assert torch.equal(model.state_dict()[name], tensor), name
    scores, ids = {}, tiny.batch()["input_ids"]
    for each in (model, real):
        (keys,) = (layer.keys for layer in memory_layers(each).values())
        hear = keys.register_forward_hook(lambda keys, inputs, output: scores.update({type(keys): output[0]}))
        logits(each, ids)
        hear.remove()
    assert torch.equal(*scores.values())


def test_padding_on_the_left_a_cache_and_packing_change_no_shuffled_address():
    model, ids_BL = control("shuffled"), torch.randint(4, tiny.VOCAB, (1, 8))
    alone = logits(model, ids_BL)
    padded_BL = torch.cat([torch.full((1, 3), tiny.PAD), ids_BL], dim=1)
    mask_BL = torch.tensor([[0] * 3 + [1] * 8])
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, padded_BL, attention_mask=mask_BL, position_ids=positions_BL)[:, 3:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)  # float32
    with torch.no_grad():
        first = model(ids_BL[:, :5], use_cache=True)
        rest = model(ids_BL[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, alone[:, 5:], rtol=0, atol=1e-5)
    assert not hears_others(model)
    assert distance_from_alone(model) < 1e-5  # float32


def test_a_copy_of_a_shuffled_model_listens_to_its_own_layers():
    model = control("shuffled")
    copied, ids = deepcopy(model), tiny.batch()["input_ids"]
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert torch.equal(logits(copied, ids), logits(control("shuffled"), ids))
    assert remove_memory(copied) is copied


def test_activations_computed_anew_read_the_same_shuffled_slots():
    grads = []
    for anew in (False, True):
        model = control("shuffled")
        if anew:
            tiny.checkpoint_activations(model)
        model(**tiny.inputs(tiny.batch())).loss.backward()
        grads.append(model.get_parameter(f"{tiny.TABLE}.weight").grad.to_dense())
    assert torch.equal(*grads)


def test_a_decoder_that_gives_no_position_numbers_is_refused():
    model = control("shuffled")
    logits(model, tiny.batch()["input_ids"])
    with pytest.raises(ValueError, match=r"this decoder gives it none for 2 tokens"):
        model.model.layers[0].mlp(torch.randn(1, 2, tiny.WIDTH))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_give_position_numbers(family):
    model = add_memory(families.decoder(family), as_control(MemoryConfig([1], 8, 2, 3), "shuffled")).eval()
    assert logits(model, families.tokens(2, 9)).isfinite().all()


def test_scattered_numbers_are_a_permutation_that_looks_random():
    numbers = torch.arange(1 << 16)
    found = scattered(numbers)
    assert found.min() >= 0
    assert found.max() < 1 << 32
    assert len(found.unique()) == len(numbers)
    counts_256 = torch.bincount(found % 256, minlength=256)
    assert (counts_256 - 256).abs().max() < 6 * 16  # six deviations of 256 draws a bin
    assert torch.equal(scattered(found), scattered(found + (1 << 32)))


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match=r"memory.control is 'hash', must be 'dense' or 'shuffled'"):
        MemoryConfig([0], control="hash")
