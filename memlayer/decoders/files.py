"""Build, save and load memory models as ordinary Hugging Face folders.

The classes are those of ``classes.py``; here are the decoder built from scratch and the tokenizer beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, logging

from memlayer.data.tokenizer import load_tokenizer, save_tokenizer
from memlayer.decoders.architecture import random_decoder
from memlayer.decoders.attach import add_memory
from memlayer.decoders.classes import MODEL_TYPE, classes_with_memory
from memlayer.decoders.looked_at import rows_written
from memlayer.decoders.mapped import (
    WEIGHT_FILES,
    TensorFile,
    is_larger_than_memory,
    lay_over,
    mapped_tables,
    read_or_map,
)
from memlayer.decoders.write_mapped import write_mapped
from memlayer.files import reading
from memlayer.layers.config import MemoryConfig
from memlayer.machine import attention

log = getLogger(__name__)

WEIGHTS = "model.safetensors"
TABLES = ("auto", "loaded", "mapped")  # where load_model may have a checkpoint's tables


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
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write config and weights to ``folder``."""
    if mapped_tables(model):
        write_mapped(model, folder)
    else:
        model.save_pretrained(folder)


def load(folder: str | Path, table: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read what ``save`` wrote; raises what ``load_model`` and ``load_tokenizer`` raise."""
    return load_model(folder, table), load_tokenizer(folder)


def load_model(folder: str | Path, table: str = "auto") -> PreTrainedModel:
    """The model of a folder alone, in evaluation mode.

    Args:
        table: "loaded" into memory, "mapped" from its file (see ``mapped``), or with "auto" mapped where the
            checkpoint is larger than the memory that is free; the log then says so.

    Raises:
        FileNotFoundError: the folder is not a checkpoint.
        ValueError: the checkpoint has no memory, or its weights do not fit its config.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: config.json is missing")
    paths = weight_files(folder)
    for file in paths:
        _check_whole(file)
    if AutoConfig.from_pretrained(folder).model_type != MODEL_TYPE:
        raise ValueError(
            f"the checkpoint in {folder} has no memory layer: job retrofit with base={folder} attaches one"
        )
    if table == "auto" and is_larger_than_memory(paths):
        log.warning("%s is larger than the memory that is free: its tables are mapped from their file", folder)
        table = "mapped"
    with _quietly():
        if table == "mapped":
            return _load_mapped(folder, paths).eval()
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention()).eval()


def _load_mapped(folder: Path, paths: list[Path]) -> PreTrainedModel:
    """As transformers loads it, from tensors read one by one, of which the tables lie on their file's pages."""
    tensors, tables = read_or_map(paths)
    config = AutoConfig.from_pretrained(folder)
    told = {"config": config, "state_dict": tensors, "dtype": "auto", "attn_implementation": attention()}
    if (folder / GENERATION_CONFIG_NAME).is_file():
        told["generation_config"] = GenerationConfig.from_pretrained(folder)
    model = classes_with_memory(config.decoder_config_class).causal_lm.from_pretrained(None, **told)
    model.name_or_path = model.config.name_or_path = str(folder)
    lay_over(model, tensors, tables)
    return model


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
    with reading(file), safe_open(file, framework="np"):  # torch would map it with reserve
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
    files = sorted(Path(folder).glob(WEIGHT_FILES))
    if not files:
        raise FileNotFoundError(f"no checkpoint in {folder}: {WEIGHTS} is missing")
    return files


def numbers_changed(model: PreTrainedModel, folder: str | Path) -> int:
    """How many numbers of ``model`` differ from those of the checkpoint in ``folder``; tied weights count once.

    Of a mapped table the rows that were written are compared; the others are the file's own.
    """
    state, mapped, changed = model.state_dict(), mapped_tables(model), 0
    for file in map(TensorFile, weight_files(folder)):
        for name in file.entries:
            saved = file.map(name)
            if name in mapped:
                changed += sum(int((rows != saved[slots]).sum()) for slots, rows in rows_written(mapped[name]))
            else:
                changed += int((state[name].cpu() != saved).sum())
    return changed
