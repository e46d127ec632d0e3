"""The jobs of train.py, as functions: pretrain a memory model, count background reads, teach new facts.

Each takes a resolved RunConfig, writes a folder, and can be called from a notebook as well.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_model
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from memlayer import __version__, modeling
from memlayer.attach import memory_tables, record_reads
from memlayer.config import RunConfig, load_config, to_yaml
from memlayer.counts import COUNTS_FILE, SlotCounts, load_counts, save_counts
from memlayer.data.facts import (
    BUILTIN_FACTS,
    BUILTIN_WORDINGS,
    Fact,
    Wordings,
    check_disjoint,
    load_facts,
    load_wordings,
    taught_anew,
)
from memlayer.data.qa import Example, collate, encode, pretraining_examples, teaching_examples
from memlayer.data.tokenizer import load_tokenizer, train_tokenizer
from memlayer.evaluation.provenance import commit
from memlayer.evaluation.qa import check_answers
from memlayer.methods import METHODS
from memlayer.patch import MemoryPatch, product_key_fingerprints, state_fingerprint
from memlayer.preflight import (
    check_checkpoint,
    check_lengths,
    check_output,
    checkpoint_to_resume,
    step_of,
    training_arguments,
)
from memlayer.taught import RECORD, files_of, read_taught, sha256_of
from memlayer.trainer import MemoryTrainer

COUNTS = COUNTS_FILE
BUILTIN_NEW = 100  # new facts of the built-in table that are taught unless data.num_new says otherwise

log = logging.getLogger(__name__)


@dataclass
class Facts:
    """The facts of a run and the wordings they are told in."""

    known: list[Fact]
    new: list[Fact]
    wordings: dict[str, Wordings]


def facts_of(config: RunConfig) -> Facts:
    """Load and check the facts a run names.

    Raises:
        FactsError: a bad line, or a new fact about a known subject.
        ValueError: more facts asked for than there are.
    """
    data = config.data
    wordings = load_wordings(data.wordings or BUILTIN_WORDINGS)
    facts = load_facts(data.facts or BUILTIN_FACTS, wordings)
    known = [f for f in facts if f.split == "known"]
    new = [f for f in facts if f.split == "new"]
    check_disjoint(known, new)
    num_new = data.num_new
    if num_new is None and data.facts is None:
        num_new = min(BUILTIN_NEW, len(new) - data.first_new)
    return Facts(_slice(known, 0, data.num_known, "known"), _slice(new, data.first_new, num_new, "new"), wordings)


def _slice(facts: list[Fact], first: int, number: int | None, kind: str) -> list[Fact]:
    last = len(facts) if number is None else first + number
    if not 0 <= first <= last <= len(facts):
        raise ValueError(f"{kind} facts {first} to {last} asked for, the file has {len(facts)}")
    return facts[first:last]


def pretrain(config: RunConfig) -> Path:
    """Train tokenizer and model on the known facts, then count background reads; returns the folder.

    Nothing is written beside an earlier result in the folder before the training is done.
    """
    set_seed(config.seed)
    facts, settings, output = facts_of(config), config.pretrain, Path(config.output)
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
    check_output(arguments.output_dir)
    checkpoint = checkpoint_to_resume(arguments, config)
    tokenizer = _train_tokenizer_once(arguments, examples, config.model.vocab_size)
    model = modeling.build(config.model, config.memory, tokenizer)
    encoded = encode(tokenizer, examples)
    check_lengths(encoded, config.model.max_length, examples)
    check_answers(tokenizer, examples)
    trainer = MemoryTrainer(
        model,
        arguments,
        table_learning_rate=settings.table_learning_rate,
        train_dataset=Dataset.from_list(encoded),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, loss_on=settings.loss_on),
    )
    train_to_end(trainer, checkpoint)
    if PartialState().is_main_process:
        modeling.save(model, tokenizer, output)
        save_counts(_count_facts(config, model, tokenizer, encoded), output / COUNTS)
        (output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    PartialState().wait_for_everyone()
    return output


def _train_tokenizer_once(
    arguments: TrainingArguments, examples: list[Example], vocab_size: int
) -> PreTrainedTokenizerBase:
    """Trained by the main process, read by the others."""
    with arguments.main_process_first(local=False):
        if arguments.process_index:
            return load_tokenizer(arguments.output_dir)
        return train_tokenizer((example.text for example in examples), vocab_size, arguments.output_dir)


def train_to_end(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the last step, from a checkpoint of this run where there is one."""
    if checkpoint is not None and checkpoint.name == f"checkpoint-{trainer.args.max_steps}":
        # Trained to the end; the Trainer would take a step more.
        load_model(trainer.model, checkpoint / modeling.WEIGHTS)
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))


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
        sha256: of the checkpoint's state and of each file that the run read.
    """

    config: RunConfig
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    patch: MemoryPatch | None
    seconds: float
    steps: int
    resumed_at: int
    parameters_changed: int
    sha256: dict[str, str]


def learn(config: RunConfig) -> Learned:
    """Teach the new facts one after the other; see ``save_learned`` for writing the outcome.

    Goes on from the newest checkpoint that an interrupted run of this very config left, where there is one.

    Raises:
        FileNotFoundError, ValueError: the checkpoint, its background counts, the facts or a setting do not fit.
    """
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
    resumable = arguments.save_strategy != "no"
    check_output(arguments.output_dir if resumable else config.output)
    check_checkpoint(config.checkpoint)
    model, tokenizer = modeling.load(config.checkpoint)
    _tell_taught_anew(config)
    encoded = encode(tokenizer, lessons)
    check_lengths(encoded, model.config.max_position_embeddings, lessons)
    check_answers(tokenizer, lessons)
    model.to(arguments.device)
    tables = {name: table.num_embeddings for name, table in memory_tables(model).items()}
    background = load_counts(Path(config.checkpoint) / COUNTS, tables, product_key_fingerprints(model))
    provenance = _provenance(config, model)
    checkpoint = checkpoint_to_resume(arguments, config, provenance["sha256"]) if resumable else None
    prepared = METHODS[settings.method](model, background, settings)
    trainer = MemoryTrainer(
        prepared.model,
        arguments,
        finetuner=prepared.finetuner,
        callbacks=[_ProtectTaught(prepared.finetuner, settings)] if prepared.finetuner else None,
        optimizers=(prepared.optimizer, None),
        train_dataset=Dataset.from_list(encoded),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, loss_on=settings.loss_on),
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # what stands in for the bar would print a line a run
    start = time.perf_counter()
    train_to_end(trainer, checkpoint)
    seconds = time.perf_counter() - start
    patch = prepared.finish()
    if patch is not None:
        patch.provenance = provenance
    changed = modeling.numbers_changed(model, config.checkpoint)
    return Learned(
        config,
        model.eval(),
        tokenizer,
        patch,
        seconds,
        trainer.state.global_step,
        step_of(checkpoint),
        changed,
        provenance["sha256"],
    )


def _provenance(config: RunConfig, model: nn.Module) -> dict:
    """Where a learning run comes from, for JSON: what was taught, how, and into which model."""
    files = files_of(config.data) | {"background_counts": Path(config.checkpoint) / COUNTS}
    return {
        "checkpoint": config.checkpoint,
        "data": asdict(config.data),
        "learn": asdict(config.learn),
        "seed": config.seed,
        "sha256": {"checkpoint": state_fingerprint(model)} | {name: sha256_of(path) for name, path in files.items()},
        "memlayer_version": __version__,
        "commit": commit(),
    }


def _tell_taught_anew(config: RunConfig) -> None:
    """One line where the facts to teach give known facts of the checkpoint another answer."""
    base = Path(config.checkpoint) / "config.yaml"
    if not base.is_file():
        return
    new = facts_of(config).new
    anew = taught_anew(facts_of(load_config(base)).known, new)
    if anew:
        log.warning(
            f"{len(anew)} of {len(new)} facts to teach are known to {config.checkpoint} already, {anew[0].key!r} for "
            "one: eval.py asks for their old answers apart from the known facts"
        )


def _lessons(config: RunConfig) -> list[Example]:
    """What is taught in order: the batch of each fact, as often as it has steps."""
    facts, settings = facts_of(config), config.learn
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
    """
    folder = Path(folder)
    if PartialState().is_main_process:
        _write_learned(learned, folder, with_model)
    PartialState().wait_for_everyone()


def _write_learned(learned: Learned, folder: Path, with_model: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in ("patch", "model"):  # or load_learned would not know which of two is meant
        shutil.rmtree(folder / earlier, ignore_errors=True)
    if learned.patch is not None:
        learned.patch.save(folder / "patch")
    elif with_model:
        modeling.save(learned.model, learned.tokenizer, folder / "model")
    took = {key: getattr(learned, key) for key in ("seconds", "steps", "resumed_at", "parameters_changed", "sha256")}
    (folder / RECORD).write_text(json.dumps(took, indent=2) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(to_yaml(learned.config), encoding="utf-8")


def load_learned(checkpoint: str | Path, folder: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that ``save_learned`` wrote: the checkpoint with the patch applied, or a whole model.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: the run began with another checkpoint, or the facts it was taught have changed.
    """
    taught = read_taught(folder)
    taught.check_files()
    model, tokenizer = modeling.load(checkpoint)
    taught.check_checkpoint(checkpoint, state_fingerprint(model))
    if taught.has_model:
        return modeling.load(taught.folder / "model")
    MemoryPatch.load(taught.folder / "patch").apply(model)
    return model, tokenizer
