"""Sources are mixed by weight and shuffled, nothing held out is trained on, and a place in the stream is exact."""

import json
import lzma
from itertools import chain

import pyarrow
import pyarrow.parquet
import pytest
from byte_level import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.data.mixture import Documents, Mixture, Share, Source, part_of, sample
from memlayer.data.qa import Example
from memlayer.data.text import encode_texts, readers_of

HELD_OUT, BUFFER = 0.1, 7
WHOLE = Share("training", HELD_OUT)
TEXTS = [f"Document {n} of {n * n % 7} lines" for n in range(60)]
TRAINED = [text for text in TEXTS if part_of(text, HELD_OUT) == "training"]
EXAMPLES = tuple(Example(f"Where is {n}?", f"In {n * n % 7}") for n in range(25))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One source in four layouts, of 15 documents each."""
    folder = tmp_path_factory.mktemp("text")
    parts = [TEXTS[at : at + 15] for at in range(0, 60, 15)]
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in part) for part in parts]
    (folder / "a.txt").write_text("\n\n".join(parts[0]), encoding="utf-8")
    (folder / "b.jsonl").write_text(lines[1], encoding="utf-8")
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(lines[2].encode()))
    rows = pyarrow.Table.from_pylist([{"text": text} for text in parts[3]])
    pyarrow.parquet.write_table(rows, folder / "d.parquet", row_group_size=4)
    return Source("files", 1.0, tuple(readers_of(sorted(folder.iterdir()))))


def next_texts(documents, number, tokenizer):
    found = []
    for _ in range(number):
        found.append(tokenizer.decode(documents.current()[0], skip_special_tokens=True))
        documents.advance()
    return found


def taken(mixture, number, most=9):
    return [(mixture.current, *mixture.take(most)) for _ in range(number)]


def test_each_pass_gives_every_training_document_once_in_another_order(files, tokenizer):
    documents = Documents(files, WHOLE, tokenizer, 0, BUFFER)
    first, second = (next_texts(documents, len(TRAINED), tokenizer) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(TRAINED)
    assert first != second
    assert TRAINED not in (first, second)
    assert sorted(first[:BUFFER]) == sorted(TRAINED[:BUFFER]), "a buffer is used up before the next is read"
    assert next_texts(Documents(files, WHOLE, tokenizer, 1, BUFFER), len(TRAINED), tokenizer) != first


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("used", [0, 7, 20, 60])
def test_a_reader_goes_on_from_its_place_as_if_it_had_not_stopped(files, tokenizer, used, lanes):
    share = Share("training", HELD_OUT, lanes - 1, lanes)
    whole, stopped = (Documents(files, share, tokenizer, 0, BUFFER) for _ in range(2))
    expected = next_texts(whole, used + 70, tokenizer)
    next_texts(stopped, used, tokenizer)
    place = json.loads(json.dumps(stopped.state()))
    assert expected[used:] == next_texts(Documents(files, share, tokenizer, 0, BUFFER, place), 70, tokenizer)


def test_readers_share_the_documents_out(files, tokenizer):
    shares = [Documents(files, Share("training", HELD_OUT, lane, 3), tokenizer, 0, BUFFER) for lane in range(3)]
    found = []
    for documents in shares:
        while not documents.passes:
            found.append(tokenizer.decode(documents.current()[0], skip_special_tokens=True))
            documents.advance()
            if documents.state()["taken"] == 0:
                documents.current()  # the next is read, or the pass is over
    assert sorted(found) == sorted(TRAINED)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 120), st.integers(1, 40))
def test_a_mixture_goes_on_in_the_middle_of_a_document(files, tokenizer, used, most):
    sources = (files, Source("facts", 0.5, examples=EXAMPLES, answers_only=True))
    whole, stopped = (Mixture(sources, WHOLE, tokenizer, 0, BUFFER) for _ in range(2))
    expected = taken(whole, used + 30, most)
    taken(stopped, used, most)
    place = json.loads(json.dumps(stopped.state()))
    goes_on = Mixture(sources, WHOLE, tokenizer, 0, BUFFER, place)
    assert taken(goes_on, 30, most) == expected[used:]
    assert goes_on.state() == whole.state()


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 20)])
def test_shares_of_tokens_are_those_of_the_weights_to_within_a_document(files, tokenizer, weights):
    one, other = weights
    facts = Source("facts", other, examples=EXAMPLES)
    mixture = Mixture((Source("files", one, files.readers), facts), WHOLE, tokenizer, 0, BUFFER)
    taken(mixture, 400)
    longest = max(map(len, encode_texts(tokenizer, TEXTS + [each.text for each in EXAMPLES])))
    assert abs(mixture.tokens["files"] / one - mixture.tokens["facts"] / other) <= longest / min(weights)


def test_what_is_held_out_is_the_same_for_every_reader_and_its_copies_are_held_out_too(files, tokenizer):
    parts = {}
    for part in ("training", "validation", "background"):
        parts[part] = [*Documents(files, Share(part, HELD_OUT), tokenizer, 0, 1).one_pass()]
    assert sorted(chain(*parts.values())) == sorted(TEXTS)
    assert all(parts.values())
    twice = Source("twice", 1.0, files.readers + files.readers)
    again = [*Documents(twice, Share("validation", HELD_OUT), tokenizer, 0, 1).one_pass()]
    assert again == 2 * parts["validation"]


def test_about_as_many_documents_are_held_out_as_asked_for():
    parts = [part_of(f"text {n}", 0.05) for n in range(4000)]
    assert 150 < parts.count("validation") < 250
    assert 150 < parts.count("background") < 250


def test_of_facts_the_answer_alone_is_learned_if_so_asked(tokenizer):
    for answers_only in (False, True):
        source = Source("facts", 1.0, examples=EXAMPLES, answers_only=answers_only)
        mixture = Mixture((source,), WHOLE, tokenizer, 0, BUFFER)
        ids, asked_from, ends = mixture.take(1000)
        assert ends
        learned = tokenizer.decode(ids[asked_from:], skip_special_tokens=True)
        assert learned.strip().startswith("In ") == answers_only
        assert asked_from > 1 or not answers_only


def test_a_tokenizer_is_trained_on_training_documents_in_shares_by_weight(files):
    facts = Source("facts", 3.0, examples=EXAMPLES)
    lines = [*sample((files, facts), HELD_OUT, 400)]
    texts = {text for text in TEXTS + [each.text for each in EXAMPLES] if part_of(text, HELD_OUT) == "training"}
    assert set(lines) <= texts
    of_facts = sum(len(line) for line in lines if line.startswith("Where"))
    assert 300 <= of_facts < 340
    assert 100 <= sum(map(len, lines)) - of_facts < 140
    long = Source("long", 1.0, examples=tuple(Example("", "x" * 2500 + f"\n{n}") for n in range(9)))
    assert max(map(len, sample((long,), HELD_OUT, 4000))) == 1000


def test_a_source_without_documents_is_named(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("One document alone")
    source = Source("mine", 1.0, tuple(readers_of([tmp_path / "a.txt"])))
    with pytest.raises(ValueError, match="source mine has no training documents for reader 2 of 2"):
        Documents(source, Share("training", HELD_OUT, 1, 2), tokenizer, 0, BUFFER).current()
    wrong = Source("mine", 1.0, source.readers, column="body")
    with pytest.raises(ValueError, match=r"a\.txt has no column 'body', its columns are text"):
        Documents(wrong, WHOLE, tokenizer, 0, BUFFER).current()


def test_what_the_documents_say_that_so_many_tokens_are_of(files, tokenizer):
    facts = Source("facts", 0.5, examples=EXAMPLES)
    mixture = Mixture([files, facts], WHOLE, tokenizer, 0, BUFFER)
    spelt, tokens = [], 0
    while tokens < 300:
        piece, _, _ = mixture.take(1000)
        spelt.append(tokenizer.decode(piece, skip_special_tokens=True))
        tokens += len(piece)
    again = Mixture([files, facts], WHOLE, tokenizer, 0, BUFFER)
    assert list(again.read(tokens)) == spelt
    assert list(again.read(0)) == []
    everything = Mixture([files], WHOLE, tokenizer, 0, BUFFER).read(10**9)
    assert sorted(everything) == sorted(TRAINED)
