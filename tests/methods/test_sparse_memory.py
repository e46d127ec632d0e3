"""Sparse memory finetuning: what a step changes, to what, and that it changes nothing else."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from finetuning import OPTIMIZERS, finetuner_of, learn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlayer.decoders.attach import memory_tables, record_reads
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.methods import METHODS
from memlayer.methods.open_table import Selection
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.slots.counts import SlotCounts
from memlayer.slots.selection import at_random, kl, top_slots


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
    moved = changed_slots(before["model.memory.0.weight"], after["model.memory.0.weight"])
    assert torch.equal(moved, torch.cat([s[tiny.TABLE] for s in selected]).unique())
    assert len(moved) >= 5
    for name in before:
        assert name == "model.memory.0.weight" or torch.equal(before[name], after[name]), name


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


def test_adam_keeps_moments_and_step_count_of_a_slot_over_steps_in_which_it_is_not_selected():
    model, lr, beta1, beta2, eps = tiny.memory_model(), 0.01, 0.9, 0.999, 1e-8
    first, second, only_first = disjoint_selections(model, num_rows=5)
    finetuner = finetuner_of(model)
    optimizer = finetuner.watch(torch.optim.Adam(finetuner.parameters(), lr=lr, betas=(beta1, beta2), eps=eps))
    values = {slot: row.clone() for slot, row in enumerate(table_of(model))}
    moments = {slot: (torch.zeros(tiny.WIDTH), torch.zeros(tiny.WIDTH)) for slot in values}
    steps = dict.fromkeys(values, 0)
    for batch in [first, second, first]:
        finetuner.loss(batch).backward()
        slots, (rows,) = finetuner.selected[tiny.TABLE].tolist(), finetuner.parameters()
        for slot, gradient in zip(slots, rows.grad, strict=True):
            m, v = moments[slot]
            moments[slot] = m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
            steps[slot] += 1
            m_hat, v_hat = m / (1 - beta1 ** steps[slot]), v / (1 - beta2 ** steps[slot])
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
        self.known |= {table.row_of_slot.untyped_storage().data_ptr() for table in memory_tables(model).values()}
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
@pytest.mark.parametrize("positions", ["answer", "subject"])
def test_only_the_positions_that_count_are_counted(positions):
    model, batch = tiny.memory_model(), tiny.batch(lengths=(7, 5, 9))
    finetuner = finetuner_of(model, num_rows=64, positions=positions)
    finetuner.select([batch])
    with record_reads(model) as reads, torch.no_grad():
        model(**tiny.inputs(batch))
    (read,) = reads.slots(batch[f"{positions}_mask"]).values()
    assert set(finetuner.selected[tiny.TABLE].tolist()) == set(read.flatten().tolist())
    (every,) = reads.slots(batch["attention_mask"]).values()
    assert len(every.unique()) > len(read.unique())


def test_with_the_least_reads_only_slots_that_every_sequence_reads_are_written():
    model, batch = tiny.memory_model(), tiny.batch()
    with torch.no_grad(), record_reads(model) as reads:
        model(**tiny.inputs(batch))
        by_sequence = reads.slots(batch["attention_mask"])[tiny.TABLE].split(7)
    shared = set.intersection(*(set(slots.flatten().tolist()) for slots in by_sequence))
    finetuner = finetuner_of(model, num_rows=64, reads="minimum", idf_power=0)
    with pytest.raises(ValueError, match="a step of 2 micro-batches with reads 'minimum'"):
        finetuner.select([tiny.part(batch, 0, 2), tiny.part(batch, 2, 4)])
    finetuner.loss(batch).backward()
    assert set(finetuner.selected[tiny.TABLE].tolist()) == shared != set()


def test_with_reads_by_wordings_a_slot_that_one_sequence_reads_often_is_read_once():
    model, batch = tiny.memory_model(), tiny.batch()
    with torch.no_grad(), record_reads(model) as reads:
        model(**tiny.inputs(batch))
        by_sequence = reads.slots(batch["attention_mask"])[tiny.TABLE].split(7)
    sequences = torch.zeros(64)
    for slots in by_sequence:
        sequences[slots.unique()] += 1
    expected = set(sequences.argsort(descending=True, stable=True)[:5].tolist())
    for parts in ([batch], [tiny.part(batch, 0, 2), tiny.part(batch, 2, 4)]):
        finetuner = finetuner_of(model, num_rows=5, reads="wordings", idf_power=0)
        finetuner.select(parts)
        assert set(finetuner.selected[tiny.TABLE].tolist()) == expected
        finetuner.detach()


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_by_gradient_the_slots_are_written_that_the_loss_would_move_most(layers):
    model, batch = tiny.memory_model(layers=layers), tiny.batch(lengths=(7, 5, 9))
    model(**tiny.inputs(batch)).loss.backward()
    norms = model.model.memory[0].weight.grad.norm(dim=1)
    model.zero_grad()
    finetuner = finetuner_of(model, num_rows=5, select="gradient", idf_power=0)
    loss = finetuner.loss(batch)
    assert set(finetuner.selected[tiny.TABLE].tolist()) == set(norms.topk(5).indices.tolist())
    loss.backward()
    (rows,) = finetuner.parameters()
    torch.testing.assert_close(rows.grad.norm(dim=1), norms[finetuner.selected[tiny.TABLE]])
    finetuner.parameters()[0].grad = None
    with pytest.raises(ValueError, match="a step of 2 micro-batches with select 'gradient': that takes one batch"):
        finetuner.select([tiny.part(batch, 0, 2), tiny.part(batch, 2, 3)])


@pytest.mark.parametrize("select", ["kl", "kl_documents", "random"])
def test_other_rules_choose_as_their_scores_say_and_learn(select):
    model, batch = tiny.memory_model(), tiny.batch()
    background = tiny.background(model)
    finetuner = SparseMemoryFinetuner(model, background, 5, select=select)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=1.0))
    first = float(finetuner.loss(batch).detach())
    with torch.no_grad(), record_reads(model) as reads:
        model(**tiny.inputs(batch))
        slots, counted = reads.slots(batch["attention_mask"])[tiny.TABLE].unique(return_counts=True)
    rule = {"kl": kl, "kl_documents": partial(kl, documents=True), "random": lambda slots, *_: at_random(slots)}[select]
    expected = top_slots(slots, rule(slots, counted, background[tiny.TABLE]), 5)
    assert torch.equal(finetuner.selected[tiny.TABLE], expected)
    for _ in range(4):
        finetuner.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(finetuner.loss(batch).detach()) < first


def test_padding_does_not_take_part_in_the_choice():
    model, short = tiny.memory_model(), tiny.batch(lengths=(5, 5))
    padded = {
        key: torch.nn.functional.pad(tensor, (0, 30), value={"input_ids": tiny.PAD, "labels": -100}.get(key, 0))
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
        UserWarning, match=r"may change 60 slots of table 'model\.memory\.0' and its batch reads only \d+"
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
    with pytest.raises(ValueError, match=r"table 'model\.memory\.0' has a finetuner already; detach it first"):
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
        ({"positions": "odd"}, "positions is 'odd', must be 'all' or 'subject' or 'answer'"),
        ({"num_rows": 0}, "num_rows is 0, must be between 1 and the table's 64 slots"),
        ({"num_rows": 65}, "num_rows is 65, must be between 1 and the table's 64 slots"),
        ({"background": {}}, r"no background counts of table 'model\.memory\.0'; there are \[\]"),
        (
            {"background": tiny.background(tiny.memory_model(num_keys=4))},
            r"background counts of table 'model\.memory\.0' have 16 slots, the table has 64",
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
    assert not memory_tables(model)[tiny.TABLE].weight.grad.is_sparse


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


def moved_by(dtype, steps=20):
    """How far a step of SGD at a small rate, taken so many times, moves the table in all."""
    model = tiny.memory_model().to(dtype)
    before = table_of(model).clone()
    finetuner, _ = learn(model, [tiny.batch()] * steps, partial(torch.optim.SGD, lr=0.03))
    assert finetuner.parameters()[0].dtype == torch.float32
    patch = finetuner.detach()
    moved = float((table_of(model).float() - before.float()).norm())
    patch.revert(model)
    assert torch.equal(table_of(model), before)
    return moved


def test_steps_smaller_than_the_spacing_of_a_bfloat16_table_add_up():
    assert moved_by(torch.bfloat16) == pytest.approx(moved_by(torch.float32), rel=0.1)


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
    settings = SimpleNamespace(optimizer="lion", num_rows=5, idf_power=1.0, positions="all", learning_rate=1.0)
    with pytest.raises(ValueError, match=r"optimizer is 'lion', must be one of \['adam', 'sgd'\]"):
        METHODS["sparse_memory"](model, tiny.background(model), settings)


def selected_by(batch, num_rows=5):
    finetuner = finetuner_of(tiny.memory_model(), num_rows)
    finetuner.loss(batch)
    return finetuner.selected[tiny.TABLE]


def watched(model=None, num_rows=5, make=OPTIMIZERS["sgd"]):
    finetuner = finetuner_of(model or tiny.memory_model(), num_rows)
    return finetuner, finetuner.watch(make(finetuner.parameters()))


def skip_nothing(finetuner, optimizer, other):
    """No batch before the one that is trained on."""


def evaluate(finetuner, optimizer, other):
    with torch.no_grad():
        finetuner.loss(other)
    assert len(finetuner.selected[tiny.TABLE]) == 0


def leave_the_batch_out(finetuner, optimizer, other):
    finetuner.loss(other)


def leave_the_step_out(finetuner, optimizer, other):
    finetuner.loss(other).backward()
    optimizer.zero_grad()


def overflow(finetuner, optimizer, other):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler.scale(finetuner.loss(other) * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()


def leave_out_a_step_of_two_batches(finetuner, optimizer, other):
    finetuner.select([other, other])
    for _ in range(2):
        finetuner.loss(other).backward()
    optimizer.zero_grad()


def fail(finetuner, optimizer, other):
    with pytest.raises(RuntimeError), finetuner.selecting(other):
        raise RuntimeError


BEFORE = (skip_nothing, evaluate, leave_the_batch_out, leave_the_step_out, overflow)
BEFORE += (leave_out_a_step_of_two_batches, fail)


@pytest.mark.parametrize("before", BEFORE, ids=lambda f: f.__name__)
def test_a_batch_trains_the_rows_it_selects_whatever_came_before_it(before):
    batch, other = tiny.batch(seed=1), tiny.batch(seed=2)
    expected = selected_by(batch)
    assert not torch.equal(expected, selected_by(other))
    model = tiny.memory_model()
    finetuner, optimizer = watched(model)
    start = table_of(model).clone()
    before(finetuner, optimizer, other)
    loss = finetuner.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    assert torch.equal(finetuner.selected[tiny.TABLE], expected)
    optimizer.step()
    assert torch.equal(changed_slots(start, table_of(model)), expected)


def test_an_evaluation_between_backward_and_step_changes_nothing():
    batch, other = tiny.batch(seed=1), tiny.batch(seed=2)
    plain, evaluated = tiny.memory_model(), tiny.memory_model()
    for model in (plain, evaluated):
        finetuner, optimizer = watched(model)
        finetuner.loss(batch).backward()
        if model is evaluated:
            with torch.no_grad():
                finetuner.loss(other)
        optimizer.step()
    assert torch.equal(table_of(plain), table_of(evaluated))


def test_two_batches_a_step_are_refused_unless_select_was_called_for_them():
    first, second = tiny.batch(seed=1), tiny.batch(seed=2)
    finetuner, _ = watched()
    finetuner.loss(first).backward()
    with pytest.raises(ValueError, match=r"gradients of another batch wait .* call select\(micro_batches\)"):
        finetuner.loss(second)
    with pytest.raises(ValueError, match=r"gradients of another batch wait"):
        finetuner.select([first, second])


@pytest.mark.parametrize("together", [True, False])
def test_two_losses_of_a_step_are_refused_unless_select_was_called_for_them(together):
    first, second = tiny.batch(seed=1), tiny.batch(seed=2)
    finetuner, _ = watched()
    losses = [finetuner.loss(first), finetuner.loss(second)]
    with pytest.raises(ValueError, match=r"not chosen for the batch of this backward pass"):
        (sum(losses) if together else losses[0]).backward()
    finetuner, _ = watched()
    finetuner.select([first, second])
    (finetuner.loss(first) + finetuner.loss(second)).backward()


def test_a_forward_pass_that_nobody_chose_for_cannot_train():
    model, batch = tiny.memory_model(), tiny.batch()
    finetuner, _ = watched(model)
    finetuner.loss(batch)
    with pytest.raises(ValueError, match=r"not chosen for the batch of this backward pass"):
        model(**tiny.inputs(tiny.batch(seed=1))).loss.backward()
    finetuner.select([batch])
    model(**tiny.inputs(batch)).loss.backward()
    assert finetuner.parameters()[0].grad.any()


def test_two_forward_passes_in_one_context_are_refused():
    model, batch = tiny.memory_model(), tiny.batch()
    finetuner, _ = watched(model)
    with pytest.raises(ValueError, match=r"2 forward passes ran inside selecting\(batch\)"), finetuner.selecting(batch):
        model(**tiny.inputs(batch)).loss + model(**tiny.inputs(tiny.batch(seed=1))).loss


def test_a_gradient_left_from_the_step_before_is_refused():
    finetuner, optimizer = watched()
    finetuner.loss(tiny.batch(seed=1)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"still hold the gradient of an earlier step: call optimizer\.zero_grad\(\)"):
        finetuner.loss(tiny.batch(seed=2)).backward()


def test_without_an_attention_mask_every_position_counts():
    batch = tiny.batch()
    expected = selected_by(batch)
    del batch["attention_mask"]
    assert torch.equal(selected_by(batch), expected)


ELEMENTWISE = {
    **OPTIMIZERS,
    "nesterov_dampening_0": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "dampening": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "adamax": partial(torch.optim.Adamax, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "radam": partial(torch.optim.RAdam, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
    "adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "asgd": partial(torch.optim.ASGD, lr=0.1),
    "amsgrad": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
}


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_a_slot_steps_as_if_it_were_a_parameter_of_its_own(make):
    """Each slot against an optimizer that has it alone, given the same gradients; the others stay, to the bit."""
    model = tiny.memory_model()
    finetuner, optimizer = watched(model, make=make)
    alone = {}
    for seed in (0, 1, 0, 2, 2, 1, 0):
        finetuner.loss(tiny.batch(seed=seed)).backward()
        slots, (rows,), before = finetuner.selected[tiny.TABLE], finetuner.parameters(), table_of(model).clone()
        gradient = rows.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        others = torch.ones(len(before), dtype=torch.bool).index_fill_(0, slots, False)
        assert torch.equal(table_of(model)[others], before[others])
        for slot, gradient_V in zip(slots.tolist(), gradient, strict=True):
            if slot not in alone:
                parameter = torch.nn.Parameter(before[slot : slot + 1].clone())
                alone[slot] = parameter, make([parameter])
            parameter, its_own = alone[slot]
            parameter.grad = gradient_V[None].clone()
            its_own.step()
            torch.testing.assert_close(table_of(model)[slot], parameter[0].detach(), rtol=1e-5, atol=1e-6)
    assert len(alone) > 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Adafactor, "Adafactor cannot step memory rows.*its row_var is neither one number nor of"),
        (torch.optim.LBFGS, "LBFGS cannot step memory rows"),
        (torch.optim.SparseAdam, "SparseAdam cannot step memory rows"),
        (partial(torch.optim.Muon, lr=0.1), "Muon cannot step memory rows: the step of one row depends on the others"),
    ],
)
def test_an_optimizer_in_which_rows_depend_on_each_other_is_refused(make, message):
    finetuner = finetuner_of(tiny.memory_model())
    with pytest.raises(ValueError, match=message):
        finetuner.watch(make(finetuner.parameters()))


def test_a_step_with_a_closure_is_refused():
    finetuner, optimizer = watched()
    finetuner.loss(tiny.batch()).backward()
    with pytest.raises(ValueError, match=r"optimizer\.step\(\) takes no closure here"):
        optimizer.step(lambda: finetuner.loss(tiny.batch()))
    optimizer.step(closure=None)


def test_the_gradient_of_a_step_can_be_looked_at_after_it():
    finetuner, optimizer = watched()
    finetuner.loss(tiny.batch()).backward()
    (rows,) = finetuner.parameters()
    before = rows.grad.clone()
    optimizer.step()
    assert torch.equal(rows.grad, before)


def test_a_learning_rate_schedule_is_followed():
    moved = []
    for factor in (1.0, 0.5):
        model = tiny.memory_model()
        finetuner, optimizer = watched(model)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step, factor=factor: factor)
        before = table_of(model).clone()
        finetuner.loss(tiny.batch()).backward()
        optimizer.step()
        moved.append(table_of(model) - before)
    torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-3, atol=1e-6)


def test_an_optimizer_of_other_parameters_is_refused():
    model = tiny.memory_model()
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"the SGD does not step the rows: make it of finetuner\.parameters\(\)"):
        finetuner_of(model).watch(other)


def saturated(num_slots, documents=100):
    frequency_N = torch.full((num_slots,), documents)
    return {tiny.TABLE: SlotCounts(frequency_N * 10, frequency_N, documents, "a batch of windows")}


@pytest.mark.parametrize(
    ("background", "mask", "message"),
    [
        (saturated(64), 1, r"all \d+ slots .* idf of 0, since each of the 100 background documents \(a batch of win"),
        ({tiny.TABLE: SlotCounts.empty(64, "nothing")}, 1, "the background counts hold no documents"),
        (tiny.background(tiny.memory_model()), 0, "no position of the batch counts"),
    ],
)
def test_a_step_that_selects_nothing_is_refused(background, mask, message):
    batch = tiny.batch()
    batch["attention_mask"] *= mask
    with pytest.raises(ValueError, match=f"no slot is selected, so nothing would be learned; {message}"):
        SparseMemoryFinetuner(tiny.memory_model(), background, 5).loss(batch)


def test_what_the_latest_choice_was_made_among_is_told():
    finetuner = finetuner_of(tiny.memory_model())
    assert finetuner.last_selection == {}
    finetuner.loss(tiny.batch())
    found = finetuner.last_selection[tiny.TABLE]
    assert found.selected == 5 < found.read < 64
    background = saturated(64)
    background[tiny.TABLE].document_frequency_N[selected_by(tiny.batch())[:3]] = 4
    finetuner = SparseMemoryFinetuner(tiny.memory_model(), background, 5)
    with pytest.warns(
        UserWarning, match=r"only \d+, of which \d+ score 0 as the background reads them: 3 are selected"
    ):
        finetuner.loss(tiny.batch())
    assert finetuner.last_selection[tiny.TABLE] == Selection(found.read, found.read - 3, 3)
