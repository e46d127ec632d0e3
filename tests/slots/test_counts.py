"""Background counts against a count in plain Python, and through a model."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from memlayer.decoders.attach import record_reads
from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.slots.counts import SlotCounts, load_counts, save_counts

NUM_SLOTS, TOP_K = 12, 3
KEYS = {"layers.1.mlp.keys.half_keys": "ab12"}


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
    counts = SlotCounts.empty(NUM_SLOTS, "test", KEYS)
    for texts in parts:
        counts.update(*tensors(texts))
    return counts


def same(a, b):
    return (
        torch.equal(a.reads_N, b.reads_N)
        and torch.equal(a.document_frequency_N, b.document_frequency_N)
        and (a.num_documents, a.document, a.product_keys) == (b.num_documents, b.document, b.product_keys)
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


def test_the_same_counts_are_the_same_bytes(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for file in files:
        save_counts({"memory.0": counted([[[1, 2, 3]]]), "memory.1": counted([[[0, 1, 11]]])}, file)
    assert len({file.read_bytes() for file in files}) == 1


def test_raising_and_lowering_document_frequencies_is_exact_and_stays_between_none_and_all():
    counts = counted([[[1, 2, 3]], [[3, 3, 4]], [[5, 6, 7]]])
    slots_P, documents_P = torch.tensor([0, 3, 9]), torch.tensor([3, 1, 2])
    raised = counts.raised(slots_P, documents_P)
    assert raised.document_frequency_N.tolist() == [3, 1, 1, 3, 1, 1, 1, 1, 0, 2, 0, 0]
    assert same(raised.raised(slots_P, -documents_P), counts)
    for sign in (1, -1):
        with pytest.raises(ValueError, match=r"of \d slots would leave 0 to 3: these are not the background counts"):
            (raised if sign == 1 else counts).raised(slots_P, sign * documents_P)


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


def test_counts_of_other_product_keys_are_refused_when_loaded_and_by_a_finetuner(tmp_path):
    path = tmp_path / "counts.safetensors"
    save_counts({"memory.0": counted([[[1, 2, 3]]])}, path)
    assert load_counts(path, {"memory.0": NUM_SLOTS}, {"memory.0": KEYS})["memory.0"].product_keys == KEYS
    with pytest.raises(ValueError, match=r"other product keys at layers\.1\.mlp\.keys\.half_keys: .* another model"):
        load_counts(path, {"memory.0": NUM_SLOTS}, {"memory.0": {"layers.1.mlp.keys.half_keys": "cd34"}})
    model, other = tiny.memory_model(), tiny.memory_model(seed=1)
    background = tiny.background(model)
    background[tiny.TABLE].product_keys = product_key_fingerprints(model)[tiny.TABLE]
    with pytest.raises(ValueError, match="counted with other product keys"):
        SparseMemoryFinetuner(other, background, 5)
    assert all(p.requires_grad for p in other.parameters())
    SparseMemoryFinetuner(model, background, 5)


def test_counts_that_do_not_say_with_which_product_keys_are_neither_saved_nor_loaded(tmp_path):
    path = tmp_path / "counts.safetensors"
    with pytest.raises(ValueError, match="do not say with which product keys they were counted"):
        save_counts({"memory.0": SlotCounts.empty(NUM_SLOTS, "test")}, path)
    assert not path.exists()
    save_counts({"memory.0": counted([[[1, 2, 3]]])}, path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    save_file(tensors, path, {"format": "pt", "memory.0.num_documents": "1", "memory.0.document": "test"})
    with pytest.raises(ValueError, match=r"does not say with which product keys was counted: count again"):
        load_counts(path, {"memory.0": NUM_SLOTS})


def test_damaged_counts_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "counts.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"background counts .* are damaged .*count again"):
        load_counts(tmp_path / "counts.safetensors", {"memory.0": NUM_SLOTS})
