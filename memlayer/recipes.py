"""The jobs of train.py, as functions: pretrain a memory model, count background reads, teach new facts.

Each takes a resolved RunConfig, writes a folder, and can be called from a notebook as well.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from memlayer import __version__
from memlayer.data.facts import facts_of, taught_anew
from memlayer.data.qa import Example, collate, encode, pretraining_examples, teaching_examples
from memlayer.data.tokenizer import load_tokenizer, train_tokenizer
from memlayer.decoders import files
from memlayer.decoders.attach import memory_tables, record_reads
from memlayer.decoders.fingerprint import fingerprint, product_key_fingerprints, state_fingerprint
from memlayer.evaluation.provenance import commit
from memlayer.evaluation.qa import check_answers
from memlayer.files import sha256_of, write_file
from memlayer.jobs.checkpoints import checkpoint_to_resume, step_of
from memlayer.jobs.config import PretrainRun, RunConfig, load_config
from memlayer.jobs.preflight import check_checkpoint, check_lengths, check_output, training_arguments
from memlayer.jobs.run_folder import claimed, is_done, trained_model, write_result, write_trained
from memlayer.jobs.taught import RECORD, files_of, read_taught
from memlayer.jobs.trainer import MemoryTrainer, StepwiseTrainer, restore
from memlayer.methods import METHODS
from memlayer.patch import MemoryPatch
from memlayer.slots.counts import COUNTS_FILE, SlotCounts, load_counts, save_counts

COUNTS = COUNTS_FILE

log = logging.getLogger(__name__)


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
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",  # a third fewer padding positions
    )
    inputs = {name: sha256_of(path) for name, path in files_of(config.data).items()}
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
    trainer = MemoryTrainer(
        model,
        arguments,
        table_learning_rate=config.pretrain.table_learning_rate,
        train_dataset=Dataset.from_list(encoded),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, loss_on=config.pretrain.loss_on),
    )
    if whole := trained_model(config.output):  # stopped while it counted
        restore(model, whole)
    else:
        train_to_end(trainer, checkpoint, f"pretrain.learning_rate={config.pretrain.learning_rate:g}")
    if PartialState().is_main_process:
        if not whole:
            save_trained(config, inputs, model, tokenizer)
        counts = _count_facts(config, model, tokenizer, encoded)
        write_result(config.output, config, inputs, lambda folder: save_counts(counts, folder / COUNTS))


def save_trained(config: RunConfig, inputs: Mapping[str, str], model: nn.Module, tokenizer) -> None:
    """Write the trained model, not yet as a result, so that a run that is stopped later need not train again."""
    check_finite(dict(model.named_parameters()))
    write_trained(config.output, config, inputs, lambda folder: files.save(model, tokenizer, folder))


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what no run may write.

    Raises:
        ValueError: a tensor holds nan or infinity.
    """
    for name, tensor in tensors.items():
        if spoiled := int((~torch.isfinite(tensor.detach())).sum()):
            raise ValueError(
                f"{spoiled} of {tensor.numel()} numbers of {name} are nan or infinite: nothing is written; "
                "a lower learning rate may help"
            )


def _train_tokenizer_once(
    arguments: TrainingArguments, examples: list[Example], vocab_size: int
) -> PreTrainedTokenizerBase:
    """Trained by the main process, read by the others."""
    with arguments.main_process_first(local=False):
        if arguments.process_index:
            return load_tokenizer(arguments.output_dir)
        return train_tokenizer((example.text for example in examples), vocab_size, arguments.output_dir)


def train_to_end(trainer: StepwiseTrainer, checkpoint: Path | None, rate: str) -> None:
    """Train to the last step, from a checkpoint of this run where there is one.

    Args:
        rate: the setting that too large a loss may come from, with its value.

    Raises:
        ValueError: the loss is no finite number.
    """
    try:
        trainer.train_to_end(checkpoint)
    except FloatingPointError as error:
        if trainer.state.global_step:
            cause = f"a {rate} may be too high"
        else:
            cause = "no step was taken before it, so the model or the precision it is computed in is at fault"
        raise ValueError(f"{error}, nothing is written: {cause}") from error


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


def count(
    model: nn.Module, documents: Sequence, make_batch: Callable, words: str, per_batch: int
) -> dict[str, SlotCounts]:
    """Count which slots of each table the documents read; what is saved beside a checkpoint as background.

    Args:
        documents: each a list of sequences.
        make_batch: from a list of sequences to ``input_ids`` and ``attention_mask``.
        words: what a document is.
        per_batch: documents run at a time.
    """
    keys, tables = product_key_fingerprints(model), memory_tables(model)
    counts = {name: SlotCounts.empty(t.num_embeddings, words, keys[name]) for name, t in tables.items()}
    model.eval()
    with (
        torch.no_grad(),
        record_reads(model) as reads,
        tqdm(total=len(documents), desc="counting background reads", unit="document") as bar,
    ):
        for first in range(0, len(documents), per_batch):
            some = documents[first : first + per_batch]
            batch = make_batch([sequence for document in some for sequence in document])
            mask = batch["attention_mask"].to(model.device)
            model.base_model(input_ids=batch["input_ids"].to(model.device), attention_mask=mask)
            document_of_sequence = torch.repeat_interleave(torch.tensor([len(d) for d in some]))
            document_of_position = document_of_sequence[mask.cpu().nonzero()[:, 0]]
            for name, slots in reads.slots(mask).items():
                counts[name].update(slots, document_of_position)
            bar.update(len(some))
    return counts


