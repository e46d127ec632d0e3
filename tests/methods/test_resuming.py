"""A sparse memory finetuner that goes on from its state ends where it would have ended."""

import pytest
import tiny
import torch
from finetuning import OPTIMIZERS, finetuner_of, learn

from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.methods.sparse_memory import SparseMemoryFinetuner


def steps(finetuner, optimizer, batches):
    """A step a batch, each a lesson of its own."""
    for number, batch in enumerate(batches):
        finetuner.begin(f"lesson {number % 3}")
        finetuner.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits(tmp_path, make, dtype):
    batches = [tiny.batch(seed=seed % 4) for seed in range(7)]  # slots are selected again, moments go on
    whole = tiny.memory_model(layers=[0, 2], share=False).to(dtype)
    finetuner = finetuner_of(whole)
    optimizer = finetuner.watch(make(finetuner.parameters()))
    steps(finetuner, optimizer, batches[:4])
    finetuner.loss(batches[4]).backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.save([finetuner.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    steps(finetuner, optimizer, batches[5:])

    resumed = tiny.memory_model(layers=[0, 2], share=False).to(dtype)
    goes_on = finetuner_of(resumed)
    other = goes_on.watch(make(goes_on.parameters()))
    state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    goes_on.load_state_dict(state)
    other.load_state_dict(optimizer_state)
    steps(goes_on, other, batches[5:])
    ours, theirs = finetuner.detach(), goes_on.detach()
    assert state_fingerprint(resumed) == state_fingerprint(whole)
    for name, table in ours.tables.items():
        for part in ("slots", "rows", "originals"):
            assert torch.equal(getattr(table, part), getattr(theirs.tables[name], part)), (name, part)
        assert table.lessons.keys() == theirs.tables[name].lessons.keys()
        assert all(torch.equal(slots, theirs.tables[name].lessons[id]) for id, slots in table.lessons.items())
        assert torch.equal(table.protected_documents, theirs.tables[name].protected_documents)


def test_a_state_of_another_model_or_other_tables_is_refused_and_changes_nothing():
    finetuner, _ = learn(tiny.memory_model(), [tiny.batch()])
    state = finetuner.state_dict()
    slot = int(state["tables"][tiny.TABLE]["slots"][0])
    other = tiny.memory_model()
    with torch.no_grad():
        memory_tables(other)[tiny.TABLE].weight[slot] += 1
    for model, named in [
        (other, f"1 of 5 rows of table 'model.memory.0' are not the patch's originals, at slot {slot}"),
        (tiny.memory_model(seed=1), "other product keys"),
        (tiny.memory_model(layers=[0, 2], share=False), "the state is of tables"),
        (tiny.memory_model(num_keys=16), "the patch changes 64 slots"),
    ]:
        before = tiny.snapshot(model)
        refusing = finetuner_of(model)
        with pytest.raises(ValueError, match=named):
            refusing.load_state_dict(state)
        refusing.detach()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_rows": 9}, "the state is of a finetuner with num_rows 5, this one has 9"),
        ({"idf_power": 8}, r"with idf_power 1\.0, this one has 8\.0"),
        ({"positions": "answer"}, "with positions 'all', this one has 'answer'"),
    ],
)
def test_a_state_of_other_settings_is_refused(settings, named):
    finetuner, _ = learn(tiny.memory_model(), [tiny.batch()])
    with pytest.raises(ValueError, match=named):
        finetuner_of(tiny.memory_model(), **settings).load_state_dict(finetuner.state_dict())


def test_a_state_over_another_background_is_refused():
    finetuner, _ = learn(tiny.memory_model(), [tiny.batch()])
    model = tiny.memory_model()
    for background, named in (
        (tiny.background(model, num_documents=50), "table 'model.memory.0' had num_documents 20, here"),
        (tiny.background(model, seed=1), "the background of table 'model.memory.0' had document_frequency"),
    ):
        other = SparseMemoryFinetuner(model, background, 5)
        with pytest.raises(ValueError, match=named):
            other.load_state_dict(finetuner.state_dict())
        other.detach()
