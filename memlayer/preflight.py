"""What is settled and checked before a run trains: arguments, output folder, lengths.

A mistake found after an hour of training costs the hour, and one found while writing costs the result.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments

from memlayer.config import RunConfig
from memlayer.machine import use_threads

# Settings of transformers.TrainingArguments that would be overruled, and what they follow from.
SET_ELSEWHERE = {
    "output_dir": "output",
    "seed": "seed",
    "learning_rate": "the job's learning_rate: pretrain, retrofit or learn",
    "max_steps": "pretrain.steps, retrofit.steps or learn.steps_per_fact",
    "per_device_train_batch_size": "pretrain.batch_size, retrofit.batch_size, or learn.statements and learn.questions",
    "remove_unused_columns": "the columns that batches are made of",
}


def training_arguments(config: RunConfig, folder: str = "trainer", **ours) -> TrainingArguments:
    """The Trainer's arguments: defaults of ours, those of the job, and the config's ``trainer`` section.

    Args:
        folder: where in the output the Trainer keeps its checkpoints.
        ours: of the job; ``per_device_train_batch_size`` is the batch of one optimizer step and is shared out
            among all processes and micro-batches, so that their number does not change what is learned.

    Raises:
        ValueError: an argument the Trainer does not have or that follows from another setting, or a batch that
            cannot be shared out.
    """
    on_cpu = not torch.accelerator.is_available()
    defaults = {
        "save_strategy": "no",
        "logging_steps": 100,
        "logging_nan_inf_filter": False,  # it would leave batches of nan out of a validation loss
        "report_to": "none",
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    fixed = {
        "output_dir": str(Path(config.output) / folder),
        "remove_unused_columns": False,
        "seed": config.seed,
    }
    for name in config.trainer:
        if name in SET_ELSEWHERE:
            raise ValueError(f"trainer.{name} cannot be set, it follows from {SET_ELSEWHERE[name]}")
    _refuse_engines(config)
    # YAML takes a bare no for false.
    theirs = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in config.trainer.items()}
    try:
        arguments = TrainingArguments(**{**defaults, **ours, **theirs, **fixed})
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from error
    _refuse_devices(arguments, trains_tables=config.job != "learn" or config.learn.method == "full")
    _share_batch(arguments)
    use_threads()
    return arguments


def _refuse_engines(config: RunConfig) -> None:
    for engine in ("fsdp", "deepspeed"):
        launched = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"
        if config.trainer.get(engine) or launched:
            raise ValueError(f"{engine} would split memory tables, which memlayer cannot train yet: leave it out")


def _refuse_devices(arguments: TrainingArguments, trains_tables: bool) -> None:
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible, and one process would spread each batch over them: "
            "show it one with CUDA_VISIBLE_DEVICES=0"
        )
    if trains_tables and arguments.world_size > 1 and arguments.device.type != "cpu":
        raise ValueError(
            f"{arguments.world_size} processes on GPUs: a table's gradient holds only the rows read, "
            "which NCCL does not reduce; train in one process"
        )


def _share_batch(arguments: TrainingArguments) -> None:
    batch = arguments.per_device_train_batch_size
    processes, micro_batches = arguments.world_size, arguments.gradient_accumulation_steps
    if batch % (processes * micro_batches):
        raise ValueError(
            f"a batch of {batch} examples cannot be shared by {processes} processes "
            f"with {micro_batches} micro-batches each"
        )
    arguments.per_device_train_batch_size = batch // (processes * micro_batches)


def refuse_unused(config: RunConfig, *names: str) -> None:
    """Refuse settings that a job does not look at, rather than skip them.

    Raises:
        ValueError: one of the sections or settings named differs from its default.
    """
    for name in names:
        if getattr(config, name) != getattr(RunConfig(), name):
            raise ValueError(f"{name} is set, but job {config.job!r} does not use it")


def check_output(folder: str | Path) -> None:
    """Make the folder and see that it can be written to, before there is a result to lose.

    Raises:
        ValueError: it cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to output {folder}: {error.strerror}") from error


def check_lengths(encoded: Sequence[dict], max_length: int, examples: Sequence) -> None:
    """Refuse examples that the model's positions do not cover.

    Args:
        examples: what was encoded, each with its ``text``.

    Raises:
        ValueError: an example is longer than ``max_length`` tokens.
    """
    longest, text = max((ids["length"], example.text) for ids, example in zip(encoded, examples, strict=True))
    if longest > max_length:
        raise ValueError(f"the longest example has {longest} tokens, model.max_length is {max_length}: {text!r:.200}")
