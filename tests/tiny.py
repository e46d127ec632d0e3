"""A decoder, batches and background counts small enough to work out by hand, shared by the tests."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from memlayer.data.tokenizer import train_tokenizer
from memlayer.decoders.attach import add_memory, memory_tables
from memlayer.layers.config import MemoryConfig
from memlayer.slots.counts import SlotCounts

VOCAB, WIDTH, PAD = 50, 16, 3
TABLE = "model.memory.0"
TOWNS = {"Lyon": "France", "Łódź": "Poland", "Zürich": "Switzerland", "Oslo": "Norway", "Porto": "Portugal"}
SENTENCES = tuple(
    f"{town} is a town; where is {town}? In {land}, at number {n}." for n in range(9) for town, land in TOWNS.items()
)


def decoder(num_layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A Llama without memory, initialised widely enough that its logits depend on what it reads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def memory_model(num_layers: int = 3, seed: int = 0, **memory) -> nn.Module:
    """The decoder with memory in its second layer: 64 slots, of which a token reads 6."""
    settings = {"layers": [1], "num_keys": 8, "num_heads": 2, "top_k": 3, **memory}
    return add_memory(decoder(num_layers, seed), MemoryConfig(**settings)).eval()


def batch(lengths=(7, 7, 7, 7), seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens padded on the right; the second and third token of each row are its subject, the
    last two its answer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(PAD + 1, VOCAB, shape, generator=generator)
    answer_mask, subject_mask = torch.zeros(2, *shape, dtype=torch.int64)
    subject_mask[:, 1:3] = 1
    for row, length in enumerate(lengths):
        answer_mask[row, length - 3 : length - 1] = 1
    return {
        "input_ids": input_ids.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, -100),
        "answer_mask": answer_mask,
        "subject_mask": subject_mask,
    }


def inputs(of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model's forward takes of a batch."""
    return {key: of[key] for key in ("input_ids", "attention_mask", "labels")}


def part(of: dict[str, torch.Tensor], first: int, last: int) -> dict[str, torch.Tensor]:
    """Rows ``first`` to ``last`` of a batch."""
    return {key: tensor[first:last] for key, tensor in of.items()}


def background(model: nn.Module, num_documents: int = 20, seed: int = 0) -> dict[str, SlotCounts]:
    """Counts that differ from slot to slot, for every table of a model."""
    generator = torch.Generator().manual_seed(seed)
    counts = {}
    for name, table in memory_tables(model).items():
        seen_N = torch.randint(0, num_documents, (table.num_embeddings,), generator=generator)
        counts[name] = SlotCounts(seen_N * 3, seen_N, num_documents, "random numbers")
    return counts


def checkpoint_activations(model: nn.Module) -> None:
    """Run every layer again in the backward pass, under either name that transformers has for it."""
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the whole state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tokenizer(folder: Path):
    """A BPE tokenizer of 340 pieces trained on SENTENCES."""
    return train_tokenizer(SENTENCES, 340, folder)


def run_python(code: str, *arguments: object, modules: tuple[str, ...] = ()) -> str:
    """Run code in a fresh interpreter that can import this file; returns what it prints."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *modules, *(() if modules else ("-c",)), code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout
