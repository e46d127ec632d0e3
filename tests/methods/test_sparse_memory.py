"""Sparse memory finetuning: what a step changes, to what, and that it changes nothing else."""

import warnings

import pytest
import tiny
import torch
from finetuning import OPTIMIZERS, finetuner_of, learn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlayer.attach import memory_tables, record_reads
from memlayer.config import LearnConfig
from memlayer.methods import METHODS
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.patch import state_fingerprint


def table_of(model):
    return memory_tables(model)[tiny.TABLE].weight.detach()


def changed_slots(before, after):
    return (before != after).any(dim=1).nonzero().flatten()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_only_selected_rows_move_under_any_optimizer(make):
    model = tiny.memory_model(layers=[0, 2])
    before = tiny.snapshot(model)
    finetuner, selected = learn(model, [tiny.batch(seed=s) for s in range(3)], make)
    finetuner.detach()
    after = model.state_dict()
    assert after.keys() == before.keys()
    moved = changed_slots(before["memory.0.weight"], after["memory.0.weight"])
    assert torch.equal(moved, torch.cat([s[tiny.TABLE] for s in selected]).unique())
    assert len(moved) >= 5
    for name in before:
        assert name == "memory.0.weight" or torch.equal(before[name], after[name]), name


def test_one_step_selects_as_many_slots_as_asked_for_and_moves_them_all():
    model = tiny.memory_model()
    before = table_of(model).clone()
    _, (selected,) = learn(model, [tiny.batch()])
    assert len(selected[tiny.TABLE]) == 5
    assert torch.equal(changed_slots(before, table_of(model)), selected[tiny.TABLE])


def test_separate_tables_are_learned_into_apart():
    model = tiny.memory_model(layers=[0, 2], share=False)
    before = tiny.snapshot(model)
    finetuner, (selected,) = learn(model, [tiny.batch()])
    assert len(finetuner.parameters()) == 2
    for name, slots in selected.items():
        moved = changed_slots(before[f"{name}.weight"], model.state_dict()[f"{name}.weight"])
        assert torch.equal(moved, slots), name


def dense_step(model, batch, num_rows, lr):
    """The same step as a dense gradient, a mask over the table and plain gradient descent."""
    (table,), (counts,) = memory_tables(model).values(), tiny.background(model).values()
    table.sparse = False
    with record_reads(model) as reads:
        model(**tiny.inputs(batch)).loss.backward()
    (slots_TK,) = reads.slots(batch["attention_mask"]).values()
    reads_N = torch.bincount(slots_TK.flatten(), minlength=64).double()
    inverse_N = ((counts.num_documents + 1) / (counts.document_frequency_N + 1)).log()
    scores_N = reads_N / reads_N.sum() * inverse_N
    best_R = scores_N.sort(descending=True, stable=True).indices[:num_rows]
    mask_N1 = torch.zeros(64, 1).index_fill_(0, best_R, 1.0)
    assert (scores_N[best_R] > 0).all()
    return table.weight.detach() - lr * mask_N1 * table.weight.grad


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_a_step_equals_a_dense_gradient_masked_to_the_top_slots(layers):
    batch = tiny.batch(lengths=(7, 4, 9))
    expected = dense_step(tiny.memory_model(layers=layers), batch, num_rows=6, lr=1.0)
    model = tiny.memory_model(layers=layers)
    before = table_of(model).clone()
    learn(model, [batch], num_rows=6)
    assert torch.equal(changed_slots(before, expected), changed_slots(before, table_of(model)))
    torch.testing.assert_close(table_of(model), expected, rtol=1e-5, atol=1e-7)


