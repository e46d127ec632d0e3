"""Scores and the choice of top slots, by hand and by brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.slots.counts import SlotCounts
from memlayer.slots.selection import kl, read_by_all, read_by_each, step_shares, tf_idf, top_slots


def counts(document_frequency, num_documents):
    seen_N = torch.tensor(document_frequency)
    return SlotCounts(seen_N, seen_N, num_documents, "by hand")


def test_tf_idf_equals_the_formula_worked_out_by_hand():
    background = counts([0, 3, 9, 1], num_documents=9)
    scores = tf_idf(torch.tensor([0, 1, 2]), torch.tensor([2, 5, 3]), background)
    expected = [0.2 * math.log(10 / 1), 0.5 * math.log(10 / 4), 0.3 * math.log(10 / 10)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-15)


def test_term_frequency_alone_ignores_the_background():
    scores = tf_idf(torch.tensor([0, 2]), torch.tensor([1, 3]), counts([9, 9, 9], 9), idf_power=0)
    assert scores.tolist() == [0.25, 0.75]


def test_a_slot_that_every_document_reads_scores_zero_and_is_never_chosen():
    slots = torch.tensor([0, 1])
    scores = tf_idf(slots, torch.tensor([100, 1]), counts([7, 0], num_documents=7))
    assert scores[0] == 0
    assert top_slots(slots, scores, num_rows=2).tolist() == [1]


def test_ties_go_to_the_lower_slot_whatever_the_order_given():
    slots, scores = torch.tensor([9, 4, 7, 2]), torch.tensor([1.0, 1.0, 2.0, 1.0])
    assert top_slots(slots, scores, num_rows=3).tolist() == [2, 4, 7]


def test_nothing_read_means_nothing_chosen():
    empty = torch.empty(0, dtype=torch.int64)
    assert tf_idf(empty, empty, counts([1, 2], 3)).shape == (0,)
    assert top_slots(empty, torch.empty(0), num_rows=5).tolist() == []


@pytest.mark.parametrize("num_rows", [0, -1])
def test_a_number_of_rows_below_one_is_refused(num_rows):
    with pytest.raises(ValueError, match=f"num_rows is {num_rows}, must be at least 1"):
        top_slots(torch.tensor([1]), torch.tensor([1.0]), num_rows)


def read_slots():
    """Distinct slots below 30 with a number of reads each, in any order."""
    return st.dictionaries(st.integers(0, 29), st.integers(1, 4), max_size=30).map(lambda d: list(d.items()))


@settings(max_examples=150, deadline=None)
@given(
    reads=read_slots(),
    seen=st.lists(st.integers(0, 5), min_size=30, max_size=30),
    num_rows=st.integers(1, 35),
    idf_power=st.sampled_from([0.0, 1.0, 8.0]),
)
def test_chosen_slots_are_the_best_by_brute_force(reads, seen, num_rows, idf_power):
    slots_U = torch.tensor([slot for slot, _ in reads], dtype=torch.int64)
    reads_U = torch.tensor([number for _, number in reads], dtype=torch.int64)
    scores_U = tf_idf(slots_U, reads_U, counts(seen, num_documents=5), idf_power)
    ranked = sorted(zip((-scores_U).tolist(), slots_U.tolist(), strict=True))
    expected = sorted(slot for minus_score, slot in ranked[:num_rows] if minus_score < 0)
    chosen = top_slots(slots_U, scores_U, num_rows)
    assert chosen.tolist() == expected
    assert set(expected) <= {slot for slot, _ in reads}
    assert chosen.dtype == torch.int64


def test_a_slot_counts_as_often_as_the_sequence_that_reads_it_least():
    slots_PK = torch.tensor([[3, 5], [3, 3], [5, 3], [7, 3]], dtype=torch.int32)
    assert read_by_all(slots_PK, torch.tensor([0, 0, 1, 1]), 2).tolist() == [3, 3, 5]
    assert read_by_all(slots_PK, torch.tensor([0, 0, 1, 1]), 3).tolist() == [], "the third reads none"
    assert read_by_all(slots_PK[:0], torch.tensor([], dtype=torch.int64), 2).tolist() == []


@given(st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=8), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_slots_that_all_sequences_read_are_those_of_a_loop(sequences):
    slots_PK = torch.tensor([[slot] for sequence in sequences for slot in sequence])
    sequence_P = torch.tensor([index for index, sequence in enumerate(sequences) for _ in sequence])
    expected = [slot for slot in range(7) for _ in range(min(sequence.count(slot) for sequence in sequences))]
    assert read_by_all(slots_PK, sequence_P, len(sequences)).tolist() == expected


def test_kl_equals_the_formula_worked_out_by_hand():
    background = SlotCounts(torch.tensor([0, 3, 9, 0]), torch.tensor([0, 1, 3, 0]), 4, "by hand")
    slots, reads = torch.tensor([0, 1, 2]), torch.tensor([2, 1, 1])
    by_reads = [0.5 * math.log(0.5 / (1 / 16)), 0.25 * math.log(0.25 / (4 / 16)), 0.25 * math.log(0.25 / (10 / 16))]
    assert kl(slots, reads, background).tolist() == pytest.approx(by_reads)
    by_documents = [0.5 * math.log(0.5 / (1 / 8)), 0.25 * math.log(0.25 / (2 / 8)), 0.25 * math.log(0.25 / (4 / 8))]
    assert kl(slots, reads, background, documents=True).tolist() == pytest.approx(by_documents)


def test_by_kl_a_protected_slot_counts_as_read_more_often():
    background = SlotCounts(
        torch.tensor([0, 12]), torch.tensor([0, 4]), 4, "by hand"
    )  # a document reads a slot 3 times
    slots, reads, protected = torch.tensor([0]), torch.tensor([5]), torch.tensor([2])
    assert kl(slots, reads, background, protected).tolist() == pytest.approx([math.log(1 / (7 / 14))])
    assert kl(slots, reads, background, protected, documents=True).tolist() == pytest.approx([math.log(1 / (3 / 6))])


def test_the_mean_slot_takes_half_a_step_and_an_unread_one_a_whole_one():
    assert step_shares(torch.tensor([0, 3, 9, 21]), 3.0, 1.0).tolist() == [1.0, 0.5, 0.25, 0.125]
    assert step_shares(torch.tensor([0, 3]), 3.0, 0.0).tolist() == [1.0, 1.0]


@given(st.lists(st.lists(st.integers(0, 6), max_size=5), max_size=4))
def test_read_by_each_counts_every_sequence_once(sequences):
    slots_PK = torch.tensor([slot for each in sequences for slot in each], dtype=torch.int64)[:, None]
    sequence_P = torch.tensor([number for number, each in enumerate(sequences) for _ in each], dtype=torch.int64)
    expected = sorted(slot for each in sequences for slot in set(each))
    assert sorted(read_by_each(slots_PK, sequence_P).tolist()) == expected
