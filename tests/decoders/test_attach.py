"""Attaching memory to a decoder, what its logits may depend on, and listening to its reads."""

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from memlayer.decoders.attach import (
    add_memory,
    calibrate,
    memory_layers,
    memory_parameters,
    memory_tables,
    record_reads,
    remove_memory,
)
from memlayer.layers.config import MemoryConfig
from memlayer.layers.memory import MemoryLayer


def names_of(model, parameter):
    """Every name a parameter is registered under."""
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter]


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_memory_beside_the_feed_forward_block_changes_no_logit():
    batch, base = tiny.batch(), tiny.decoder()
    before = logits(base, batch)
    settings = {"num_keys": 8, "num_heads": 2, "top_k": 3}
    assert torch.equal(before, logits(add_memory(base, MemoryConfig([0, 2], mode="add", **settings)), batch))


@torch.no_grad()
def test_a_calibrated_value_of_size_one_is_as_loud_as_the_block_beside_it():
    batch, model = tiny.inputs(tiny.batch()), tiny.memory_model(layers=[0, 2], mode="add", share=False)
    del batch["labels"]
    heard = {}
    for name, layer in memory_layers(model).items():
        block = model.get_submodule(name.removesuffix(".memory"))
        block.ffn.register_forward_hook(lambda _m, _i, out, name=name: heard.__setitem__(f"{name} block", out))
        layer.register_forward_hook(lambda _m, _i, out, name=name: heard.__setitem__(name, out))
    before = model(**batch).logits
    factors = calibrate(model, [batch])
    assert torch.equal(model(**batch).logits, before), "the values are zero still"
    for table in memory_tables(model).values():
        table.weight.fill_(0.5)  # each of two heads reads one whole
    model(**batch)
    for name in memory_layers(model):
        # The last layer hears what the first now says, so its block is another than the one that was measured.
        tolerance = 1e-4 if name.startswith("model.layers.0") else 0.5
        said, block = (heard[each].square().mean().sqrt() for each in (name, f"{name} block"))
        assert said / block == pytest.approx(1, rel=tolerance), factors


def test_memory_that_holds_something_is_not_calibrated():
    model = tiny.memory_model(mode="add")
    memory_tables(model)[tiny.TABLE].weight.data[3] = 1.0
    with pytest.raises(ValueError, match="the memory holds something already"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="no memory beside a block"):
        calibrate(tiny.memory_model(mode="replace"), [])


def test_memory_in_place_of_the_feed_forward_block_leaves_none_of_its_parameters():
    model = tiny.memory_model(layers=[1])
    in_layer = [name for name, _ in model.named_parameters() if "layers.1.mlp" in name]
    assert not [name for name in in_layer if "up_proj" in name or "down_proj" in name or "gate_proj" in name]
    assert isinstance(model.model.layers[1].mlp, MemoryLayer)
    assert any("layers.0.mlp.up_proj" in name for name, _ in model.named_parameters())


def test_memory_changes_the_logits_it_takes_part_in():
    model, batch = tiny.memory_model(), tiny.batch()
    before = logits(model, batch)
    memory_tables(model)[tiny.TABLE].weight.data.mul_(5)
    assert (before - logits(model, batch)).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_a_shared_table_is_registered_once(mode):
    model = tiny.memory_model(layers=[0, 2], mode=mode)
    (table,) = memory_tables(model).values()
    assert all(layer.table is table for layer in memory_layers(model).values())
    assert names_of(model, table.weight) == ["model.memory.0.weight"]


