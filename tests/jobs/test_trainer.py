"""MemoryTrainer: optimizer groups, resuming, clipping and accumulation; several processes: test_several_devices.py."""

import families
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from training import assert_same, examples, trainer_of
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from memlayer.data.qa import collate
from memlayer.decoders.attach import memory_tables
from memlayer.methods.sparse_memory import SparseMemoryFinetuner


class Rates(TrainerCallback):
    """The learning rate of every group at every step, by name."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def test_tables_keep_their_rate_while_the_rest_follows_the_schedule(tmp_path):
    rates = Rates()
    settings = {"learning_rate": 0.01, "warmup_steps": 2, "lr_scheduler_type": "linear", "max_steps": 6}
    trainer = trainer_of(tiny.memory_model(), tmp_path, examples(), callbacks=[rates], **settings)
    trainer.train()
    expected = [0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(expected)
    assert [r["table"] for r in rates.seen] == [0.003] * 6
    assert [r["decay"] for r in rates.seen] == pytest.approx(expected)
    assert [r["no_decay"] for r in rates.seen] == pytest.approx(expected)


def test_tables_keep_their_rate_when_a_plateau_lowers_the_others(tmp_path):
    settings = {"learning_rate": 1.0, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "mode": "max"}}
    trainer = trainer_of(tiny.memory_model(), tmp_path, examples(), validation=examples(2), **settings, **plateau)
    trainer.create_optimizer_and_scheduler(6)
    for loss in (3.0, 2.0, 1.0):  # in mode max none but the first is an improvement
        trainer.lr_scheduler.step(loss)
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == pytest.approx({"table": 0.003, "decay": 0.01, "no_decay": 0.01})


def test_a_schedule_that_would_move_the_tables_rate_is_refused(tmp_path):
    greedy = {"lr_scheduler_type": "greedy", "eval_strategy": "epoch"}
    trainer = trainer_of(tiny.memory_model(), tmp_path, examples(), validation=examples(2), **greedy)
    with pytest.raises(ValueError, match="lr_scheduler_type 'greedy' moves the rate of the tables too"):
        trainer.create_optimizer_and_scheduler(6)


def test_groups_hold_every_parameter_once_and_decay_only_matrices(tmp_path):
    model = tiny.memory_model(layers=[0, 2], share=False)
    trainer = trainer_of(model, tmp_path, examples(), weight_decay=0.1)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    tables = [table.weight for table in memory_tables(model).values()]
    assert [id(p) for p in groups["table"]["params"]] == [id(p) for p in tables]
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "table": 0.0,
        "decay": 0.1,
        "no_decay": 0.0,
    }
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim > 1 for p in groups["decay"]["params"])
    assert all(p.ndim == 1 for p in groups["no_decay"]["params"])


def test_operations_are_counted_as_transformers_counts_them(tmp_path):
    trainer = trainer_of(tiny.memory_model(), tmp_path, examples())
    batch = collate(examples(4), tiny.PAD)
    assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) > 0


def lora(model):
    """The model with adapters of peft that change what it computes."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return wrapped.eval()


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["plain", "lora"])
def test_positions_before_the_first_label_get_no_logits_and_the_loss_is_the_same(tmp_path, wrap):
    model = wrap(tiny.memory_model())
    trainer = trainer_of(model, tmp_path, examples())
    batch = collate(examples(4), tiny.PAD, loss_on="answer")
    whole = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    expected = torch.autograd.grad(whole, [p for p in model.parameters() if p.requires_grad])
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    loss = trainer.compute_loss(model, dict(batch))
    first = min(each["answer_start"] for each in examples(4))
    assert seen == [batch["labels"].shape[1] - first + 1]  # and the position that predicts it
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]), expected)


def test_rows_that_were_never_read_do_not_move_in_pretraining(tmp_path):
    model = tiny.memory_model(num_keys=16)
    before = model.model.memory[0].weight.detach().clone()
    trainer = trainer_of(model, tmp_path, examples(4), max_steps=5, weight_decay=0.1)
    trainer.train()
    steps_N = trainer.optimizer.optimizer.state[model.model.memory[0].weight]["step"]
    moved_N = (model.model.memory[0].weight != before).any(dim=1)
    assert not moved_N[steps_N == 0].any()
    assert 0 < moved_N.sum() <= (steps_N > 0).sum() < len(steps_N)


