"""The learning job: teach a checkpoint new facts or lessons, in order, by any method of the table.

What it writes, and what is read of that again, is taught.py.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from memlayer.data.facts import facts_of, taught_anew
from memlayer.data.hub_sets import local_file
from memlayer.data.lessons import Lesson
from memlayer.data.qa import collate, encode, pad_token
from memlayer.decoders import files
from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import fingerprint, product_key_fingerprints
from memlayer.decoders.looked_at import checkpoint_fingerprint
from memlayer.decoders.mapped import read_or_map, refuse_mapped
from memlayer.decoders.split import tables_split
from memlayer.evaluation.qa import check_answers
from memlayer.files import sha256_of
from memlayer.jobs.checkpoints import checkpoint_to_resume, step_of
from memlayer.jobs.config import RunConfig, facts_told, load_config
from memlayer.jobs.learn_settings import LearnConfig, SparseMemoryConfig
from memlayer.jobs.lessons import lessons_of, prompts_of
from memlayer.jobs.preflight import check_checkpoint, check_lengths, check_output, training_arguments
from memlayer.jobs.run_folder import claimed, is_done
from memlayer.jobs.stepwise_trainer import train_to_end
from memlayer.jobs.taught import Learned, files_of, provenance, save_learned
from memlayer.jobs.terms import terms_of
from memlayer.jobs.trainer import MemoryTrainer
from memlayer.methods import METHODS, STORES, Prepared
from memlayer.methods.mist import adapt_to_lessons
from memlayer.patch import MemoryPatch
from memlayer.slots.counts import COUNTS_FILE, SlotCounts, load_counts

log = logging.getLogger(__name__)


@dataclass
class _Prepared:
    """All that a learning run needs, loaded and checked."""

    config: RunConfig
    arguments: TrainingArguments
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    lessons: list[Lesson]
    encoded: list[list[dict]]
    micro_batches: list[list[dict]]
    lesson_of_step: list[str]
    background: dict[str, SlotCounts] | None
    sha256: dict[str, str]


@dataclass(frozen=True)
class _Batches(Sequence):
    """Batches that are collated when they are asked for."""

    examples: list[list[dict]]
    collator: Callable[[list[list[dict]]], dict[str, Tensor]]
    device: torch.device
    looked_at: Callable[[], object]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        self.looked_at()
        return {key: tensor.to(self.device) for key, tensor in self.collator([self.examples[number]]).items()}


def learn(config: RunConfig) -> Learned:
    """Teach the new facts or lessons; see ``save_learned`` for writing the outcome.

    Goes on from the newest checkpoint that an interrupted run of this very config left, where there is one.

    Raises:
        FileNotFoundError, ValueError: the checkpoint, its background counts, the facts or a setting do not fit, or
            the output holds what another run wrote.
    """
    prepared = _prepare(config)
    is_done(config.output, config, prepared.sha256)  # refuses what another run wrote
    return _teach(prepared)


def learn_into_output(config: RunConfig) -> None:
    """``learn`` and ``save_learned``, unless that is done already."""
    prepared = _prepare(config)
    with claimed(config, prepared.sha256) as done:
        if not done:
            save_learned(_teach(prepared), config.output)


def _prepare(config: RunConfig) -> _Prepared:
    set_seed(config.seed)
    settings = config.learn
    if Path(config.output).resolve() == Path(config.checkpoint).resolve():
        raise ValueError(f"output and checkpoint are both {config.output}: a run would overwrite what it starts from")
    lessons, prompts = lessons_of(config), prompts_of(config.prompts)
    arguments = training_arguments(
        config,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    check_checkpoint(config.checkpoint)
    model, tokenizer = files.load(config.checkpoint, config.table.place)
    _refuse_whole_tables(config, model)
    if not config.lessons.files:
        _tell_taught_anew(config)
    examples = [[prompts.apply(example, tokenizer) for example in lesson.teach] for lesson in lessons]
    encoded = [encode(tokenizer, each) for each in examples]
    check_lengths(list(chain(*encoded)), model.config.max_position_embeddings, list(chain(*examples)))
    check_answers(tokenizer, chain(*examples))
    micro_batches, ids = _in_steps(config, arguments, lessons, encoded) if settings.method in METHODS else ([], [])
    inputs = _inputs(config, checkpoint_fingerprint(model))
    background = _background(config, model)
    return _Prepared(config, arguments, model, tokenizer, lessons, encoded, micro_batches, ids, background, inputs)


def _refuse_whole_tables(config: RunConfig, model: nn.Module) -> None:
    """Refuse what would need a gradient or a copy of a table that is mapped, before it is read."""
    settings = config.learn
    if config.table.shards > 1:
        refuse_mapped(model, f"table.shards={config.table.shards} splits whole tables")
    if settings.method in ("full", "dense_memory"):
        refuse_mapped(model, f"learn.method={settings.method} trains whole tables")
    if isinstance(settings, LearnConfig) and settings.mist is not None and settings.mist.paper_code:
        refuse_mapped(model, "learn.mist.paper_code tunes whole tables")
    if isinstance(settings, LearnConfig) and settings.terms.trust_region is not None:
        refuse_mapped(model, "learn.terms.trust_region holds two numbers for each of a table")


def _in_steps(
    config: RunConfig, arguments: TrainingArguments, lessons: Sequence[Lesson], encoded: Sequence[list[dict]]
) -> tuple[list[list[dict]], list[str]]:
    """The micro-batches of all steps in order, and of each step the lesson that it teaches."""
    settings = config.learn
    steps = in_order(encoded, settings.steps_per_fact, settings.order, settings.batch_size)
    micro_batches = shared_out(steps, arguments.world_size * arguments.gradient_accumulation_steps)
    ids = chain(*in_order([[lesson.id] for lesson in lessons], settings.steps_per_fact, settings.order, None))
    return micro_batches, list(ids)


def _background(config: RunConfig, model: nn.Module) -> dict[str, SlotCounts] | None:
    """The counts beside the checkpoint; what chooses no rows does without."""
    path = Path(config.checkpoint) / COUNTS_FILE
    if config.learn.method not in ("sparse_memory", "ridge") and not path.is_file():
        return None
    tables = {name: table.num_embeddings for name, table in memory_tables(model).items()}
    return load_counts(path, tables, product_key_fingerprints(model))


def _teach(lesson: _Prepared) -> Learned:
    config, arguments, model, tokenizer = lesson.config, lesson.arguments, lesson.model, lesson.tokenizer
    settings, checkpoint = config.learn, None
    if settings.method in STORES:
        return _keep(lesson)
    if arguments.save_strategy != "no":
        check_output(arguments.output_dir)
        checkpoint = checkpoint_to_resume(arguments, config, lesson.sha256)
    told = provenance(config, lesson.sha256)
    with tables_split(model, config.table.shards):
        taught = chain(*lesson.micro_batches)
        terms = terms_of(config, model.to(arguments.device), tokenizer, taught, lesson.lessons)
        found = {key: number for term in terms for key, number in term.found().items()}
        if not arguments.disable_tqdm and PartialState().is_main_process:
            _tell_of_context(found)
        subject_tokens = settings.subject_tokens if isinstance(settings, SparseMemoryConfig) else None
        told_of = {"loss_on": settings.loss_on, "subject_tokens": subject_tokens}
        collator = partial(_collate, pad_token_id=pad_token(tokenizer), **told_of)
        start = time.perf_counter()  # what looks at the lessons before the first step is learning, too
        prepared = _made_ready(lesson, collator)
        found |= prepared.found
        if not arguments.disable_tqdm and "rate_of_one" in found:
            rate = settings.learning_rate * found["rate_of_one"]
            print(f"by the lessons a learning rate of 1 is {found['rate_of_one']:.4g} here, so it is {rate:.4g}")
        may_change = sum(p.numel() for group in prepared.optimizer.param_groups for p in group["params"])
        trainer = MemoryTrainer(
            prepared.model,
            arguments,
            finetuner=prepared.finetuner,
            lessons=lesson.lesson_of_step,
            skip_below=settings.skip_below,
            terms=terms,
            optimizers=(prepared.optimizer, None),
            train_dataset=lesson.micro_batches,
            data_collator=collator,
        )
        if arguments.disable_tqdm:
            trainer.remove_callback(PrinterCallback)  # what stands in for the bar would print a line a run
        train_to_end(trainer, checkpoint, f"learn.learning_rate={settings.learning_rate:g}")
    seconds = time.perf_counter() - start
    capacity = prepared.finetuner.capacity() if prepared.finetuner else {}
    if not arguments.disable_tqdm and trainer.is_world_process_zero():
        for name, full in capacity.items():
            print(f"{name}: {full}")
    patch = prepared.finish()
    if settings.mist is not None:
        patch = None  # it would be over a model that MIST had tuned: the whole model is the outcome
    if patch is not None:
        patch.provenance = told
        _warn_of_nothing(patch, settings)
    changed = may_change if prepared.save else files.numbers_changed(model, config.checkpoint)
    return Learned(
        config,
        model.eval(),
        tokenizer,
        patch,
        save_adapter=prepared.save,
        save_beside=None if patch is None else prepared.beside,
        seconds=seconds,
        steps=trainer.state.global_step,
        parameters_changed=changed,
        may_change=may_change,
        **trainer.shown(),
        resumed_at=step_of(checkpoint),
        sha256=lesson.sha256,
        steps_left_out=trainer.steps_left_out,
        capacity={name: asdict(full) for name, full in capacity.items()},
        found=found,
    )


def _tell_of_context(found: Mapping[str, float]) -> None:
    """A line on whether the untouched model can teach what it is to teach."""
    if "context_answers" in found:
        print(
            f"with its lesson before it, the untouched model gives {found['context_answers_right']} of "
            f"{found['context_answers']} answers, and all of {found['context_lessons_right']} of "
            f"{found['context_lessons']} lessons: what it does not give is taught wrongly"
        )


def _made_ready(lesson: _Prepared, collator: Callable[[list[list[dict]]], dict[str, Tensor]]) -> Prepared:
    """The model tuned by MIST, where that is asked for, and then made ready by the method."""
    settings, model = lesson.config.learn, lesson.model.to(lesson.arguments.device)
    first = in_order(lesson.encoded, 1, settings.order, settings.batch_size)
    quiet = lesson.arguments.disable_tqdm
    # How often each lesson is looked at, the method knows; most look at none.
    with tqdm(desc="looking at what will be taught", unit="lesson", delay=1, disable=quiet) as bar:
        batches = _Batches(first, collator, lesson.arguments.device, bar.update)
        if (mist := settings.mist) is not None:
            told = {"density": mist.density, "drop": mist.drop, "epochs": mist.epochs, "momentum": mist.momentum}
            adapt_to_lessons(model, batches, lesson.config.seed, mist.paper_code, lr=mist.rate, **told)
        return METHODS[settings.method](model, lesson.background, settings, batches)


def _warn_of_nothing(patch: MemoryPatch, settings: SparseMemoryConfig) -> None:
    if not patch.num_rows:
        log.warning(
            f"nothing was learned: no row has changed, with learn.num_rows={settings.num_rows} and "
            f"learn.learning_rate={settings.learning_rate:g}; the model may read the chosen rows with a weight of 0"
        )


def _keep(lesson: _Prepared) -> Learned:
    """Keep the lessons beside the model, which stays as it is and answers with them."""
    config, model = lesson.config, lesson.model.to(lesson.arguments.device).eval()
    start = time.perf_counter()
    quiet = lesson.arguments.disable_tqdm
    with tqdm(desc="reading the lessons", unit="example", delay=1, disable=quiet) as bar:
        store = STORES[config.learn.method].of(model, lesson.lessons, lesson.encoded, config.learn, bar.update)
    seconds = time.perf_counter() - start
    changed = files.numbers_changed(model, config.checkpoint)
    store.attach(model)
    read = list(chain(*lesson.encoded))
    return Learned(
        config,
        model,
        lesson.tokenizer,
        patch=None,
        seconds=seconds,
        steps=0,
        parameters_changed=changed,
        may_change=0,
        examples=len(read),
        tokens=sum(example["length"] for example in read),
        sha256=lesson.sha256,
        store=store,
    )


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Name and SHA-256 of what a learning run starts from: the weights of its checkpoint, and its files."""
    weights = [Path(file) for file in files.weight_files(config.checkpoint)]
    return _inputs(
        config, _fingerprint(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in weights))
    )


