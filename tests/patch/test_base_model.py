"""A patch knows the model that it is made for by its other weights, and takes copies of it, wrapped or rounded."""

import copy
import math

import pytest
import tiny
import torch
from patch_cases import bits, odd_patch, patch_of, table_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memlayer import remove_memory
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.layers.memory import MemoryTable
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.patch import Base, MemoryPatch, patches
from memlayer.patch import base_model as base_module

OTHERS = [name for name in tiny.memory_model().state_dict() if "memory." not in name]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_one_other_weight_is_refused_unless_it_is_asked_for(name):
    model = tiny.memory_model()
    patch = odd_patch(model)
    with torch.no_grad():
        model.get_parameter(name).add_(0.01)
    before = state_fingerprint(model)
    with pytest.raises(ValueError, match=r"made for a model with other weights|made for other product keys"):
        patch.apply(model)
    assert state_fingerprint(model) == before
    if ".keys." not in name:
        patch.apply(model, any_base=True)
        patch.revert(model)
        assert state_fingerprint(model) == before
        with patches(model, [patch], any_base=True):
            assert state_fingerprint(model) != before


def test_other_rows_of_the_table_are_no_other_model():
    model = tiny.memory_model()
    patch = odd_patch(model)
    table_of(model)[11] += 1
    before = state_fingerprint(model)
    patch.apply(model)
    assert torch.equal(table_of(model)[patch.tables[tiny.TABLE].slots], patch.tables[tiny.TABLE].rows)
    patch.revert(model)
    assert state_fingerprint(model) == before


@pytest.mark.parametrize("made_in", DTYPES)
@pytest.mark.parametrize("applied_in", DTYPES)
def test_a_copy_in_another_dtype_takes_the_patch_rounded_and_gets_back_what_it_had(made_in, applied_in):
    model = tiny.memory_model().to(made_in)
    patch = odd_patch(model)
    model.to(applied_in)
    before, rows = state_fingerprint(model), patch.tables[tiny.TABLE].rows
    patch.apply(model)
    assert torch.equal(bits(table_of(model)[patch.tables[tiny.TABLE].slots]), bits(rows.to(applied_in)))
    with pytest.raises(ValueError, match="applied already"):
        patch.apply(model)
    patch.revert(model)
    assert state_fingerprint(model) == before


def test_a_half_precision_patch_is_refused_by_the_model_that_was_rounded_for_it():
    model = tiny.memory_model()
    patch = odd_patch(copy.deepcopy(model).bfloat16())
    before = state_fingerprint(model)
    with pytest.raises(ValueError, match="other weights outside the memory"):
        patch.apply(model)
    assert state_fingerprint(model) == before


def test_rows_that_half_precision_does_not_hold_are_refused():
    model = tiny.memory_model()
    patch = patch_of(model, [5], torch.full((1, tiny.WIDTH), 1e5))
    with pytest.raises(ValueError, match=r"at slot 5: .* torch\.float16 does not hold them"):
        patch.apply(model.half())


def test_rows_are_not_rounded_for_a_model_that_is_not_known():
    model = tiny.memory_model()
    patch = odd_patch(model)
    model.bfloat16()
    for asked in (patch, MemoryPatch(patch.tables)):
        with pytest.raises(ValueError, match=r"is in torch\.float32, table 'model\.memory\.0' in torch\.bfloat16"):
            asked.apply(model, any_base=asked is patch)


def test_float32_memory_in_a_half_precision_model_is_told_by_the_precision_of_the_rest():
    model = tiny.memory_model()
    patch = odd_patch(model)
    for name, module in model.named_modules():
        if "memory" not in name and "mlp" not in name and not list(module.children()):
            module.bfloat16()
    assert table_of(model).dtype == torch.float32
    patch.apply(model)


def test_embeddings_that_have_grown_are_the_same_and_others_are_not():
    model = tiny.memory_model()
    patch = odd_patch(model)
    model.resize_token_embeddings(tiny.VOCAB + 14, mean_resizing=False)
    patch.apply(model)
    patch.revert(model)
    model.resize_token_embeddings(tiny.VOCAB - 2)
    with pytest.raises(ValueError, match="other weights outside the memory"):
        patch.apply(model)


def test_the_sample_of_a_large_weight_is_spread_over_rows_and_columns():
    for shape in ((3000, 4096), (4096, 2), (1, 7000)):
        numbers = base_module._sample(torch.arange(math.prod(shape)).view(shape))
        assert len(numbers.unique()) == base_module.SAMPLE
        for seen, size in ((numbers // shape[1], shape[0]), (numbers % shape[1], shape[1])):
            assert len(seen.unique()) > min(size, base_module.SAMPLE) / 4
            assert int(seen.max()) >= 0.99 * (size - 1)


def test_the_table_is_not_read():
    model = tiny.memory_model()
    base = Base.of(model)
    with torch.no_grad():
        table_of(model).fill_(float("nan"))
    model.model.memory.append(MemoryTable(4, 4))
    assert Base.of(model) == base


def with_lora(model):
    adapted = ["q_proj", "embed_tokens", "keys.query"]
    config = LoraConfig(r=2, target_modules=adapted, modules_to_save=["norm"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.mark.parametrize("wrap", [with_lora, torch.compile, lambda model: torch.compile(with_lora(model))])
def test_a_wrapped_model_is_the_model_that_is_wrapped(wrap):
    base = Base.of(tiny.memory_model())
    wrapped = wrap(tiny.memory_model())
    assert Base.of(wrapped) == base
    base_module.mark(wrapped, ["a patch"], had=True)
    assert Base.of(wrapped).patches == ["a patch"]
    with torch.no_grad():
        next(p for name, p in wrapped.named_parameters() if "layers.0.self_attn.q_proj" in name).add_(1)
    assert not Base.of(wrapped).same_weights(base)


def test_offloaded_weights_cannot_be_compared():
    model = tiny.memory_model()
    patch = odd_patch(model)
    model.model.layers[2].to("meta")
    with pytest.raises(ValueError, match=r"offloaded and cannot be compared .*: any_base=True"):
        patch.apply(model)
    patch.apply(model, any_base=True)
    assert Base.of(model) is None


def learned(model):
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), num_rows=5)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=1.0))
    finetuner.loss(tiny.batch()).backward()
    optimizer.step()
    return finetuner.detach()


def test_a_learned_patch_names_the_patches_that_its_model_had(tmp_path):
    model = tiny.memory_model()
    first = learned(model)
    model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    second = patch_of(model, [3], torch.ones(1, tiny.WIDTH))
    assert (first.base.patches, second.base.patches) == ([], [first.fingerprint])
    second.save(tmp_path / "second")
    first.revert(model)
    with pytest.raises(ValueError, match=f"on top of patch {first.fingerprint[:12]}, which the model lacks"):
        MemoryPatch.load(tmp_path / "second").apply(model)
    with patches(model, [first, second]):
        assert model.config.memory_patches == [first.fingerprint, second.fingerprint]
    assert not hasattr(model.config, "memory_patches")


def test_a_reverted_patch_leaves_the_config_as_it_was():
    model = tiny.memory_model()
    config = model.config.to_dict()
    patch = odd_patch(model)
    patch.apply(model)
    assert model.config.to_dict() != config
    patch.revert(model)
    assert model.config.to_dict() == config
    patch.apply(model)
    assert remove_memory(model).config.to_dict() == tiny.decoder().config.to_dict()