def disjoint_selections(model, num_rows):
    """Two batches and the slots that only the first of them selects."""
    first, second = tiny.batch(seed=0), tiny.batch(seed=1)
    finetuner = finetuner_of(model, num_rows)
    chosen = []
    for batch in (first, second):
        finetuner.select([batch])
        chosen.append(set(finetuner.selected[tiny.TABLE].tolist()))
    finetuner.detach()
    only_first = sorted(chosen[0] - chosen[1])
    assert only_first, "the two batches have to select different slots"
    return first, second, only_first


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_slot_no_longer_selected_does_not_move_in_later_steps(make):
    model = tiny.memory_model()
    first, second, only_first = disjoint_selections(model, num_rows=5)
    finetuner = finetuner_of(model)
    optimizer = finetuner.watch(make(finetuner.parameters()))
    after_first = None
    for batch in [first] + [second] * 20:
        finetuner.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_first = table_of(model).clone() if after_first is None else after_first
    assert torch.equal(table_of(model)[only_first], after_first[only_first])
    assert not torch.equal(table_of(model), after_first)


def test_adam_keeps_its_moments_per_slot_over_steps_in_which_the_slot_is_not_selected():
    model, lr, beta1, beta2, eps = tiny.memory_model(), 0.01, 0.9, 0.999, 1e-8
    first, second, only_first = disjoint_selections(model, num_rows=5)
    finetuner = finetuner_of(model)
    optimizer = finetuner.watch(
        torch.optim.Adam(finetuner.parameters(), lr=lr, betas=(beta1, beta2), eps=eps)
    )
    values = {slot: row.clone() for slot, row in enumerate(table_of(model))}
    moments = {slot: (torch.zeros(tiny.WIDTH), torch.zeros(tiny.WIDTH)) for slot in values}
    for step, batch in enumerate([first, second, first], start=1):
        finetuner.loss(batch).backward()
        slots, (rows,) = finetuner.selected[tiny.TABLE].tolist(), finetuner.parameters()
        for slot, gradient in zip(slots, rows.grad, strict=True):
            m, v = moments[slot]
            moments[slot] = m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
            m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
            values[slot] = values[slot] - lr * m_hat / (v_hat.sqrt() + eps)
        optimizer.step()
        optimizer.zero_grad()
    assert set(only_first) <= set(slots), "slots of the first step are selected again in the third"
    torch.testing.assert_close(table_of(model), torch.stack(list(values.values())), rtol=1e-5, atol=1e-6)


def micro_batches(batch, rows):
    return [tiny.part(batch, first, first + rows) for first in range(0, len(batch["input_ids"]), rows)]


def test_one_batch_and_four_micro_batches_select_the_same_slots_and_take_the_same_step():
    batch = tiny.batch(lengths=(7,) * 8)
    whole, parts = tiny.memory_model(), tiny.memory_model()
    _, (selected,) = learn(whole, [batch], num_rows=9)
    finetuner = finetuner_of(parts, num_rows=9)
    optimizer = finetuner.watch(OPTIMIZERS["sgd"](finetuner.parameters()))
    finetuner.select(micro_batches(batch, 2))
    assert torch.equal(finetuner.selected[tiny.TABLE], selected[tiny.TABLE])
    for micro_batch in micro_batches(batch, 2):
        (finetuner.loss(micro_batch) / 4).backward()
        assert torch.equal(finetuner.selected[tiny.TABLE], selected[tiny.TABLE])
    optimizer.step()
    torch.testing.assert_close(table_of(parts), table_of(whole), rtol=1e-5, atol=1e-6)


class LargestMade(TorchDispatchMode):
    """The most elements in any tensor made while it is active, views and in-place results left out."""

    def __init__(self, model):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        self.known |= {
            table.row_of_slot.untyped_storage().data_ptr() for table in memory_tables(model).values()
        }
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse_csr:
                known = tensor.untyped_storage().data_ptr() in self.known
                self.largest = max(self.largest, 0 if known else tensor.numel())
        return made


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_gradient_mask_or_state_of_the_size_of_the_table_is_made(make):
    model = tiny.memory_model(num_keys=128)
    finetuner, _ = learn(model, [tiny.batch(seed=1)], make)  # makes the optimizer's state
    optimizer = finetuner.watch(make(finetuner.parameters()))
    num_slots = memory_tables(model)[tiny.TABLE].num_embeddings
    with LargestMade(model) as made:
        finetuner.loss(tiny.batch()).backward()
        (rows,) = finetuner.parameters()
        assert rows.grad.shape == (5, tiny.WIDTH)
        assert memory_tables(model)[tiny.TABLE].weight.grad is None
        optimizer.step()
    assert 0 < made.largest < num_slots, "not even one number per slot"


