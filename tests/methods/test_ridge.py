"""Ridge over rows: rows alone are written, the same in any order, and a lesson is left out or added exactly."""

import copy

import pytest
import tiny
import torch

from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.methods.ridge import RidgeFinetuner
from memlayer.methods.row_equations import dense_reads
from memlayer.methods.sparse_memory import SparseMemoryFinetuner

LESSONS = {f"lesson {seed}": tiny.batch(seed=seed) for seed in range(3)}
ADAM = torch.optim.Adam


def model_of(**settings):
    """One whose memory is heard: its output projection is not zero."""
    model = tiny.memory_model(mode="add", **settings)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "memory"):
            torch.manual_seed(0)
            layer.mlp.memory.out.weight.data.normal_()
    return model


def finetuner_of(model, lessons=LESSONS, make=ADAM, rate=0.1, **settings):
    told = {"num_rows": 20, "idf_power": 1, "positions": "all", **settings}
    finetuner = RidgeFinetuner(model, tiny.background(model), list(lessons.values()), **told)
    return finetuner, finetuner.watch(make(finetuner.parameters(), lr=rate))


def take(finetuner, optimizer, lessons, steps=4):
    for _ in range(steps):
        for name, batch in lessons.items():
            finetuner.begin(name)
            finetuner.loss(batch).backward()
            optimizer.step()


def learned(lessons=LESSONS, **settings):
    """A model that was taught, its patch and the equations."""
    model = model_of()
    finetuner, optimizer = finetuner_of(model, lessons, **settings)
    take(finetuner, optimizer, lessons)
    equations = finetuner.equations()
    return model, finetuner.detach(), equations


