"""Background counts against a count in plain Python, and through a model."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.attach import record_reads
from memlayer.counts import SlotCounts, load_counts, save_counts

NUM_SLOTS, TOP_K = 12, 3


def documents():
    """A few documents, each a few positions, each reading TOP_K slots."""
    position = st.lists(st.integers(0, NUM_SLOTS - 1), min_size=TOP_K, max_size=TOP_K)
    return st.lists(st.lists(position, min_size=1, max_size=4), min_size=1, max_size=5)


def tensors(texts):
    """Documents as ``update`` takes them."""
    slots = [position for text in texts for position in text]
    document = [number for number, text in enumerate(texts) for _ in text]
    return torch.tensor(slots), torch.tensor(document)


def counted(*parts):
    counts = SlotCounts.empty(NUM_SLOTS, "test")
    for texts in parts:
        counts.update(*tensors(texts))
    return counts


def same(a, b):
    return (
        torch.equal(a.reads_N, b.reads_N)
        and torch.equal(a.document_frequency_N, b.document_frequency_N)
        and (a.num_documents, a.document) == (b.num_documents, b.document)
    )


@settings(max_examples=60, deadline=None)
@given(documents())
def test_reads_and_document_frequency_equal_a_count_in_python(texts):
    counts = counted(texts)
    flat = [[slot for position in text for slot in position] for text in texts]
    assert counts.reads_N.tolist() == [sum(text.count(s) for text in flat) for s in range(NUM_SLOTS)]
    assert counts.document_frequency_N.tolist() == [sum(s in text for text in flat) for s in range(NUM_SLOTS)]
    assert counts.num_documents == len(texts)


@settings(max_examples=40, deadline=None)
@given(documents(), documents())
def test_counting_in_parts_equals_counting_at_once(first, second):
    assert same(counted(first, second), counted(first + second))


def test_two_layers_of_one_table_count_reads_twice_but_a_document_once():
    counts = SlotCounts.empty(NUM_SLOTS, "test")
    document_T = torch.tensor([0, 0, 1])
    layer = torch.tensor([[1, 2], [2, 3], [3, 4]])
    counts.update(torch.cat([layer, layer]), document_T)
    assert counts.reads_N.tolist()[:6] == [0, 2, 4, 4, 2, 0]
    assert counts.document_frequency_N.tolist()[:6] == [0, 1, 1, 2, 1, 0]
    assert counts.num_documents == 2


def count_through_model(model, batch, rows_at_once):
    counts = SlotCounts.empty(64, "a row")
    with torch.no_grad(), record_reads(model) as reads:
        for first in range(0, len(batch["input_ids"]), rows_at_once):
            some = tiny.part(batch, first, first + rows_at_once)
            mask = some["attention_mask"]
            model(input_ids=some["input_ids"], attention_mask=mask)
            document_T = torch.arange(len(mask))[:, None].expand_as(mask)[mask.bool()]
            counts.update(reads.slots(mask)[tiny.TABLE], document_T)
    return counts


def test_counting_batches_of_documents_equals_counting_one_document_at_a_time():
    model, batch = tiny.memory_model(layers=[0, 2]), tiny.batch(lengths=(9, 4, 6, 7, 5, 8))
    one_at_a_time = count_through_model(model, batch, rows_at_once=1)
    assert one_at_a_time.num_documents == 6
    assert one_at_a_time.reads_N.sum() == (9 + 4 + 6 + 7 + 5 + 8) * 2 * 6  # 2 layers, 2 heads of 3 slots
    assert same(one_at_a_time, count_through_model(model, batch, rows_at_once=4))


def test_summary_says_how_uneven_the_reads_are():
    counts = SlotCounts.empty(200, "test")
    counts.update(torch.tensor([[5, 5], [5, 6], [7, 8]]), torch.tensor([0, 0, 1]))
    expected = {"documents": 2, "live_slots": 4, "num_slots": 200, "top_1_percent_share": 4 / 6}
    assert counts.summary() == pytest.approx(expected)


def test_counts_on_another_device_are_the_same():
    counts = counted([[[1, 2, 3]]])
    assert same(counts, counts.to(torch.device("cpu")))


@pytest.mark.parametrize(
    ("slots", "document", "message"),
    [
        ([[0, 12, 1]], [0], "slots 0 to 12 read, the table has 12"),
        ([[-1, 2, 1]], [0], "slots -1 to 2 read, the table has 12"),
        ([[0, 1, 2]] * 3, [0, 0], "slots of 3 positions, documents of 2"),
        ([[0, 1, 2]], [], "slots of 1 positions, documents of 0"),
    ],
)
def test_reads_that_do_not_fit_are_refused_and_nothing_is_counted(slots, document, message):
    counts = SlotCounts.empty(NUM_SLOTS, "test")
    with pytest.raises(ValueError, match=message):
        counts.update(torch.tensor(slots), torch.tensor(document, dtype=torch.int64))
    assert same(counts, SlotCounts.empty(NUM_SLOTS, "test"))


def test_documents_without_any_read_are_refused():
    with pytest.raises(ValueError, match="slots of 0 positions, documents of 2"):
        SlotCounts.empty(NUM_SLOTS, "test").update(torch.empty(0, 3, dtype=torch.int64), torch.tensor([0, 1]))


def test_counts_are_saved_and_loaded_to_the_bit(tmp_path):
    saved = {"memory.0": counted([[[1, 2, 3]], [[3, 3, 4]]]), "memory.1": counted([[[0, 1, 11]]])}
    save_counts(saved, tmp_path / "counts.safetensors")
    loaded = load_counts(tmp_path / "counts.safetensors", {"memory.0": NUM_SLOTS, "memory.1": NUM_SLOTS})
    assert loaded.keys() == saved.keys()
    assert all(same(saved[name], loaded[name]) for name in saved)
    assert loaded["memory.0"].document_frequency_N.dtype == torch.int64


def test_loaded_counts_can_be_counted_on(tmp_path):
    first, second = [[[1, 2, 3]], [[3, 3, 4]]], [[[0, 1, 11]]]
    save_counts({"memory.0": counted(first)}, tmp_path / "counts.safetensors")
    loaded = load_counts(tmp_path / "counts.safetensors", {"memory.0": NUM_SLOTS})["memory.0"]
    loaded.update(*tensors(second))
    assert same(loaded, counted(first + second))


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"memory.0": 16}, "counts 12 slots of 'memory.0', the model has 16"),
        ({"memory.0": 12, "memory.1": 12}, "has no counts of table 'memory.1'"),
    ],
)
def test_counts_of_another_model_are_refused(tmp_path, expected, message):
    save_counts({"memory.0": counted([[[1, 2, 3]]])}, tmp_path / "counts.safetensors")
    with pytest.raises(ValueError, match=message):
        load_counts(tmp_path / "counts.safetensors", expected)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no background counts at .*absent\.safetensors"):
        load_counts(tmp_path / "absent.safetensors", {"memory.0": 12})
