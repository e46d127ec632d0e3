"""Steps that are shorter the more background text reads a slot."""

import warnings

import pytest
import tiny
import torch
from finetuning import OPTIMIZERS, finetuner_of, learn

from memlayer.decoders.attach import memory_tables
from memlayer.methods.sparse_memory import SparseMemoryFinetuner


def change_and_slots(damping, make, batches=None, lessons=None, **settings):
    """By how much the rows of the table moved in the last of the steps, float64, and the slots that it chose."""
    model = tiny.memory_model()
    finetuner = finetuner_of(model, damping=damping, **settings)
    optimizer = finetuner.watch(make(finetuner.parameters()))
    for number, batch in enumerate(batches or [tiny.batch()]):
        finetuner.begin(lessons[number] if lessons else "one")
        finetuner.loss(batch).backward()
        before, slots = memory_tables(model)[tiny.TABLE].weight.detach().clone(), finetuner.selected[tiny.TABLE].clone()
        optimizer.step()
        optimizer.zero_grad()
    change = memory_tables(model)[tiny.TABLE].weight.detach().double() - before.double()
    finetuner.detach()
    return change[slots], slots


def counted():
    return tiny.background(tiny.memory_model())[tiny.TABLE]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("damping", [0.5, 4.0])
def test_a_step_is_as_much_shorter_as_the_background_reads_its_slot(make, damping):
    whole, slots = change_and_slots(0.0, make)
    damped, same_slots = change_and_slots(damping, make)
    assert torch.equal(slots, same_slots), "damping chooses no other rows"
    reads = counted().reads_N.double()
    shares = 1 / (1 + damping * reads[slots] / reads.mean())
    assert shares.min() < 0.9, "so that the test can fail"
    assert torch.allclose(damped, whole * shares[:, None], rtol=1e-3, atol=1e-7)


def test_a_slot_that_no_background_text_reads_takes_its_whole_step():
    background = tiny.background(tiny.memory_model())
    _, slots = change_and_slots(0.0, OPTIMIZERS["sgd"])
    background[tiny.TABLE].reads_N[slots[:2]] = 0
    rows = {}
    for damping in (0.0, 4.0):
        model = tiny.memory_model()
        finetuner = SparseMemoryFinetuner(model, background, 5, damping=damping)
        optimizer = finetuner.watch(OPTIMIZERS["sgd"](finetuner.parameters()))
        finetuner.loss(tiny.batch()).backward()
        optimizer.step()
        rows[damping] = memory_tables(model)[tiny.TABLE].weight.detach()[slots]
    assert torch.equal(rows[0.0][:2], rows[4.0][:2])
    assert not torch.equal(rows[0.0], rows[4.0])


def test_another_lesson_takes_shorter_steps_where_one_has_written_and_the_same_lesson_does_not():
    told = {"batches": [tiny.batch()] * 2, "idf_power": 0.0}
    alone, slots = change_and_slots(1.0, OPTIMIZERS["sgd"], lessons=["one", "one"], protect=7, **told)
    free, _ = change_and_slots(1.0, OPTIMIZERS["sgd"], lessons=["one", "two"], protect=0, **told)
    assert torch.equal(alone, free)
    protected, same_slots = change_and_slots(1.0, OPTIMIZERS["sgd"], lessons=["one", "two"], protect=7, **told)
    assert torch.equal(slots, same_slots)
    reads, more = counted().reads_N.double(), 7 * 3  # a document reads a slot three times
    shares = (reads.mean() + reads[slots]) / (reads.mean() + reads[slots] + more)
    assert torch.allclose(protected, alone * shares[:, None], rtol=1e-3, atol=1e-7)


def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits():
    batches, told = [tiny.batch(seed=seed) for seed in range(4)], {"damping": 2.0, "protect": 3}
    whole = tiny.memory_model()
    finetuner, _ = learn(whole, batches[:2], OPTIMIZERS["adam"], **told)
    state = finetuner.state_dict()
    resumed = tiny.memory_model()
    goes_on = finetuner_of(resumed, **told)
    goes_on.load_state_dict(state)
    for each in (finetuner, goes_on):
        optimizer = each.watch(OPTIMIZERS["adam"](each.parameters()))
        for batch in batches[2:]:
            each.begin("another")
            each.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    tables = [memory_tables(model)[tiny.TABLE].weight for model in (whole, resumed)]
    assert torch.equal(*tables)


def test_a_state_of_another_damping_or_other_reads_is_refused():
    finetuner, _ = learn(tiny.memory_model(), [tiny.batch()], damping=2.0)
    state = finetuner.state_dict()
    with pytest.raises(ValueError, match=r"with damping 2\.0, this one has 0\.0"):
        finetuner_of(tiny.memory_model()).load_state_dict(state)
    model = tiny.memory_model()
    background = tiny.background(model)
    background[tiny.TABLE].reads_N[0] += 1
    with pytest.raises(ValueError, match=r"the background of table 'model\.memory\.0' had reads"):
        SparseMemoryFinetuner(model, background, 5, damping=2.0).load_state_dict(state)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_damping_that_is_no_number_of_at_least_0_is_refused(damping):
    with pytest.raises(ValueError, match=f"damping is {damping}, must be a number of at least 0"):
        finetuner_of(tiny.memory_model(), damping=damping)


def test_counts_without_a_read_are_refused_and_the_model_left_as_it_was():
    model = tiny.memory_model()
    background = tiny.background(model)
    background[tiny.TABLE].reads_N.zero_()
    with pytest.raises(ValueError, match=r"damping is 1\.0, and the background counts .* hold no read"):
        SparseMemoryFinetuner(model, background, 5, damping=1.0)
    assert memory_tables(model)[tiny.TABLE].rows is None
    assert all(p.requires_grad for p in model.parameters())


def test_with_damping_every_row_that_is_read_may_be_asked_for_without_a_warning():
    """It is what keeps the others then, not the choice of a few."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change, slots = change_and_slots(1.0, OPTIMIZERS["sgd"], num_rows=60, idf_power=0.0)
    assert 5 < len(slots) < 60, "all that the batch reads, fewer than were asked for"
    assert change.abs().sum(1).count_nonzero() > 5
    with pytest.warns(UserWarning, match="may change 60 slots"):
        change_and_slots(0.0, OPTIMIZERS["sgd"], num_rows=60, idf_power=0.0)
