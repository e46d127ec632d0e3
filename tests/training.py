"""Runs of MemoryTrainer over tiny models, what forward passes read, what is equal to the bit; shared by the tests."""

from contextlib import contextmanager
from functools import partial

import tiny
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import TrainingArguments

from memlayer.data.qa import collate
from memlayer.jobs.trainer import MemoryTrainer
from memlayer.layers.product_keys import ProductKeys


def examples(number=20, seed=0):
    """Sequences of 5 to 9 tokens as ``data.qa.encode`` returns them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 10, (number,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(tiny.PAD + 1, tiny.VOCAB, (length,), generator=generator).tolist(),
            "answer_start": length - 2,
            "length": length,
        }
        for length in lengths
    ]


def trainer_of(model, folder, data, finetuner=None, optimizer=None, callbacks=(), validation=None, **arguments):
    defaults = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "seed": 0}
    defaults |= {"remove_unused_columns": False, "disable_tqdm": True, "per_device_train_batch_size": 2}
    return MemoryTrainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        table_learning_rate=0.003,
        finetuner=finetuner,
        optimizers=(optimizer, None),
        train_dataset=data,
        eval_dataset=validation,
        data_collator=partial(collate, pad_token_id=tiny.PAD),
        callbacks=list(callbacks),
    )


def assert_same(ours, theirs, where=""):
    """Nested dictionaries and lists of tensors and numbers are equal, tensors to the bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert ours == theirs, where


@contextmanager
def watching(register, kind, keep):
    """Lists what ``keep`` returns for every forward call of a module of ``kind`` while the context lasts."""
    kept = []

    def hook(module, *seen):
        if type(module) is kind:
            kept.append(keep(*seen))

    handle = register(hook)
    try:
        yield kept
    finally:
        handle.remove()


def batches_read():
    """Token ids of every forward pass, as the embedding of the tokens gets them."""
    return watching(register_module_forward_pre_hook, nn.Embedding, lambda inputs: inputs[0].clone())


def slots_read():
    """Slots of every forward pass, padding included."""
    return watching(register_module_forward_hook, ProductKeys, lambda _inputs, output: output[1].unique())
