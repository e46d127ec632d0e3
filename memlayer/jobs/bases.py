"""A pretrained decoder from a folder or the hub: what memory is attached to, or what writes study texts."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from memlayer.data.tokenizer import load_tokenizer

MADE_BY = {"runs/base": "tiny_base.py", "runs/stories260k": "llama2c_to_hf.py model.bin tokenizer.bin"}


def load_decoder(
    base: str, revision: str | None, dtype: torch.dtype, purpose: str, with_memory: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, and its tokenizer.

    Args:
        base: folder, or name on the hub.
        revision: of a name on the hub; None is its main branch.
        purpose: what it is loaded for; a refusal says that it cannot do or be that.
        with_memory: whether it may have memory.

    Raises:
        ValueError: there is no such model, it lacks weights, it has memory and may not, or no tokenizer fits it.
    """
    try:
        if not with_memory and getattr(AutoConfig.from_pretrained(base, revision=revision), "memory", None):
            raise ValueError("it has memory already")
        model, loading = AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} first")
        tokenizer = load_tokenizer(base, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        make = f" (python examples/{MADE_BY[base]} {base} makes it)" if base in MADE_BY else ""
        where = "" if Path(base).is_dir() else f"it is no folder{make}, and as a name on the hub: "
        raise ValueError(f"base {base} cannot {purpose}: {where}{str(error).splitlines()[0]}") from error
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        raise ValueError(f"the tokenizer of base {base} has {len(tokenizer)} tokens, the model {rows}")
    return model.eval(), tokenizer