def test_separate_tables_are_registered_once_each():
    model = tiny.memory_model(layers=[0, 2], share=False)
    first, second = memory_tables(model).values()
    assert [layer.table for layer in memory_layers(model).values()] == [first, second]
    assert names_of(model, first.weight) == ["model.memory.0.weight"]
    assert names_of(model, second.weight) == ["model.memory.1.weight"]
    assert not torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_memory_has_a_dtype_of_its_own_and_the_decoder_keeps_its_own(mode, dtype):
    config = MemoryConfig([1], num_keys=8, num_heads=2, top_k=3, mode=mode, dtype=dtype)
    model = add_memory(tiny.decoder().bfloat16(), config)
    memory = memory_parameters(model)
    assert {str(p.dtype) for p in memory.values()} == {f"torch.{dtype}"}
    assert {p.dtype for name, p in model.named_parameters() if name not in memory} == {torch.bfloat16}
    found = logits(model, tiny.batch())
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    model(**tiny.inputs(tiny.batch())).loss.backward()
    assert memory["model.memory.0.weight"].grad.dtype == memory["model.memory.0.weight"].dtype


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_float32_memory_in_a_bfloat16_decoder_moves_as_far_as_in_a_float32_one(mode):
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = add_memory(tiny.decoder().to(dtype), MemoryConfig([1], 8, 2, 3, mode=mode))
        (layer,) = memory_layers(model).values()
        torch.nn.init.normal_(layer.out.weight, generator=torch.Generator().manual_seed(1))
        start = layer.table.weight.detach().clone()
        for _ in range(20):
            model(**tiny.inputs(tiny.batch())).loss.backward()
            with torch.no_grad():
                layer.table.weight -= 0.01 * layer.table.weight.grad.to_dense()
            model.zero_grad()
        moved[dtype] = (layer.table.weight - start).norm()
    # The rest of the decoder rounds to 8 bits; rows that rounded with it would move by less than a third.
    torch.testing.assert_close(moved[torch.bfloat16], moved[torch.float32], rtol=0.1, atol=0)


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_memory_goes_beside_or_in_place_of_a_quantised_block(mode):
    model = tiny.decoder()
    # Weights of 8 bits in neither parameters nor buffers.
    model.model.layers[1].mlp = torch.ao.quantization.quantize_dynamic(model.model.layers[1].mlp)
    block, before = model.model.layers[1].mlp, logits(model, tiny.batch())
    add_memory(model, MemoryConfig([1], 8, 2, 3, mode=mode))
    assert torch.equal(before, logits(model, tiny.batch())) == (mode == "add")
    remove_memory(model)
    assert model.model.layers[1].mlp is block
    assert torch.equal(before, logits(model, tiny.batch()))


def offloaded(tmp_path):
    """The decoder with its second layer on disk."""
    tiny.decoder().save_pretrained(tmp_path / "base")
    modules = {name.rpartition(".")[0] for name in tiny.decoder().state_dict()}
    device_map = {name: "disk" if name.startswith("model.layers.1.") else "cpu" for name in modules}
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_a_block_on_disk_is_refused_and_the_model_left_alone(mode, tmp_path):
    model = offloaded(tmp_path)
    before = logits(model, tiny.batch())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp are on the meta device, offloaded or not yet loaded"):
        add_memory(model, MemoryConfig([0, 1], 8, 2, 3, mode=mode))
    assert torch.equal(before, logits(model, tiny.batch()))
    add_memory(model, MemoryConfig([0, 2], 8, 2, 3, mode="add"))
    assert torch.equal(before, logits(model, tiny.batch()))


def test_a_refusal_half_way_leaves_the_model_as_it_was():
    model = tiny.decoder()
    modules, config = list(model.named_modules()), model.config
    del model.model.layers[2].mlp.up_proj
    with pytest.raises(ValueError, match=r"layers\.2\.mlp does not run on hidden states: .* 'up_proj'"):
        add_memory(model, MemoryConfig([1, 2], num_keys=8, num_heads=2, top_k=3))
    assert [named for named in modules if "2.mlp.up_proj" not in named[0]] == list(model.named_modules())
    assert model.config is config


def test_blocks_that_memory_replaced_come_back_in_the_dtype_the_model_was_converted_to():
    model = add_memory(tiny.decoder(), MemoryConfig([1], 8, 2, 3)).bfloat16()
    assert {p.dtype for p in remove_memory(model).parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model, tiny.batch()), logits(tiny.decoder().bfloat16(), tiny.batch()))


