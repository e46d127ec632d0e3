"""The evaluation job: what a checkpoint knows, what learning runs made of it, and what else they changed.

New facts and lessons are asked as they were taught, known facts beside them where the checkpoint was pretrained on
some, and whatever the caller names as probes, before and after. Of a checkpoint that healed the untouched base is
measured too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from memlayer.data.facts import facts_of
from memlayer.data.qa import Question, new_questions
from memlayer.decoders import files
from memlayer.decoders.looked_at import checkpoint_fingerprint
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.report import write_report
from memlayer.evaluation.rows import CONTROL, result_row, sample
from memlayer.jobs import typed, written
from memlayer.jobs.config import RetrofitRun, RunConfig, facts_told, load_config
from memlayer.jobs.lessons import lessons_of, prompts_of
from memlayer.jobs.measure import PLAIN, Measured, Measurement, check_finite, compared_probes, questions_of_known
from memlayer.jobs.preflight import check_output
from memlayer.jobs.retrofit import load_base
from memlayer.jobs.sections import DataConfig, ProbesConfig
from memlayer.jobs.taught import Taught, is_taught, read_taught
from memlayer.machine import best_device


@dataclass
class Evaluation:
    """What to ask of whom.

    Attributes:
        checkpoint: folder of a memory model.
        learned: folders that learning runs wrote which began with it.
        facts, wordings, first_new, num_new: new facts in place of those that the runs were taught.
        num_known: known facts to ask about; None is all that the checkpoint was pretrained on.
        probes: what else to measure.
        batch_size: questions at a time.
        device: where to ask; None is a GPU, if there is one.
        max_new_tokens: where an answer that does not end is cut; None is past the longest answer.
        output: folder to write.
        table: "loaded" into memory, "mapped" from its file, or with "auto" mapped where memory is too small.
    """

    checkpoint: Path
    learned: Sequence[Path] = ()
    facts: str | None = None
    wordings: str | None = None
    first_new: int | None = None
    num_new: int | None = None
    num_known: int | None = None
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    batch_size: int = 256
    device: str | None = None
    max_new_tokens: int | None = None
    output: Path = Path("runs/report")
    table: str = "auto"


def load_probes(path: str | Path) -> ProbesConfig:
    """Read a YAML file of probes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key or a value of the wrong type.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of probes at {path}")
    try:
        return typed.read(ProbesConfig, written.parse(Path(path).read_text(encoding="utf-8")) or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def evaluate(asked: Evaluation) -> list[dict]:
    """Ask before and after, and write the report.

    Returns:
        a row a model, as in ``evaluation.rows``, with ``probes``.

    Raises:
        FileNotFoundError, ValueError: a folder, file or setting does not fit, or there is nothing to ask; nothing has
            been asked then.
    """
    checkpoint = asked.checkpoint
    if is_taught(checkpoint):
        raise ValueError(f"{checkpoint} was written by a learning run: name the model that it was taught to first")
    base, taught = load_config(checkpoint / "config.yaml"), [read_taught(folder) for folder in asked.learned]
    _check_taught_alike(taught)
    questions = questions_of(asked, base, taught[0].config if taught else None)
    check_output(asked.output)
    device = device_of(asked.device)
    model, tokenizer = files.load(checkpoint, asked.table)
    prompts = prompts_of(taught[0].config.prompts) if taught else PLAIN
    generation = {"prompts": prompts, "batch_size": asked.batch_size, "max_new_tokens": asked.max_new_tokens}
    measure = Measurement(model, tokenizer, questions, asked.probes, device, **generation)
    _check_runs(taught, checkpoint, model, tokenizer)

    before = measure(model, tokenizer, checkpoint, is_first=True)
    rows = [_row(CONTROL, "", before, before, seed=base.seed)]
    if isinstance(base, RetrofitRun) and base.retrofit.steps:
        untouched, _ = load_base(base)
        rows.append(_row("attach and heal", "", measure(untouched, tokenizer, base.base), before, seed=base.seed))
        del untouched
    if taught:
        measure.remember(model, before)
    samples = []
    for run in taught:
        with run.model(model, tokenizer) as learned:
            after = measure(*learned, run.folder, ask=run.store and run.store.ask)
        told = run.config.learn
        rows.append(_row(told.method, told.in_words, before, after, seed=run.config.seed, costs=run.costs))
        pairs = zip(before.answers, after.answers, strict=True)
        samples += [sample(*pair) | {"run": str(run.folder)} for pair in pairs]
    told = json.loads(json.dumps(asdict(asked), default=str))
    write_report(
        asked.output,
        f"Learning and forgetting of {checkpoint}",
        rows,
        provenance([run.config.seed for run in taught], {"asked": told, "checkpoint": asdict(base)}),
        samples or [sample(each, each) for each in before.answers],
    )
    return rows


def _row(method: str, strength: str, before: Measured, after: Measured, **took) -> dict:
    measured = scores(before.answers), scores(after.answers)
    return result_row(method, strength, *measured, **took) | {"probes": compared_probes(before, after)}


def _check_taught_alike(taught: Sequence[Taught]) -> None:
    for run in taught:
        run.check_files()
        first = taught[0]
        if any(getattr(run.config, part) != getattr(first.config, part) for part in ("data", "lessons", "prompts")):
            raise ValueError(f"{run.folder} was taught other facts than {first.folder}: evaluate it apart")


def _check_runs(taught: Sequence[Taught], checkpoint: Path, model: nn.Module, tokenizer) -> None:
    """Refuse a run that does not fit before the first question."""
    fingerprint = checkpoint_fingerprint(model) if taught else ""
    for run in taught:
        run.check_checkpoint(checkpoint, fingerprint)
        if run.has_model:
            files.weight_files(run.folder / "model")
        else:
            with run.model(model, tokenizer):
                check_finite(model, run.folder)


def questions_of(asked: Evaluation, base: RunConfig, taught: RunConfig | None) -> list[Question]:
    """Known facts, where the checkpoint was told some, and what is new: the facts or the lessons of the runs.

    Raises:
        ValueError: settings of facts for runs that were taught lessons; or there is nothing to ask.
    """
    named = {key: getattr(asked, key) for key in ("facts", "wordings", "first_new", "num_new")}
    named = {key: value for key, value in named.items() if value is not None}
    if taught and taught.lessons.files:
        if named:
            option = next(iter(named)).replace("_", "-")
            raise ValueError(f"--{option}: the runs were taught lessons, and are asked those")
        new, taught_facts = [question for lesson in lessons_of(taught) for question in lesson.ask], ()
    else:
        data = asdict(getattr(taught or base, "data", DataConfig()))
        taught_facts = facts_of(**data).new if taught else ()
        learns = facts_of(**data | {"num_known": 0} | named)
        told_facts = taught or named or facts_told(base)
        new = new_questions(learns.new, learns.wordings) if told_facts else []
        if told_facts and not new and not asked.probes.any:
            raise ValueError("there is no new fact to ask about: --num-new is 0, or the facts file has none")
    # Of a checkpoint that was told no facts built-in ones are asked if their number is named.
    told_some = facts_told(base) or asked.num_known is not None
    known = questions_of_known(base, slice(asked.num_known) if told_some else slice(0), taught_facts)
    questions = known + new
    if not questions and not asked.probes.any:
        raise ValueError(f"there is nothing to ask {asked.checkpoint}, which was told no facts: name runs or --probes")
    return questions


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the one there is.

    Raises:
        ValueError: torch has no such device here.
    """
    if name is None:
        return best_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without it
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
