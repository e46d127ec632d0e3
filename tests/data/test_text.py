"""Documents are read from wherever they are, and no document is both trained on and validated on."""

import json
import lzma
import re

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from byte_level import END, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.data.facts import BUILTIN_FACTS, BUILTIN_WORDINGS, load_facts, load_wordings
from memlayer.data.qa import fill
from memlayer.data.text import collate_windows, load_documents, windows

STORIES = ["Once upon a time.\nThe end.", "A second story, on one line.", "Zürich is a town: 北京 ☃."]


@pytest.fixture(scope="module")
def byte_level():
    return byte_level_tokenizer()


def write(path, documents):
    """The documents in the layout that the file's ending asks for."""
    rows = [{"number": number, "text": document} for number, document in enumerate(documents)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffixes:
        case [".txt"]:
            path.write_text("\n\n\n".join(documents) + "\n", encoding="utf-8")
        case [".json"]:
            path.write_text(json.dumps(rows), encoding="utf-8")
        case [".jsonl"]:
            path.write_text(lines, encoding="utf-8")
        case [".jsonl", ".xz"]:
            path.write_bytes(lzma.compress(lines.encode()))
        case [".parquet"]:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.jsonl.xz", "a.parquet"])
def test_every_layout_gives_the_same_documents(tmp_path, name):
    assert list(load_documents([write(tmp_path / name, STORIES)])) == STORIES


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffErster Satz.\r\n\r\nZweiter Satz.\r\n".encode())
    assert list(load_documents([tmp_path / "a.txt"])) == ["Erster Satz.", "Zweiter Satz."]


def test_files_are_read_one_after_the_other_up_to_the_limit(tmp_path):
    files = [write(tmp_path / "b.txt", STORIES[:2]), write(tmp_path / "a.jsonl", STORIES[2:])]
    assert list(load_documents(files)) == STORIES
    assert list(load_documents(files[::-1], limit=2)) == [STORIES[2], STORIES[0]]


def test_another_column_can_hold_the_text_and_empty_rows_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"story": " one "}\n{"story": "\\n"}\n{"story": "two"}\n')
    assert list(load_documents([path], column="story")) == ["one", "two"]


def test_without_a_source_the_documents_tell_the_known_facts_and_no_new_one():
    documents = list(load_documents())
    assert documents == list(load_documents()), "the order is fixed"
    wordings = load_wordings(BUILTIN_WORDINGS)
    told = {"known": set(), "new": set()}
    for fact in load_facts(BUILTIN_FACTS, wordings):
        words = wordings[fact.relation]
        told[fact.split] |= {f"{fill(w, fact.subject)} {fact.answers[0]}" for w in words.statements + words.questions}
    assert set(documents) <= told["known"]
    assert not told["new"].intersection(documents)
    assert len(documents) > 0.8 * len(told["known"])


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n', "body", "a.jsonl has no column 'body', its columns are text"),
        ("a.jsonl", '{"text": 5}\n', "text", "a.jsonl, row 1: text is 5, not text"),
        ("a.jsonl", '{"text": "x"}\n{"text":\n', "text", "a.jsonl cannot be read: "),
        ("a.txt", b"caf\xe9", "text", "a.txt cannot be read: .*utf-8"),
        ("a.txt", "", "text", "a.txt is empty"),
        ("a.csv", "text\nx\n", "text", "a.csv ends in '.csv', readable are .txt, .json"),
        ("a.xz", b"", "text", "a.xz is empty"),
    ],
)
def test_a_file_that_holds_no_text_is_named_with_the_reason(tmp_path, name, content, column, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(load_documents([tmp_path / name], column=column))


def test_a_missing_file_is_named_before_any_is_read(tmp_path):
    there = write(tmp_path / "a.txt", STORIES)
    with pytest.raises(FileNotFoundError, match=r"no text file .*absent\.txt"):
        load_documents([there, tmp_path / "absent.txt"])


def test_a_dataset_that_cannot_be_reached_is_named_in_one_sentence():
    with pytest.raises(ValueError, match=r"^dataset some/text \(part\) cannot be read: [^\n]+$"):
        next(load_documents(dataset="some/text", subset="part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": ["a.txt"], "dataset": "some/text"}, "files and dataset are both named, a.txt and some/text"),
        ({"subset": "part"}, "subset is 'part', but no dataset is named"),
        ({"limit": 0}, "limit is 0 documents, must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_documents(**arguments)


def test_windows_are_the_documents_in_a_row_each_ended(byte_level):
    train, validation = windows(byte_level, tiny.SENTENCES, length=16, num_train=6, num_validation=2)
    assert (train.shape, validation.shape, train.dtype) == ((6, 16), (2, 16), torch.int64)
    text = END.join([*tiny.SENTENCES, ""])
    assert text.startswith(byte_level.decode(validation.flatten()))
    assert byte_level.decode(train.flatten()) in text


def test_a_begin_token_of_its_own_stands_before_each_document(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path)
    train, validation = windows(tokenizer, tiny.SENTENCES, length=64, num_train=3, num_validation=1)
    assert train[0, 0] == validation[0, 0] == tokenizer.bos_token_id
    after_ends = train.flatten()[1:][train.flatten()[:-1] == tokenizer.eos_token_id]
    assert len(after_ends) > 1
    assert set(after_ends.tolist()) == {tokenizer.bos_token_id}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=40, max_size=80), st.integers(2, 9), st.integers(1, 4), st.integers(1, 4))