@pytest.mark.filterwarnings("ignore:a step may change 64 slots")
def test_answer_positions_count_only_the_positions_that_predict_the_answer():
    model, batch = tiny.memory_model(), tiny.batch(lengths=(7, 5, 9))
    finetuner = finetuner_of(model, num_rows=64, positions="answer")
    finetuner.select([batch])
    with record_reads(model) as reads, torch.no_grad():
        model(**tiny.inputs(batch))
    (read,) = reads.slots(batch["answer_mask"]).values()
    assert set(finetuner.selected[tiny.TABLE].tolist()) == set(read.flatten().tolist())
    (every,) = reads.slots(batch["attention_mask"]).values()
    assert len(every.unique()) > len(read.unique())


def test_padding_does_not_take_part_in_the_choice():
    model, short = tiny.memory_model(), tiny.batch(lengths=(5, 5))
    padded = {
        key: torch.nn.functional.pad(
            tensor, (0, 30), value={"input_ids": tiny.PAD, "labels": -100}.get(key, 0)
        )
        for key, tensor in short.items()
    }
    finetuner = finetuner_of(model)
    finetuner.select([short])
    expected = finetuner.selected[tiny.TABLE].clone()
    finetuner.select([padded])
    assert torch.equal(finetuner.selected[tiny.TABLE], expected)


