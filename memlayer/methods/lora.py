"""LoRA on every linear layer (peft), AdamW; merged into the weights when done, or kept beside them.

Kept beside them it is peft's own folder (``adapter_model.safetensors``), a few megabytes, which peft loads by itself.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from torch import nn

from memlayer.files import reading
from memlayer.methods.prepared import Prepared


def prepare(model: nn.Module, background, settings, lessons=()) -> Prepared:
    """Train low-rank updates of all linear layers. ``background`` and ``lessons`` are not used."""
    config = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with _quiet():
        wrapped = peft.get_peft_model(model, config)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.01, fused=True)

    def finish() -> None:
        if settings.merge:
            wrapped.merge_and_unload()
            model.requires_grad_(True)

    return Prepared(wrapped, optimizer, finish, save=None if settings.merge else wrapped.save_pretrained)


def attach(model: nn.Module, folder: Path) -> Callable[[], None]:
    """Have a model answer with the updates of a folder; returns what takes them off again, to the bit.

    Raises:
        ValueError: a file is damaged.
    """
    with reading(folder / "adapter_model.safetensors"), _quiet():
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    return lambda: wrapped.unload().requires_grad_(True)


@contextmanager
def _quiet():
    with warnings.catch_warnings():  # peft 0.21 calls what transformers 5.23 has renamed
        warnings.simplefilter("ignore", FutureWarning)
        yield
