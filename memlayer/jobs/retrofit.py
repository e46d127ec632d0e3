"""The retrofit job: attach memory to a pretrained decoder and heal it on text, all other weights frozen.

Memory beside a block that starts with empty values changes no logit and hears what is written at once: with no steps
it is attached and calibrated, and the reads of the text are counted.

A model is healed when its validation loss is within a margin of the base model's: the gate. Two controls stand
beside it in the report: the base model as it was, and the same model with a dense block where the memory
is, of as many FLOPs a token as it, trained on the same batches.

Left out: training the base model's own weights along. It would heal faster, but what was lost and what the
memory holds could no longer be told apart.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from memlayer.data.hub_sets import local_file
from memlayer.data.lessons import load_lessons
from memlayer.data.qa import collate, encode, pad_token
from memlayer.data.text import collate_windows, load_documents, windows
from memlayer.decoders import files
from memlayer.decoders.attach import add_memory, calibrate, memory_layers, memory_parameters
from memlayer.decoders.controls import as_control
from memlayer.decoders.fingerprint import fingerprint
from memlayer.decoders.split import tables_split
from memlayer.evaluation.healing import BASE, DENSE, MEMORY, gate, write_healing_report
from memlayer.evaluation.provenance import provenance
from memlayer.files import sha256_of, write_file
from memlayer.jobs.bases import load_decoder
from memlayer.jobs.checkpoints import checkpoint_to_resume, step_of
from memlayer.jobs.config import RunConfig
from memlayer.jobs.count import count
from memlayer.jobs.lessons import prompts_of
from memlayer.jobs.preflight import check_output, count_windows_once, training_arguments
from memlayer.jobs.run_folder import check_finite, claimed, trained_model, write_result, write_trained
from memlayer.jobs.stepwise_trainer import StepwiseTrainer, train_to_end
from memlayer.jobs.trainer import MemoryTrainer, restore
from memlayer.layers.costs import touched_per_token
from memlayer.slots.counts import COUNTS_FILE, SlotCounts, save_counts

DEFAULT_MARGIN = {"add": 0.01, "replace": 0.05}  # nats per token
CALIBRATION, BATCH = 32, 8  # windows that calibrate memory which does not heal, and of them at a time
EVALUATIONS = 20  # over a training
HEALING = "healing.json"  # what healing did, kept beside the healed model until the report is written


@dataclass
class Text:
    """Windows to train on and to measure the loss on, int64, shape (windows, length)."""

    train_WL: Tensor
    validation_WL: Tensor


@dataclass
class Trained:
    """What training on the text did to one model.

    Attributes:
        before, after: validation loss, in nats per token.
        curves: [step, loss] pairs, "validation" and "training".
        seconds: time of the training from step ``resumed_at``.
    """

    before: float
    after: float
    curves: dict[str, list]
    seconds: float
    resumed_at: int


@dataclass
class Retrofitted:
    """The outcome of a retrofit; ``results`` is what evaluation/healing.py describes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    results: dict

    @property
    def healed(self) -> bool:
        """Whether the gate was passed."""
        return self.results["healed"]


def retrofit(config: RunConfig) -> Retrofitted:
    """Attach memory to ``config.base``, heal it, count background reads and write the folder with its report.

    Raises:
        FileNotFoundError, ValueError: the base model, its tokenizer, the text or a setting does not fit; nothing is
            trained then.
    """
    _check_folders(config)
    _arguments(config, "trainer")  # a setting that the Trainer refuses is found before a model is loaded
    model, tokenizer = load_base(config)
    inputs = _background_files(config)
    text = _text(config, tokenizer, model)
    inputs |= {"base": fingerprint(model.state_dict()), "text": fingerprint(vars(text))}
    with claimed(config, inputs) as done:
        results = _finished(config) if done else _retrofit(config, inputs, model, tokenizer, text)
        PartialState().wait_for_everyone()
    return Retrofitted(files.load_model(config.output) if done else model.eval(), tokenizer, results)


