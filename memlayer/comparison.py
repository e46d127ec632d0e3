"""Compare finetuning methods on the same facts and the same questions.

A trial is one setting of one method on one set of new facts: learn, then ask. It is written to a folder
with all that it depends on and read back from there when that is the same, so an interrupted
comparison goes on where it stopped. Strengths are chosen on validation facts and reported on test facts.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from memlayer import modeling
from memlayer.config import RunConfig, to_yaml
from memlayer.data.qa import Question, known_questions, new_questions
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.qa import Answered, answer_questions
from memlayer.evaluation.report import CONTROL, result_row
from memlayer.recipes import Learned, facts_of, learn, save_learned

ANSWERS, TOLD = "answers.jsonl", "trial.yaml"


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
    facts = facts_of(config)
    questions = known_questions(facts.known[slice(*known)], facts.wordings)
    questions += new_questions(facts.new, facts.wordings)
    return answer_questions(model, tokenizer, questions, progress=progress)


def run_trials(trials: Sequence[Trial], workers: int, progress: Callable[[Trial], object]) -> None:
    """Run what is not there yet, ``workers`` processes of one thread at a time.

    A step on one fact is too small for two threads to help, so two trials side by side take half the time.

    Args:
        progress: called with each trial when its result is there.

    Raises:
        ValueError: a trial is to save checkpoints.
    """
    for trial in trials:
        if trial.config.trainer.get("save_strategy", "no") not in ("no", False):
            raise ValueError(
                f"trainer.save_strategy is {trial.config.trainer['save_strategy']!r}: a trial of a comparison is "
                "timed from its first step, so one that was interrupted starts again"
            )
    missing = [trial for trial in trials if not is_done(trial)]
    for trial in trials:
        if trial not in missing:
            progress(trial)
    if not missing:
        return
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), **one_thread) as pool:
        running = {pool.submit(run_trial, trial): trial for trial in missing}
        for future in as_completed(running):
            future.result()
            progress(running[future])


def is_done(trial: Trial) -> bool:
    """Whether the folder holds the answers of exactly this trial."""
    told = trial.folder / TOLD
    return (trial.folder / ANSWERS).is_file() and told.is_file() and told.read_text(encoding="utf-8") == _told(trial)


def _told(trial: Trial) -> str:
    """All that a trial's answers depend on: its config, the questions, and how its checkpoint was made."""
    base = Path(trial.config.checkpoint) / "config.yaml"
    made = base.read_text(encoding="utf-8") if base.is_file() else ""
    return f"{to_yaml(trial.config)}---\nknown: {list(trial.known)}\n---\n{made}"


def run_trial(trial: Trial) -> None:
    """Learn, ask, and write the outcome; the answers go last and mark the trial as done."""
    (trial.folder / ANSWERS).unlink(missing_ok=True)
    if trial.method == CONTROL:
        nothing = {"patch": None, "seconds": 0.0, "steps": 0, "resumed_at": 0, "parameters_changed": 0, "sha256": {}}
        learned = Learned(trial.config, *modeling.load(trial.config.checkpoint), **nothing)
    else:
        learned = learn(trial.config)
    save_learned(learned, trial.folder, with_model=False)
    (trial.folder / TOLD).write_text(_told(trial), encoding="utf-8")
    write_answers(ask(learned.model, learned.tokenizer, trial.config, trial.known), trial.folder)


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
    """One JSON line an answer, moved into place when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{ANSWERS}"
    lines = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in answered)
    beside.write_text("".join(lines), encoding="utf-8")
    beside.replace(folder / ANSWERS)


def read_answers(folder: Path) -> list[Answered]:
    """What ``write_answers`` wrote."""
    answered = []
    for line in (folder / ANSWERS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = record.pop("question")
        answered.append(Answered(Question(**question | {"answers": tuple(question["answers"])}), **record))
    return answered
