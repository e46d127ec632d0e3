"""Build, save and load memory models as ordinary Hugging Face folders.

The classes are those of ``classes.py``; here are the decoder built from scratch and the tokenizer beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from memlayer.data.tokenizer import load_tokenizer, save_tokenizer
from memlayer.decoders.architecture import random_decoder
from memlayer.decoders.attach import add_memory
from memlayer.decoders.classes import MODEL_TYPE
from memlayer.files import reading
from memlayer.layers.config import MemoryConfig
from memlayer.machine import attention

WEIGHTS = "model.safetensors"


def build(
    memory: MemoryConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    ffn_width: int,
    max_length: int,
) -> PreTrainedModel:
    """A Llama-architecture decoder with memory layers, randomly initialised in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=ffn_width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return add_memory(random_decoder(config), memory)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write config, weights and tokenizer to ``folder``."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read what ``save`` wrote; raises what ``load_model`` and ``load_tokenizer`` raise."""
    return load_model(folder), load_tokenizer(folder)


def load_model(folder: str | Path) -> PreTrainedModel:
    """The model of a folder alone, in evaluation mode.

    Raises:
        FileNotFoundError: the folder is not a checkpoint.
        ValueError: the checkpoint has no memory, or its weights do not fit its config.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: config.json is missing")
    for file in weight_files(folder):
        _check_whole(file)
    if AutoConfig.from_pretrained(folder).model_type != MODEL_TYPE:
        raise ValueError(
            f"the checkpoint in {folder} has no memory layer: job retrofit with base={folder} attaches one"
        )
    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention())
    return model.eval()


def check_saved(model: PreTrainedModel, folder: str | Path) -> None:
    """Load the checkpoint in ``folder`` and compare it with ``model``, bit by bit; it is in memory twice meanwhile.

    Raises:
        ValueError: the checkpoint does not load, or gives another model than this one.
    """
    state, saved = model.state_dict(), load_model(folder).state_dict()
    wrong = sorted(state.keys() ^ saved.keys()) or [n for n in state if not _same_bits(state[n], saved[n])]
    if wrong:
        raise ValueError(f"{folder} does not hold this model: {len(wrong)} tensors differ, {wrong[0]} first")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = (t.cpu().contiguous().flatten() for t in (one, other))
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _check_whole(file: Path) -> None:
    with reading(file), safe_open(file, framework="pt"):
        pass


@contextmanager
def _quietly() -> Iterator[None]:
    """Weights that do not fit are refused in one sentence: no table of them, and no bar before it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or its shards.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no checkpoint in {folder}: {WEIGHTS} is missing")
    return files


def numbers_changed(model: PreTrainedModel, folder: str | Path) -> int:
    """How many numbers of ``model`` differ from those of the checkpoint in ``folder``; tied weights count once."""
    state = model.state_dict()
    return sum(
        int((state[name].cpu() != saved).sum())
        for file in weight_files(folder)
        for name, saved in load_file(file).items()
    )