class _ProtectTaught(TrainerCallback):
    """Count each fact as background once its last step is done."""

    def __init__(self, finetuner, settings):
        self.finetuner, self.settings = finetuner, settings

    def on_step_end(self, args, state, control, **kwargs):
        if self.settings.protect and state.global_step % self.settings.steps_per_fact == 0:
            self.finetuner.protect(self.settings.protect)


@dataclass
class Learned:
    """The outcome of one learning run.

    Attributes:
        model: the model that has learned, an ordinary one again.
        patch: the rows changed, where the method changes memory rows only.
        seconds: time of the learning alone, from step ``resumed_at``.
        parameters_changed: numbers in the model that are not what they were.
        sha256: name and SHA-256 of what the run started from: checkpoint, facts, wordings, background counts.
    """

    config: RunConfig
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    patch: MemoryPatch | None
    seconds: float
    steps: int
    resumed_at: int
    parameters_changed: int
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass
class _Lesson:
    """All that a learning run needs, loaded and checked."""

    config: RunConfig
    arguments: TrainingArguments
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    encoded: list[dict]
    background: dict[str, SlotCounts] | None
    sha256: dict[str, str]


def learn(config: RunConfig) -> Learned:
    """Teach the new facts one after the other; see ``save_learned`` for writing the outcome.

    Goes on from the newest checkpoint that an interrupted run of this very config left, where there is one.

    Raises:
        FileNotFoundError, ValueError: the checkpoint, its background counts, the facts or a setting do not fit, or
            the output holds what another run wrote.
    """
    lesson = _prepare(config)
    is_done(config.output, config, lesson.sha256)  # refuses what another run wrote
    return _teach(lesson)


def learn_into_output(config: RunConfig) -> None:
    """``learn`` and ``save_learned``, unless that is done already."""
    lesson = _prepare(config)
    with claimed(config, lesson.sha256) as done:
        if not done:
            save_learned(_teach(lesson), config.output)


