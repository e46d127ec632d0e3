"""The jobs of train.py, as functions: pretrain a memory model, count background reads, teach new facts.

Each takes a resolved RunConfig, writes a folder, and can be called from a notebook as well.
"""

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from memlayer import modeling
from memlayer.attach import memory_tables, record_reads
from memlayer.config import RunConfig, to_yaml
from memlayer.counts import SlotCounts, load_counts, save_counts
from memlayer.data.facts import (
    BUILTIN_FACTS,
    BUILTIN_WORDINGS,
    Fact,
    Wordings,
    check_disjoint,
    load_facts,
    load_wordings,
)
from memlayer.data.qa import collate, encode, pretraining_examples, teaching_examples
from memlayer.data.tokenizer import train_tokenizer
from memlayer.methods import METHODS
from memlayer.patch import MemoryPatch
from memlayer.trainer import MemoryTrainer

COUNTS = "background_counts.safetensors"


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
    return Facts(
        _slice(known, 0, data.num_known, "known"), _slice(new, data.first_new, data.num_new, "new"), wordings
    )


def _slice(facts: list[Fact], first: int, number: int | None, kind: str) -> list[Fact]:
    last = len(facts) if number is None else first + number
    if not 0 <= first <= last <= len(facts):
        raise ValueError(f"{kind} facts {first} to {last} asked for, the file has {len(facts)}")
    return facts[first:last]


def pretrain(config: RunConfig) -> Path:
    """Train tokenizer and model on the known facts, then count background reads; returns the folder."""
    set_seed(config.seed)
    facts, settings, output = facts_of(config), config.pretrain, Path(config.output)
    examples = pretraining_examples(facts.known, facts.wordings)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((f"{e.prompt} {e.answer}" for e in examples), config.model.vocab_size, output)
    model = modeling.build(config.model, config.memory, tokenizer)
    encoded = encode(tokenizer, examples)
    _check_lengths(encoded, config.model.max_length)
    arguments = _training_arguments(
        config,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",  # a third fewer padding positions
    )
    trainer = MemoryTrainer(
        model,
        arguments,
        table_learning_rate=settings.table_learning_rate,
        train_dataset=Dataset.from_list(encoded),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, loss_on=settings.loss_on),
    )
    trainer.train(resume_from_checkpoint=_may_resume(arguments, config))
    modeling.save(model, tokenizer, output)
    count(config, model, tokenizer, encoded)
    (output / "config.yaml").write_text(to_yaml(config))
    return output