@pytest.mark.parametrize("positions", ["answer", "subject", "all"])
def test_rows_alone_change_and_only_those_that_the_lessons_brought(positions):
    model = model_of()
    before, trainable = tiny.snapshot(model), [p.requires_grad for p in model.parameters()]
    finetuner, optimizer = finetuner_of(model, positions=positions, num_rows=3, idf_power=0)
    take(finetuner, optimizer, LESSONS)
    brought = torch.cat([part.rows_R for part in finetuner.equations().lessons.values()]).unique()
    assert all(len(part.rows_R) == 3 for part in finetuner.equations().lessons.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "until the end"
    patch = finetuner.detach()
    name = f"{tiny.TABLE}.weight"
    assert [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])] == [name]
    moved = (model.state_dict()[name] != before[name]).any(1).nonzero()[:, 0]
    assert torch.equal(moved, brought)
    assert torch.equal(patch.tables[tiny.TABLE].slots, moved)
    assert [p.requires_grad for p in model.parameters()] == trainable
    patch.revert(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_rows_make_the_reads_that_were_wanted():
    """Where all rows may move for nothing, the model with the rows says what it said with the reads changed."""
    model, batch = model_of(), LESSONS["lesson 0"]
    only = {"lesson 0": tiny.part(batch, 0, 1)}  # 7 positions of 64 slots
    finetuner, optimizer = finetuner_of(model, only, num_rows=64, idf_power=0, ridge=1e-9)
    take(finetuner, optimizer, only)
    finetuner.begin("lesson 0")
    wanted = finetuner.loss(only["lesson 0"]).item()
    before = model(**tiny.inputs(only["lesson 0"])).loss.item()
    finetuner.detach()
    after = model(**tiny.inputs(only["lesson 0"])).loss.item()
    assert after == pytest.approx(wanted, abs=1e-4)  # float32
    assert after < before - 0.1


def test_the_reads_of_the_layer_change_by_what_the_equations_solve_for():
    model = model_of()
    finetuner, optimizer = finetuner_of(model)
    take(finetuner, optimizer, LESSONS)
    equations = finetuner.equations()
    rows_R, change_RV = equations.solve()
    part = equations.lessons["lesson 1"]

    def reads():
        found = []
        handle = memory_tables(model)[tiny.TABLE].register_forward_hook(lambda _t, _i, read: found.append(read))
        with torch.no_grad():
            model(**tiny.inputs(LESSONS["lesson 1"]))
        handle.remove()
        return found[0]

    before = reads()
    finetuner.detach()
    expected_PV = dense_reads(part.slots_PK, part.weights_PK, rows_R) @ change_RV
    torch.testing.assert_close((reads() - before).double(), expected_PV, rtol=1e-4, atol=1e-5)  # float32


def test_the_order_of_lessons_changes_no_bit():
    turned = dict(reversed(LESSONS.items()))
    (one, _, _), (other, _, _) = learned(), learned(turned)
    assert state_fingerprint(one) == state_fingerprint(other) != state_fingerprint(model_of())


def test_rounds_and_one_lesson_after_the_other_are_the_same_to_the_bit():
    model = model_of()
    finetuner, optimizer = finetuner_of(model)
    for name, batch in LESSONS.items():
        take(finetuner, optimizer, {name: batch})
    finetuner.detach()
    assert state_fingerprint(model) == state_fingerprint(learned()[0])


def test_a_lesson_deleted_or_added_is_the_model_that_never_or_always_had_it_to_the_bit():
    two = {name: batch for name, batch in LESSONS.items() if name != "lesson 1"}
    model, patch, equations = learned()
    never = learned(two)[0]
    base = copy.deepcopy(model)
    patch.revert(base)
    equations.without(["lesson 1"]).patch(base).apply(base)
    assert state_fingerprint(base) == state_fingerprint(never) != state_fingerprint(model)
    of_two, of_one = (learned(some)[2] for some in (two, {"lesson 1": LESSONS["lesson 1"]}))
    again = model_of()
    of_two.joined(of_one).patch(again).apply(again)
    assert state_fingerprint(again) == state_fingerprint(model)


def test_micro_batches_of_a_lesson_add_up_to_its_batch():
    whole, parts = model_of(), model_of()
    finetuner, optimizer = finetuner_of(whole, make=torch.optim.SGD)
    other, stepping = finetuner_of(parts, make=torch.optim.SGD)
    for name, batch in LESSONS.items():
        finetuner.begin(name)
        finetuner.loss(batch).backward()
        optimizer.step()
        other.begin(name)
        halves = [tiny.part(batch, 0, 2), tiny.part(batch, 2, 4)]
        other.select(halves)
        for half in halves:
            (other.loss(half) / 2).backward()
        stepping.step()
    ours, theirs = finetuner.detach(), other.detach()
    assert torch.equal(ours.tables[tiny.TABLE].slots, theirs.tables[tiny.TABLE].slots)
    torch.testing.assert_close(ours.tables[tiny.TABLE].rows, theirs.tables[tiny.TABLE].rows, rtol=1e-4, atol=1e-5)


def test_the_rows_are_those_that_sparse_memory_would_choose():
    model, batch = model_of(), LESSONS["lesson 2"]
    finetuner, _ = finetuner_of(model, num_rows=7, idf_power=8)
    finetuner.begin("lesson 2")
    finetuner.loss(batch)
    rows_R = finetuner.equations().lessons["lesson 2"].rows_R
    finetuner.detach()
    sparse = SparseMemoryFinetuner(model_of(), tiny.background(model), num_rows=7, idf_power=8)
    sparse.loss(batch)
    assert torch.equal(rows_R, sparse.selected[tiny.TABLE])


def test_activations_that_are_computed_again_are_changed_again():
    plain, again = model_of(), model_of()
    tiny.checkpoint_activations(again)
    again.enable_input_require_grads()
    gradients = []
    for model in (plain, again):
        finetuner, _ = finetuner_of(model)
        finetuner.begin("lesson 0")
        with torch.no_grad():
            finetuner.parameters()[0].fill_(0.1)
        finetuner.loss(LESSONS["lesson 0"]).backward()
        gradients.append(finetuner.parameters()[0].grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_an_evaluation_in_between_sees_the_untouched_model():
    model, batch = model_of(), LESSONS["lesson 0"]
    with torch.no_grad():
        before = model(**tiny.inputs(batch)).loss
    finetuner, optimizer = finetuner_of(model)
    take(finetuner, optimizer, LESSONS)
    with torch.no_grad(), finetuner.alongside():
        assert torch.equal(model(**tiny.inputs(batch)).loss, before)
        assert torch.equal(finetuner.loss(batch), before)


def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits(tmp_path):
    whole = model_of()
    finetuner, optimizer = finetuner_of(whole)
    take(finetuner, optimizer, {name: LESSONS[name] for name in ("lesson 1", "lesson 0")}, 2)
    torch.save([finetuner.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    take(finetuner, optimizer, LESSONS, 2)
    resumed = model_of()
    goes_on, other = finetuner_of(resumed)
    state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    goes_on.load_state_dict(state)
    other.load_state_dict(optimizer_state)
    take(goes_on, other, LESSONS, 2)
    ours, theirs = finetuner.detach(), goes_on.detach()
    assert ours.fingerprint == theirs.fingerprint
    assert state_fingerprint(whole) == state_fingerprint(resumed)
    for model, settings, named in (
        (model_of(), {"num_rows": 9}, "with num_rows 20, this one has 9"),
        (
            model_of(),
            {"lessons": {"lesson 0": tiny.batch((5, 5))}},
            "lesson 'lesson 1' has other positions|lesson 'les",
        ),
        (model_of(seed=1), {}, "it has other product keys"),
    ):
        with pytest.raises(ValueError, match=named):
            finetuner_of(model, **settings)[0].load_state_dict(state)


def test_how_full_the_table_is_counts_the_rows_of_the_lessons_begun():
    model = model_of()
    finetuner, optimizer = finetuner_of(model, num_rows=5)
    take(finetuner, optimizer, {"lesson 0": LESSONS["lesson 0"]}, 1)
    (full,) = finetuner.capacity().values()
    assert (full.slots, full.written, full.shared, full.lessons) == (64, 5, 0, 1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: finetuner_of(model_of(layers=[0, 2])), "takes one memory layer, the model has 2, model.layers.0.mlp"),
        (lambda: finetuner_of(model_of(), {}), "there are no lessons"),
        (
            lambda: finetuner_of(model_of(), positions="end"),
            "positions is 'end', must be 'answer' or 'subject' or 'all'",
        ),
        (lambda: finetuner_of(model_of(), num_rows=65), "num_rows is 65, must be between 1 and the table's 64 slots"),
        (lambda: finetuner_of(model_of(), ridge=0.0), "ridge=0.0, background_tokens=0.0: ridge > 0"),
        (lambda: RidgeFinetuner(model_of(), {}, [tiny.batch()]), "no background counts of table 'model.memory.0'"),
        (
            lambda: RidgeFinetuner(model_of(), tiny.background(tiny.memory_model(num_keys=16)), [tiny.batch()]),
            "have 256 slots, it has 64",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_batch_that_was_not_announced_and_a_lesson_without_a_row_are_refused():
    model = model_of()
    finetuner, _ = finetuner_of(model)
    finetuner.begin("lesson 7")
    with pytest.raises(ValueError, match="the batch is none of lesson 'lesson 7'"):
        finetuner.loss(tiny.batch(seed=7))
    background = tiny.background(model)
    background[tiny.TABLE].document_frequency_N.fill_(20)
    other = RidgeFinetuner(model_of(), background, [tiny.batch()], num_rows=20)
    other.begin("ada")
    with pytest.raises(ValueError, match="no slot is selected for lesson 'ada': all"):
        other.loss(tiny.batch())