def _prepare(config: RunConfig) -> _Lesson:
    set_seed(config.seed)
    settings = config.learn
    if Path(config.output).resolve() == Path(config.checkpoint).resolve():
        raise ValueError(f"output and checkpoint are both {config.output}: a run would overwrite what it starts from")
    lessons = _lessons(config)
    arguments = training_arguments(
        config,
        num_train_epochs=1,
        per_device_train_batch_size=settings.statements + settings.questions,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    check_checkpoint(config.checkpoint)
    model, tokenizer = files.load(config.checkpoint)
    _tell_taught_anew(config)
    encoded = encode(tokenizer, lessons)
    check_lengths(encoded, model.config.max_position_embeddings, lessons)
    check_answers(tokenizer, lessons)
    inputs = _inputs(config, state_fingerprint(model))
    return _Lesson(config, arguments, model, tokenizer, encoded, _background(config, model), inputs)


def _background(config: RunConfig, model: nn.Module) -> dict[str, SlotCounts] | None:
    """The counts beside the checkpoint; full finetuning and LoRA do without."""
    path = Path(config.checkpoint) / COUNTS
    if config.learn.method != "sparse_memory" and not path.is_file():
        return None
    tables = {name: table.num_embeddings for name, table in memory_tables(model).items()}
    return load_counts(path, tables, product_key_fingerprints(model))


def _teach(lesson: _Lesson) -> Learned:
    config, arguments, model, tokenizer = lesson.config, lesson.arguments, lesson.model, lesson.tokenizer
    settings, checkpoint = config.learn, None
    if arguments.save_strategy != "no":
        check_output(arguments.output_dir)
        checkpoint = checkpoint_to_resume(arguments, config, lesson.sha256)
    provenance = _provenance(config, lesson.sha256)
    prepared = METHODS[settings.method](model.to(arguments.device), lesson.background, settings)
    trainer = MemoryTrainer(
        prepared.model,
        arguments,
        finetuner=prepared.finetuner,
        callbacks=[_ProtectTaught(prepared.finetuner, settings)] if prepared.finetuner else None,
        optimizers=(prepared.optimizer, None),
        train_dataset=Dataset.from_list(lesson.encoded),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, loss_on=settings.loss_on),
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # what stands in for the bar would print a line a run
    start = time.perf_counter()
    train_to_end(trainer, checkpoint, f"learn.learning_rate={settings.learning_rate:g}")
    seconds = time.perf_counter() - start
    patch = prepared.finish()
    if patch is not None:
        patch.provenance = provenance
    changed = files.numbers_changed(model, config.checkpoint)
    steps, resumed_at = trainer.state.global_step, step_of(checkpoint)
    return Learned(config, model.eval(), tokenizer, patch, seconds, steps, resumed_at, changed, lesson.sha256)


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Name and SHA-256 of what a learning run starts from: the weights of its checkpoint, and its files."""
    weights = files.weight_files(config.checkpoint)
    return _inputs(config, fingerprint({name: tensor for file in weights for name, tensor in load_file(file).items()}))


def _inputs(config: RunConfig, checkpoint_sha256: str) -> dict[str, str]:
    counts = Path(config.checkpoint) / COUNTS
    paths = files_of(config.data) | ({"background_counts": counts} if counts.is_file() else {})
    return {"checkpoint": checkpoint_sha256} | {name: sha256_of(path) for name, path in paths.items()}


def _provenance(config: RunConfig, sha256: Mapping[str, str]) -> dict:
    """Where a learning run's patch comes from, for JSON: what was taught, how, and into which model."""
    return {
        "checkpoint": config.checkpoint,
        "data": asdict(config.data),
        "learn": asdict(config.learn),
        "seed": config.seed,
        "sha256": dict(sha256),
        "memlayer_version": __version__,
        "commit": commit(),
    }


def _tell_taught_anew(config: RunConfig) -> None:
    """One line where the facts to teach give known facts of the checkpoint another answer."""
    base = Path(config.checkpoint) / "config.yaml"
    if not base.is_file() or not PartialState().is_main_process:
        return
    new = facts_of(**asdict(config.data)).new
    try:
        made = load_config(base)
        if not isinstance(made, PretrainRun):  # healed on text, it was told no facts
            return
        anew = taught_anew(facts_of(**asdict(made.data)).known, new)
    except (OSError, ValueError) as error:  # what the checkpoint was told may be long gone
        log.warning(f"whether {config.checkpoint} knows some of the facts to teach cannot be told: {error}")
        return
    if anew:
        log.warning(
            f"{len(anew)} of {len(new)} facts to teach are known to {config.checkpoint} already, {anew[0].key!r} for "
            "one: eval.py asks for their old answers apart from the known facts"
        )


def _lessons(config: RunConfig) -> list[Example]:
    """What is taught in order: the batch of each fact, as often as it has steps."""
    facts, settings = facts_of(**asdict(config.data)), config.learn
    if not facts.new:
        raise ValueError("data.num_new is 0: there are no new facts to teach")
    batches = [
        teaching_examples(fact, facts.wordings, settings.statements, settings.questions) for fact in facts.new
    ]
    return [example for batch in batches for example in batch * settings.steps_per_fact]


def save_learned(learned: Learned, folder: str | Path, with_model: bool = True) -> None:
    """Write the patch, or the whole model where there is none, with the resolved config and what it took.

    Args:
        with_model: False leaves a whole model out, for comparisons that only ask it questions.

    Raises:
        ValueError: the folder holds a result or files that are in the way, or what was learned is nan or infinite;
            nothing is written then.
    """
    if PartialState().is_main_process:
        if is_done(folder, learned.config, learned.sha256):
            raise ValueError(f"{folder} holds this result already: name another folder, or delete it")
        write_result(folder, learned.config, learned.sha256, partial(write_learned, learned, with_model=with_model))
    PartialState().wait_for_everyone()


def write_learned(learned: Learned, folder: Path, with_model: bool) -> None:
    """Write the files of ``save_learned`` but the config."""
    if learned.patch is not None:
        check_finite({f"the patch of {name}": table.rows for name, table in learned.patch.tables.items()})
        learned.patch.save(folder / "patch")
    elif with_model:
        check_finite(dict(learned.model.named_parameters()))
        files.save(learned.model, learned.tokenizer, folder / "model")
    took = {key: getattr(learned, key) for key in ("seconds", "steps", "resumed_at", "parameters_changed", "sha256")}
    write_file(folder / RECORD, json.dumps(took, indent=2) + "\n")


def load_learned(checkpoint: str | Path, folder: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that ``save_learned`` wrote: the checkpoint with the patch applied, or a whole model.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: the run began with another checkpoint, or the facts it was taught have changed.
    """
    taught = read_taught(folder)
    taught.check_files()
    model, tokenizer = files.load(checkpoint)
    taught.check_checkpoint(checkpoint, state_fingerprint(model))
    if taught.has_model:
        return files.load(taught.folder / "model")
    MemoryPatch.load(taught.folder / "patch").apply(model)
    return model, tokenizer
