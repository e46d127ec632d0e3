"""A converted model computes what llama2.c computes, and its tokenizer gives the ids that llama2.c gives."""

import importlib.util
import io
import math
import re
import struct
from pathlib import Path

import commands
import pytest
import sentencepiece
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from memlayer.data.tokenizer import load_tokenizer

REPO = Path(__file__).parents[2]
STORIES = REPO.parent / "shared" / "data" / "models" / "stories260K"
SCRIPT = "examples/llama2c_to_hf.py"
HEADER = {"dim": 24, "hidden_dim": 20, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 360, "seq_len": 32}
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
TOLD = "Tom had a red ball. He liked to play with his ball in the park. One day, Tom saw a big dog. The dog was sad."


def _load_script():
    spec = importlib.util.spec_from_file_location("llama2c_to_hf", REPO / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


llama2c = _load_script()


def random_tensors(header, seed=0):
    """Weights in the order of the file, the rotary tables left out; norms away from 1, so that none can be mixed up."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden, layers = header["dim"], header["hidden_dim"], header["n_layers"]
    vocab, kv_dim = abs(header["vocab_size"]), dim // header["n_heads"] * header["n_kv_heads"]
    shapes = {
        "embedding": (vocab, dim),
        "att_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "final_norm": (dim,),
        "classifier": (vocab, dim),
    }
    return {name: torch.randn(shape, generator=generator) / math.sqrt(dim) for name, shape in shapes.items()}


def write_model(path, header, tensors, tail=b""):
    """The binary layout: header, tensors, two rotary tables that no reader needs, an untied classifier."""
    rotary = torch.full((2, header["seq_len"], header["dim"] // header["n_heads"] // 2), math.nan)
    in_order = [*(tensor for name, tensor in tensors.items() if name != "classifier"), rotary]
    in_order += [tensors["classifier"]] if header["vocab_size"] < 0 else []
    data = b"".join(tensor.numpy().tobytes() for tensor in in_order)
    path.write_bytes(struct.pack("<7i", *header.values()) + data + tail)
    return path


def llama2c_logits(header, tensors, ids_L):
    """The forward pass of llama2.c, position by position: rotary pairs are neighbours, heads share keys and values."""
    heads, kv_heads = header["n_heads"], header["n_kv_heads"]
    head_dim = header["dim"] // heads
    x_LD = tensors["embedding"][ids_L]
    for layer in range(header["n_layers"]):
        of = {name: tensors[name][layer] for name in ("att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")}
        h_LD = rms_norm(x_LD, of["att_norm"])
        q, k, v = ((h_LD @ of[name].T).view(len(ids_L), -1, head_dim).transpose(0, 1) for name in ("wq", "wk", "wv"))
        k, v = (each.repeat_interleave(heads // kv_heads, dim=0) for each in (k, v))
        read = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x_LD = x_LD + read.transpose(0, 1).reshape(len(ids_L), -1) @ of["wo"].T
        h_LD = rms_norm(x_LD, of["ffn_norm"])
        x_LD = x_LD + (F.silu(h_LD @ of["w1"].T) * (h_LD @ of["w3"].T)) @ of["w2"].T
    classifier = tensors["classifier" if header["vocab_size"] < 0 else "embedding"]
    return rms_norm(x_LD, tensors["final_norm"]) @ classifier.T


def rms_norm(x_LD, weight):
    return x_LD * torch.rsqrt(x_LD.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def turned(x_HLE):
    """Numbers 2i and 2i + 1 of a head, taken as a complex number, turned by position / 10000^(2i / head_dim)."""
    positions, head_dim = torch.arange(x_HLE.shape[1]), x_HLE.shape[2]
    angles = positions[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    pairs = torch.view_as_complex(x_HLE.reshape(*x_HLE.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize(("vocab_size", "n_kv_heads"), [(360, 2), (-360, 2), (360, 4), (-360, 1)])
def test_logits_are_those_of_llama2c(tmp_path, vocab_size, n_kv_heads):
    header = {**HEADER, "vocab_size": vocab_size, "n_kv_heads": n_kv_heads}
    tensors = random_tensors(header)
    model = llama2c.read_model(write_model(tmp_path / "model.bin", header, tensors))
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.tie_word_embeddings == (vocab_size > 0)
    ids_L = torch.randint(360, (32,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids_L[None]).logits[0]
    torch.testing.assert_close(logits, llama2c_logits(header, tensors, ids_L), atol=1e-5, rtol=1e-5)  # float32


@pytest.mark.parametrize(
    ("changes", "tail", "message"),
    [
        ({"dim": 28}, b"", r"has \d+ bytes, its header \(dim 28, .*seq_len 32\) makes it \d+"),
        ({}, b"\0\0\0\0", r"has \d+ bytes, its header \(dim 24, .*seq_len 32\) makes it \d+"),
        ({"n_layers": 0}, b"", "n_layers is 0"),
        ({"n_heads": -4}, b"", "n_heads is -4"),
        ({"n_heads": 5}, b"", "dim is 24, not a multiple of n_heads = 5"),
        ({"n_kv_heads": 3}, b"", "n_heads is 4, not a multiple of n_kv_heads = 3"),
        ({"dim": 0x616B3432}, b"", "is of a later llama2.c version"),
    ],
)
def test_a_model_of_the_wrong_size_is_refused_by_name_and_number(tmp_path, changes, tail, message):
    path = write_model(tmp_path / "model.bin", HEADER, random_tensors(HEADER), tail)
    header = struct.pack("<7i", *{**HEADER, **changes}.values())
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(ValueError, match=message):
        llama2c.read_model(path)


def train_pieces(vocab_size=360):
    """Pieces and scores as llama2.c exports them from a sentencepiece model: with spaces, and line ends around ends."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*tiny.SENTENCES, "aaaa aaa abab ababa      x ... ......", "baaab   bab aa"] * 2),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(processor.id_to_piece(i).replace("▁", " "), processor.get_score(i)) for i in range(vocab_size)]
    return [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *pieces[3:]]


def write_pieces(path, pieces):
    data = [(piece.encode(), score) for piece, score in pieces]
    records = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in data)
    path.write_bytes(struct.pack("<i", max(len(piece) for piece, _ in data)) + records)
    return path