def test_tables_have_sparse_gradients_while_they_are_pretrained_and_dense_ones_afterwards(tmp_path):
    seen = []

    class Sparse(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.append(model.model.memory[0].weight.grad.is_sparse)

    model = tiny.memory_model()
    trainer = trainer_of(model, tmp_path, examples(), callbacks=[Sparse()], max_steps=2)
    trainer.train()
    assert seen == [True, True]
    model(**tiny.inputs(tiny.batch())).loss.backward()
    assert not model.model.memory[0].weight.grad.is_sparse
    trainer.train()
    assert seen == [True] * 4


def test_a_resumed_run_in_a_mixture_of_experts_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    families.decoder("mixtral").save_pretrained(tmp_path / "base")

    def trainer():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # loading is what brings the conversion
        model = families.with_memory(base, "add", layers=[1])
        return trainer_of(model, tmp_path, examples(), max_steps=4, save_strategy="steps", save_steps=2)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))


def test_a_checkpoint_that_the_trainer_did_not_restore_is_refused(tmp_path):
    trainer_of(tiny.memory_model(), tmp_path, examples(), max_steps=1, save_strategy="steps", save_steps=1).train()
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    state = load_file(weights)
    del state["model.memory.0.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(model\.memory\.0\.weight\)"):
        trainer_of(tiny.memory_model(), tmp_path, examples(), max_steps=2).train(str(weights.parent))


