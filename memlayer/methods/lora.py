"""LoRA on every linear layer (peft), AdamW; merged into the weights when done."""

import warnings

import peft
import torch
from torch import nn

from memlayer.methods.prepared import Prepared


def prepare(model: nn.Module, background, settings, lessons=()) -> Prepared:
    """Train low-rank updates of all linear layers. ``background`` and ``lessons`` are not used."""
    config = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 calls what transformers 5.23 has renamed
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, config)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.01, fused=True)

    def finish() -> None:
        wrapped.merge_and_unload()
        model.requires_grad_(True)

    return Prepared(wrapped, optimizer, finish)