def llama2c_encode(text, pieces):
    """llama2.c's encoder: characters or their bytes, then the best pair of neighbours joined until there is none."""
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    tokens = [ids[" "]] if text else []
    for character in text:
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        best, where = -1e10, None
        for i in range(len(tokens) - 1):
            joined = ids.get(pieces[tokens[i]][0] + pieces[tokens[i + 1]][0])
            if joined is not None and pieces[joined][1] > best:
                best, where, union = pieces[joined][1], i, joined
        if where is None:
            return [1, *tokens]
        tokens[where : where + 2] = [union]


def plain(text):
    """Leaves out text that spells a special token, which transformers reads as that token by design."""
    return not any(special in text for special in llama2c.SPECIAL_PIECES)


@pytest.fixture(scope="module")
def pieces():
    return train_pieces()


@pytest.fixture(scope="module")
def tokenizer(pieces, tmp_path_factory):
    """Written and read again, as a user of the folder has it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = write_pieces(folder / "tokenizer.bin", pieces)
    llama2c.build_tokenizer(llama2c.read_pieces(path, len(pieces))).save_pretrained(folder / "hf")
    return load_tokenizer(folder / "hf")


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
KNOWN_TEXT = st.text("Oslo isatwn.;ab  \n<0x0A>")  # letters that merge into each other in many ways


@settings(max_examples=400, deadline=None)
@given(st.one_of(ANY_TEXT, KNOWN_TEXT).filter(plain))
@example("")
@example("  two  spaces \n\n")
@example("▁ 北京 ☃ 🦙 e\u0301 \u00a0<0x0A>")
@example("ababababa aaaaaaaaa baaaaab ......... ")
def test_ids_are_those_of_llama2c_and_decoding_gives_the_text_back(tokenizer, pieces, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == llama2c_encode(text, pieces)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentences_use_the_long_pieces(tokenizer, pieces):
    for sentence in tiny.SENTENCES:
        ids = tokenizer(sentence)["input_ids"]
        assert ids == llama2c_encode(sentence, pieces)
        assert len(ids) < 0.7 * len(sentence)


def test_sequences_begin_and_end_with_id_1(tokenizer):
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0


@pytest.mark.parametrize(
    ("change", "vocab_size", "message"),
    [
        (lambda pieces: pieces, 361, "has 360 pieces, the model has 361"),
        (lambda pieces: [*pieces[:-1], pieces[-2]], 360, "has piece '.*' twice"),
        (lambda pieces: [*pieces[:3], *pieces[4:], ("x", 0.0)], 360, "pieces 3 to 258 are not the bytes"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(tmp_path, pieces, change, vocab_size, message):
    path = write_pieces(tmp_path / "tokenizer.bin", change(pieces))
    with pytest.raises(ValueError, match=message):
        llama2c.read_pieces(path, vocab_size)


@pytest.mark.parametrize("missing", [1, 8])
def test_a_tokenizer_that_is_cut_short_is_refused(tmp_path, pieces, missing):
    path = write_pieces(tmp_path / "tokenizer.bin", pieces)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(ValueError, match="piece 359"):
        llama2c.read_pieces(path, 360)


def test_the_command_writes_a_folder_that_loads_and_generates(tmp_path, pieces):
    model = write_model(tmp_path / "model.bin", HEADER, random_tensors(HEADER))
    vocabulary = write_pieces(tmp_path / "tokenizer.bin", pieces)
    done = commands.run(SCRIPT, model, vocabulary, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert "360 pieces written to" in done.stdout
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "hf")
    expected = llama2c.read_model(model).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    prompt = tokenizer("Oslo", return_tensors="pt")
    assert loaded.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_command_refuses_in_one_sentence(tmp_path):
    (tmp_path / "short.bin").write_bytes(b"abc")
    for name, message in (("short.bin", "has 3 bytes, a header alone takes 28"), ("absent.bin", "No such file")):
        done = commands.run(SCRIPT, tmp_path / name, tmp_path / "tokenizer.bin", tmp_path / "hf")
        assert done.returncode != 0
        (line,) = done.stderr.splitlines()
        assert re.match(r"llama2c_to_hf\.py: ", line)
        assert name in line
        assert message in line


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs {STORIES}")
def test_stories260k_tells_the_story_it_tells_in_llama2c(pytestconfig):
    folder = pytestconfig.cache.mkdir("stories260K")
    done = commands.run(SCRIPT, STORIES / "stories260K.bin", STORIES / "tok512.bin", folder)
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    prompt = tokenizer("", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=100, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith(GREEDY)

    pieces = llama2c.read_pieces(STORIES / "tok512.bin", 512)
    for text in (GREEDY, TOLD, 'Zürich: 北京 ☃ \n "..."  oooo llll pppp'):
        assert tokenizer(text)["input_ids"] == llama2c_encode(text, pieces)

    ids = tokenizer(TOLD, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        told = model(ids, labels=ids).loss
        scrambled = model(ids.flip(1), labels=ids.flip(1)).loss
    assert told < 1.6
    assert scrambled > told + 2