@pytest.mark.parametrize("interrupted_at", [3, 5, 7])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, interrupted_at):
    """Two epochs of five steps of two micro-batches; step 5 ends an epoch, 3 and 7 lie within one."""
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    settings |= {"save_strategy": "steps", "save_steps": interrupted_at, "warmup_steps": 2}
    whole = trainer_of(tiny.memory_model(layers=[0, 2]), tmp_path, examples(), **settings)
    whole.train()
    assert whole.state.global_step == 10
    resumed = trainer_of(tiny.memory_model(layers=[0, 2], seed=1), tmp_path, examples(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{interrupted_at}"))
    assert resumed.state.global_step == 10
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert_same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert_same(whole.lr_scheduler.get_last_lr(), resumed.lr_scheduler.get_last_lr())


@pytest.mark.parametrize("interrupted_at", [3, 5])
def test_a_finetuner_goes_on_from_a_checkpoint_that_holds_what_it_wrote_and_no_more(tmp_path, interrupted_at):
    def learner(seed=0):
        model = tiny.memory_model(num_keys=16)
        finetuner = SparseMemoryFinetuner(model, tiny.background(model), num_rows=5)
        optimizer = finetuner.watch(torch.optim.Adam(finetuner.parameters(), lr=0.01))
        settings = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": interrupted_at, "seed": seed}
        settings |= {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
        return trainer_of(model, tmp_path, examples(), finetuner, optimizer, **settings)

    whole = learner()
    whole.train()
    assert whole.state.global_step == 10
    checkpoint = tmp_path / f"checkpoint-{interrupted_at}"
    assert not list(checkpoint.glob("*.safetensors"))
    resumed = learner(seed=1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = whole.finetuner.detach(), resumed.finetuner.detach()
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert_same(vars(ours.tables[tiny.TABLE]), vars(theirs.tables[tiny.TABLE]))


def first_moments(folder, **settings):
    """(1 - beta1) times the gradient of every parameter in one step, by name."""
    model = tiny.memory_model()
    trainer = trainer_of(model, folder, examples(8), max_steps=1, **settings)
    trainer.train()
    state = trainer.optimizer.optimizer.state
    return {name: state[p]["exp_avg"] for name, p in model.named_parameters()}, trainer.state.log_history


def norm(tensors):
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def test_clipping_scales_the_dense_gradients_and_leaves_the_table_alone(tmp_path):
    unclipped, _ = first_moments(tmp_path, max_grad_norm=0.0)
    clipped, history = first_moments(tmp_path, max_grad_norm=0.01)
    assert torch.equal(clipped.pop("model.memory.0.weight"), unclipped.pop("model.memory.0.weight"))
    assert norm(unclipped.values()) > 0.1 * 0.02
    assert norm(clipped.values()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert history[0]["grad_norm"] == pytest.approx(norm(unclipped.values()) / 0.1, rel=1e-4)


def test_one_batch_and_accumulated_micro_batches_have_the_same_loss_and_gradient(tmp_path):
    settings = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    whole, whole_history = first_moments(tmp_path, per_device_train_batch_size=8, **settings)
    for micro_batches in (4, 8):
        parts, history = first_moments(
            tmp_path,
            per_device_train_batch_size=8 // micro_batches,
            gradient_accumulation_steps=micro_batches,
            **settings,
        )
        assert history[0]["loss"] == pytest.approx(whole_history[0]["loss"], abs=1e-4)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def taught(folder, positions="all", **settings):
    """Two steps of sparse memory finetuning through the trainer; the patch and the table."""
    model = tiny.memory_model()
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), 9, positions=positions)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=1.0))
    settings = {"num_train_epochs": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **settings}
    data = examples(16)
    trainer = trainer_of(model, folder, data, finetuner, optimizer, train_sampling_strategy="sequential", **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    return finetuner.detach().tables[tiny.TABLE].slots, model.state_dict()["model.memory.0.weight"]


def test_the_log_says_among_how_many_slots_a_step_chose(tmp_path):
    model = tiny.memory_model()
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), 9)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=1.0))
    trainer = trainer_of(model, tmp_path, examples(4), finetuner, optimizer, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["model.memory.0.slots_selected"] == 9 < entry["model.memory.0.slots_read"] < 64
    assert 0 <= entry["model.memory.0.slots_zero_idf"] < entry["model.memory.0.slots_read"]


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_a_finetuner_selects_over_all_micro_batches_of_a_step(tmp_path, positions):
    slots, table = taught(tmp_path, positions, per_device_train_batch_size=8)
    for micro_batches in (2, 4):
        settings = {
            "per_device_train_batch_size": 8 // micro_batches,
            "gradient_accumulation_steps": micro_batches,
        }
        parts_slots, parts_table = taught(tmp_path, positions, **settings)
        assert torch.equal(parts_slots, slots)
        torch.testing.assert_close(parts_table, table, rtol=1e-4, atol=1e-6)


def test_a_finetuner_in_the_trainer_takes_the_steps_it_takes_in_a_plain_loop(tmp_path):
    slots, table = taught(tmp_path, per_device_train_batch_size=8)
    model = tiny.memory_model()
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), 9)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=1.0))
    data = examples(16)
    for first in (0, 8):
        finetuner.loss(collate(data[first : first + 8], tiny.PAD)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(finetuner.detach().tables[tiny.TABLE].slots, slots)
    torch.testing.assert_close(model.state_dict()["model.memory.0.weight"], table, rtol=1e-5, atol=1e-6)


def test_a_finetuner_has_no_best_model_to_go_back_to(tmp_path):
    model = tiny.memory_model()
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), 9)
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="load_best_model_at_end has no meaning while facts are taught"):
        trainer_of(model, tmp_path, examples(), finetuner, validation=examples(2), **best)


def test_a_finetuner_survives_clipping_and_activation_checkpointing(tmp_path):
    slots, table = taught(tmp_path, per_device_train_batch_size=8, max_grad_norm=0.001)
    again, checkpointed = taught(
        tmp_path, per_device_train_batch_size=8, max_grad_norm=0.001, gradient_checkpointing=True
    )
    assert torch.equal(slots, again)
    assert torch.equal(table, checkpointed)
    before = tiny.memory_model().state_dict()["model.memory.0.weight"]
    assert float((table - before).norm()) <= 2 * 0.001 * 1.01, "two steps of SGD at rate 1, each clipped"


def test_a_finetuner_for_answer_positions_refuses_batches_without_them(tmp_path):
    model = tiny.memory_model()
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), 9, positions="answer")
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=1.0))
    trainer = trainer_of(model, tmp_path, examples(4), finetuner, optimizer, max_steps=1)
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collator(rows).items() if k != "answer_mask"}
    with pytest.raises(ValueError, match="the batch has no 'answer_mask'"):
        trainer.train()
