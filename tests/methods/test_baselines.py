"""Every method hands back the caller's model as an ordinary one that has learned."""

import pytest
import tiny
import torch

from memlayer.decoders.attach import record_reads
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.learn_settings import (
    DenseMemoryConfig,
    FullConfig,
    LoraConfig,
    RidgeConfig,
    SparseMaskConfig,
    SparseMemoryConfig,
)
from memlayer.methods import METHODS
from memlayer.methods.sparse_mask import linear_weights

SETTINGS = {
    "sparse_memory": SparseMemoryConfig(learning_rate=1.0, num_rows=20),
    "dense_memory": DenseMemoryConfig(learning_rate=0.01),
    "full": FullConfig(learning_rate=0.01),
    "lora": LoraConfig(learning_rate=0.05, lora_rank=4),
    "sparse_mask": SparseMaskConfig(learning_rate=0.03, score="fisher", density=0.1),
    "ridge": RidgeConfig(learning_rate=0.3, num_rows=20),
}


def loss_of(model, batch):
    with torch.no_grad():
        return float(model(**tiny.inputs(batch)).loss)


def learn(model, method, steps=6):
    prepared = METHODS[method](model, tiny.background(model), SETTINGS[method], [tiny.batch()])
    for _ in range(steps):
        forward = prepared.finetuner.loss if prepared.finetuner else lambda b: prepared.model(**tiny.inputs(b)).loss
        forward(tiny.batch()).backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
    return prepared.finish()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_model_handed_in_has_learned_and_is_an_ordinary_one_again(method):
    model, batch = tiny.memory_model(mode="add"), tiny.batch()
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    before, keys, kinds = loss_of(model, batch), list(model.state_dict()), [type(m) for m in model.modules()]
    learn(model, method)
    assert loss_of(model, batch) < before - 0.01
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    model(**tiny.inputs(batch)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.model.memory[0].weight.grad.is_sparse


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_sparse_memory_changes_the_table_alone_and_returns_the_patch():
    model = tiny.memory_model()
    before, fingerprint = tiny.snapshot(model), state_fingerprint(model)
    patch = learn(model, "sparse_memory")
    assert changed(before, model) == {"model.memory.0.weight"}
    patch.revert(model)
    assert state_fingerprint(model) == fingerprint


def test_full_finetuning_changes_every_parameter_and_returns_no_patch():
    model = tiny.memory_model()
    before = tiny.snapshot(model)
    assert learn(model, "full") is None
    assert changed(before, model) == set(before)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_dense_memory_moves_every_row_that_was_read_and_nothing_else(optimizer):
    model, batch = tiny.memory_model(), tiny.batch()
    before = tiny.snapshot(model)
    with torch.no_grad(), record_reads(model) as reads:
        model(**tiny.inputs(batch))
        read = reads.slots(torch.ones_like(batch["attention_mask"]))[tiny.TABLE].unique()
    prepared = METHODS["dense_memory"](model, {}, DenseMemoryConfig(learning_rate=0.01, optimizer=optimizer))
    for _ in range(3):
        prepared.model(**tiny.inputs(batch)).loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
    prepared.finish()
    assert changed(before, model) == {tiny.TABLE + ".weight"}
    moved = (model.model.memory[0].weight != before[tiny.TABLE + ".weight"]).any(1).nonzero()[:, 0]
    assert torch.equal(moved, read)


def test_dense_memory_without_a_memory_is_refused():
    with pytest.raises(ValueError, match="no memory"):
        METHODS["dense_memory"](tiny.decoder(), {}, DenseMemoryConfig())


def test_full_finetuning_by_sgd_is_one_step_along_the_gradient():
    model, batch = tiny.memory_model(), tiny.batch()
    before = tiny.snapshot(model)
    model(**tiny.inputs(batch)).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    prepared = METHODS["full"](model, {}, FullConfig(learning_rate=0.1, optimizer="sgd"))
    prepared.model(**tiny.inputs(batch)).loss.backward()
    prepared.optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * gradients[name])


def test_lora_changes_linear_layers_but_no_table_embedding_or_norm():
    model = tiny.memory_model()
    before = tiny.snapshot(model)
    assert learn(model, "lora") is None
    moved = changed(before, model)
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    assert "model.layers.1.mlp.gate.weight" in moved
    assert not [name for name in moved if "memory" in name or "embed" in name or "norm" in name or "half_keys" in name]


def test_lora_merges_to_what_it_computed():
    model, batch = tiny.memory_model(), tiny.batch()
    prepared = METHODS["lora"](model, {}, SETTINGS["lora"], [])
    for _ in range(3):
        prepared.model(**tiny.inputs(batch)).loss.backward()
        prepared.optimizer.step()
    wrapped = loss_of(prepared.model, batch)
    prepared.finish()
    assert loss_of(model, batch) == pytest.approx(wrapped, abs=1e-5)


def test_a_sparse_mask_changes_its_share_of_linear_layers_alone():
    model = tiny.memory_model()
    before = tiny.snapshot(model)
    assert learn(model, "sparse_mask") is None
    for name in changed(before, model):
        assert name in linear_weights(model)
        moved = before[name] != model.state_dict()[name]
        assert 0 < moved.sum() <= round(0.1 * moved.numel())
    assert len(changed(before, model)) >= 20
