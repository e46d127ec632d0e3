"""The comparison job: several methods at several strengths, the same lessons, the same questions, over seeds.

A trial is one setting of one method on one set of facts or lessons: learn, then measure. What it learned and what was
measured come into its folder together, so an interrupted comparison goes on where it stopped; see
``memlayer.jobs.run_folder``. Strengths are chosen on validation facts and reported on test facts.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from memlayer.data.facts import facts_of
from memlayer.data.hub_sets import local_file
from memlayer.data.qa import Question
from memlayer.decoders import files
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.probes import Probed
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.qa import Answered
from memlayer.evaluation.report import write_report
from memlayer.evaluation.rows import CONTROL, NOTHING, forgetting_at_equal_learning, mean_rows, result_row, sample
from memlayer.evaluation.tables import format_at_equal_learning, format_probes, format_table
from memlayer.files import sha256_of, write_file
from memlayer.jobs import recipes
from memlayer.jobs.config import CompareRun, LearnRun, load_config
from memlayer.jobs.learn import inputs_of, learn
from memlayer.jobs.lessons import lessons_of, prompts_of
from memlayer.jobs.measure import Measured, Measurement, compared_probes, questions_of_known
from memlayer.jobs.run_folder import claimed, is_done, write_result
from memlayer.jobs.sections import ProbesConfig
from memlayer.jobs.taught import Learned, write_learned
from memlayer.jobs.workers import worker_processes

ANSWERS, PROBES, TRIALS = "answers.jsonl", "probes.json", "trials"
SEED = "{seed}"  # in the name of a checkpoint
NAMED = 5  # methods in a title


class TrialsFailed(ValueError):
    """Some trials could not be finished, as at too high a rate; all others that were asked for are done."""


@dataclass(frozen=True)
class Trial:
    """One setting to try.

    Attributes:
        method: its name in the table; CONTROL learns nothing.
        strength: what is varied, in words.
        config: the run; its ``output`` is the trial's folder.
        known: first and last of the known facts that are asked about.
        probes: what else to measure.
        control: folder of the trial that learned nothing, whose probes say what was known.
    """

    method: str
    strength: str
    config: LearnRun
    known: tuple[int, int]
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    control: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the trial is written."""
        return Path(self.config.output)


@dataclass
class Compared:
    """What a comparison found.

    Attributes:
        rows: of the report, of one seed each.
        samples: of the report: what the first method's chosen strength made of each question, or its strongest one.
    """

    rows: list[dict]
    samples: list[dict]

    @property
    def shown(self) -> list[dict]:
        """The rows as they are reported: their means, where there are several seeds."""
        return mean_rows(self.rows) if len({each["seed"] for each in self.rows}) > 1 else self.rows


def compare(config: CompareRun) -> None:
    """Run the trials that are not there yet, write the report, and print its tables.

    Raises:
        FileNotFoundError, ValueError: a checkpoint, a file or a setting does not fit, or a folder holds something
            else.
    """
    inputs = _inputs_of(config)
    with claimed(config, inputs) as done:
        if done:
            return
        found = run(config)
        named = ", ".join(config.methods) if len(config.methods) <= NAMED else f"{len(config.methods)} methods"
        title = f"{named} on {config.checkpoint}"
        came_from = provenance(_seeds(config), asdict(config))
        equal = forgetting_at_equal_learning(found.rows)

        def write(folder: Path) -> None:
            write_report(folder, title, found.shown, came_from, found.samples, equal, config.note)

        write_result(config.output, config, inputs, write)
    print(format_table(found.shown))
    print(format_probes(found.shown), end="")
    print(format_at_equal_learning(equal), end="")


def run(config: CompareRun) -> Compared:
    """Run the trials that are not there yet, and read all of them.

    Raises:
        FileNotFoundError, ValueError: as of ``compare``; what cannot be measured is refused before any trial is run.
        TrialsFailed: some trials of a seed; those of later seeds are run before.
    """
    found = Compared([], [])
    failed: list[str] = []
    for seed in _seeds(config):
        _check(config, seed)
    if config.note:
        print(config.note, flush=True)
    for seed in _seeds(config):
        try:
            rows, samples = _try_methods(config, seed)
        except TrialsFailed as error:
            failed.append(f"seed {seed}: {error}")
        else:
            found.rows += rows
            found.samples += [each | {"seed": seed} for each in samples]
    if failed:
        raise TrialsFailed("; ".join(failed))
    return found


def _seeds(config: CompareRun) -> range:
    return range(config.seed, config.seed + config.compare.seeds)


def _plans(config: CompareRun, seed: int) -> list[list[Trial]]:
    """The trials of a seed on validation facts, if any are to choose, and those on test facts."""
    kinds = (True, False) if config.compare.num_validation else (False,)
    return [trials(config, seed, validation) for validation in kinds]


