"""The job that pretrains a decoder with memory on text: any architecture, any tokenizer, a stream of several sources.

The model is built in one place (``build_model``) and trained in another (``train_on_text``), so that a control is a
model of another making on the very same batches.

Left out: text that is written while a run reads it, and deduplication, but for copies of documents that are held out.
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from memlayer.data.facts import facts_of
from memlayer.data.mixture import Source, sample
from memlayer.data.packing import Packing, held_out_windows
from memlayer.data.qa import collate, pad_token, pretraining_examples
from memlayer.data.text import hub_reader, readers_of
from memlayer.data.tokenizer import load_tokenizer, train_tokenizer
from memlayer.decoders import files
from memlayer.decoders.architecture import architecture, random_decoder
from memlayer.decoders.attach import add_memory, memory_parameters
from memlayer.decoders.packed import check_keeps_apart
from memlayer.decoders.split import tables_split
from memlayer.evaluation.provenance import provenance
from memlayer.files import sha256_of, write_file
from memlayer.jobs.checkpoints import checkpoint_to_resume, step_of
from memlayer.jobs.config import PretrainTextRun
from memlayer.jobs.count import count
from memlayer.jobs.preflight import check_output, count_windows_once, training_arguments
from memlayer.jobs.run_folder import SOURCE, check_finite, claimed, trained_model, write_result, write_trained
from memlayer.jobs.stepwise_trainer import train_to_end
from memlayer.jobs.taught import files_of
from memlayer.jobs.text_trainer import TextTrainer
from memlayer.jobs.trainer import restore
from memlayer.slots.counts import COUNTS_FILE, SlotCounts, save_counts

EVALUATIONS, LOGS = 10, 50  # over a training
RESULTS = "results.json"


def pretrain_text(config: PretrainTextRun) -> Path:
    """Train tokenizer and model on the text, then count background reads of held-out text; returns the folder.

    What the folder may hold already, see ``memlayer.jobs.run_folder``.

    Raises:
        FileNotFoundError, ValueError: a file, a setting or a model does not fit; nothing is trained then.
    """
    arguments, sources = arguments_of(config), sources_of(config)
    inputs = inputs_of(config)
    with claimed(config, inputs) as done:
        if not done:
            _pretrain(config, inputs, arguments, sources)
        PartialState().wait_for_everyone()
    return Path(config.output)


def sources_of(config: PretrainTextRun) -> tuple[Source, ...]:
    """The sources that have a weight.

    Raises:
        FileNotFoundError, ValueError: a file that is not there or cannot be read, bad facts.
    """
    found = []
    for name, told in config.text.sources.items():
        if not told.weight:
            continue
        kept = {"name": name, "weight": told.weight, "column": told.column}
        if told.facts:
            facts = facts_of(**asdict(config.data))
            examples = pretraining_examples(facts.known, facts.wordings, told.unseen_wordings)
            random.Random(config.seed).shuffle(examples)  # a buffer would hold a few facts in all their wordings
            kept |= {"examples": tuple(examples), "answers_only": told.loss_on == "answer"}
        elif told.files:
            kept["readers"] = tuple(readers_of(told.files))
        else:
            kept["readers"] = (hub_reader(told.dataset, told.subset, told.split),)
        found.append(Source(**kept))
    return tuple(found)


def build_model(config: PretrainTextRun, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The decoder with memory that ``config`` describes, randomly initialised in float32 from its seed.

    Raises:
        ValueError: there is no such architecture, or memory does not fit it.
    """
    set_seed(config.seed)
    told = config.model
    return add_memory(
        random_decoder(architecture(told.config, told.settings, tokenizer, config.text.length)), config.memory
    )


def packing_of(config: PretrainTextRun, sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase) -> Packing:
    """How the text becomes windows."""
    text = config.text
    return Packing(sources, tokenizer, text.length, text.together, config.seed, text.buffer, text.held_out)


def validation_windows(packing: Packing, number: int) -> list[dict[str, Tensor]]:
    """Windows of documents that training leaves out.

    Raises:
        ValueError: the text holds out too few documents for them.
    """
    found = list(held_out_windows(packing, "validation", number))
    if len(found) < number:
        raise ValueError(
            f"the held-out documents fill {len(found)} windows of {packing.length} tokens before a source ends, "
            f"text.num_validation is {number}: raise text.held_out, which is {packing.held_out:g}, or lower that"
        )
    return found


def train_on_text(
    config: PretrainTextRun,
    inputs: Mapping[str, str],
    model: PreTrainedModel,
    packing: Packing,
    validation: list[dict[str, Tensor]],
    folder: str = "trainer",
) -> dict:
    """Train any causal language model on the batches that ``config`` says, or go on where a run was stopped.

    Args:
        folder: where in the output checkpoints are kept; a control has one of its own.

    Returns:
        what results.json holds of it.

    Raises:
        ValueError: documents of one window hear each other, or the loss is no number.
    """
    arguments = arguments_of(config, folder)
    check_output(arguments.output_dir)
    checkpoint = checkpoint_to_resume(arguments, config, inputs)
    if packing.together:
        check_keeps_apart(model)
    settings = config.pretrain
    with tables_split(model, config.table.shards):
        trainer = TextTrainer(
            model,
            arguments,
            packing=packing,
            validation=validation,
            table_learning_rate=settings.table_learning_rate,
        )
        if trainer.is_world_process_zero() and not arguments.disable_tqdm:
            print(_speed_in_words(trainer.speed()))
        train_to_end(trainer, checkpoint, f"pretrain.learning_rate={settings.learning_rate:g}")
        loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss after {trainer.state.global_step} steps is {loss}: nothing is written")
    return {
        "validation_loss": loss,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * trainer.tokens_of_a_step,
        "resumed_at": step_of(checkpoint),
        "sources": trainer.told(),
        "speed": trainer.speed(),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }


