"""Build, save and load memory models as ordinary Hugging Face folders.

``config.json`` carries the memory section, so a folder says how to rebuild itself; loading refuses
weights that do not fit.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memlayer.attach import add_memory
from memlayer.config import MemoryConfig, ModelConfig
from memlayer.data.tokenizer import load_tokenizer, save_tokenizer

WEIGHTS = "model.safetensors"
# Torch's fused backward is slow in bfloat16 on CPUs at 20 tokens a sequence. Loading has to use the same, or the
# logits of a loaded model would differ in the last bit.
ATTENTION = "eager"


def build(model: ModelConfig, memory: MemoryConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Llama-architecture decoder with memory layers, randomly initialised in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.width,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        max_position_embeddings=model.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    return add_memory(decoder, memory)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write config, weights and tokenizer to ``folder``."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read what ``save`` wrote.

    Raises:
        FileNotFoundError: the folder is not a checkpoint.
        ValueError: the checkpoint has no memory, or its weights do not fit its config.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no checkpoint in {folder}: {name} is missing")
    config = AutoConfig.from_pretrained(folder)
    if not getattr(config, "memory", None):
        raise ValueError(f"the checkpoint in {folder} has no memory layer")
    dtype = config.dtype or torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    try:
        add_memory(model, MemoryConfig(**config.memory))
        load_model(model, folder / WEIGHTS, strict=True)
    except (RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS} does not fit its config: {reason}") from error
    return model.eval(), load_tokenizer(folder)


def numbers_changed(model: PreTrainedModel, folder: str | Path) -> int:
    """How many numbers of ``model`` differ from those of the checkpoint in ``folder``; tied weights count once."""
    state = model.state_dict()
    return sum(int((state[name].cpu() != saved).sum()) for name, saved in load_file(Path(folder) / WEIGHTS).items())