def _check(config: CompareRun, seed: int) -> None:
    """Refuse what cannot be measured before anything is taught."""
    plans = [planned for planned in _plans(config, seed) if not all(map(trial_is_done, planned))]
    if plans:
        model, tokenizer = files.load(plans[0][0].config.checkpoint)
        for planned in plans:
            _measurement(planned[0], model, tokenizer)


def _try_methods(config: CompareRun, seed: int) -> tuple[list[dict], list[dict]]:
    """Every method on validation facts, then on test facts at chosen strengths or all; rows and samples of these."""
    *validation, test = _plans(config, seed)
    number = len(test) if config.compare.every_strength else 1 + len(config.methods)
    total = sum(map(len, validation)) + number
    with tqdm(total=total, desc=f"seed {seed}: teaching and asking", unit="trial") as bar:
        chosen: dict[str, str] = {}
        for planned in validation:
            before = _run_all(planned, config.compare.workers, bar)
            chosen = choose([row(trial, before) for trial in planned])
        if not config.compare.every_strength:
            test = [trial for trial in test if chosen[trial.method] == trial.strength]
        before = _run_all(test, config.compare.workers, bar)
    rows = [row(trial, before, chosen=chosen.get(trial.method) == trial.strength) for trial in test]
    first = [trial for trial in test if trial.method == next(iter(config.methods))]
    shown = next((trial for trial in first if chosen.get(trial.method) == trial.strength), first[-1])
    pairs = zip(before.answers, read_measured(shown.folder).answers, strict=True)
    return rows, [sample(*pair) for pair in pairs]


def _run_all(some: list[Trial], workers: int, bar: tqdm) -> Measured:
    """Run trials, of which the first changes nothing, and return what that measured."""
    first, *others = some
    if first.probes.known_only:
        run_trials([first], workers, progress=lambda trial: bar.update())
    else:
        others.insert(0, first)
    run_trials(others[::-1], workers, progress=lambda trial: bar.update())  # the longest ones first
    return read_measured(first.folder)


def trials(config: CompareRun, seed: int, validation: bool) -> list[Trial]:
    """The control, then every method at every strength, on the validation facts or lessons or on those of the seed.

    Raises:
        FileNotFoundError, ValueError: a method's config, or a setting of it.
    """
    told = config.compare
    first, number = told.first_test + (seed - config.seed) * told.num_test, told.num_test
    known = tuple(told.known_test)
    if validation:
        first, number, known = told.first_validation, told.num_validation, tuple(told.known_validation)
    folder = Path(config.output) / TRIALS / f"seed{seed}" / ("validation" if validation else "test")
    taught = {"data": replace(config.data, first_new=first, num_new=number), "lessons": config.lessons}
    if config.lessons.files:
        taught = {"data": config.data, "lessons": replace(config.lessons, first=first, number=number)}
    common = taught | {
        "checkpoint": config.checkpoint.replace(SEED, str(seed)),
        "seed": seed,
        "prompts": config.prompts,
    }
    planned: list[Trial] = []

    def plan(name: str, strength: str, run: LearnRun) -> None:
        output = str(folder / f"{name} {strength}".strip())
        run = replace(run, **common, trainer=run.trainer | {"disable_tqdm": True}, output=output)
        planned.append(Trial(name, strength, run, known, config.probes, folder / CONTROL))

    for name, method in config.methods.items():
        run = load_config(recipes.find(method.config, "learn"), method.settings)
        if not isinstance(run, LearnRun):
            raise ValueError(f"methods.{name}.config is {method.config}, of job {run.job}: name one of job learn")
        if not planned:
            plan(CONTROL, "", run)
        key = run.learn.strength
        short, wanted, other = "lr", "learning_rates", "strengths"
        if key != "learning_rate":
            short, wanted, other = key, "strengths", "learning_rates"
        if getattr(method, other):
            raise ValueError(f"methods.{name}.{other}: {run.learn.method} is varied in learn.{key}, by {wanted}")
        for value in getattr(method, wanted):
            plan(name, f"{short} {value:g}", replace(run, learn=replace(run.learn, **{key: value})))
    return planned


def _inputs_of(config: CompareRun) -> dict[str, str]:
    """Name and SHA-256 of what a comparison depends on: every method's settings, and what its trials start from."""
    named: dict[str, str] = {}
    for seed in _seeds(config):
        for planned in _plans(config, seed):
            named |= {f"{trial.method} {trial.strength}": _digest(trial.config.learn) for trial in planned}
            first = planned[0]
            named |= {f"{name} of {first.folder.parent}": digest for name, digest in _inputs(first).items()}
    return named


