"""Windows hold whole documents apart, every token but a first is learned once, and batches go on where they were."""

import json
from itertools import chain, islice, pairwise

import pytest
import torch
from byte_level import byte_level_tokenizer
from torch.utils.data import DataLoader

from memlayer.data.mixture import Share, Source, part_of
from memlayer.data.packing import Batches, Packing, held_out_windows, window
from memlayer.data.qa import IGNORED, Example
from memlayer.data.text import encode_texts, readers_of

LENGTH, HELD_OUT = 16, 0.1
EXAMPLES = tuple(Example(f"Where is {n}?", f"In {n * n % 7}") for n in range(60))


@pytest.fixture(scope="module")
def packing(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} " * (n % 9 + 1)}) + "\n" for n in range(50)))
    sources = (Source("files", 2.0, tuple(readers_of([path]))), Source("facts", 1.0, examples=EXAMPLES))
    return Packing(sources, byte_level_tokenizer(), LENGTH, buffer=5, held_out=HELD_OUT)


def documents_of(packing, number):
    """The next documents of the training stream, whole."""
    mixture = packing.mixture(Share("training", HELD_OUT))
    return [mixture.take(10**6)[0] for _ in range(number)]


def segments(window):
    """Token ids of each document of a window, told by its position numbers."""
    starts = [*(window["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
    return [window["input_ids"][a:b].tolist() for a, b in pairwise(starts)]


def test_windows_in_a_row_are_the_documents_in_a_row_and_positions_begin_with_each(packing):
    mixture = packing.mixture(Share("training", HELD_OUT))
    windows = [window(mixture, packing) for _ in range(12)]
    in_a_row = [*chain(*documents_of(packing, 40))]
    assert torch.cat([each["input_ids"] for each in windows]).tolist() == in_a_row[: 12 * LENGTH]
    starts, at = set(), 0
    for ids in documents_of(packing, 40):
        starts.add(at)
        at += len(ids)
    for number, each in enumerate(windows):
        assert set(each) == {"input_ids", "labels", "position_ids"}
        positions = each["position_ids"].tolist()
        for place, position in enumerate(positions):
            begins = place == 0 or number * LENGTH + place in starts
            assert position == (0 if begins else positions[place - 1] + 1)


def test_no_document_is_asked_for_its_first_token_and_all_others_are_labels(packing):
    mixture = packing.mixture(Share("training", HELD_OUT))
    several = 0
    for each in (window(mixture, packing) for _ in range(12)):
        first = each["position_ids"] == 0
        several += int(first.sum()) > 1
        assert each["labels"][first].eq(IGNORED).all()
        assert torch.equal(each["labels"][~first], each["input_ids"][~first])
    assert several > 3


def test_alone_a_document_has_a_window_and_padding_is_no_label(packing):
    alone = Packing(packing.sources, packing.tokenizer, LENGTH, False, buffer=5, held_out=HELD_OUT)
    mixture = alone.mixture(Share("training", HELD_OUT))
    pieces = [ids[at : at + LENGTH] for ids in documents_of(packing, 30) for at in range(0, len(ids), LENGTH)]
    for piece in pieces[:20]:
        found = window(mixture, alone)
        assert set(found) == {"input_ids", "labels", "attention_mask"}
        there = found["attention_mask"].bool()
        assert found["input_ids"][there].tolist() == piece
        assert there.sum() == len(piece)
        assert found["labels"].tolist() == [IGNORED, *piece[1:], *[IGNORED] * (LENGTH - len(piece))]


def test_labels_of_answers_stop_where_a_window_cuts_them(packing):
    facts = Source("facts", 1.0, examples=EXAMPLES, answers_only=True)
    cut = Packing((facts,), packing.tokenizer, 5, buffer=5, held_out=HELD_OUT)
    mixture = cut.mixture(Share("training", HELD_OUT))
    windows = [window(mixture, cut) for _ in range(20)]
    labels = torch.cat([each["labels"] for each in windows])
    starts = torch.cat([each["position_ids"] for each in windows]) == 0
    mixture, at = cut.mixture(Share("training", HELD_OUT)), 0
    while at < 60:
        ids, asked_from, _ = mixture.take(1000)
        for place, token in enumerate(ids):
            asked = place >= asked_from and not starts[at + place]
            assert labels[at + place] == (token if asked else IGNORED)
        at += len(ids)


def test_held_out_windows_end_with_the_text_and_share_no_document_with_training(packing):
    found = [*held_out_windows(packing, "validation", 1000)]
    assert 0 < len(found) < 30
    assert len([*held_out_windows(packing, "validation", 1)]) == 1
    trained = {tuple(ids) for ids in documents_of(packing, 400)}
    kept = {tuple(ids) for each in found for ids in segments(each)[1:-1]}
    assert kept
    assert not kept & trained
    texts = [f"{n} " * (n % 9 + 1) for n in range(50)]
    whole = [text.strip() for text in texts if part_of(text.strip(), HELD_OUT) == "validation"]
    assert kept <= {tuple(ids) for ids in encode_texts(packing.tokenizer, whole)} | {
        tuple(ids) for ids in encode_texts(packing.tokenizer, [each.text for each in EXAMPLES])
    }


def loaded(batches, workers):
    return iter(DataLoader(batches, batch_size=None, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("used", [1, 4])
def test_batches_go_on_behind_the_last_that_was_used_whatever_was_read_ahead(packing, workers, used):
    def made():
        return Batches(packing, 3, rank=1, world_size=2, workers=workers)

    whole, stopped, goes_on = made(), made(), made()
    expected = [whole.note(batch) for batch in islice(loaded(whole, workers), used + 6)]
    for batch in islice(loaded(stopped, workers), used):
        stopped.note(batch)
    goes_on.load_state(json.loads(json.dumps(stopped.state())))
    found = [goes_on.note(batch) for batch in islice(loaded(goes_on, workers), 6)]
    for ours, theirs in zip(found, expected[used:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert ours.keys() == theirs.keys() == {"input_ids", "labels", "position_ids"}
    assert goes_on.state() == whole.state()
    assert goes_on.told() == whole.told()
    assert sum(each["tokens"] for each in whole.told().values()) == (used + 6) * 3 * LENGTH


def test_no_two_processes_read_the_same_documents(packing):
    first = [set() for _ in range(2)]
    for rank, seen in enumerate(first):
        for batch in islice(Batches(packing, 4, rank, 2), 4):
            for row in range(4):
                one = {name: batch[name][row] for name in ("input_ids", "position_ids")}
                seen.update(tuple(ids) for ids in segments(one)[1:-1])
    assert all(first)
    assert not first[0] & first[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_cannot_be_read_is_one_sentence_from_a_worker_too(packing, tmp_path, workers):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n' * 20)
    batches = Batches(
        Packing((Source("mine", 1.0, tuple(readers_of([tmp_path / "a.jsonl"]))),), packing.tokenizer, 4), 2
    )
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: text is 3, not text$"):
        batches.note(next(loaded(batches, workers)))


def test_a_place_of_another_number_of_processes_or_workers_is_refused(packing):
    state = Batches(packing, 3, 0, 2, 2).state()
    with pytest.raises(
        ValueError, match="is of process 1 of 2 with 2 readers of the text, this is process 1 of 1 with"
    ):
        Batches(packing, 3).load_state(state)
