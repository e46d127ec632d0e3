"""Models with memory under what the ecosystem does to models: plain torch training, PEFT, torch.compile."""

import peft
import pytest
import tiny
import torch
from finetuning import OPTIMIZERS, finetuner_of, learn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from memlayer.decoders.attach import memory_layers, memory_tables, record_reads
from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.patch import MemoryPatch


def with_lora(model, modules=("q_proj",)):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM"))


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


WRAPPERS = {"peft": with_lora, "compile": compiled, "both": lambda model: compiled(with_lora(model))}


def test_plain_torch_trains_a_model_with_memory():
    model = tiny.memory_model()
    before = tiny.snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**tiny.inputs(tiny.batch())).loss.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    optimizer.step()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_trainer_of_transformers_trains_a_model_with_memory(tmp_path):
    model, batch = tiny.memory_model(), tiny.inputs(tiny.batch())
    before = tiny.snapshot(model)
    data = [{key: tensor[row] for key, tensor in batch.items()} for row in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(model.state_dict()["model.memory.0.weight"], before["model.memory.0.weight"])


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_those_of_the_model_within(wrap):
    model = tiny.memory_model(layers=[0, 2], share=False)
    tables, layers, keys = memory_tables(model), memory_layers(model), product_key_fingerprints(model)
    wrapped = wrap(model)
    assert memory_tables(wrapped) == tables
    assert memory_layers(wrapped) == layers
    assert product_key_fingerprints(wrapped) == keys


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(wrap, id=name, marks=[pytest.mark.slow] if name != "peft" else [])
        for name, wrap in WRAPPERS.items()
    ],
)
def test_patches_and_finetuners_take_a_wrapped_model(wrap):
    batches = [tiny.batch(seed=seed) for seed in (1, 2)]
    model = tiny.memory_model()
    patch = learn(model, batches)[0].detach()
    learned, other = tiny.snapshot(model), tiny.memory_model()
    patch.apply(wrap(other))
    assert torch.equal(memory_tables(other)[tiny.TABLE].weight, learned["model.memory.0.weight"])
    again = tiny.memory_model()
    finetuner = SparseMemoryFinetuner(wrap(again), tiny.background(again), 5)
    optimizer = finetuner.watch(OPTIMIZERS["sgd"](finetuner.parameters()))
    for batch in batches:
        finetuner.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(finetuner.detach().tables[tiny.TABLE].slots, patch.tables[tiny.TABLE].slots)
    torch.testing.assert_close(memory_tables(again)[tiny.TABLE].weight.data, learned["model.memory.0.weight"])


def test_an_adapter_on_a_table_is_refused():
    with pytest.raises(ValueError, match="cannot stand in for memory table 0"):
        with_lora(tiny.memory_model(), ["model.memory.0"])


@pytest.mark.slow
@pytest.mark.parametrize("used_before", [True, False])
def test_reads_of_a_model_compiled_in_place_are_recorded(used_before):
    model, batch = tiny.memory_model(), tiny.batch()
    torch._dynamo.reset()
    model.compile(backend="eager")
    expected = tiny.memory_model()
    finetuner = finetuner_of(expected)
    finetuner.loss(batch)
    if used_before:
        model(**tiny.inputs(batch))
    with record_reads(model) as reads, torch.no_grad():
        model(**tiny.inputs(batch))
    with record_reads(expected) as of_eager, torch.no_grad():
        expected(**tiny.inputs(batch))
    mask = batch["attention_mask"]
    assert torch.equal(reads.slots(mask)[tiny.TABLE], of_eager.slots(mask)[tiny.TABLE])
    compiled_finetuner = finetuner_of(model)
    compiled_finetuner.loss(batch)
    assert torch.equal(compiled_finetuner.selected[tiny.TABLE], finetuner.selected[tiny.TABLE])


def test_a_model_that_fsdp_has_sharded_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = tiny.memory_model().train()
        background = tiny.background(model)
        early = SparseMemoryFinetuner(model, background, 5)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        told = "embed_tokens.weight is sharded over 1 processes by FSDP"
        with pytest.raises(ValueError, match=told):
            early.loss(tiny.batch())
        with pytest.raises(ValueError, match=told):
            early.patch()
        with pytest.raises(ValueError, match=told):
            SparseMemoryFinetuner(model, background, 5)
        with pytest.raises(ValueError, match=told):
            MemoryPatch({}).apply(model)
    finally:
        torch.distributed.destroy_process_group()