def test_no_document_is_both_in_training_and_in_validation(byte_level, numbers, length, num_train, num_validation):
    documents = [f"#{number}." for number in numbers]
    try:
        train, validation = windows(byte_level, iter(documents), length, num_train, num_validation)
    except ValueError:  # one document over and over fills no training windows
        return
    apart = [set(re.findall(r"#\d+\.", byte_level.decode(part.flatten()))) for part in (train, validation)]
    assert not apart[0] & apart[1]
    assert byte_level.decode(train[0, :1]) == "#", "the document that validation cuts off does not go on in training"
    again, _ = windows(byte_level, documents, length, num_train, num_validation)
    assert torch.equal(train, again)


def test_a_document_longer_than_a_window_is_cut_and_kept(byte_level):
    long = " ".join(tiny.SENTENCES)
    train, _ = windows(byte_level, ["Oslo " * 30, long], length=8, num_train=20, num_validation=1)
    assert long.startswith(byte_level.decode(train.flatten()))


def test_too_little_text_is_refused_with_the_numbers(byte_level):
    tokens = len(byte_level("Oslo")["input_ids"]) + 1
    with pytest.raises(ValueError, match=f"too short: {tokens} tokens are left for validation, 4 windows of 9 take 36"):
        windows(byte_level, ["Oslo"], length=9, num_train=1, num_validation=4)
    with pytest.raises(
        ValueError, match=f"too short: {2 * tokens} tokens are left for training, 5 windows of 9 take 45"
    ):
        windows(byte_level, [tiny.SENTENCES[0], "Oslo", "Oslo"], length=9, num_train=5, num_validation=1)


@pytest.mark.parametrize(
    ("name", "number", "least"), [("length", 1, 2), ("num_train", -1, 0), ("num_validation", 0, 1)]
)
def test_numbers_that_leave_nothing_to_do_are_refused(byte_level, name, number, least):
    arguments = {"length": 4, "num_train": 1, "num_validation": 1, name: number}
    with pytest.raises(ValueError, match=f"{name} is {number}, must be at least {least}"):
        windows(byte_level, tiny.SENTENCES, **arguments)


def test_text_that_is_only_measured_needs_none_left_for_training(byte_level):
    train, validation = windows(byte_level, tiny.SENTENCES[:1], length=4, num_train=0, num_validation=1)
    assert (train.shape, validation.shape) == ((0, 4), (1, 4))


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end token to put between documents"):
        windows(tokenizer, tiny.SENTENCES, 4, 1, 1)


def test_every_token_of_a_window_is_a_label():
    batch = collate_windows([torch.tensor([5, 6, 7]), [8, 9, 9]])
    assert {key: tensor.tolist() for key, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 1, 1]],
        "labels": [[5, 6, 7], [8, 9, 9]],
    }
