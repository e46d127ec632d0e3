"""python examples/llama2c_to_hf.py model.bin tokenizer.bin runs/stories

Turns a llama2.c model and its tokenizer into a Hugging Face folder, to retrofit memory into. The layout is the first
one of https://github.com/karpathy/llama2.c (its export version 0): float32, without a version number.

Text is begun and ended by id 1 there, so the folder's begin token is its end token too. The tokenizer merges as
llama2.c does: of all neighbours, the two whose union has the highest score.
"""

import argparse
import math
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
LATER_VERSIONS = 0x616B3432  # the number they begin with, "ak42"
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")  # ids 0 to 2; the file writes the last two between line ends
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]  # ids 3 to 258


def read_header(data: bytes, path: Path) -> dict[str, int]:
    """The seven sizes a model begins with; a negative ``vocab_size`` says that the classifier is not tied.

    Raises:
        ValueError: a size is impossible, or the file is of a later version.
    """
    if len(data) < 4 * len(HEADER):
        raise ValueError(f"{path} has {len(data)} bytes, a header alone takes {4 * len(HEADER)}")
    header = dict(zip(HEADER, struct.unpack_from("<7i", data)))
    if header["dim"] == LATER_VERSIONS:
        raise ValueError(f"{path} is of a later llama2.c version, this reads version 0: export with --version 0")
    for name, number in header.items():
        if number == 0 or (number < 0 and name != "vocab_size"):
            raise ValueError(f"{path}: {name} is {number}")
    for whole, part in (("dim", "n_heads"), ("n_heads", "n_kv_heads")):
        if header[whole] % header[part]:
            raise ValueError(f"{path}: {whole} is {header[whole]}, not a multiple of {part} = {header[part]}")
    return header


def read_model(path: Path) -> LlamaForCausalLM:
    """Read a model.

    Raises:
        ValueError: the file is not as long as the sizes in its header make it.
    """
    data = path.read_bytes()
    header = read_header(data, path)
    shapes, tied = tensor_shapes(header), header["vocab_size"] > 0
    size = 4 * len(HEADER) + 4 * sum(map(math.prod, shapes.values()))
    if len(data) != size:
        sizes = ", ".join(f"{name} {number}" for name, number in header.items())
        raise ValueError(f"{path} has {len(data)} bytes, its header ({sizes}) makes it {size}")
    floats = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=4 * len(HEADER)).copy())
    pieces = floats.split([math.prod(shape) for shape in shapes.values()])
    tensors = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)}
    config = LlamaConfig(
        vocab_size=abs(header["vocab_size"]),
        hidden_size=header["dim"],
        intermediate_size=header["hidden_dim"],
        num_hidden_layers=header["n_layers"],
        num_attention_heads=header["n_heads"],
        num_key_value_heads=header["n_kv_heads"],
        max_position_embeddings=header["seq_len"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state_dict(tensors, header))
    return model.eval()


def tensor_shapes(header: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The tensors of the file in their order, under the names that llama2.c has for them."""
    dim, hidden, layers, vocab = (header[name] for name in ("dim", "hidden_dim", "n_layers", "vocab_size"))
    head_dim = dim // header["n_heads"]
    kv_dim = head_dim * header["n_kv_heads"]
    shapes = {
        "token_embedding": (abs(vocab), dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "rotary_cos": (header["seq_len"], head_dim // 2),  # transformers computes these two itself
        "rotary_sin": (header["seq_len"], head_dim // 2),
    }
    return shapes if vocab > 0 else {**shapes, "classifier": (abs(vocab), dim)}


def state_dict(tensors: dict[str, Tensor], header: dict[str, int]) -> dict[str, Tensor]:
    """The same numbers under the names that transformers has for them."""
    state = {
        "model.embed_tokens.weight": tensors["token_embedding"],
        "model.norm.weight": tensors["rms_final"],
        "lm_head.weight": tensors.get("classifier", tensors["token_embedding"]),
    }
    for layer in range(header["n_layers"]):
        of_layer = {
            "input_layernorm": tensors["rms_att"][layer],
            "self_attn.q_proj": halves(tensors["wq"][layer], header["n_heads"]),
            "self_attn.k_proj": halves(tensors["wk"][layer], header["n_kv_heads"]),
            "self_attn.v_proj": tensors["wv"][layer],
            "self_attn.o_proj": tensors["wo"][layer],
            "post_attention_layernorm": tensors["rms_ffn"][layer],
            "mlp.gate_proj": tensors["w1"][layer],
            "mlp.down_proj": tensors["w2"][layer],
            "mlp.up_proj": tensors["w3"][layer],
        }
        state |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in of_layer.items()}
    return state


def halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows reordered within each head: llama2.c turns rows 2i and 2i + 1, transformers i and i + head_dim / 2."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_pieces(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    """The pieces of a tokenizer with their scores, in the order of their ids.

    Raises:
        ValueError: the file holds another number of pieces than the model, a piece twice, or no piece for each byte.
    """
    data, offset, pieces = path.read_bytes(), 4, []
    while offset < len(data):
        if offset + 8 > len(data):
            raise ValueError(f"{path} ends within piece {len(pieces)}")
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8 + length
        if length < 0 or offset > len(data):
            raise ValueError(f"{path}: piece {len(pieces)} has length {length}, the file ends before it")
        pieces.append((data[offset - length : offset], score))
    if len(pieces) != vocab_size:
        raise ValueError(f"{path} has {len(pieces)} pieces, the model has {vocab_size}")
    texts = [*SPECIAL_PIECES, *(piece.decode("utf-8", "replace") for piece, _ in pieces[len(SPECIAL_PIECES) :])]
    first_text = len(SPECIAL_PIECES) + len(BYTE_PIECES)
    if texts[len(SPECIAL_PIECES) : first_text] != BYTE_PIECES:
        raise ValueError(f"{path}: pieces 3 to 258 are not the bytes <0x00> to <0xFF>")
    if len(set(texts)) < len(texts):
        repeated = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"{path} has piece {repeated!r} twice")
    return list(zip(texts, (score for _, score in pieces)))


def build_tokenizer(pieces: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that gives text the ids that llama2.c gives it.

    Spaces stay spaces in its pieces. Special tokens written in the text are read as such, which llama2.c does not.
    """
    ids = {text: number for number, (text, _) in enumerate(pieces)}
    first_text = len(SPECIAL_PIECES) + len(BYTE_PIECES)
    # Highest score first. The splits of one piece share its score, and no text is known on which their order matters.
    merges = [
        (text[:cut], text[cut:])
        for text, _ in sorted(pieces[first_text:], key=lambda piece: -piece[1])
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<s>",
        unk_token="<unk>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model, such as stories260K.bin")
    parser.add_argument("tokenizer", type=Path, help="its tokenizer, such as tok512.bin")
    parser.add_argument("output", type=Path, help="folder to write")
    arguments = parser.parse_args()
    model = read_model(arguments.model)
    tokenizer = build_tokenizer(read_pieces(arguments.tokenizer, model.config.vocab_size))
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{model.num_parameters():,} parameters and {len(tokenizer)} pieces written to {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"llama2c_to_hf.py: {error}")