def _speed_in_words(speed: Mapping[str, float]) -> str:
    rate, per_token = speed["matmul_flops_per_second"], speed["flops_per_token"]
    return (
        f"a token takes {per_token / 1e6:.1f} MFLOP of training; this machine multiplies matrices at {rate / 1e9:.0f} "
        f"GFLOP/s, which would be {rate / per_token:,.0f} tokens a second: flop_share is the share of that"
    )


def arguments_of(config: PretrainTextRun, folder: str = "trainer") -> TrainingArguments:
    """The Trainer's, for a training whose checkpoints are in a folder of the output."""
    settings, text = config.pretrain, config.text
    steps = settings.tokens // (settings.batch_size * text.length)
    if not steps:
        raise ValueError(
            f"pretrain.tokens is {settings.tokens}, one step takes {settings.batch_size} windows of {text.length}"
        )
    arguments = training_arguments(
        config,
        folder,
        max_steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=max(1, steps // EVALUATIONS),
        logging_steps=max(1, steps // LOGS),
        ignore_data_skip=True,  # the stream knows its place
    )
    count_windows_once(arguments, text.num_validation)
    return arguments


def inputs_of(config: PretrainTextRun) -> dict[str, str]:
    """SHA-256 of what is read from files; a dataset of the hub is taken by its name."""
    found = {}
    for name, source in config.text.sources.items():
        if source.weight and source.files:
            found[f"{SOURCE}{name}"] = "+".join(sha256_of(path) for path in source.files)
    if any(source.weight and source.facts for source in config.text.sources.values()):
        found |= {name: sha256_of(path) for name, path in files_of(config).items()}
    for name, folder, pattern in (
        ("architecture", config.model.config, "config.json"),
        ("tokenizer", config.tokenizer.name, "tokenizer*"),
    ):
        if folder and (there := sorted(Path(folder).glob(pattern))):
            found[name] = "+".join(sha256_of(path) for path in there)
    return found


def _pretrain(
    config: PretrainTextRun, inputs: Mapping[str, str], arguments: TrainingArguments, sources: tuple[Source, ...]
) -> None:
    check_output(arguments.output_dir)
    whole = trained_model(config.output)
    begun = whole or checkpoint_to_resume(arguments, config, inputs)
    tokenizer = _tokenizer(config, arguments, sources, begun=begun is not None)
    packing = packing_of(config, sources, tokenizer)
    validation = validation_windows(packing, config.text.num_validation)
    background = _background(config, packing)
    model = build_model(config, tokenizer)
    if whole:  # stopped while it counted
        restore(model, whole)
        model.to(arguments.device)
    else:
        results = train_on_text(config, inputs, model, packing, validation)
        results |= {"parameters": _parameters(model), "provenance": provenance([config.seed], asdict(config))}
        if PartialState().is_main_process:
            _write_trained(config, inputs, model, tokenizer, results)
    if PartialState().is_main_process:
        counts = _count(config, model, tokenizer, background)
        write_result(config.output, config, inputs, lambda folder: save_counts(counts, folder / COUNTS_FILE))


def _write_trained(
    config: PretrainTextRun, inputs: Mapping[str, str], model: PreTrainedModel, tokenizer, results: dict
) -> None:
    """Write the trained model, not yet as a result, so that a run that is stopped later need not train again."""
    check_finite(dict(model.named_parameters()))

    def write(folder: Path) -> None:
        files.save(model, tokenizer, folder)
        write_file(folder / RESULTS, json.dumps(results, indent=1))

    write_trained(config.output, config, inputs, write)


def _parameters(model: PreTrainedModel) -> dict[str, int]:
    whole = sum(p.numel() for p in model.parameters())
    of_memory = sum(p.numel() for p in memory_parameters(model).values())
    return {"whole model": whole, "memory": of_memory, "the rest": whole - of_memory}


def _tokenizer(
    config: PretrainTextRun, arguments: TrainingArguments, sources: tuple[Source, ...], begun: bool
) -> PreTrainedTokenizerBase:
    """The one that is named; or trained by the main process and read by the others, and by a run that goes on."""
    told = config.tokenizer
    if told.name:
        return load_tokenizer(told.name)
    with arguments.main_process_first(local=False):
        if begun or arguments.process_index:
            return load_tokenizer(arguments.output_dir)
        lines = sample(sources, config.text.held_out, told.characters)
        return train_tokenizer(lines, told.vocab_size, arguments.output_dir)


def _background(config: PretrainTextRun, packing: Packing) -> list[dict]:
    """Held-out documents to count, each cut into pieces as long as a window.

    Raises:
        ValueError: there is none.
    """
    alone = replace(packing, together=False)
    windows = held_out_windows(alone, "background", config.text.num_background)
    found = [window["input_ids"][window["attention_mask"].bool()].tolist() for window in windows]
    if not found:
        raise ValueError(
            f"no document is held out for the background: raise text.held_out, which is {packing.held_out:g}"
        )
    return [{"input_ids": ids, "answer_start": 1, "length": len(ids)} for ids in found]


def _count(
    config: PretrainTextRun, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, background: list[dict]
) -> dict[str, SlotCounts]:
    """Background counts over text of the same kind that the model was not trained on."""
    documents = [[each] for each in sorted(background, key=lambda each: each["length"])]  # little padding in a batch
    words = f"a held-out document of the pretraining text, or a piece of {config.text.length} tokens of one"
    make_batch = partial(collate, pad_token_id=pad_token(tokenizer))
    return count(model, documents, make_batch, words, config.pretrain.batch_size)