def test_as_many_rows_as_slots_read_warns_once():
    model = tiny.memory_model()
    with pytest.warns(
        UserWarning, match=r"may change 60 slots of table 'memory\.0' and its batch reads only \d+"
    ) as seen:
        learn(model, [tiny.batch(), tiny.batch(seed=1)], num_rows=60)
    assert len([w for w in seen if "may change 60" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(tiny.memory_model(), [tiny.batch()], num_rows=5)


def test_activation_checkpointing_takes_the_same_step():
    plain, checkpointed = (tiny.memory_model(layers=[0, 2]) for _ in range(2))
    tiny.checkpoint_activations(checkpointed)
    batches = [tiny.batch(seed=s) for s in range(2)]
    for one, other in zip(learn(plain, batches)[1], learn(checkpointed, batches)[1], strict=True):
        assert torch.equal(one[tiny.TABLE], other[tiny.TABLE])
    assert torch.equal(table_of(plain), table_of(checkpointed))


def test_a_second_finetuner_on_the_same_table_is_refused_and_the_first_works_on():
    model = tiny.memory_model()
    first = finetuner_of(model)
    with pytest.raises(ValueError, match=r"table 'memory\.0' has a finetuner already; detach it first"):
        finetuner_of(model)
    optimizer = first.watch(OPTIMIZERS["sgd"](first.parameters()))
    before = table_of(model).clone()
    first.loss(tiny.batch()).backward()
    optimizer.step()
    assert len(changed_slots(before, table_of(model))) == 5


def test_after_detaching_another_finetuner_may_be_attached():
    model = tiny.memory_model()
    finetuner_of(model).detach()
    before = tiny.snapshot(model)
    learn(model, [tiny.batch()])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tiny.snapshot(model).items())


def test_a_step_before_any_batch_was_read_is_refused():
    finetuner = finetuner_of(tiny.memory_model())
    optimizer = finetuner.watch(OPTIMIZERS["sgd"](finetuner.parameters()))
    with pytest.raises(ValueError, match=r"optimizer\.step\(\) before any batch was read"):
        optimizer.step()
    finetuner.loss(tiny.batch()).backward()
    optimizer.step()
    assert finetuner.selected[tiny.TABLE].tolist() == [], "the next step chooses anew"
    with pytest.raises(ValueError, match=r"optimizer\.step\(\) before any batch was read"):
        optimizer.step()


def test_an_answer_mask_that_is_missing_is_asked_for():
    batch = tiny.batch()
    del batch["answer_mask"]
    with pytest.raises(ValueError, match="the batch has no 'answer_mask', only"):
        finetuner_of(tiny.memory_model(), positions="answer").loss(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"idf_power": -1.0}, "idf_power is -1.0, must be at least 0"),
        ({"positions": "odd"}, "positions is 'odd', must be 'all' or 'answer'"),
        ({"num_rows": 0}, "num_rows is 0, must be between 1 and the table's 64 slots"),
        ({"num_rows": 65}, "num_rows is 65, must be between 1 and the table's 64 slots"),
        ({"background": {}}, r"no background counts of table 'memory\.0'; there are \[\]"),
        (
            {"background": tiny.background(tiny.memory_model(num_keys=4))},
            r"background counts of table 'memory\.0' have 16 slots, the table has 64",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(settings, message):
    model = tiny.memory_model()
    with pytest.raises(ValueError, match=message):
        SparseMemoryFinetuner(model, **{"background": tiny.background(model), "num_rows": 5, **settings})
    assert all(p.requires_grad for p in model.parameters())
    assert memory_tables(model)[tiny.TABLE].rows is None


def test_detaching_gives_the_model_back_as_it_was():
    model = tiny.memory_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    finetuner, _ = learn(model, [tiny.batch()])
    assert [p.requires_grad for p in model.parameters()].count(True) == 1, "the rows alone"
    finetuner.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert list(model.state_dict()) == keys
    model(**tiny.inputs(tiny.batch())).loss.backward()
    assert memory_tables(model)[tiny.TABLE].weight.grad.is_sparse


def test_the_patch_of_several_steps_reverts_to_the_first_state_and_applies_to_the_last():
    model = tiny.memory_model(layers=[0, 2], share=False)
    before = state_fingerprint(model)
    finetuner, selected = learn(model, [tiny.batch(seed=s) for s in range(4)], OPTIMIZERS["adam"])
    patch = finetuner.detach()
    after = state_fingerprint(model)
    for name in selected[0]:
        assert torch.equal(patch.tables[name].slots, torch.cat([s[name] for s in selected]).unique())
    patch.revert(model)
    assert state_fingerprint(model) == before
    patch.apply(model)
    assert state_fingerprint(model) == after


def test_detaching_before_any_step_gives_an_empty_patch():
    model = tiny.memory_model()
    before = state_fingerprint(model)
    assert finetuner_of(model).detach().num_rows == 0
    assert state_fingerprint(model) == before


def test_a_bfloat16_table_is_learned_into_in_bfloat16():
    model = tiny.memory_model().bfloat16()
    before = table_of(model).clone()
    finetuner, (selected,) = learn(model, [tiny.batch()])
    assert finetuner.parameters()[0].dtype == torch.bfloat16
    moved = changed_slots(before, table_of(model))
    assert set(moved.tolist()) <= set(selected[tiny.TABLE].tolist())
    assert len(moved) > 0


def test_learning_lowers_the_loss_on_what_is_taught():
    model, batch = tiny.memory_model(), tiny.batch()
    finetuner = finetuner_of(model, num_rows=20)
    optimizer = finetuner.watch(torch.optim.Adam(finetuner.parameters(), lr=0.1))
    losses = []
    for _ in range(10):
        losses.append(finetuner.loss(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05


def test_the_method_refuses_an_optimizer_it_does_not_know():
    model = tiny.memory_model()
    with pytest.raises(ValueError, match=r"optimizer is 'lion', must be one of \['adam', 'sgd'\]"):
        METHODS["sparse_memory"](model, tiny.background(model), LearnConfig(optimizer="lion", num_rows=5))