def count(
    config: RunConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase, encoded: list[dict]
) -> dict:
    """Count which slots the pretraining text reads, save the counts beside the checkpoint."""
    per_document = config.count.sequences_per_document
    words = f"{per_document} consecutive sequences of pretraining text, one wording of a fact each"
    counts = {name: SlotCounts.empty(t.num_embeddings, words) for name, t in memory_tables(model).items()}
    model.eval()
    per_batch = per_document * max(1, config.pretrain.batch_size // per_document)
    with torch.no_grad(), record_reads(model) as reads:
        for first in tqdm(range(0, len(encoded), per_batch), desc="counting background reads", unit="batch"):
            batch = collate(encoded[first : first + per_batch], tokenizer.pad_token_id)
            mask = batch["attention_mask"]
            model(input_ids=batch["input_ids"], attention_mask=mask)
            document_of_position = (
                torch.arange(len(mask))[:, None].expand_as(mask)[mask.bool()] // per_document
            )
            for name, slots in reads.slots(mask).items():
                counts[name].update(slots, document_of_position)
    save_counts(counts, Path(config.output) / COUNTS)
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
        seconds: time of the learning alone.
        parameters_changed: numbers in the model that are not what they were.
    """

    config: RunConfig
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    patch: MemoryPatch | None
    seconds: float
    steps: int
    parameters_changed: int


def learn(config: RunConfig) -> Learned:
    """Teach the new facts one after the other; see ``save_learned`` for writing the outcome.

    Raises:
        FileNotFoundError, ValueError: the checkpoint, its background counts, the facts or a setting do not fit.
    """
    set_seed(config.seed)
    settings = config.learn
    if settings.method not in METHODS:
        raise ValueError(f"learn.method is {settings.method!r}, must be one of {sorted(METHODS)}")
    if config.checkpoint is None:
        raise ValueError("checkpoint is not set: name the folder of a pretrained memory model")
    facts = facts_of(config)
    lessons = [
        example
        for fact in facts.new
        for example in teaching_examples(fact, facts.wordings, settings.statements, settings.questions)
        * settings.steps_per_fact
    ]
    model, tokenizer = modeling.load(config.checkpoint)
    tables = {name: table.num_embeddings for name, table in memory_tables(model).items()}
    background = load_counts(Path(config.checkpoint) / COUNTS, tables)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = METHODS[settings.method](model, background, settings)
    trainer = MemoryTrainer(
        prepared.model,
        _training_arguments(
            config,
            num_train_epochs=1,
            per_device_train_batch_size=settings.statements + settings.questions,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
        ),
        finetuner=prepared.finetuner,
        callbacks=[_ProtectTaught(prepared.finetuner, settings)] if prepared.finetuner else None,
        optimizers=(prepared.optimizer, None),
        train_dataset=Dataset.from_list(encode(tokenizer, lessons)),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id, loss_on=settings.loss_on),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    patch = prepared.finish()
    if patch is not None:
        patch.provenance = {"learn": asdict(settings), "data": asdict(config.data), "seed": config.seed}
    changed = sum(int((tensor != before[name]).sum()) for name, tensor in model.state_dict().items())
    return Learned(config, model.eval(), tokenizer, patch, seconds, trainer.state.global_step, changed)


def save_learned(learned: Learned, folder: str | Path, with_model: bool = True) -> None:
    """Write the patch, or the whole model where there is none, with the resolved config and what it took.

    Args:
        with_model: False leaves a whole model out, for comparisons that only ask it questions.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if learned.patch is not None:
        learned.patch.save(folder / "patch")
    elif with_model:
        modeling.save(learned.model, learned.tokenizer, folder / "model")
    took = {key: getattr(learned, key) for key in ("seconds", "steps", "parameters_changed")}
    (folder / "learned.json").write_text(json.dumps(took, indent=2) + "\n")
    (folder / "config.yaml").write_text(to_yaml(learned.config))


def load_learned(checkpoint: str | Path, folder: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that ``save_learned`` wrote: the checkpoint with the patch applied, or a whole model.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: the patch belongs to another checkpoint.
    """
    folder = Path(folder)
    if (folder / "model").is_dir():
        return modeling.load(folder / "model")
    patch = MemoryPatch.load(folder / "patch")
    model, tokenizer = modeling.load(checkpoint)
    patch.apply(model)
    return model, tokenizer


def _training_arguments(config: RunConfig, **ours) -> TrainingArguments:
    on_cpu = not torch.accelerator.is_available()
    defaults = {
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": "none",
        "seed": config.seed,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    fixed = {"output_dir": str(Path(config.output) / "trainer"), "remove_unused_columns": False}
    try:
        return TrainingArguments(**{**defaults, **ours, **config.trainer, **fixed})
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from error


def _may_resume(arguments: TrainingArguments, config: RunConfig) -> bool:
    """Whether an interrupted run of this very config left a checkpoint to go on from."""
    folder = Path(arguments.output_dir)
    started = folder / "config.yaml"
    if not any(folder.glob("checkpoint-*")):
        folder.mkdir(parents=True, exist_ok=True)
        started.write_text(to_yaml(config))
        return False
    if not started.is_file() or started.read_text() != to_yaml(config):
        raise ValueError(f"{folder} holds checkpoints of another config: name another output, or delete it")
    return True


def _check_lengths(encoded: list[dict], max_length: int) -> None:
    longest = max(e["length"] for e in encoded)
    if longest > max_length:
        raise ValueError(f"the longest example has {longest} tokens, model.max_length is {max_length}")