def _background_files(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the files that are counted beside the text, read once before anything is trained.

    Raises:
        FactsError, ValueError: a file or a setting of the prompts is bad.
    """
    prompts_of(config.prompts)
    named = config.retrofit.background_lessons
    if named:
        load_lessons(named)
    files_read = {f"background lessons {number}": path for number, path in enumerate(named, start=1)}
    if config.prompts.shots:
        files_read["shots"] = config.prompts.shots
    return {name: sha256_of(local_file(path)) for name, path in files_read.items()}


def _finished(config: RunConfig) -> dict:
    return json.loads((Path(config.output) / "results.json").read_text(encoding="utf-8"))


def _retrofit(
    config: RunConfig,
    inputs: Mapping[str, str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
) -> dict:
    set_seed(config.seed)
    add_memory(model, config.memory)
    touched = [touched_per_token(layer) for layer in memory_layers(model).values()]
    parameters = {
        "whole model": _size(model.parameters()),
        "memory, all that is trained": _size(memory_parameters(model).values()),
        "memory, touched by a token": sum(touched),
    }
    if whole := trained_model(config.output):  # stopped after it was healed
        restore(model, whole)
        told = json.loads((whole / HEALING).read_text(encoding="utf-8"))
        base_loss, healing, frozen = told["base_loss"], Trained(**told["healing"]), told["frozen"]
        model.to(_arguments(config, "trainer").device)
    else:
        base_loss = _base_loss(config, text)
        if not config.retrofit.steps:
            calibrate(model, [{"input_ids": each} for each in text.train_WL[:CALIBRATION].split(BATCH)])
        healing, frozen = _train_memory(config, inputs, model, text)
        told = {"base_loss": base_loss, "healing": asdict(healing), "frozen": frozen}
        if PartialState().is_main_process:
            _write_healed(config, inputs, model, tokenizer, told)
    before, after = frozen.values()
    where = f"the model is in {trained_model(config.output)}"
    assert before == after, f"healing moved frozen weights: SHA-256 {before} before, {after} after; {where}"
    trained = {MEMORY: healing}
    counts = _count(config, model, tokenizer, text) if PartialState().is_main_process else {}
    PartialState().wait_for_everyone()
    if config.retrofit.dense_control and config.retrofit.steps:
        model.to("cpu")  # the control has its place on the accelerator
        trained[DENSE], parameters[DENSE] = _train_dense(config, inputs, text)
    results = _results(config, base_loss, trained, parameters, frozen, text)

    def write(folder: Path) -> None:
        save_counts(counts, folder / COUNTS_FILE)
        write_healing_report(folder, results)
        (folder / HEALING).unlink()

    if PartialState().is_main_process:
        write_result(config.output, config, inputs, write)
    return results


def _write_healed(
    config: RunConfig, inputs: Mapping[str, str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, told: dict
) -> None:
    """Write the healed model, not yet as a result, so that a run that is stopped later need not heal again."""
    check_finite(memory_parameters(model))

    def write(folder: Path) -> None:
        files.save(model, tokenizer, folder)
        files.check_saved(model, folder)
        write_file(folder / HEALING, json.dumps(told))

    write_trained(config.output, config, inputs, write)


def _check_folders(config: RunConfig) -> None:
    if Path(config.output).resolve() == Path(config.base).resolve():
        raise ValueError(f"output and base are both {config.output}: a run would overwrite what it starts from")


def load_base(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained decoder without memory, and its tokenizer.

    Raises:
        ValueError: it cannot be loaded, or has memory already.
    """
    dtype = getattr(torch, config.retrofit.dtype)
    return load_decoder(config.base, config.retrofit.revision, dtype, "be retrofitted", with_memory=False)


def _text(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Text:
    settings, positions = config.text, getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.length > positions:
        raise ValueError(f"text.length is {settings.length}, base {config.base} has {positions} positions")
    documents = load_documents(
        settings.files, settings.dataset, settings.subset, settings.split, settings.column, settings.limit
    )
    return Text(*windows(tokenizer, documents, settings.length, settings.num_train, settings.num_validation))


def _arguments(config: RunConfig, folder: str):
    settings = config.retrofit
    interval = max(1, settings.steps // EVALUATIONS)
    arguments = training_arguments(
        config,
        folder,
        max_steps=settings.steps or 1,  # of none, the Trainer makes as many as the text has
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=interval,
        logging_steps=interval,
    )
    count_windows_once(arguments, config.text.num_validation)
    return arguments


def _base_loss(config: RunConfig, text: Text) -> float:
    model, _ = load_base(config)
    arguments = _arguments(config, "trainer")
    trainer = StepwiseTrainer(model, arguments, eval_dataset=text.validation_WL, data_collator=collate_windows)
    return _validation_loss(trainer, f"base {config.base}")


def _validation_loss(trainer: StepwiseTrainer, of: str) -> float:
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss of {of} is {loss}: nothing is written")
    return loss


def _train_memory(
    config: RunConfig, inputs: Mapping[str, str], model: PreTrainedModel, text: Text
) -> tuple[Trained, dict[str, str]]:
    """Heal; also the SHA-256 of all weights that memory did not bring, before and after."""
    model.requires_grad_(False)
    memory = memory_parameters(model)
    for parameter in memory.values():
        parameter.requires_grad_(True)

    def frozen() -> str:
        return fingerprint({name: t for name, t in model.state_dict().items() if name not in memory})

    before = frozen()
    kind = partial(MemoryTrainer, table_learning_rate=config.retrofit.table_learning_rate)
    with tables_split(model, config.table.shards):
        trained = _train(config, inputs, model, text, kind, "trainer")
    return trained, {"sha256_before": before, "sha256_after": frozen()}


def _train_dense(config: RunConfig, inputs: Mapping[str, str], text: Text) -> tuple[Trained, int]:
    """The dense control, and how many parameters its blocks have."""
    model, _ = load_base(config)
    model.requires_grad_(False)
    set_seed(config.seed)
    add_memory(model, as_control(config.memory, "dense"))
    trained = _train(config, inputs, model, text, StepwiseTrainer, "dense_control")
    return trained, _size(memory_parameters(model).values())


def _train(
    config: RunConfig,
    inputs: Mapping[str, str],
    model: nn.Module,
    text: Text,
    kind: Callable[..., StepwiseTrainer],
    folder: str,
) -> Trained:
    """Train what requires a gradient; every model gets the same batches, since their order follows from the seed."""
    arguments = _arguments(config, folder)
    check_output(arguments.output_dir)
    checkpoint = checkpoint_to_resume(arguments, config, inputs)
    trainer = kind(
        model,
        arguments,
        train_dataset=text.train_WL,
        eval_dataset=text.validation_WL,
        data_collator=collate_windows,
    )
    before = _validation_loss(trainer, f"base {config.base} as it goes into {folder}")
    if not config.retrofit.steps:
        return Trained(before, before, _curves(before, []), 0.0, 0)
    start = time.perf_counter()
    train_to_end(trainer, checkpoint, f"retrofit.learning_rate={config.retrofit.learning_rate:g}")
    seconds = time.perf_counter() - start
    after = _validation_loss(trainer, f"{folder} after {trainer.state.global_step} steps")
    return Trained(before, after, _curves(before, trainer.state.log_history), seconds, step_of(checkpoint))


def _curves(before: float, log: list[dict]) -> dict[str, list]:
    """[step, loss] pairs out of the Trainer's log; the last entry of a step counts."""
    curves = {"validation": {0: before}, "training": {}}
    for entry in log:
        for key, curve in (("eval_loss", "validation"), ("loss", "training")):
            if key in entry:
                curves[curve][entry["step"]] = entry[key]
    return {name: [list(point) for point in curve.items()] for name, curve in curves.items()}


def _count(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text
) -> dict[str, SlotCounts]:
    windows = text.train_WL[: config.retrofit.num_background].tolist()
    documents = [{"input_ids": ids, "answer_start": 1, "length": len(ids)} for ids in windows]
    words = f"a window of {config.text.length} tokens of the text that the memory healed on"
    if files_named := config.retrofit.background_lessons:
        prompts, lessons = prompts_of(config.prompts), load_lessons(files_named)
        examples = [prompts.apply(example, tokenizer) for lesson in lessons for example in lesson.teach]
        documents += sorted(encode(tokenizer, examples), key=lambda each: each["length"])
        words += f", or one of {len(examples)} examples of lessons"
    make_batch = partial(collate, pad_token_id=pad_token(tokenizer))
    return count(model, [[each] for each in documents], make_batch, words, config.retrofit.batch_size)


def _results(
    config: RunConfig,
    base_loss: float,
    trained: dict[str, Trained],
    parameters: dict[str, int],
    frozen: dict[str, str],
    text: Text,
) -> dict:
    """What evaluation/healing.py writes."""
    settings, memory = config.retrofit, config.memory
    margin = DEFAULT_MARGIN[memory.mode] if settings.margin is None else settings.margin
    healed, verdict = gate(base_loss, trained[MEMORY].after, margin)
    losses = {name: {"before": each.before, "after": each.after} for name, each in trained.items()}
    layers = ", ".join(map(str, memory.layers))
    return {
        "title": f"Memory in {config.base}, layers {layers}, mode {memory.mode}",
        "verdict": verdict,
        "healed": healed,
        "mode": memory.mode,
        "margin": margin,
        "losses": {BASE: {"before": base_loss, "after": base_loss}, **losses},
        "curves": {name: each.curves for name, each in trained.items()},
        "parameters": parameters,
        "seconds": {name: each.seconds for name, each in trained.items()},
        "resumed_at": {name: each.resumed_at for name, each in trained.items()},
        "tokens": {
            "trained on": settings.steps * settings.batch_size * config.text.length,
            "in the training windows": text.train_WL.numel(),
            "in the validation windows": text.validation_WL.numel(),
        },
        "frozen": frozen,
        "provenance": provenance([config.seed], asdict(config)),
    }


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
