"""Compare finetuning methods on the same facts and the same questions.

A trial is one setting of one method on one set of new facts: learn, then ask. What it learned and its answers come
into its folder together, so an interrupted comparison goes on where it stopped; see ``memlayer.jobs.run_folder``.
Strengths are chosen on validation facts and reported on test facts.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from memlayer.data.facts import facts_of
from memlayer.data.qa import Question, known_questions
from memlayer.decoders import files
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.qa import Answered, answer_questions
from memlayer.evaluation.report import CONTROL, result_row
from memlayer.files import write_file
from memlayer.jobs.config import RunConfig
from memlayer.jobs.learn import inputs_of, learn
from memlayer.jobs.lessons import lessons_of, prompts_of
from memlayer.jobs.run_folder import claimed, is_done, write_result
from memlayer.jobs.taught import Learned, write_learned
from memlayer.jobs.workers import worker_processes

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Trial:
    """One setting to try.

    Attributes:
        method: its name in the table; CONTROL learns nothing.
        strength: what is varied, in words.
        config: the run; its ``output`` is the trial's folder.
        known: first and last of the known facts that are asked about.
    """

    method: str
    strength: str
    config: RunConfig
    known: tuple[int, int]

    @property
    def folder(self) -> Path:
        """Where the trial is written."""
        return Path(self.config.output)


def ask(
    model, tokenizer, config: RunConfig, known: tuple[int, int], progress: Callable | None = None
) -> list[Answered]:
    """Ask about known facts ``known`` (first, last) and the config's new facts."""
    prompts = prompts_of(config.prompts)
    questions = [prompts.apply(question, tokenizer) for question in _questions(config, known)]
    return answer_questions(model, tokenizer, questions, progress=progress)


def _questions(config: RunConfig, known: tuple[int, int]) -> list[Question]:
    facts = facts_of(**asdict(config.data))
    new = [question for lesson in lessons_of(config) for question in lesson.ask]
    return known_questions(facts.known[slice(*known)], facts.wordings) + new


def run_trials(trials: Sequence[Trial], workers: int, progress: Callable[[Trial], object]) -> None:
    """Run what is not there yet, ``workers`` processes of one thread at a time.

    A step on one fact is too small for two threads to help, so two trials side by side take half the time.

    Args:
        progress: called with each trial when its result is there.

    Raises:
        ValueError: a trial is to save checkpoints, or its folder holds something else; none is run then.
    """
    for trial in trials:
        if trial.config.trainer.get("save_strategy", "no") not in ("no", False):
            raise ValueError(
                f"trainer.save_strategy is {trial.config.trainer['save_strategy']!r}: a trial of a comparison is "
                "timed from its first step, so one that was interrupted starts again"
            )
    missing = [trial for trial in trials if not trial_is_done(trial)]
    for trial in trials:
        if trial not in missing:
            progress(trial)
    if not missing:
        return
    try:
        with worker_processes(workers, threads=1) as pool:
            running = {pool.submit(run_trial, trial): trial for trial in missing}
            for future in as_completed(running):
                future.result()
                progress(running[future])
    except KeyboardInterrupt as stop:
        stop.add_note("stopped; the trials that are done stay, and the same command runs the others")
        raise


def trial_is_done(trial: Trial) -> bool:
    """Whether the folder holds the answers of exactly this trial.

    Raises:
        ValueError: it holds those of another one.
    """
    # A folder that is not there needs no hash of the checkpoint.
    return trial.folder.is_dir() and is_done(trial.folder, trial.config, _inputs(trial))


def run_trial(trial: Trial) -> None:
    """Learn, ask, and write the outcome, unless that is done already."""
    inputs = _inputs(trial)
    with claimed(trial.config, inputs) as done:
        if done:
            return
        if trial.method == CONTROL:
            nothing = {"patch": None, "seconds": 0.0, "steps": 0, "resumed_at": 0, "parameters_changed": 0}
            learned = Learned(trial.config, *files.load(trial.config.checkpoint), **nothing)
        else:
            learned = learn(trial.config)
        answers = ask(learned.model, learned.tokenizer, trial.config, trial.known)

        def write(folder: Path) -> None:
            write_learned(learned, folder, with_model=False)
            write_answers(answers, folder)

        write_result(trial.folder, trial.config, inputs, write)


def _inputs(trial: Trial) -> Mapping[str, str]:
    questions = repr(_questions(trial.config, trial.known))
    return inputs_of(trial.config) | {"questions": hashlib.sha256(questions.encode("utf-8")).hexdigest()}


def row(trial: Trial, before: Iterable[Answered], chosen: bool = False) -> dict:
    """The trial's row of a report."""
    took = json.loads((trial.folder / "learned.json").read_text(encoding="utf-8"))
    return result_row(
        trial.method,
        trial.strength,
        scores(before),
        scores(read_answers(trial.folder)),
        seed=trial.config.seed,
        seconds=took["seconds"],
        parameters_changed=took["parameters_changed"],
        chosen=chosen and trial.method != CONTROL,  # the control has no strength to choose
    )


def choose(rows: Sequence[dict]) -> dict[str, str]:
    """The strength of each method that learned most on validation facts (unseen wording), then forgot least."""
    best: dict[str, dict] = {}
    for candidate in rows:
        method = candidate["method"]
        if method not in best or _merit(candidate) > _merit(best[method]):
            best[method] = candidate
    return {method: candidate["strength"] for method, candidate in best.items()}


def _merit(candidate: dict) -> tuple[float, float]:
    return candidate["learning_unseen"], candidate["known_seen_after"]


def write_answers(answered: Iterable[Answered], folder: Path) -> None:
    """One JSON line an answer."""
    lines = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in answered)
    write_file(folder / ANSWERS, "".join(lines))


def read_answers(folder: Path) -> list[Answered]:
    """What ``write_answers`` wrote."""
    answered = []
    for line in (folder / ANSWERS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = record.pop("question")
        answered.append(Answered(Question(**question | {"answers": tuple(question["answers"])}), **record))
    return answered