def run_trials(trials: Sequence[Trial], workers: int, progress: Callable[[Trial], object]) -> None:
    """Run what is not there yet, in ``workers`` processes of one thread, or one after the other in this one.

    A step on one fact is too small for two threads to help, so two trials side by side take half the time.

    Args:
        progress: called with each trial when its result is there.

    Raises:
        ValueError: a trial is to save checkpoints, or its folder holds something else; none is run then.
        TrialsFailed: some could not be finished; all others of these are run before.
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
    failed: list[str] = []

    def finish(trial: Trial, ended: Callable[[], None]) -> None:
        try:
            ended()
        except ValueError as error:
            failed.append(f"{trial.method} {trial.strength}: {error}")
        else:
            progress(trial)

    try:
        if workers == 1:
            for trial in missing:
                finish(trial, partial(run_trial, trial))
        elif missing:
            with worker_processes(workers, threads=1) as pool:
                running = {pool.submit(run_trial, trial): trial for trial in missing}
                for future in as_completed(running):
                    finish(running[future], future.result)
    except KeyboardInterrupt as stop:
        stop.add_note("stopped; the trials that are done stay, and the same command runs the others")
        raise
    if failed:
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise TrialsFailed(f"{failed[0]}{others}; the other trials of the {len(trials)} are done and stay")


def trial_is_done(trial: Trial) -> bool:
    """Whether the folder holds the answers of exactly this trial.

    Raises:
        ValueError: it holds those of another one.
    """
    # A folder that is not there needs no hash of the checkpoint.
    return trial.folder.is_dir() and is_done(trial.folder, trial.config, _inputs(trial))


def run_trial(trial: Trial) -> None:
    """Learn, measure, and write the outcome, unless that is done already."""
    inputs = _inputs(trial)
    with claimed(trial.config, inputs) as done:
        if done:
            return
        model, tokenizer = files.load(trial.config.checkpoint)
        measure = _measurement(trial, model, tokenizer)
        if trial.method == CONTROL:
            learned = Learned(trial.config, model, tokenizer, patch=None, **NOTHING)
        else:
            known_only = trial.probes.known_only
            measure.remember(model, read_measured(trial.control) if known_only else Measured([], []))
            del model
            learned = learn(trial.config)
        ask = learned.store and learned.store.ask
        measured = measure(learned.model, learned.tokenizer, trial.folder, trial.method == CONTROL, ask)

        def write(folder: Path) -> None:
            write_learned(learned, folder, with_model=False)
            write_measured(measured, folder)

        write_result(trial.folder, trial.config, inputs, write)


def _measurement(trial: Trial, model, tokenizer) -> Measurement:
    prompts, questions = prompts_of(trial.config.prompts), _questions(trial.config, trial.known)
    return Measurement(model, tokenizer, questions, trial.probes, prompts=prompts, disable_tqdm=True)


def _questions(config: LearnRun, known: tuple[int, int]) -> list[Question]:
    """The checkpoint's known facts ``known`` (first, last), and what the run teaches."""
    made = Path(config.checkpoint) / "config.yaml"
    base = load_config(made) if made.is_file() else None
    taught = () if config.lessons.files else facts_of(**asdict(config.data)).new
    new = [question for lesson in lessons_of(config) for question in lesson.ask]
    return questions_of_known(base, slice(*known), taught) + new


def _inputs(trial: Trial) -> dict[str, str]:
    """What a trial depends on, beside its config."""
    probes = trial.probes
    read = {f"probe {path}": sha256_of(local_file(path)) for path in (*probes.questions, *probes.texts)}
    measured = {"questions": _digest(_questions(trial.config, trial.known)), "probes": _digest(probes)}
    return inputs_of(trial.config) | read | measured


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8")).hexdigest()


def row(trial: Trial, before: Measured, chosen: bool = False) -> dict:
    """The trial's row of a report."""
    took = json.loads((trial.folder / "learned.json").read_text(encoding="utf-8"))
    after = read_measured(trial.folder)
    measured = result_row(
        trial.method,
        trial.strength,
        scores(before.answers),
        scores(after.answers),
        seed=trial.config.seed,
        costs=took,
        chosen=chosen and trial.method != CONTROL,  # the control has no strength to choose
    )
    return measured | {"probes": compared_probes(before, after)}


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


def write_measured(measured: Measured, folder: Path) -> None:
    """The answers, one JSON line each, and the probes."""
    lines = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in measured.answers)
    write_file(folder / ANSWERS, "".join(lines))
    write_file(folder / PROBES, json.dumps([asdict(each) for each in measured.probes]) + "\n")


def read_measured(folder: Path) -> Measured:
    """What ``write_measured`` wrote."""
    answered = []
    for line in (folder / ANSWERS).read_text(encoding="utf-8").split("\n")[:-1]:  # an answer may hold other line ends
        record = json.loads(line)
        question = record.pop("question")
        answered.append(Answered(Question(**question | {"answers": tuple(question["answers"])}), **record))
    probes = json.loads((folder / PROBES).read_text(encoding="utf-8"))
    return Measured(answered, [Probed(**each) for each in probes])
