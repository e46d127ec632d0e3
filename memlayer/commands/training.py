"""Run one job as a config says: what train.py does, and ``memlayer`` with the name of a job.

One command line serves both. ``memlayer JOB`` finds a recipe by its name, has the settings of that job alone in its
help, and refuses a config of another job.
"""

import argparse
import re
import sys

from accelerate import PartialState

from memlayer import __version__
from memlayer.jobs import recipes
from memlayer.jobs.augment import augment
from memlayer.jobs.compare import compare
from memlayer.jobs.compare_pretraining import compare_pretraining
from memlayer.jobs.config import ANY_RUN, RunConfig, load_config, to_yaml
from memlayer.jobs.config_help import describe_settings
from memlayer.jobs.learn import learn_into_output
from memlayer.jobs.pretrain import pretrain
from memlayer.jobs.pretrain_text import pretrain_text
from memlayer.jobs.retrofit import retrofit
from memlayer.jobs.run_folder import is_finished
from memlayer.jobs.typed import names
from memlayer.refusals import refusals

NOT_HEALED = 3
SETTING = re.compile(r"[A-Za-z_][\w.]*=")
AFTER_RUN = """Any setting can be given as section.key=value. --print-config shows the resolved configuration and stops.
Exit status: 0 done, 1 refused, 2 a wrong command line, 3 retrofitted and written but not healed, 130 or 143 stopped."""


def train(config: RunConfig, program: str) -> int:
    """Train a memory model from nothing."""
    pretrain(config)
    return 0


def train_on_text(config: RunConfig, program: str) -> int:
    """Train a memory model from nothing on text."""
    pretrain_text(config)
    return 0


def weigh(config: RunConfig, program: str) -> int:
    """Train a memory model and its controls on the same text, and report what the memory earned."""
    compare_pretraining(config)
    return 0


def heal(config: RunConfig, program: str) -> int:
    """Retrofit memory into a pretrained model, and say whether it healed."""
    retrofitted = retrofit(config)
    if PartialState().is_main_process:
        print(f"{program}: {retrofitted.results['verdict']}", file=sys.stderr)
    return 0 if retrofitted.healed else NOT_HEALED


def write(config: RunConfig, program: str) -> int:
    """Let a language model write study texts about lessons."""
    augment(config)
    return 0


def teach(config: RunConfig, program: str) -> int:
    """Teach new facts and write what changed."""
    learn_into_output(config)
    return 0


def contest(config: RunConfig, program: str) -> int:
    """Teach the same by several methods, and report what each learned and forgot."""
    compare(config)
    return 0


JOBS = {
    "pretrain": train,
    "pretrain_text": train_on_text,
    "compare_pretraining": weigh,
    "retrofit": heal,
    "augment": write,
    "learn": teach,
    "compare": contest,
}


def main(program: str, description: str, words: list[str], job: str | None = None) -> None:
    """Run the job of a config, or only the given one; ends the process with its exit status.

    Args:
        program: how the user called this, which opens what is refused.
        description: what ``--help`` says first.
        words: the command line behind the program.

    Raises:
        SystemExit: with the exit status.
    """
    if job and job in recipes.recipes() and not names_config(words):
        words = [job, *words]
    arguments = parse(program, description, words, job)
    with refusals(program):
        config = load_config(recipes.find(arguments.config, job), arguments.overrides)
        if job not in (None, config.job):
            raise ValueError(f"{arguments.config} is of job {config.job}: run it by memlayer {config.job}")
        if arguments.print_config:
            print(to_yaml(config), end="")
            return
        finished = is_finished(config.output)
        status = JOBS[config.job](config, program)
    if PartialState().is_main_process:
        print(f"{config.output} holds this result already" if finished else f"wrote {config.output}")
    PartialState().destroy_process_group()  # left to the end of the process, its threads sometimes abort it
    sys.exit(status)


def main_of_job(job: str, words: list[str]) -> None:
    """``memlayer JOB``; see ``main``."""
    example = (recipes.of_job(job) or ["my.yaml"])[0]
    description = "\n\n".join(
        [
            JOBS[job].__doc__,
            f"    memlayer {job} {example.removeprefix(f'{job}_')} output=runs/mine\n    memlayer {job} my.yaml",
            f"recipes (memlayer recipe NAME prints one):\n{recipes.listed(job)}".rstrip(),
            AFTER_RUN,
        ]
    )
    main(f"memlayer {job}", description, words, job)


def names_config(words: list[str]) -> bool:
    """Whether the words name a config, which comes before all settings."""
    first = next((word for word in words if not word.startswith("-") or word in ("-h", "--help")), "")
    return bool(first) and not SETTING.match(first)


def parse(program: str, description: str, words: list[str], job: str | None) -> argparse.Namespace:
    """The command line; options and overrides may come in any order."""
    metavar = "RECIPE" if job else "CONFIG"
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} {metavar} [section.key=value ...] [--print-config]",
        description=description,
        epilog=f"settings and their defaults:\n\n{describe_settings(job)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    meaning = "a recipe by name, or a YAML file of yours" if job else "YAML file, see configs/; or a recipe by its name"
    parser.add_argument("config", nargs="?", metavar=metavar, help=meaning)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    parser.add_argument("--version", action="version", version=f"memlayer {__version__}")
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        parser.error(as_setting(unknown[0], words))
    if arguments.config is None or (job and SETTING.match(arguments.config)):
        some = f"one of {', '.join(recipes.of_job(job))}" if job else "train.py configs/pretrain.yaml"
        parser.error(f"no {metavar} is named; try {some}, or --help for all settings")
    return arguments


def as_setting(option: str, words: list[str]) -> str:
    """What to write in place of an option that there is not."""
    name, equals, value = option.lstrip("-").partition("=")
    following = words[words.index(option) + 1 :] if option in words and not equals else []
    value = value or (following[0] if following else "VALUE")
    meant = [each for each in dict.fromkeys(names(ANY_RUN)) if each.split(".")[-1] == name.replace("-", "_")]
    if not meant:
        return f"there is no option {option}; settings are written without dashes, as section.key={value}: see --help"
    write = " or ".join(f"{each}={value}" for each in meant)
    return f"there is no option {option}; settings are written without dashes: {write}"
