"""What is settled and checked before a run trains: arguments, output folder, lengths.

A mistake found after an hour of training costs the hour, and one found while writing costs the result.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainingArguments

from memlayer.jobs.config import RunConfig
from memlayer.jobs.trainer_settings import DECIDED, check_reporters, check_trainer
from memlayer.machine import best_device, use_threads

SPLIT_METHODS = ("sparse_memory", "full")  # what of learn.method trains a table that processes share


def training_arguments(
    config: RunConfig, folder: str = "trainer", batch_size: int | None = None, **ours
) -> TrainingArguments:
    """The Trainer's arguments: defaults of ours, those of the job, and the config's ``trainer`` section.

    Args:
        folder: where in the output the Trainer keeps its checkpoints.
        batch_size: of one optimizer step; it is shared out among all processes and micro-batches, so that their number
            does not change what is learned. None where an item of the dataset is a micro-batch.
        ours: of the job.

    Raises:
        ValueError: a setting that the job does not leave open or the Trainer refuses, a package that is not
            installed, or a batch that cannot be shared out.
    """
    on_cpu = best_device().type == "cpu"
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
        "per_device_train_batch_size": batch_size or 1,
    }
    check_trainer(config.job, config.trainer)
    _refuse_engines()
    check_reporters(config.trainer.get("report_to"))
    try:
        arguments = TrainingArguments(**{**defaults, **ours, **config.trainer, **fixed})
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"trainer: {' '.join(str(error).split())}") from error
    _refuse_devices(arguments)
    _check_shards(config, arguments.world_size)
    if batch_size is not None:
        _share_batch(arguments)
    use_threads()
    return arguments


def count_windows_once(arguments: TrainingArguments, windows: int) -> None:
    """Give evaluation a batch with which all processes have full ones.

    The Trainer fills up the others with windows that it has counted already; only batches of one are left out again.
    """
    most, processes = arguments.per_device_eval_batch_size, arguments.world_size
    if processes > 1:
        arguments.per_device_eval_batch_size = next(
            size for size in range(most, 0, -1) if size == 1 or windows % (size * processes) == 0
        )


def _refuse_engines() -> None:
    for engine in ("fsdp", "deepspeed"):
        if os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true":
            raise ValueError(f"accelerate was told to use {engine}: {DECIDED[engine]}")


def _refuse_devices(arguments: TrainingArguments) -> None:
    if arguments.device.type not in ("cpu", "cuda"):
        raise ValueError(f"the kernels have no way on {arguments.device}: leave trainer.use_cpu out, or set it to true")
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible, and one process would spread each batch over them: "
            "show it one with CUDA_VISIBLE_DEVICES=0, or launch a process for each"
        )


def _check_shards(config: RunConfig, processes: int) -> None:
    """Refuse what a table that processes share cannot do."""
    shards = config.table.shards
    if processes % shards:
        raise ValueError(
            f"table.shards is {shards}, and {processes} process{'es' * (processes > 1)} cannot stand in groups of that "
            "size: launch a multiple of it"
        )
    if shards == 1:
        return
    if config.trainer.get("save_on_each_node"):
        raise ValueError(f"trainer.save_on_each_node with table.shards={shards}: only the first process writes")
    if config.job == "learn" and (refused := _needs_whole_table(config.learn)):
        raise ValueError(f"table.shards is {shards}, but {refused} needs the whole table in each process")


def _needs_whole_table(learn) -> str | None:
    if learn.method not in SPLIT_METHODS:
        return f"learn.method={learn.method}"
    if learn.mist is not None:
        return "learn.mist"
    on = [name for name, term in vars(learn.terms).items() if term is not None]
    return f"learn.terms.{on[0]}" if on else None


def _share_batch(arguments: TrainingArguments) -> None:
    batch = arguments.per_device_train_batch_size
    processes, micro_batches = arguments.world_size, arguments.gradient_accumulation_steps
    if batch % (processes * micro_batches):
        would_do = [str(n) for n in range(1, batch // processes + 1) if batch % (processes * n) == 0]
        advice = f"{', '.join(would_do)} micro-batches would do" if would_do else "take fewer processes"
        raise ValueError(
            f"a batch of {batch} examples cannot be shared by {processes} process{'es' * (processes > 1)} with "
            f"trainer.gradient_accumulation_steps={micro_batches}: {advice}"
        )
    arguments.per_device_train_batch_size = batch // (processes * micro_batches)


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


def check_checkpoint(folder: str | Path) -> None:
    """Say where a folder that can be taught comes from when there is none.

    Raises:
        FileNotFoundError: it holds no model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"no checkpoint in {folder}: config.json is missing; job pretrain writes such a folder, and memory is "
            f"attached to a pretrained model, also of the hub, by job retrofit with base={folder}"
        )


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
