"""The pretraining job: tokenizer and model from nothing on the known facts, then background counts of that text."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from memlayer.data.facts import facts_of
from memlayer.data.qa import Example, collate, encode, pretraining_examples
from memlayer.data.tokenizer import load_tokenizer, train_tokenizer
from memlayer.decoders import files
from memlayer.decoders.split import tables_split
from memlayer.evaluation.qa import check_answers
from memlayer.files import sha256_of
from memlayer.jobs.checkpoints import checkpoint_to_resume
from memlayer.jobs.config import RunConfig
from memlayer.jobs.count import count
from memlayer.jobs.preflight import check_lengths, check_output, training_arguments
from memlayer.jobs.run_folder import check_finite, claimed, trained_model, write_result, write_trained
from memlayer.jobs.stepwise_trainer import train_to_end
from memlayer.jobs.taught import files_of
from memlayer.jobs.trainer import MemoryTrainer, restore
from memlayer.slots.counts import COUNTS_FILE, SlotCounts, save_counts


def pretrain(config: RunConfig) -> Path:
    """Train tokenizer and model on the known facts, then count background reads; returns the folder.

    What the folder may hold already, see ``memlayer.jobs.run_folder``.
    """
    set_seed(config.seed)
    facts, settings = facts_of(**asdict(config.data)), config.pretrain
    examples = pretraining_examples(facts.known, facts.wordings, settings.unseen_wordings)
    if not examples:
        raise ValueError("data.num_known is 0: there are no known facts to pretrain on")
    arguments = training_arguments(
        config,
        max_steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",  # a third fewer padding positions
    )
    inputs = {name: sha256_of(path) for name, path in files_of(config).items()}
    with claimed(config, inputs) as done:
        if not done:
            _pretrain(config, inputs, arguments, examples)
        PartialState().wait_for_everyone()
    return Path(config.output)


def _pretrain(
    config: RunConfig, inputs: Mapping[str, str], arguments: TrainingArguments, examples: list[Example]
) -> None:
    check_output(arguments.output_dir)
    checkpoint = checkpoint_to_resume(arguments, config, inputs)
    tokenizer = _train_tokenizer_once(arguments, examples, config.model.vocab_size)
    model = files.build(
        config.memory,
        tokenizer,
        num_layers=config.model.num_layers,
        width=config.model.width,
        num_heads=config.model.num_heads,
        ffn_width=config.model.ffn_width,
        max_length=config.model.max_length,
    )
    encoded = encode(tokenizer, examples)
    check_lengths(encoded, config.model.max_length, examples)
    check_answers(tokenizer, examples)
    if whole := trained_model(config.output):  # stopped while it counted
        restore(model.to(arguments.device), whole)
    else:
        _train(config, arguments, model, tokenizer, encoded, checkpoint)
    if PartialState().is_main_process:
        if not whole:
            save_trained(config, inputs, model, tokenizer)
        counts = _count_facts(config, model, tokenizer, encoded)
        write_result(config.output, config, inputs, lambda folder: save_counts(counts, folder / COUNTS_FILE))


def _train(
    config: RunConfig,
    arguments: TrainingArguments,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[dict],
    checkpoint: Path | None,
) -> None:
    settings = config.pretrain
    with tables_split(model, config.table.shards):
        trainer = MemoryTrainer(
            model,
            arguments,
            table_learning_rate=settings.table_learning_rate,
            train_dataset=Dataset.from_list(encoded),
            data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, loss_on=settings.loss_on),
        )
        train_to_end(trainer, checkpoint, f"pretrain.learning_rate={settings.learning_rate:g}")


def save_trained(config: RunConfig, inputs: Mapping[str, str], model: nn.Module, tokenizer) -> None:
    """Write the trained model, not yet as a result, so that a run that is stopped later need not train again."""
    check_finite(dict(model.named_parameters()))
    write_trained(config.output, config, inputs, lambda folder: files.save(model, tokenizer, folder))


def _train_tokenizer_once(
    arguments: TrainingArguments, examples: list[Example], vocab_size: int
) -> PreTrainedTokenizerBase:
    """Trained by the main process, read by the others."""
    with arguments.main_process_first(local=False):
        if arguments.process_index:
            return load_tokenizer(arguments.output_dir)
        return train_tokenizer((example.text for example in examples), vocab_size, arguments.output_dir)


def _count_facts(
    config: RunConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase, encoded: list[dict]
) -> dict[str, SlotCounts]:
    """Background counts over the pretraining text."""
    per_document = config.count.sequences_per_document
    documents = [encoded[i : i + per_document] for i in range(0, len(encoded), per_document)]
    documents.sort(key=lambda document: max(e["length"] for e in document))  # little padding in a batch
    words = f"{per_document} consecutive sequences of pretraining text, one wording of a fact each"
    make_batch = partial(collate, pad_token_id=tokenizer.pad_token_id)
    return count(model, documents, make_batch, words, max(1, config.pretrain.batch_size // per_document))