def test_the_config_says_how_to_rebuild_the_memory():
    model = tiny.memory_model(layers=[0, 2], value_width=10)
    assert MemoryConfig(**model.config.memory) == MemoryConfig([0, 2], 8, 2, 3, value_width=10)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"layers": [3]}, r"memory layers \[3\] asked for, the model has layers 0 to 2"),
        ({"layers": [0, 3]}, r"memory layers \[0, 3\] asked for, the model has layers 0 to 2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_the_model_left_alone(memory, message):
    model = tiny.decoder()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        add_memory(model, MemoryConfig(**{"num_keys": 8, "num_heads": 2, "top_k": 3, **memory}))
    assert model.state_dict().keys() == before.keys()
    assert not hasattr(model, "memory")


def test_a_module_that_is_no_decoder_is_refused_with_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no place for memory in Linear: looked for .* named mlp or .*, found none"):
        add_memory(nn.Linear(2, 2), MemoryConfig([0]))


def test_attaching_twice_is_refused():
    with pytest.raises(ValueError, match=r"memory is attached already, at layers \[1\]"):
        add_memory(tiny.memory_model(layers=[1]), MemoryConfig([0], num_keys=8, top_k=3))


@pytest.mark.parametrize("ask", [memory_layers, memory_tables])
def test_a_model_without_memory_is_told_how_to_get_some(ask):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no memory \w+; attach one with add_memory"):
        ask(tiny.decoder())


# float32: the same products in another matrix shape may be summed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_logits_of_a_prefix_do_not_change_with_what_follows():
    model, batch = tiny.memory_model(layers=[0, 2]), tiny.batch()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 4:] = tiny.batch(seed=1)["input_ids"][:, 4:]
    before, after = logits(model, batch), logits(model, changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], **CLOSE)
    shorter = {key: tensor[:, :4] for key, tensor in batch.items()}
    torch.testing.assert_close(before[:, :4], logits(model, shorter), **CLOSE)


def test_logits_of_a_sequence_do_not_change_with_the_rest_of_the_batch():
    model, batch = tiny.memory_model(layers=[0, 2]), tiny.batch(lengths=(5, 9, 7, 9))
    together = logits(model, batch)
    for row, length in enumerate((5, 9, 7, 9)):
        alone = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
        torch.testing.assert_close(together[row : row + 1, :length], logits(model, alone), **CLOSE)
    others = {key: tensor.clone() for key, tensor in batch.items()}
    others["input_ids"][1:] = tiny.batch(lengths=(9, 9, 9), seed=3)["input_ids"]
    assert torch.equal(together[:1, :5], logits(model, others)[:1, :5])


def test_generation_with_a_cache_equals_generation_without():
    model, prompt = tiny.memory_model(layers=[0, 2]), tiny.batch(lengths=(5, 5))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached, full = (
        model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert cached.sequences.shape == (2, 17)
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), **CLOSE)


