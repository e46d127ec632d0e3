"""Our tokenizer is the sentencepiece model it was made from; any other is what its folder says."""

import io
import json
import warnings
from pathlib import Path

import pytest
import sentencepiece
import tiny
from byte_level import END, byte_level_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from memlayer.data.qa import Example, encode
from memlayer.data.tokenizer import SAMPLES, load_tokenizer, save_tokenizer, train_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def usual(text):
    """Leaves out the two kinds of text on which the libraries differ by design.

    transformers reads a literal "<s>" as the token of that name, sentencepiece as three letters. Before text
    that begins with a space (or the sign that stands for one) only sentencepiece puts another.
    """
    return not text.startswith((" ", "▁")) and not any(s in text for s in ("<s>", "</s>", "<unk>", "<pad>"))


TEXT = st.text(st.characters(exclude_categories=["Cs"])).filter(usual)


@settings(max_examples=300, deadline=None)
@given(TEXT)
@example("")
@example("two  spaces and a tab\t")
@example("北京 ☃ 🦙 e\u0301 \u00a0\u2028")
def test_ids_equal_those_of_sentencepiece(loaded, reference, text):
    assert loaded.encode(text, add_special_tokens=False) == reference.encode(text)


@settings(max_examples=200, deadline=None)
@given(TEXT.filter(lambda text: "▁" not in text))
def test_decoding_gives_the_text_back(loaded, text):
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text


def test_nothing_is_unknown_and_a_begin_token_alone_is_added(loaded):
    ids = loaded.encode("ξένος 🦙", add_special_tokens=False)
    assert loaded.unk_token_id not in ids
    assert loaded.encode("where is Oslo?") == [1, *loaded.encode("where is Oslo?", add_special_tokens=False)]


def test_special_tokens_are_those_of_the_model(loaded, reference):
    ours = (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    theirs = (reference.unk_id(), reference.bos_id(), reference.eos_id(), reference.pad_id())
    assert ours == theirs == (0, 1, 2, 3)
    assert len(loaded) == reference.get_piece_size() == 340


def test_training_twice_gives_the_same_model(folder, tmp_path):
    tiny.tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_a_saved_tokenizer_is_loaded_as_it_was(folder, loaded, tmp_path):
    save_tokenizer(loaded, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    again = load_tokenizer(tmp_path)
    for sentence in tiny.SENTENCES:
        assert again.encode(sentence) == loaded.encode(sentence)
    save_tokenizer(again, tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == loaded.get_vocab()


def test_a_unigram_model_is_refused_at_load(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.SENTENCES),
        model_writer=model,
        model_type="unigram",
        vocab_size=340,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=3,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*test_a_folder"):
        load_tokenizer(tmp_path)


def test_a_hub_model_that_cannot_be_reached_is_named_in_one_sentence():
    with pytest.raises(FileNotFoundError, match=r"^no tokenizer at some/model: [^\n]+$"):
        load_tokenizer("some/model")


def test_a_byte_level_tokenizer_is_saved_and_loaded_as_it_was(tmp_path):
    original = byte_level_tokenizer(bos_token="<s>", pad_token="<pad>")
    save_tokenizer(original, tmp_path)
    with warnings.catch_warnings(action="error"):
        again = load_tokenizer(tmp_path)
    for text in (*tiny.SENTENCES, *SAMPLES, " a  b\n"):
        assert again.encode(text) == original.encode(text)
        assert again.decode(again.encode(text)) == text
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", END, "<pad>")


def test_padding_is_the_end_token_where_there_is_none_and_that_is_said_once(tmp_path):
    save_tokenizer(byte_level_tokenizer(), tmp_path / "base")
    with pytest.warns(UserWarning, match=r"base has no padding token, its end token <\|endoftext\|> is used"):
        tokenizer = load_tokenizer(tmp_path / "base")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    save_tokenizer(tokenizer, tmp_path / "saved")
    with warnings.catch_warnings(action="error"):
        assert load_tokenizer(tmp_path / "saved").pad_token == END


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer in .* has no end token"):
        load_tokenizer(tmp_path)


def test_a_broken_file_is_refused_by_the_name_of_its_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer in .*test_a_broken_file.* cannot be loaded: "):
        load_tokenizer(tmp_path)


def test_the_model_of_an_earlier_tokenizer_is_not_left_beside_another(loaded, tmp_path):
    save_tokenizer(loaded, tmp_path)
    save_tokenizer(byte_level_tokenizer(pad_token="<pad>"), tmp_path)
    assert load_tokenizer(tmp_path).encode("Oslo") == byte_level_tokenizer(pad_token="<pad>").encode("Oslo")


def test_a_sentencepiece_model_of_others_is_left_to_transformers(tmp_path):
    """Llama 2 has a tokenizer.model too: taken for ours, it would get a padding token beyond its vocabulary."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.warns(UserWarning, match="has no padding token, its end token </s> is used"):
        tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 340
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("Oslo 42", add_special_tokens=False) == reference.encode("Oslo 42")
    save_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == model.getvalue(), "it is not ours to delete"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")
def test_the_tokenizer_of_gpt2_is_saved_and_loaded_as_it_was(tmp_path):
    vocab = json.loads((SHARED / "gpt2" / "encoder.json").read_text())
    merges = [tuple(line.split()) for line in (SHARED / "gpt2" / "vocab.bpe").read_text().splitlines()[1:]]
    original = GPT2Tokenizer(vocab=vocab, merges=merges)
    save_tokenizer(original, tmp_path)
    with pytest.warns(UserWarning, match="has no padding token"):
        again = load_tokenizer(tmp_path)
    assert again.encode("Hello world") == original.encode("Hello world") == [15496, 995]
    (encoded,) = encode(again, [Example("The capital of France is", "Paris")])
    assert again.decode(encoded["input_ids"]) == f"The capital of France is Paris{END}"
    assert encoded["input_ids"][encoded["answer_start"] :] == [6342, again.eos_token_id]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")
def test_the_tokenizer_of_olmo_works_as_it_is(tmp_path):
    original = PreTrainedTokenizerFast(tokenizer_file=str(SHARED / "gpt_neox_olmo" / "tokenizer.json"), eos_token=END)
    save_tokenizer(original, tmp_path)
    with pytest.warns(UserWarning, match="has no padding token"):
        again = load_tokenizer(tmp_path)
    (encoded,) = encode(again, [Example("The capital of France is", "Paris")])
    assert again.decode(encoded["input_ids"]) == f"The capital of France is Paris{END}"


@pytest.mark.parametrize("text", [["too small"], []])
def test_text_too_small_for_the_vocabulary_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="no tokenizer with vocab_size = 5000 from this text"):
        train_tokenizer(text, 5000, tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