@lru_cache(maxsize=8)
def _fingerprint(weights: tuple[tuple[Path, int, int], ...]) -> str:
    """Of a checkpoint's weights; a comparison asks for that of one checkpoint at every trial.

    Args:
        weights: its files, when each was last written and how long it is.
    """
    return fingerprint(read_or_map([file for file, *_ in weights])[0])


def _inputs(config: RunConfig, checkpoint_sha256: str) -> dict[str, str]:
    counts = Path(config.checkpoint) / COUNTS_FILE
    paths = files_of(config) | ({"background_counts": counts} if counts.is_file() else {})
    if isinstance(config.learn, LearnConfig) and (replay := config.learn.terms.replay):
        paths |= {f"replay {number}": local_file(path) for number, path in enumerate(replay.files, start=1)}
    return {"checkpoint": checkpoint_sha256} | {name: sha256_of(path) for name, path in paths.items()}


def _tell_taught_anew(config: RunConfig) -> None:
    """One line where the facts to teach give known facts of the checkpoint another answer."""
    base = Path(config.checkpoint) / "config.yaml"
    if not base.is_file() or not PartialState().is_main_process:
        return
    new = facts_of(**asdict(config.data)).new
    try:
        pretrained_on = facts_told(load_config(base))
        if pretrained_on is None:  # pretrained or healed on text, it was told no facts
            return
        anew = taught_anew(facts_of(**asdict(pretrained_on[0])).known, new)
    except (OSError, ValueError) as error:  # what the checkpoint was told may be long gone
        log.warning(f"whether {config.checkpoint} knows some of the facts to teach cannot be told: {error}")
        return
    if anew:
        log.warning(
            f"{len(anew)} of {len(new)} facts to teach are known to {config.checkpoint} already, {anew[0].key!r} for "
            "one: eval.py asks for their old answers apart from the known facts"
        )