def num_hooks(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks + sum(len(layer.keys._listeners) for layer in memory_layers(model).values())


def slots_of(model, batch, mask="attention_mask"):
    with record_reads(model) as reads:
        logits(model, batch)
    return reads.slots(batch[mask])


def test_reads_are_the_slots_of_the_product_keys():
    model, batch = tiny.memory_model(), tiny.batch()
    seen = []
    (layer,) = memory_layers(model).values()
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    found = slots_of(model, batch)[tiny.TABLE]
    handle.remove()
    _, slots_THK = layer.keys(seen[0].flatten(0, 1))
    assert torch.equal(found, slots_THK.flatten(1))


def test_passes_for_their_reads_end_with_the_last_read_and_read_the_same():
    model, batches = tiny.memory_model(layers=[0, 1]), [tiny.batch(seed=seed) for seed in (1, 2, 3)]
    expected = [slots_of(model, batch)[tiny.TABLE] for batch in batches]
    ran = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: ran.append(True))
    with torch.no_grad(), record_reads(model) as reads:
        for batch, slots in zip(batches, expected, strict=True):
            reads.run(model.base_model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            assert torch.equal(reads.slots(batch["attention_mask"])[tiny.TABLE], slots)
    handle.remove()
    assert len(ran) == 1  # the first counts the reads


def test_nothing_stays_hooked_after_recording():
    model = tiny.memory_model()
    before = num_hooks(model)
    slots_of(model, tiny.batch())
    assert num_hooks(model) == before


def test_nothing_stays_hooked_after_an_error_while_recording():
    model = tiny.memory_model()
    before = num_hooks(model)
    with pytest.raises(RuntimeError, match="somebody else's"), record_reads(model):
        raise RuntimeError("somebody else's")
    assert num_hooks(model) == before


def test_reads_exclude_padding():
    model, batch = tiny.memory_model(), tiny.batch(lengths=(5, 9, 7))
    padded = slots_of(model, batch)[tiny.TABLE]
    assert padded.shape == (5 + 9 + 7, 2 * 3)
    alone = [
        slots_of(model, {key: tensor[row : row + 1, :length] for key, tensor in batch.items()})[tiny.TABLE]
        for row, length in enumerate((5, 9, 7))
    ]
    assert torch.equal(padded, torch.cat(alone))


def test_only_the_positions_of_the_mask_count():
    model, batch = tiny.memory_model(), tiny.batch(lengths=(7, 7))
    every = slots_of(model, batch)[tiny.TABLE].view(2, 7, 6)
    assert torch.equal(slots_of(model, batch, "answer_mask")[tiny.TABLE], every[:, 4:6].flatten(0, 1))


def test_two_layers_of_one_table_both_count():
    shared, batch = tiny.memory_model(layers=[0, 2]), tiny.batch()
    separate = tiny.memory_model(layers=[0, 2], share=False)
    separate.load_state_dict(
        {**shared.state_dict(), "model.memory.1.weight": shared.state_dict()["model.memory.0.weight"]}
    )
    apart = slots_of(separate, batch)
    both = torch.cat([apart["model.memory.0"], apart["model.memory.1"]])
    assert torch.equal(slots_of(shared, batch)[tiny.TABLE], both)


def test_two_models_in_one_process_do_not_hear_each_other():
    one, two, batch = tiny.memory_model(seed=0), tiny.memory_model(seed=1), tiny.batch()
    expected_one, expected_two = slots_of(one, batch)[tiny.TABLE], slots_of(two, batch)[tiny.TABLE]
    with record_reads(one) as reads_one, record_reads(two) as reads_two:
        logits(one, batch)
        logits(two, batch)
    assert torch.equal(reads_one.slots(batch["attention_mask"])[tiny.TABLE], expected_one)
    assert torch.equal(reads_two.slots(batch["attention_mask"])[tiny.TABLE], expected_two)
    assert not torch.equal(expected_one, expected_two)


def test_activation_checkpointing_does_not_count_a_read_twice():
    model, batch = tiny.memory_model(layers=[0, 2]), tiny.batch()
    expected = slots_of(model, batch)[tiny.TABLE]
    calls = []
    for name, layer in memory_layers(model).items():
        layer.keys.register_forward_hook(lambda *_, name=name: calls.append(name))
    tiny.checkpoint_activations(model)
    with record_reads(model) as reads:
        model(**tiny.inputs(batch)).loss.backward()
    assert len(calls) == 4, "each of the two layers runs again in the backward pass"
    assert torch.equal(reads.slots(batch["attention_mask"])[tiny.TABLE], expected)


def test_reads_of_several_forward_passes_add_up_until_they_are_asked_for():
    model, first, second = tiny.memory_model(), tiny.batch(seed=0), tiny.batch(lengths=(5, 9), seed=1)
    masks = [batch["attention_mask"] for batch in (first, second)]
    alone = [slots_of(model, batch)[tiny.TABLE] for batch in (first, second)]
    with record_reads(model) as reads:
        logits(model, first)
        logits(model, second)
        both = reads.slots(torch.cat([mask.flatten() for mask in masks]))[tiny.TABLE]
        assert torch.equal(both, torch.cat(alone))
        logits(model, second)
        assert torch.equal(reads.slots(masks[1])[tiny.TABLE], alone[1])
        assert torch.equal(reads.slots(masks[1])[tiny.TABLE], alone[1]), "asked twice"
        logits(model, first)
        logits(model, second)
        with pytest.raises(ValueError, match="18 positions, the 2 forward passes since the last question had 46"):
            reads.slots(masks[1])


def test_a_mask_of_another_size_is_refused():
    model, batch = tiny.memory_model(), tiny.batch(lengths=(7, 7))
    with record_reads(model) as reads:
        logits(model, batch)
    with pytest.raises(ValueError, match="mask has 12 positions, the forward pass had 14"):
        reads.slots(torch.ones(2, 6))


def test_asking_for_reads_before_any_forward_pass_is_refused():
    with record_reads(tiny.memory_model()) as reads, pytest.raises(ValueError, match="no reads recorded"):
        reads.slots(torch.ones(2, 6))