def in_order(lessons: Sequence[list], steps: int, order: str, batch_size: int | None) -> list[list]:
    """The examples of each optimizer step: ``steps`` of each lesson, one lesson after the other or in rounds.

    A step takes all examples of its lesson, or ``batch_size`` of them, going on where the step before it stopped.
    """

    def batch(lesson: list, step: int) -> list:
        if batch_size is None or len(lesson) <= batch_size:
            return lesson
        return [lesson[(step * batch_size + place) % len(lesson)] for place in range(batch_size)]

    if order == "rounds":
        return [batch(lesson, step) for step in range(steps) for lesson in lessons]
    return [batch(lesson, step) for lesson in lessons for step in range(steps)]


def shared_out(batches: Sequence[list], parts: int) -> list[list]:
    """Each batch in ``parts`` micro-batches, over all processes, as nearly alike as can be.

    Raises:
        ValueError: a batch has fewer examples than that.
    """
    if (smallest := min(map(len, batches))) < parts:
        raise ValueError(
            f"a batch of {smallest} examples cannot be shared by processes and trainer.gradient_accumulation_steps in "
            f"{parts} parts: {smallest} parts are the most"
        )
    return [batch[part::parts] for batch in batches for part in range(parts)]


def _collate(micro_batches: Sequence[list[dict]], **settings) -> dict[str, Tensor]:
    (examples,) = micro_batches
    return collate(examples, **settings)
